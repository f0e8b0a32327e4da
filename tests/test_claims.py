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
from alpagasus2.core.files import UserError, json_sha256, write_json
from alpagasus2.core.run_folder import annotate
from alpagasus2.evidence.claim_file import read_claim, write_claim
from alpagasus2.evidence.sampling import SEED, in_turn
from alpagasus2.experiment import judge_arms
from alpagasus2.recipe import Judge
from alpagasus2.steps.results import report_run
from alpagasus2.steps.rows import select_arms
from alpagasus2.steps.run import Run


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


RUNS = 3
LONG = "Write a short letter to a friend about the first snow of this year"


def judged_run(folder: Path, won: int, margin: float | None = None) -> Path:
    """A run of three replicates over 60 questions, of which filtered wins so many."""
    (folder / "selected").mkdir(parents=True)
    arms = {"filtered": {"select": "top_k"}, "random": {"select": "random_k"}}
    recipe = {"base_model": "base", "margin": margin, "rater": {"kind": "flaws", "model": ""},
              "judge": {"model": "judge"}, "pool_share": 0.8, "arms": arms}  # fmt: skip
    pairs = {"questions": {"t": 60}, "runs": RUNS, "number": 60 * RUNS}
    write_claim(folder / "claim.json", {
        "recipe": recipe, "model_a": "filtered", "control": "random", "aa": None,
        "seeds": [*range(RUNS)], "pairs": pairs})  # fmt: skip
    asked = [f"{LONG}, number {i}." for i in range(60)]
    said = [
        {"id": f"q{i}", "test_set": "t", "category": None, "instruction": asked[i], "input": "",
         "model_a": "filtered", "model_b": "random", "replicate": r, "vote": 0, "first": first,
         "response_a": "x", "response_b": "y", "score_a": None, "score_b": None, "status": "ok",
         "verdict": "a" if i < won else "b", "review": "", "judge": {"model": "judge"}}
        for r in range(RUNS) for i in range(60) for first in "ab"]  # fmt: skip
    write(folder / "judgments.jsonl", said)
    for arm in arms:
        for r in range(RUNS):
            rows = [{"id": f"{arm}{r}{k}", "instruction": "Say.", "output": "It."} for k in "ab"]
            write_json(folder / "selected" / f"{arm}-{r}.json", rows)
    return folder


def claimed(judgments: Path, *options: str) -> dict:
    """The claim of a report."""
    page = judgments.parent / "page" if judgments.is_file() else judgments / "page"
    assert not main(["report", "--judgments", str(judgments), "--output", str(page), *options])
    return json.loads((page / "results.json").read_text())["claim"]


def test_the_fixed_claim_holds_wherever_its_verdicts_are_read_from(tmp_path):
    """A win rate of 33 in 60 is noise, and within a margin that nobody fixed."""
    run = judged_run(tmp_path / "run", 33)
    (tmp_path / "link.jsonl").symlink_to(run / "judgments.jsonl")
    places = [run, run / "judgments.jsonl", tmp_path / "link.jsonl"]
    later = (
        ("--margin", "0.2"),
        ("--model_a", "random"),
        ("--margin", "0.2", "--model_a", "random"),
    )
    for place in places:
        assert claimed(place)["verdict"] == "within noise"
        for options in later:
            found = claimed(place, *options)
            assert found["verdict"] == "within noise"
            assert (
                "Post hoc, with " in found["reason"] and "which no claim fixed" in found["reason"]
            )
    assert claimed(run, "--margin", "0.2")["post_hoc"]["verdict"] == "supported"
    renamed = run.rename(tmp_path / "another")
    assert claimed(renamed, "--margin", "0.2")["verdict"] == "within noise"


def test_a_claim_that_was_replaced_or_taken_away_is_missed(tmp_path, capsys):
    run = judged_run(tmp_path / "run", 33)
    plan = {k: v for k, v in read_claim(run / "claim.json").items() if k != "sha256"}
    plan["recipe"]["margin"] = 0.2
    write_json(run / "claim.json", {**plan, "sha256": json_sha256(plan)})
    report = ["report", "--judgments", str(run), "--output", str(tmp_path / "page")]
    assert main(report) == 2
    assert "not the claim with which the run began" in capsys.readouterr().err
    (run / "claim.json").unlink()
    assert main([*report, "--margin", "0.2"]) == 2
    assert "claim.json is gone" in capsys.readouterr().err


