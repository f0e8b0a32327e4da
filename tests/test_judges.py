"""Three judges that differ, from the recipe to the page."""

import json
import re
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_endpoint import lines, read, serving

from alpagasus2.catalog import dataset_path
from alpagasus2.cli import main
from alpagasus2.core.files import UserError
from alpagasus2.experiment import judge_arms
from alpagasus2.judge import NULL_ANSWER, PADDING
from alpagasus2.recipe import Arm, Judge, Recipe
from alpagasus2.report.summary import summary_lines
from alpagasus2.steps.results import report_run
from alpagasus2.steps.run import Run

CHROMIUM = Path("/usr/bin/chromium")
ANSWER = r"\[The Start of Assistant {0}'s Answer (\w+)\]\n(.*?)\n\[The End of Assistant {0}'s"
GOLD = lines(dataset_path("gold_pairs.jsonl"))
WORTH = {g["good"]: 1000 for g in GOLD} | {g["bad"]: 0 for g in GOLD} | {NULL_ANSWER: 0}


class Fair(BaseHTTPRequestHandler):
    """A judge that prefers more words, but no padding, in either order; it knows the gold pairs."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        answers = [re.search(ANSWER.format(n), asked, re.S)[2].strip() for n in (1, 2)]
        one, two = (WORTH.get(x, len(x.removesuffix(PADDING).split())) for x in answers)
        reply = json.dumps({
            "id": "x", "object": "chat.completion", "created": 0, "model": "fair-served",
            "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
            "choices": [{"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant",
                "content": "8 8" if one == two else "9 6" if one > two else "6 9"}}],
        }).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def fair():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fair)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def recipe(*judges: Judge) -> Recipe:
    arms = {"filtered": Arm("longest_k", 4), "random": Arm("random_k", 4)}
    return Recipe("smollm2-135m", "sample", arms, judge=[*judges], preset="quickstart", limit=16)


def answered(run: Run) -> None:
    """The answers of the arms: filtered writes more than random to three questions of four."""
    words = {"base": lambda n: 1, "filtered": lambda n: 9, "random": lambda n: 12 if n % 4 else 3}
    told = []
    for n, q in enumerate(run.questions):
        asked = {k: q.get(k) for k in ("id", "test_set", "category", "instruction", "input")}
        for model, count in words.items():
            text = " ".join(["word"] * count(n))
            told.append({**asked, "model": model, "replicate": 0, "response": text})
    text = "".join(json.dumps(x) + "\n" for x in told)
    (run.dir / "responses.jsonl").write_text(text)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with fair() as one, serving(reply="9 7\nThe first.") as two, serving(reply="8 8") as three:
        judges = (
            Judge(model="fair", base_url=f"{one}/v1"),
            Judge(model="org/slot", base_url=f"{two}/v1", price_in=1.0, price_out=1.0),
            Judge(model="fair", name="always tie", base_url=f"{three}/v1"),
        )
        started = Run(recipe(*judges), folder, progress=False)
        answered(started)
        judge_arms(started)
        results = report_run(started, {}, {"filtered": started.rows, "random": started.rows})
        asked = read(two)["requests"]
        judge_arms(Run(recipe(*judges), folder, progress=False))
        assert read(two)["requests"] == asked, "a second run makes no call"
    return folder, results, judges


def test_files_and_claim(judged):
    folder, _, judges = judged
    names = {p.name for p in folder.glob("*.jsonl")}
    files = ("judgments", "judgments-org-slot", "judgments-always-tie")
    assert {f"{f}.jsonl" for f in files} <= names
    assert {f"{f}.jsonl".replace("judgments", "canaries") for f in files} <= names
    claim = json.loads((folder / "claim.json").read_text())
    assert (claim["judges"], claim["decides"]) == (["fair", "org/slot", "always tie"], "fair")
    with pytest.raises(UserError, match="another `recipe`"):
        Run(recipe(*judges[::-1]), folder, progress=False)


def test_results(judged):
    folder, results, _ = judged
    fair_one, slot, _ = results["judges"]
    assert [j["decides"] for j in results["judges"]] == [True, False, False]
    assert results["claim"]["decides"] == "fair"
    counts = {j["name"]: {p["model_b"]: (p["win"], p["tie"], p["lose"]) for p in j["pooled"]}
              for j in results["judges"]}  # fmt: skip
    assert counts["fair"] == {"base": (16, 0, 0), "random": (4, 0, 12)}
    assert counts["org/slot"] == counts["always tie"] == {"base": (0, 16, 0), "random": (0, 16, 0)}
    top = {p["model_b"]: (p["win"], p["tie"], p["lose"]) for p in results["pooled"]}
    assert top == counts["fair"], "what decides stands where it stood with one judge"
    assert slot["verdict"] == "judge unfit: no claim" != fair_one["verdict"]
    assert (slot["cost"]["usd"] > 0) and fair_one["cost"]["usd"] == 0
    assert fair_one["cost"]["calls"] == len(lines(folder / "judgments.jsonl")) + len(
        lines(folder / "canaries.jsonl")
    )
    agree = {tuple(a["judges"]): a for a in results["judge_agreement"]}
    assert agree["org/slot", "always tie"]["agreement"] == 1.0
    assert agree["fair", "org/slot"]["agreement"] == 0.0
    assert agree["fair", "org/slot", "always tie"]["n"] == 32
    assert "judges come to different verdicts" in results["warnings"][-1]
    told = "\n".join(summary_lines(results))
    assert "org/slot and always tie agree on 100% of 32 pairs" in told


def test_page(judged):
    page = (judged[0] / "report/index.html").read_text()
    section = page[page.index('<section id="judges"') : page.index('<section id="filter"')]
    for text in (
        "fair <span",
        "decides",
        "org/slot",
        "always tie",
        "Agreement",
        "100.0%",
        "✗ fail",
    ):
        assert text in section, text
    assert "Of several judges fair decides" in page
    pairs = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])
    said = [v["judge"] for v in pairs["pairs"][0]["verdicts"]]
    assert said == ["fair", "fair", "always tie", "always tie", "org/slot", "org/slot"]


def test_report_of_the_folder(judged, tmp_path, capsys):
    assert not main(["report", "--judgments", str(judged[0]), "--output", str(tmp_path)])
    again = json.loads((tmp_path / "results.json").read_text())
    for key in ("pooled", "judges", "judge_agreement"):
        assert again[key] == judged[1][key], key
    other = str(judged[0] / "judgments-org-slot.jsonl")
    assert main(["report", "--judgments", other, "--output", str(tmp_path)]) == 2
    assert "says that fair decides; give the folder" in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM.exists(), reason="chromium is not there")
def test_the_page_in_a_browser(judged, tmp_path):
    page, shot = judged[0] / "report/index.html", tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,6000"]
    subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={shot}", f"file://{page}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 50_000
