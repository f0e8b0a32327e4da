"""The client against a server that fails: nothing lost, nothing asked twice, nothing given away.

Each test has a short form that always runs and, where that says more, a long one marked slow.
"""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from alpagasus2.core.files import UserError
from alpagasus2.endpoint.batch_api import Batches
from alpagasus2.endpoint.cache import Reply, Request
from alpagasus2.endpoint.client import Endpoint, EndpointConfig

SERVER = Path(__file__).with_name("faulty_server.py")
KEY = "sk-test-1234567890abcdef"


@contextmanager
def serving(**options: Any) -> Iterator[str]:
    """Start the server; its address."""
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    server = subprocess.Popen([sys.executable, SERVER, *words], stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def read(address: str, route: str = "stats") -> dict:
    with urlopen(f"{address}/{route}") as answer:
        return json.load(answer)


def command(*words: object, cwd: Path, **environ: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")} | environ
    return subprocess.Popen(
        [sys.executable, "-m", "alpagasus2", *map(str, words)], cwd=cwd, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(*words: object, cwd: Path, **environ: str) -> tuple[int, str]:
    """Run a command; its status and all that it said."""
    process = command(*words, cwd=cwd, **environ)
    said, _ = process.communicate(timeout=900)
    return process.returncode, said


def write_rows(folder: Path, n: int) -> Path:
    rows = [
        {"id": f"r{i}", "instruction": f"Name {i} things.", "input": "", "output": "One. " * 20}
        for i in range(n)
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def rate(address: str, folder: Path, *words: object) -> list:
    return [
        "rate", "--data", folder / "rows.json", "--output", folder / "ratings.jsonl",
        "--model", "judge", "--base_url", f"{address}/v1", *words,
    ]  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def committed(cache: Path) -> set[str]:
    """Hashes of the requests whose replies a killed run had committed."""
    if not cache.exists():
        return set()
    with closing(sqlite3.connect(cache)) as db:
        try:
            found = db.execute("SELECT raw FROM replies").fetchall()
        except sqlite3.OperationalError:  # killed before the table was made
            return set()
    return {re.search(r"chatcmpl-(\w+)", raw)[1] for (raw,) in found}


FAULTS = {"p429": 0.1, "p500": 0.05, "phang": 0.01, "preset": 0.01, "phalf": 0.01}


@pytest.mark.parametrize("n", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_row_is_rated_once_whatever_fails(tmp_path, n):
    write_rows(tmp_path, n)
    with serving(latency=0.02, pmalformed=0.005, pduplicate=0.01, **FAULTS) as address:
        words = rate(address, tmp_path, "--workers", 32, "--timeout", 5)
        status, said = run(*words, cwd=tmp_path)
        counts = read(address)
    assert status == 0, said
    rated = lines(tmp_path / "ratings.jsonl")
    assert sorted(x["id"] for x in rated) == sorted(f"r{i}" for i in range(n))
    assert {x["status"] for x in rated} == {"ok"}
    assert counts["requests"] <= 1.25 * n, counts
    cost = json.loads((tmp_path / "manifest.json").read_text())["outputs"]["ratings.jsonl"]["cost"]
    assert cost["calls"] == n and cost["usd"] == 0.0  # a model on this machine


@pytest.mark.parametrize(
    ("n", "kills"), [(1000, 3), pytest.param(4000, 20, marks=pytest.mark.slow)]
)
def test_a_kill_loses_no_reply(tmp_path, n, kills):
    workers, dice = 8, random.Random(n)
    write_rows(tmp_path, n)
    seen: list[tuple[set[str], dict]] = []
    with serving(latency=0.03) as address:
        words = rate(address, tmp_path, "--workers", workers)
        for _ in range(kills):
            before = read(address)["requests"]
            process = command(*words, cwd=tmp_path)
            while read(address)["requests"] == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.8))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it had finished before it was killed"
            process.stdout.close()
            time.sleep(0.1)  # what was in flight is answered, to nobody
            seen.append((committed(tmp_path / "cache.sqlite"), read(address, "hashes")))
        status, said = run(*words, cwd=tmp_path)
        assert status == 0, said
        counts, hashes = read(address), read(address, "hashes")
    assert len(lines(tmp_path / "ratings.jsonl")) == n
    for kept, then in seen:
        again = [h for h in kept if hashes[h][0] > then[h][0]]
        assert not again, f"{len(again)} committed replies were asked for again"
    assert len(seen[-1][0]) > len(seen[0][0]) > 0
    assert counts["contents"] == n
    assert counts["requests"] - n <= kills * workers, counts


def test_a_killed_retry_pays_once(tmp_path):
    n, workers = 120, 4
    write_rows(tmp_path, n)
    with serving(latency=0.05, reply="A fine answer.") as address:
        words = rate(address, tmp_path, "--workers", workers)
        assert run(*words, cwd=tmp_path)[0] == 0
        assert {x["status"] for x in lines(tmp_path / "ratings.jsonl")} == {"unparsed"}
        process = command(*words, "--retry", "true", cwd=tmp_path)
        while read(address)["requests"] < n + n // 2 and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had finished before it was killed"
        process.stdout.close()
        assert run(*words, "--retry", "true", cwd=tmp_path)[0] == 0
        asked = read(address)["requests"]
        assert 2 * n <= asked <= 2 * n + workers, asked  # what was in flight is asked again
        assert run(*words, "--retry", "true", cwd=tmp_path)[0] == 0  # another wish, another price
        assert read(address)["requests"] == asked + n


def test_two_processes_share_a_cache_and_the_work(tmp_path):
    n = 600
    write_rows(tmp_path, n)
    with serving(latency=0.05) as address:
        words = rate(address, tmp_path, "--workers", 8)
        other = [str(w).replace("ratings.jsonl", "others.jsonl") for w in words]
        both = [command(*w, cwd=tmp_path) for w in (words, other)]
        said = [p.communicate(timeout=300)[0] for p in both]
        counts = read(address)
    assert [p.returncode for p in both] == [0, 0], said
    assert len(lines(tmp_path / "ratings.jsonl")) == len(lines(tmp_path / "others.jsonl")) == n
    assert counts["requests"] == n, counts  # not one was paid for twice
    assert not any("locked" in text for text in said)


@pytest.mark.parametrize("n", [400, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("limit", [{"rpm": 3000}, {"tpm": 1_200_000}])
def test_the_endpoints_limit_is_used_and_kept(tmp_path, n, limit):
    write_rows(tmp_path, n)
    with serving(latency=0.05, window=3, **limit) as address:
        status, said = run(*rate(address, tmp_path, "--workers", 32), cwd=tmp_path)
        counts = read(address)
    assert status == 0, said
    assert counts["statuses"].get("429", 0) < 0.01 * n, counts
    least = 0.95 if n > 1000 else 0.4  # a short run on a busy machine starts slowly
    assert counts["used"] > least, counts


def test_a_limit_of_the_users_own(tmp_path):
    write_rows(tmp_path, 40)
    with serving() as address:
        started = time.monotonic()
        words = rate(address, tmp_path, "--workers", 32, "--requests_per_minute", 600)
        status, said = run(*words, cwd=tmp_path)
    assert status == 0, said
    assert time.monotonic() - started > 2.9  # ten at once, then ten a second


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ("401", "refuses the key in OPENAI_API_KEY"),
        ("403", "Country not supported"),
        ("404", "The model `judge` does not exist"),
        ("quota", "has no money left"),
        ("html", "does the address lack its /v1?"),
    ],
)
def test_what_meets_every_call_stops_the_run_at_once(tmp_path, refusal, says):
    write_rows(tmp_path, 50)
    with serving(permanent=refusal, echo_key=1) as address:
        status, said = run(*rate(address, tmp_path), cwd=tmp_path, OPENAI_API_KEY=KEY)
        asked = read(address)["requests"]
    assert status == 2 and says in said.splitlines()[-1], said
    assert said.count("alpagasus2: ") == 1 and "Traceback" not in said
    assert asked == (3 if refusal in ("403", "html") else 1)  # one of these may be of one row
    assert KEY not in said


def test_one_long_row_does_not_stop_the_others(tmp_path):
    path = write_rows(tmp_path, 20)
    rows = json.loads(path.read_text())
    rows[3]["output"] = "[over-long]"
    path.write_text(json.dumps(rows))
    with serving() as address:
        for _ in range(2):  # also when it is all that is left
            status, said = run(*rate(address, tmp_path), cwd=tmp_path)
            assert status == 2 and "1 of 20 got no answer" in said.splitlines()[-1], said
        asked = read(address)["requests"]
    status = {x["id"]: (x["status"], x["review"]) for x in lines(tmp_path / "ratings.jsonl")}
    assert status["r3"][0] == "error" and "context length" in status["r3"][1]
    assert sum(s == "ok" for s, _ in status.values()) == 19
    assert asked == 21  # the refused one is tried again by the second run


def test_a_secret_is_kept_nowhere(tmp_path):
    write_rows(tmp_path, 60)
    with serving(echo_key=1, p500=0.2) as address:
        words = rate(address, tmp_path)
        secret = {"OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"}
        status, said = run(*words, cwd=tmp_path, **secret)
    assert status == 0, said
    assert "Sending HTTP Request" in said, "the openai client's own log was on"
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY not in said and KEY.encode() not in kept
    assert b"as good as ***" in kept  # the server had repeated the key in each answer
    status, said = run(*rate("http://me:" + KEY + "@x", tmp_path), cwd=tmp_path)
    assert status == 2 and KEY not in said and "OPENAI_API_KEY" in said


def test_money(tmp_path):
    write_rows(tmp_path, 100)
    prices = tmp_path / "prices.json"
    prices.write_text('{"judge": {"price_in": 100, "price_out": 200}}')
    with serving() as address:
        words = rate(address, tmp_path, "--workers", 4, "--prices", prices)
        status, said = run(*words, "--dry_run", cwd=tmp_path)
        assert status == 0 and "100 calls" in said and "about $" in said, said
        assert read(address)["requests"] == 0
        status, said = run(*words, "--max_cost", 1.0, cwd=tmp_path)
        assert status == 2 and "max_cost of $1.00 reached" in said.splitlines()[-1], said
        entry = json.loads((tmp_path / "manifest.json").read_text())["outputs"]["ratings.jsonl"]
        assert entry["ended"] is None and 0.85 < entry["cost"]["usd"] <= 1.0
        asked = read(address)["requests"]
        status, said = run(*words, "--max_cost", 1.0, cwd=tmp_path)  # the money is spent
        assert status == 2 and read(address)["requests"] == asked, said
        status, said = run(*words, "--max_cost", 50, cwd=tmp_path)
        assert status == 0 and read(address)["requests"] == 100, said
        assert "spent" in said
    entry = json.loads((tmp_path / "manifest.json").read_text())["outputs"]["ratings.jsonl"]
    paid = sum(x["usage"]["usd"] for x in lines(tmp_path / "ratings.jsonl"))
    assert entry["ended"] and entry["cost"]["usd"] == pytest.approx(paid)
    status, said = run(*rate("https://example.com", tmp_path, "--max_cost", 1), cwd=tmp_path,
                       OPENAI_API_KEY=KEY)  # fmt: skip
    assert status == 2 and "price of judge is not known" in said


def test_a_damaged_cache_is_set_aside(tmp_path):
    write_rows(tmp_path, 40)
    with serving() as address:
        assert run(*rate(address, tmp_path), cwd=tmp_path)[0] == 0
        cache = tmp_path / "cache.sqlite"
        os.truncate(cache, cache.stat().st_size // 2)
        (tmp_path / "ratings.jsonl").unlink()
        status, said = run(*rate(address, tmp_path), cwd=tmp_path)
        assert status == 0 and "was damaged" in said, said
        assert read(address)["requests"] <= 80
    assert len(lines(tmp_path / "ratings.jsonl")) == 40


def test_ratings_are_rebuilt_without_a_call(tmp_path):
    write_rows(tmp_path, 30)
    with serving(p500=0.1) as address:
        words = rate(address, tmp_path, "--votes", 2, "--temperature", 0.7)
        assert run(*words, cwd=tmp_path)[0] == 0
        asked, first = read(address)["requests"], lines(tmp_path / "ratings.jsonl")
        (tmp_path / "ratings.jsonl").unlink()
        status, said = run(*words, cwd=tmp_path)
        assert status == 0 and read(address)["requests"] == asked, said
        assert "nothing to pay" in said
    again = lines(tmp_path / "ratings.jsonl")
    assert len(again) == 60

    def scores(rows: list[dict]) -> list:
        return sorted((x["id"], x["vote"], x["score"]) for x in rows)

    assert scores(again) == scores(first)


def write_answers(folder: Path, n: int) -> None:
    answers = [
        {"id": f"q{i}", "test_set": "t", "category": None, "instruction": f"Why {i}?", "input": "",
         "model": m, "replicate": 0, "response": f"{m} says so {i}."}
        for i in range(n) for m in ("best", "base", "random")
    ]  # fmt: skip
    (folder / "responses.jsonl").write_text("\n".join(map(json.dumps, answers)))


def judge(address: str, folder: Path) -> list:
    return [
        "judge", "--responses", folder / "responses.jsonl", "--output",
        folder / "judgments.jsonl", "--model", "judge", "--base_url", f"{address}/v1",
    ]  # fmt: skip


def test_several_arms_and_the_canaries_in_one_command(tmp_path):
    write_answers(tmp_path, 6)
    with serving() as address:
        words = judge(address, tmp_path)
        status, said = run(*words, "--model_a", "best", "--model_b", "base", cwd=tmp_path)
        assert status == 0, said
        assert len(lines(tmp_path / "judgments.jsonl")) == 12
        status, said = run(*words, cwd=tmp_path)  # all pairs of arms
        assert status == 0, said
    judged = lines(tmp_path / "judgments.jsonl")
    pairs = {(x["model_a"], x["model_b"]) for x in judged}
    assert pairs == {("best", "base"), ("best", "random"), ("base", "random")}
    assert len(judged) == 3 * 6 * 2
    known = lines(tmp_path / "canaries.jsonl")
    assert {x["model_a"] for x in known} == {"gold", "null", "itself", "padded"}
    words = ["report", "--judgments", tmp_path / "judgments.jsonl", "--output", tmp_path / "out"]
    status, said = run(*words, "--model_a", "best", cwd=tmp_path)
    assert status == 0, said
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["canaries"]) == {"gold_right", "null_wins", "itself_tied", "padded_wins"}


def test_batches_behind_the_same_command(tmp_path):
    write_rows(tmp_path, 30)
    with serving(p500=0.1) as address:
        words = rate(address, tmp_path, "--price_in", 2, "--price_out", 2)
        status, said = run(*words, "--batch", cwd=tmp_path)
        assert status == 0, said
        counts = read(address)
        assert counts["batches"] >= 1 and counts["answered_twice"] == 0
        (tmp_path / "ratings.jsonl").unlink()
        assert run(*words, cwd=tmp_path)[0] == 0  # without batches, from the same cache
        assert read(address)["requests"] == counts["requests"]
    assert {x["status"] for x in lines(tmp_path / "ratings.jsonl")} == {"ok"}


def test_a_prompt_of_ones_own_and_a_rater_without_opinion(tmp_path):
    write_rows(tmp_path, 20)
    (tmp_path / "mine.txt").write_text("From 1 to 10, how good is {response} for {instruction}?")
    with serving(reply="Score: 8") as address:
        words = rate(address, tmp_path, "--prompt", "mine.txt", "--low", 1, "--high", 10)
        status, said = run(*words, cwd=tmp_path)
        assert status == 0 and "100% of the scores are 8" in said, said
        status, said = run(*rate(address, tmp_path), cwd=tmp_path)  # AlpaGasus's prompt
        assert status == 2 and "prompt was 'own-" in said, said
    assert {x["score"] for x in lines(tmp_path / "ratings.jsonl")} == {8.0}


def test_answers_of_a_server(tmp_path):
    with serving(p500=0.1) as address:
        words = [
            "generate", "--questions", "sample_questions", "--limit", 10, "--output",
            "responses.jsonl", "--base_model", "m", "--base_url", f"{address}/v1",
            "--price_in", 1, "--price_out", 2,
        ]  # fmt: skip
        status, said = run(*words, "--dry_run", cwd=tmp_path)
        assert status == 0 and "10 calls" in said and "about $" in said, said
        assert read(address)["requests"] == 0
        status, said = run(*words, cwd=tmp_path)
        assert status == 0 and "10 answers" in said, said
    answers = lines(tmp_path / "responses.jsonl")
    assert len(answers) == 10 and all(x["response"] for x in answers)
    entry = json.loads((tmp_path / "manifest.json").read_text())["outputs"]["responses.jsonl"]
    assert entry["cost"]["usd"] == pytest.approx(sum(x["usage"]["usd"] for x in answers), abs=1e-6)


def test_a_model_that_thinks_needs_no_more_than_its_name(tmp_path):
    write_rows(tmp_path, 12)
    prices = ("--price_in", 1, "--price_out", 100)
    with serving(thinks=300) as address:
        status, said = run(*rate(address, tmp_path, *prices), cwd=tmp_path)
        assert status == 0, said
        for field in ("temperature", "max_tokens"):
            assert said.count(f"takes no {field}, so") == 1, said
        asked = read(address)["requests"]
        assert asked == 12 + 2  # the two refusals
        rated = lines(tmp_path / "ratings.jsonl")
        assert {x["status"] for x in rated} == {"ok"}
        assert {x["usage"]["reasoning_tokens"] for x in rated} == {300}
        assert all(x["usage"]["usd"] > 0.03 for x in rated)  # thoughts are paid for
        (tmp_path / "ratings.jsonl").unlink()
        status, said = run(*rate(address, tmp_path, *prices), cwd=tmp_path)
        assert status == 0 and "takes no" not in said and read(address)["requests"] == asked, said
        small = rate(address, tmp_path, "--max_tokens", 100, "--output", tmp_path / "small.jsonl")
        status, said = run(*small, cwd=tmp_path)
        assert "12 replies were cut off before their answer: give a larger --max_tokens" in said
        assert {x["status"] for x in lines(tmp_path / "small.jsonl")} == {"length"}
        write_answers(tmp_path, 3)
        status, said = run(*judge(address, tmp_path), cwd=tmp_path)
        assert status == 0, said
        assert {x["status"] for x in lines(tmp_path / "judgments.jsonl")} == {"ok"}


WORKER = """
import sys
from alpagasus2.endpoint import cache
from alpagasus2.endpoint.cache import Request
from alpagasus2.endpoint.client import Endpoint, EndpointConfig
from alpagasus2.core.files import UserError
from alpagasus2.core.run_folder import Journal
cache.LEASE = 3.0  # seconds: what a kill leaves behind is free sooner
address, folder, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
endpoint = Endpoint("m", address, f"{folder}/cache.sqlite", EndpointConfig(workers=4))
asked = [Request([{"role": "user", "content": f"row {i}"}]) for i in range(n)]
for i, reply in endpoint.complete(asked):
    while True:
        try:
            with Journal(f"{folder}/lines.jsonl") as journal:
                if not journal.get({"id": str(i)}):
                    journal.append({"id": str(i), "text": reply.text})
                break
        except UserError:
            pass
"""


@pytest.mark.parametrize(("n", "kills"), [(60, 3), pytest.param(600, 30, marks=pytest.mark.slow)])
def test_six_processes_with_kills_on_one_cache_and_one_journal(tmp_path, n, kills):
    dice = random.Random(n)

    def begin() -> subprocess.Popen:
        words = [sys.executable, "-c", WORKER, f"{address}/v1", str(tmp_path), str(n)]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    with serving(latency=0.05) as address:
        six = [begin() for _ in range(6)]
        while not read(address)["requests"]:
            time.sleep(0.02)
        for _ in range(kills):
            time.sleep(dice.uniform(0.1, 0.4))
            k = dice.randrange(6)
            six[k].kill()
            six[k].communicate()
            six[k] = begin()
        said = [p.communicate(timeout=300)[1] for p in six]
        counts, hashes = read(address), read(address, "hashes")
    assert [p.returncode for p in six] == [0] * 6, said
    kept = lines(tmp_path / "lines.jsonl")
    assert sorted(int(x["id"]) for x in kept) == list(range(n)), "a line is lost, or there twice"
    twice = sum(answered - 1 for _, answered in hashes.values())
    assert twice <= kills * 4, "more than what was in flight at the kills was asked again"
    assert counts["contents"] == n


@pytest.mark.parametrize(("n", "kills"), [(300, 2), pytest.param(3000, 8, marks=pytest.mark.slow)])
def test_kills_do_not_break_the_cap(tmp_path, n, kills):
    workers, cap = 8, n / 100
    write_rows(tmp_path, n)
    dice = random.Random(n)
    with serving(latency=0.05, p429=0.03, p500=0.03, reply="4.5\nIt is right.") as address:
        prices = ("--price_in", 100, "--price_out", 100, "--max_tokens", 200)
        words = rate(address, tmp_path, "--workers", workers, "--max_cost", cap, *prices)
        for _ in range(kills):
            before = read(address)["requests"]
            process = command(*words, cwd=tmp_path)
            while read(address)["requests"] == before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.8))
            process.kill()
            process.communicate()
        status, said = run(*words, cwd=tmp_path)
        hashes = read(address, "hashes")
    assert status == 2 and f"max_cost of ${cap:.2f} reached" in said, said
    usd = [x["usage"]["usd"] for x in lines(tmp_path / "ratings.jsonl") if x["usage"]["usd"]]
    each = sum(usd) / len(usd)
    paid = sum(answered for _, answered in hashes.values()) * each
    assert 0.7 * cap < paid <= cap + kills * workers * each, (paid, each)


TRANSIENT = {"p429": 0.05, "p500": 0.05, "phang": 0.003, "preset": 0.01, "phalf": 0.01,
             "pmalformed": 0.004, "pduplicate": 0.01}  # fmt: skip


@pytest.mark.slow
def test_three_thousand_calls_with_all_transient_faults(tmp_path):
    n = 3000
    write_rows(tmp_path, n)
    with serving(latency=0.02, burst_every=500, burst_length=20, **TRANSIENT) as address:
        words = rate(address, tmp_path, "--workers", 32, "--timeout", 3)
        status, said = run(*words, cwd=tmp_path)
        hashes = read(address, "hashes")
    assert status == 0, said
    assert {x["status"] for x in lines(tmp_path / "ratings.jsonl")} == {"ok"}
    assert len(hashes) == n
    assert sum(answered > 1 for _, answered in hashes.values()) <= n // 100


def ask_here(address: str, folder: Path, **config: Any) -> list[Reply]:
    """Two questions, from this process."""
    endpoint = Endpoint("m", address, folder / "cache.sqlite", EndpointConfig(**config))
    asked = [Request([{"role": "user", "content": f"row {i}"}]) for i in range(2)]
    return [reply for _, reply in endpoint.complete(asked)]


def test_no_proxy_stands_before_this_machine(tmp_path, monkeypatch):
    with serving() as proxy, serving() as address:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        assert not any(r.error for r in ask_here(f"{address}/v1", tmp_path))
        monkeypatch.undo()
        assert read(proxy)["all"] == 1, "rows went to the proxy"  # this look at its count


def test_rows_are_not_sent_on(tmp_path):
    with serving() as other, serving(redirect=other) as address:
        with pytest.raises(
            UserError, match=r"sends us to http://127\.0\.0\.1:.*, and rows go to base_url alone"
        ):
            ask_here(f"{address}/v1", tmp_path)
        assert read(other)["requests"] == 0
        with pytest.raises(UserError, match="batches"):
            endpoint = Endpoint("m", f"{address}/v2", tmp_path / "b.sqlite", EndpointConfig())
            list(Batches(endpoint).complete([Request([{"role": "user", "content": "row"}])]))


def test_headers_and_query_reach_the_server_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(echo_key=1) as address:
        where = f"{address}/v1?api-version=2024-10-21"
        (reply, _) = ask_here(where, tmp_path, headers={"Authorization": "JUDGE_KEY"})
        assert not reply.error
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in kept and b"api-version" in kept


# ---- what services of today answer, in their words


def completion(text: str | None = "4", reason: str = "stop", **usage: int) -> dict:
    used = {"prompt_tokens": 100, "completion_tokens": 5, **usage}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return {"model": "m", "choices": [{**choice, "finish_reason": reason}], "usage": used}


@contextmanager
def answering(answer: Callable[[dict, int], tuple[int, Any]]) -> Iterator[tuple[str, list]]:
    """A server that answers each call by a function of its body and number; the calls it got."""
    calls: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answer(calls[-1], len(calls))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", calls
    finally:
        server.shutdown()


def asked(url: str, folder: Path, texts: list[str]) -> tuple[Endpoint, list[Reply]]:
    config = EndpointConfig(workers=1, price_in=1.0, price_out=10.0, max_wait=20)
    sampling = {"temperature": "auto", "max_tokens": "auto"}
    endpoint = Endpoint("m", url, folder / "cache.sqlite", config, purpose="p", **sampling)
    found = dict(endpoint.complete(Request([{"role": "user", "content": t}]) for t in texts))
    return endpoint, [found[i] for i in range(len(texts))]


def wrapped(code: int, message: str) -> dict:
    return {"error": {"code": code, "message": message}}


def test_a_refusal_inside_a_success_is_a_refusal(tmp_path):
    """As gateways answer: the status is 200, and the error in the body costs nothing."""

    def busy(body, n):
        long = "long" in body["messages"][0]["content"]
        refused = wrapped(400, "This endpoint's maximum context length is 8192 tokens.")
        return 200, refused if long else completion() if n > 2 else wrapped(429, "Slow down.")

    with answering(busy) as (url, calls):
        endpoint, (first, other) = asked(url, tmp_path, ["short", "long"])
    assert first.text == "4" and "maximum context length" in other.error and len(calls) == 4
    assert endpoint.budget.spent == pytest.approx(100e-6 + 50e-6)
    with answering(lambda body, n: (200, wrapped(402, "Insufficient credits."))) as (url, calls):
        with pytest.raises(UserError, match="has no money left"):
            asked(url, tmp_path, ["short"] * 3)
        assert len(calls) == 1


def test_an_empty_purse_ends_the_run_whenever_it_is_said(tmp_path):
    said = {"error": {"message": "Your credit balance is too low to access the Anthropic API."}}
    with answering(lambda _, n: (200, completion()) if n < 3 else (400, said)) as (url, calls):
        with pytest.raises(UserError, match="credit balance"):
            asked(url, tmp_path, [f"question {i}" for i in range(20)])
        assert len(calls) == 3


def test_thoughts_that_only_the_total_shows_are_paid_for(tmp_path):
    """As Gemini counts: no completion token, no text, and 4,096 tokens of thoughts."""
    thought = completion(None, "length", completion_tokens=0, total_tokens=4196)
    with answering(lambda body, n: (200, thought)) as (url, _):
        endpoint, _ = asked(url, tmp_path, ["question"])
    assert endpoint.budget.spent > 0.04


def test_a_prompt_that_was_cut_is_not_answered(tmp_path):
    """As Ollama reads: what is longer than num_ctx is left out, and the answer looks like one."""
    context = 4096

    def read_in_part(body, n):
        size = len(body["messages"][0]["content"]) // 4
        return 200, completion(prompt_tokens=min(size, context))

    texts = ["short", "word " * 8000, "short again"]
    with answering(read_in_part) as (url, calls):
        _, replies = asked(url, tmp_path, texts)
        assert [x.text for x in replies] == ["4", "", "4"]
        assert "read 4,096 tokens of a longer prompt" in replies[1].error
        context = 32768
        _, replies = asked(url, tmp_path, texts)
        assert [x.text for x in replies] == ["4", "4", "4"] and len(calls) == 4


def gemini(quota: str) -> tuple[int, list]:
    """A refusal as Gemini sends it: a list, with what was exceeded among the details."""
    said = "You exceeded your current quota, please check your plan. Please retry in 0.05s."
    details = [{"violations": [{"quotaId": f"GenerateRequests{quota}PerProjectPerModel-FreeTier"}]}]
    return 429, [{"error": {"code": 429, "message": said, "details": details}}]


# fmt: off
FOR_ALL = [  # once said, it is true of every request, today at least
    (429, {"message": "Your account is not active.", "code": "billing_not_active"}, "no money"),
    (400, {"message": "You have reached your specified API usage limits."}, "no money left"),
    (429, "Your team has either used all available credits or reached its monthly spending limit.",
     "no money left"),
    (412, {"message": "Account x is suspended, possibly due to the monthly spending limit"},
     "no money left"),
    (400, {"message": "Access denied, is your account in good standing?", "code": "Arrearage"},
     "no money left"),
    (400, {"message": "API key not valid. Please pass a valid API key."}, "refuses the key"),
    (404, {"message": "The API deployment for this resource does not exist."}, "no such model"),
    (429, {"message": "Rate limit exceeded: free-models-per-day."}, "no calls left for today"),
]
# fmt: on


@pytest.mark.parametrize(("status", "error", "says"), FOR_ALL)
def test_what_is_true_of_all_requests_ends_the_run_at_once(tmp_path, status, error, says):
    told = {"error": error}
    with answering(lambda _, n: (200, completion()) if n < 3 else (status, told)) as (url, calls):
        with pytest.raises(UserError, match=says):
            asked(url, tmp_path, [f"question {i}" for i in range(9)])
        assert len(calls) == 3


def test_a_quota_of_a_day_is_told_from_one_of_a_minute(tmp_path):
    with answering(lambda _, n: gemini("PerMinute") if n < 4 else (200, completion())) as (url, c):
        _, (reply,) = asked(url, tmp_path, ["question"])
        assert reply.text == "4" and len(c) == 4
    with answering(lambda _, n: gemini("PerDay")) as (url, calls):
        with pytest.raises(UserError, match="no calls left for today"):
            asked(url, tmp_path / "day", ["question"])
        assert len(calls) == 1


def test_a_temperature_that_nobody_asked_for_is_left_out(tmp_path):
    """As Kimi K2.5 says it: neither `unsupported`, nor which parameter."""
    only = {"error": {"message": "invalid temperature: only 1 is allowed for this model"}}

    def strict(body, n):
        return (400, only) if "temperature" in body else (200, completion())

    with answering(strict) as (url, calls):
        _, replies = asked(url, tmp_path, ["one", "two"])
        assert [x.text for x in replies] == ["4", "4"] and len(calls) == 3
        endpoint = Endpoint("m", url, tmp_path / "own.sqlite", temperature=0.5)
        with pytest.raises(UserError, match="only 1 is allowed"):
            list(endpoint.complete(Request([{"role": "user", "content": str(i)}]) for i in "123"))


def test_an_answer_that_broke_off_is_asked_again(tmp_path):
    """As DeepSeek, Zhipu and vLLM say that they have failed: half an answer, and the status 200."""
    why = ("insufficient_system_resource", "network_error", "abort")

    def broken(body, n):
        return 200, completion("Score: 2", why[n // 2]) if n % 2 else completion()

    with answering(broken) as (url, calls):
        endpoint, replies = asked(url, tmp_path, ["one", "two", "three"])
    assert [x.text for x in replies] == ["4"] * 3 and len(calls) == 6
    assert endpoint.budget.spent > 3 * 150e-6  # half an answer may be on the bill


def test_what_is_under_way_when_a_run_ends_is_waited_for_or_counted(tmp_path, monkeypatch):
    """A refusal of one call waits for the others; what is broken off counts as paid for."""
    told = {"error": {"message": "Insufficient balance"}}

    def slow(body, n):
        text = body["messages"][0]["content"]
        time.sleep({"slow": 1.5, "hangs": 3}.get(text, 0.3))
        return (402, told) if text == "refused" else (200, completion())

    def asked_for(*texts: str) -> tuple[Endpoint, Iterator]:
        limits = EndpointConfig(workers=3, price_in=1.0, price_out=10.0)
        cache = tmp_path / f"{texts[-1]}.sqlite"
        endpoint = Endpoint("m", url, cache, limits, purpose="p", max_tokens=1000)
        return endpoint, endpoint.complete(
            Request([{"role": "user", "content": t}]) for t in ("first", *texts)
        )

    monkeypatch.setattr("alpagasus2.endpoint.client._GRACE", 0.1)
    with answering(slow) as (url, calls):
        endpoint, replies = asked_for("slow", "refused")
        with pytest.raises(UserError, match="no money left"):
            list(replies)
        assert endpoint.stored(Request([{"role": "user", "content": "slow"}])).text == "4"
        endpoint, replies = asked_for("hangs")
        next(replies)
        while len(calls) < 5:
            time.sleep(0.02)
        replies.close()
        assert 0.01 < endpoint.cache.spent("p") < 0.0105