def test_terms_that_nothing_fixed_are_post_hoc(tmp_path):
    run = judged_run(tmp_path / "run", 45)
    alone = tmp_path / "alone.jsonl"
    alone.write_bytes((run / "judgments.jsonl").read_bytes())
    assert "Post hoc: no claim.json" in claimed(alone)["reason"]
    assert "Post hoc" not in claimed(run)["reason"] and claimed(run)["verdict"] == "supported"


def test_more_runs_than_were_fixed_are_refused(tmp_path, capsys):
    run = judged_run(tmp_path / "run", 45)
    said = lines(run / "judgments.jsonl")
    write(run / "judgments.jsonl", said + [{**x, "replicate": RUNS} for x in said[:120]])
    assert main(["report", "--judgments", str(run), "--output", str(tmp_path / "page")]) == 2
    assert "verdicts of 4 runs, but claim.json fixed 3" in capsys.readouterr().err


def test_a_later_report_knows_the_questions_that_an_arm_was_trained_on(tmp_path):
    run = judged_run(tmp_path / "run", 45)
    assert claimed(run)["verdict"] == "supported"
    held = [{"id": f"h{i}", "instruction": f"{LONG}, number {i}.", "output": "Dear friend"}
            for i in range(12)]  # fmt: skip
    write_json(run / "selected" / "filtered-1.json", held)
    found = claimed(run)
    assert found["verdict"] != "supported"
    assert "prompts stand in the rows of an arm; without them: within noise" in found["reason"]


def test_without_a_control_arm_nothing_is_claimed(tmp_path):
    run = judged_run(tmp_path / "run", 60)
    said = [{**x, "model_b": "base"} for x in lines(run / "judgments.jsonl")]
    alone = tmp_path / "alone.jsonl"
    write(alone, said)
    for options in ((), ("--model_a", "filtered"), ("--model_a", "filtered", "--margin", "0.1")):
        assert claimed(alone, *options)["verdict"] == "no control arm: no claim"


def test_the_lines_say_whose_wins_are_counted(tmp_path):
    """Without a claim it is not the first name of the alphabet."""
    run = judged_run(tmp_path / "run", 45)
    renamed = {"filtered": "zebra", "random": "random"}
    said = [{**x, **{m: renamed[x[m]] for m in ("model_a", "model_b")}}
            for x in lines(run / "judgments.jsonl")]  # fmt: skip
    write(tmp_path / "alone.jsonl", said)
    assert claimed(tmp_path / "alone.jsonl")["verdict"] == "supported"
    results = json.loads((tmp_path / "page/results.json").read_text())
    assert results["pooled"][0]["model_a"] == "zebra"


def test_the_rows_of_an_arm_stay_as_many_as_the_claim_fixed(tmp_path):
    run = Run(recipe(Judge(model="fair", base_url="http://127.0.0.1:9/v1")), tmp_path, False)
    chosen = select_arms(run, {})
    assert {len(rows) for rows in chosen.values()} == {4}
    write_json(tmp_path / "selected/random.json", chosen["random"][:3])
    with pytest.raises(UserError, match=r"3 rows, but claim\.json fixed 4"):
        select_arms(run, {})


def test_terminal_and_page_say_why(tmp_path, capsys):
    """A judge that only prefers a slot is called unfit, with the figure and its limit."""
    run = judged_run(tmp_path / "run", 45)
    said = [{**x, "verdict": x["first"]} for x in lines(run / "judgments.jsonl")]
    write(run / "judgments.jsonl", said)
    claim = claimed(run)
    assert claim["verdict"] == "judge unfit: no claim"
    told = capsys.readouterr().out
    assert "the answer shown first wins 360 of 360" in told
    assert "Agreement between the two orders (Cohen's kappa) is 0 [" in told
    assert "needed at least 0.2" in told
    results = json.loads((run / "page/results.json").read_text())
    assert results["ranking"] is None
    page = (run / "page/index.html").read_text()
    assert "needed at least 0.2" in page and 'id="ranking"' not in page


def misjudged(n: int) -> list[dict]:
    """Canaries of a judge that is right on one gold pair of ten."""
    return [
        {"id": f"g{i}", "test_set": "gold", "model_a": "gold", "model_b": "bad", "first": first,
         "verdict": "a" if i % 10 == 0 else "b", "status": "ok", "vote": 0, "replicate": 0}
        for i in range(n) for first in "ab"]  # fmt: skip


