"""Ways to a wrong "supported" that go through files and commands: what is missing or unequal."""

import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from test_endpoint import lines
from test_judges import Fair, answered, fair, recipe

from alpagasus2.cli import main
from alpagasus2.experiment import Run, judge_arms, report_run
from alpagasus2.recipe import Judge


def answer(model: str, key: str, asked: str = "", text: str = "An answer.", **more) -> dict:
    return {"id": key, "test_set": "t", "category": None, "instruction": asked or f"What is {key}?",
            "input": "", "model": model, "replicate": 0, "response": text, **more}  # fmt: skip


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    return str(path)


@contextmanager
def judging(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()


def test_questions_that_one_arm_did_not_answer_are_its_losses(tmp_path, capsys):
    """Six answers and five, to two questions in common: nine are counted, two are judged."""
    both = [answer("a", f"q{i}", text="A longer answer.") for i in range(6)]
    both += [answer("b", f"q{i}") for i in range(4, 9)]
    given, output = write(tmp_path / "r.jsonl", both), str(tmp_path / "judgments.jsonl")
    with fair() as url:
        words = ["judge", "--responses", given, "--model_a", "a", "--model", "fair"]
        assert not main([*words, "--base_url", f"{url}/v1", "--output", output])
    told = capsys.readouterr().err
    assert "b has no answer to 4 of 9 questions (q0, q1, q2, q3), which are its losses" in told
    assert "a has no answer to 3 of 9 questions (q6, q7, q8)" in told
    assert [x["status"] for x in lines(Path(output))].count("ok") == 4
    assert not main(["report", "--judgments", output, "--output", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report/results.json").read_text())
    (p,) = results["pooled"]
    assert [p[k] for k in ("n", "win", "lose", "unanswered_a", "unanswered_b")] == [9, 6, 3, 3, 4]
    assert results["failures"] == []


def test_one_id_is_one_question(tmp_path, capsys):
    given = [answer("a", "q0", "What is red?"), answer("b", "q0", "What is a dog?")]
    path = write(tmp_path / "r.jsonl", given)
    words = ["judge", "--responses", path, "--model", "m", "--base_url", "http://127.0.0.1:9/v1"]
    assert main([*words, "--output", str(tmp_path / "j.jsonl")]) == 2
    assert "q0 of t: a was asked 'What is red?' and b 'What is a dog?'" in capsys.readouterr().err
    shared = {"id": "q", "test_set": "t", "replicate": 0, "model_a": "x", "vote": 0, "status": "ok",
              "response_a": "1", "response_b": "2", "verdict": "a"}  # fmt: skip
    said = [{**shared, "model_b": b, "instruction": f"Ask {b}", "first": o}
            for b in "yz" for o in "ab"]  # fmt: skip
    path = write(tmp_path / "judgments.jsonl", said)
    assert main(["report", "--judgments", path, "--output", str(tmp_path / "page")]) == 2
    assert "q of t is two questions, 'Ask y' and 'Ask z'" in capsys.readouterr().err


class Hesitant(Fair):
    """The fair judge, whose every other reply to a new question says nothing."""

    seen: ClassVar[set] = set()

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        body = self.rfile.peek(size)[:size]
        first = body not in self.seen and len(self.seen) % 2 == 0
        self.seen.add(body)
        if not first:
            return super().do_POST()
        self.rfile.read(size)
        reply = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                            "choices": [{"index": 0, "finish_reason": "stop", "message": {
                                "role": "assistant", "content": "Hard to say."}}]})  # fmt: skip
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply.encode())


def test_a_run_asks_unread_verdicts_again(tmp_path):
    with judging(Hesitant) as url:
        run = Run(recipe(Judge(model="fair", base_url=url)), tmp_path, progress=False)
        answered(run)
        judge_arms(run)
        said = lines(tmp_path / "judgments.jsonl")
        last = {(x["model_b"], x["id"], x["first"]): x["status"] for x in said}
        assert len(said) > len(last) and set(last.values()) == {"ok"}
        before, asked = (tmp_path / "judgments.jsonl").read_bytes(), len(Hesitant.seen)
        judge_arms(Run(run.recipe, tmp_path, progress=False))
        assert (tmp_path / "judgments.jsonl").read_bytes() == before
        assert len(Hesitant.seen) == asked


@pytest.fixture
def silent(tmp_path):
    """A run in which random's server failed on a quarter of the questions."""
    with fair() as url:
        run = Run(recipe(Judge(model="fair", base_url=f"{url}/v1")), tmp_path, progress=False)
        answered(run)
        lost = {q["id"] for q in run.questions[::4]}
        gone = {"response": "", "finish_reason": "error"}
        said = [
            {**x, **gone} if x["model"] == "random" and x["id"] in lost else x
            for x in lines(tmp_path / "responses.jsonl")
        ]
        write(tmp_path / "responses.jsonl", said)
        judge_arms(run)
    return run, report_run(run, {}, {"filtered": run.rows, "random": run.rows})


def test_a_claim_counts_its_pairs(silent):
    run, results = silent
    assert run.claim["pairs"] == {"questions": {"sample": 16}, "runs": 1, "number": 16}
    p = next(p for p in results["pooled"] if p["model_b"] == "random")
    assert (p["n"], p["unanswered_b"], p["missing"]) == (16, 4, 0)
    assert p["win_rate_bounds"][0] < p["win_rate_ci95"][0]
    assert "4 questions have no answer of random" in results["claim"]["reason"]


def test_verdicts_that_are_taken_away_are_missed(silent, tmp_path):
    run, _ = silent
    kept = [x for x in lines(run.dir / "judgments.jsonl") if x["verdict"] != "b"]
    write(run.dir / "judgments.jsonl", kept)
    assert not main(["report", "--judgments", str(run.dir), "--output", str(tmp_path / "again")])
    results = json.loads((tmp_path / "again/results.json").read_text())
    p = next(p for p in results["pooled"] if p["model_b"] == "random")
    assert p["n"] + p["missing"] + p["failed"] == 16 and p["missing"] > 0
    assert "that were to be judged have no verdict" in results["claim"]["reason"]