def test_the_sanity_checks_go_where_the_claim_goes(tmp_path, capsys):
    """A judge that fails them is unfit, by whatever name its verdicts are read."""
    run = judged_run(tmp_path / "run", 45)
    write(run / "canaries.jsonl", misjudged(50))
    annotate(run / "canaries.jsonl")
    (tmp_path / "link.jsonl").symlink_to(run / "judgments.jsonl")
    (run / "judgments_2.jsonl").symlink_to(run / "judgments.jsonl")
    for place in (run, run / "judgments.jsonl", tmp_path / "link.jsonl", run / "judgments_2.jsonl"):
        assert claimed(place)["verdict"] == "judge unfit: no claim", place
    (run / "judgments_2.jsonl").unlink()
    (run / "canaries.jsonl").unlink()
    assert main(["report", "--judgments", str(run), "--output", str(tmp_path / "page")]) == 2
    assert "canaries.jsonl: it is gone, and manifest.json names it" in capsys.readouterr().err


def test_rows_that_were_taken_away_are_missed(tmp_path, capsys):
    """They could hold the questions; a folder without any of them says that nobody knows."""
    run = judged_run(tmp_path / "run", 45)
    assert "not known" not in claimed(run)["reason"]
    (run / "selected/filtered-1.json").unlink()
    assert main(["report", "--judgments", str(run), "--output", str(tmp_path / "page")]) == 2
    assert (
        "filtered-1.json: it is gone, and rows of other arms are there" in capsys.readouterr().err
    )
    (run / "selected").rename(tmp_path / "elsewhere")
    assert "whether the arms were trained on the questions is not known" in claimed(run)["reason"]


def contradicting(folder: Path) -> str:
    """Labels by which the other arm wins all of the first 40 prompts that the page draws."""
    drawn = in_turn([("t", f"q{i}") for i in range(60)])[:40]
    said = [{"id": i, "test_set": t, "model_a": "filtered", "model_b": "random", "label": "b"}
            for t, i in drawn]  # fmt: skip
    write_json(folder / "labels.json", {"sample": {"seed": SEED}, "labels": said})
    return str(folder / "labels.json")


def test_later_terms_do_not_leave_the_labels_or_the_seen_prompts_behind(tmp_path):
    run = judged_run(tmp_path / "run", 45)
    found = claimed(run, "--margin", "0.05", "--labels", contradicting(tmp_path))
    assert found["verdict"] == found["post_hoc"]["verdict"] == "within noise"
    held = [{"id": f"h{i}", "instruction": f"{LONG}, number {i}.", "output": "Dear friend"}
            for i in range(60)]  # fmt: skip
    write_json(run / "selected" / "filtered-1.json", held)
    assert claimed(run, "--margin", "0.05")["post_hoc"]["verdict"] == "within noise"


def test_a_page_among_its_verdicts_is_checked(tmp_path, capsys):
    run = judged_run(tmp_path / "run", 45)
    assert not main(["report", "--judgments", str(run), "--output", str(run)])
    assert not main(["verify", str(run)])
    assert "left alone" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"first": "c"}, "first='c'; a or b"),
        ({"verdict": "A"}, "verdict='A'; a, b, tie or null"),
        ({"replicate": "0"}, "replicate='0'; a whole number"),
        ({"response_a": 5}, "response_a=5; text is wanted"),
        ({"model_b": None}, "model_b=None; text is wanted"),
        ({"judge": {"model": []}}, "judge model=[]; text is wanted"),
        ({"review": float("nan")}, "holds nan"),
        ({"model_b": "filtered"}, "filtered as both models"),
    ],
)
def test_a_line_that_cannot_be_counted_is_named(wrong, why, tmp_path, capsys):
    run = judged_run(tmp_path / "run", 45)
    said = lines(run / "judgments.jsonl")
    write(run / "judgments.jsonl", [{**said[0], **wrong}, *said[1:]])
    assert main(["report", "--judgments", str(run), "--output", str(tmp_path / "page")]) == 2
    said = capsys.readouterr().err
    assert "the line of q0 " in said and why in said


@pytest.mark.parametrize("label", [3, {"id": "q1", "test_set": "t", "model_a": "filtered",
                                       "model_b": "random", "label": ["a"]}])  # fmt: skip
def test_labels_that_are_none_are_named(label, tmp_path, capsys):
    run = judged_run(tmp_path / "run", 45)
    write_json(tmp_path / "labels.json", {"labels": [label]})
    words = ["report", "--judgments", str(run), "--output", str(tmp_path / "page")]
    assert main([*words, "--labels", str(tmp_path / "labels.json")]) == 2
    assert "labels.json: " in capsys.readouterr().err


def test_the_help_of_a_report_says_what_model_a_is(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--model_a MODEL_A whose wins are counted" in said


# ---- verdicts without a claim.json, by hand or by carelessness


def verdict(key: str, said: str, run: int = 0, judge: str = "j", **more) -> list[dict]:
    """Both orders of one prompt of one run; the answers of every run are its own."""
    shared = {"id": key, "test_set": "t", "instruction": f"What is {key}?", "input": "", "vote": 0,
              "model_a": "x", "model_b": "random", "replicate": run, "verdict": said,
              "response_a": f"{key} of {run}", "response_b": f"{key}, in {run}", "status": "ok",
              "judge": {"model": judge, "prompt_version": "pair-1"}, **more}  # fmt: skip
    return [{**shared, "first": first} for first in "ab"]


def report(folder: Path, said: list[dict], *more: list[dict]) -> dict | None:
    """The results of a page of such verdicts; None where it was refused."""
    for n, rows in enumerate((said, *more)):
        write(folder / f"judgments{n}.jsonl", rows)
    given = folder if more else folder / "judgments0.jsonl"
    if main(["report", "--judgments", str(given), "--output", str(folder / "page")]):
        return None
    return json.loads((folder / "page" / "results.json").read_text())


WON = ["a" if n % 10 < 7 else "b" for n in range(40)]


def test_one_run_under_three_numbers_is_one_run(tmp_path):
    runs = [x for r in range(3) for n, v in enumerate(WON) for x in verdict(f"q{n}", v, r)]
    assert report(tmp_path, runs)["claim"]["verdict"] == "supported"
    copies = [{**x, "response_a": f"{x['id']} a", "response_b": f"{x['id']} b"} for x in runs]
    claim = report(tmp_path, copies)["claim"]
    assert claim["verdict"] == "not tested against run-to-run noise"
    assert "Runs 0 and 1 of x have the same answers" in claim["reason"]


@pytest.mark.parametrize("field", ["id", "test_set"])
def test_a_question_under_several_names_is_one_question(tmp_path, field):
    ten = [x for r in range(3) for n, v in enumerate(WON[:10]) for x in verdict(f"q{n}", v, r)]
    said = [{**x, field: f"{x[field]} {k}"} for k in range(5) for x in ten]
    results = report(tmp_path, said)
    (p,) = results["pooled"]
    assert (p["n"], p["clusters"], results["claim"]["verdict"]) == (50, 10, "within noise")
    assert any("40 of 50 questions have the text of another" in w for w in results["warnings"])


def test_verdicts_of_two_judges_are_not_added_up(tmp_path, capsys):
    halves = [x for n, v in enumerate(WON) for x in verdict(f"q{n}", v, judge="jk"[n % 2])]
    assert report(tmp_path, halves) is None
    assert "k (prompt pair-1) in judgments0.jsonl judged random and x" in capsys.readouterr().err
    by_order = [x | {"judge": {"model": x["first"]}} for x in halves]
    assert report(tmp_path, by_order[::2], by_order[1::2]) is None
    one = [x for n, v in enumerate(WON) for x in verdict(f"q{n}", v, served=f"j-{n % 2}")]
    (tmp_path / "judgments1.jsonl").unlink()
    assert "The judge answered as j-0 and j-1" in " ".join(report(tmp_path, one)["warnings"])


def test_sanity_checks_of_another_judge_are_refused(tmp_path, capsys):
    said = [x for n, v in enumerate(WON) for x in verdict(f"q{n}", v)]
    write(tmp_path / "canaries0.jsonl", verdict("g", "a", judge="strong", model_a="gold"))
    assert report(tmp_path, said) is None
    assert "these sanity checks are of ('strong', 'pair-1')" in capsys.readouterr().err


def test_a_verdict_that_its_scores_deny_is_named(tmp_path, capsys):
    scored = {"score_a": 2, "score_b": 9, "protocol": "pair"}
    assert report(tmp_path, verdict("q", "a", **scored)) is None
    assert "verdict='a'; the scores say b" in capsys.readouterr().err
