"""Results of other tools become a page with one command, which `verify` holds to its files."""

import csv
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alpagasus2.cli import main
from alpagasus2.evidence.paired import Scores, compare
from alpagasus2.report.outside import read_scores

OUTSIDE = Path(__file__).parent / "outside"


def verified(page, capsys) -> tuple[int, str]:
    "Exit status of `verify`, and what it prints."
    capsys.readouterr()
    try:
        status = main(["verify", str(page)])
    except SystemExit as e:
        status = int(e.code or 0)
    return status, capsys.readouterr().out


def results_of(page: Path) -> dict:
    return json.loads((page / "results.json").read_text(encoding="utf-8"))


def changed(path: Path) -> str:
    "Change one byte of a file; what it held before."
    before = path.read_bytes()
    at = next(n for n in range(len(before) // 2, len(before)) if before[n : n + 1].isdigit())
    other = b"1" if before[at : at + 1] != b"1" else b"2"
    path.write_bytes(before[:at] + other + before[at + 1 :])
    return before.decode()


@pytest.mark.parametrize(
    ("tool", "models", "pairs", "part"),
    [
        ("lm_eval", ["bad", "good"], 2, "results.json"),
        ("inspect", ["mockllm/filtered", "mockllm/random"], 1, "index.html"),
    ],
)
def test_one_command_each_and_a_changed_byte_is_found(tool, models, pairs, part, tmp_path, capsys):
    shutil.copytree(OUTSIDE / tool, tmp_path / tool)
    page = tmp_path / "page"
    words = ["report", "--scores", str(tmp_path / tool), "--output", str(page)]
    assert main(words) == 0
    results = results_of(page)
    assert len(results["scores"]) == pairs
    assert [results["scores"][0][m] for m in ("model_a", "model_b")] == models
    assert results["claim"]["verdict"] == "not tested against run-to-run noise"
    assert verified(page, capsys)[0] == 0
    read = [p for p in sorted((tmp_path / tool).rglob("*")) if p.suffix in (".json", ".jsonl")]
    for path in (read[-1], page / part):
        before = changed(path)
        status, said = verified(page, capsys)
        assert status == 1 and f"{path.name}: its SHA-256" in said, (path, said)
        path.write_text(before)


def test_accuracies_are_those_of_lm_eval():
    "The figure of each model that stands in lm-eval's own results."
    scores, _ = read_scores([OUTSIDE / "lm_eval"], ["acc_norm"])
    entry = compare(scores, "good")[0][0]
    for model, mean in (("good", entry["mean_a"]), ("bad", entry["mean_b"])):
        stated = json.loads(next((OUTSIDE / "lm_eval" / model).rglob("results_*")).read_text())
        assert mean == pytest.approx(stated["results"]["own_gold"]["acc_norm,none"], abs=1e-12)


def annotation(number: int, preference: float, **more: object) -> dict:
    return {
        "instruction": f"Question {number}?", "output_1": "x", "output_2": "y",
        "generator_1": "gpt4_turbo", "generator_2": "ours", "annotator": "weighted",
        "preference": preference, **more,
    }  # fmt: skip


def test_alpaca_evals_own_win_rate_and_error(tmp_path, capsys):
    rng = random.Random(0)
    preferences = [1 + rng.random() for _ in range(804)] + [0]
    rows = [annotation(n, p) for n, p in enumerate(preferences)]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    page = tmp_path / "page"
    words = ["report", "--judgments", str(tmp_path), "--output", str(page)]
    assert main(words) == 0
    (entry,) = results_of(page)["weighted"]
    shares = [p - 1 if p else 0.5 for p in preferences]
    mean = sum(shares) / 805
    error = (sum((x - mean) ** 2 for x in shares) / 804 / 805) ** 0.5
    assert (entry["model_a"], entry["n"]) == ("ours", 805)
    assert 100 * entry["win_rate"] == pytest.approx(100 * mean, abs=1e-6)
    assert 100 * entry["standard_error"] == pytest.approx(100 * error, abs=1e-6)
    assert verified(page, capsys)[0] == 0
    changed(tmp_path / "annotations.json")
    assert verified(page, capsys)[0] == 1


def test_two_judges_in_one_folder_are_not_added_up(tmp_path, capsys):
    for judge, preference in (("one", 2), ("other", 1)):
        rows = [annotation(n, preference, annotator=judge) for n in range(10)]
        (tmp_path / f"annotations_{judge}.json").write_text(json.dumps(rows))
    words = ["report", "--judgments", str(tmp_path), "--output", str(tmp_path / "page")]
    assert main(words) == 2
    assert "say with --judge which of them decides" in capsys.readouterr().err
    assert main([*words, "--judge", "other", "--model_a", "ours"]) == 0
    results = results_of(tmp_path / "page")
    assert [(w["judge"], w["win_rate"]) for w in results["weighted"]] == [("one", 1), ("other", 0)]
    assert (results["pooled"][0]["win"], results["pooled"][0]["n"]) == (0, 10)


def test_a_new_file_among_the_verdicts_is_found(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    line = {"test_set": "t", "instruction": "q", "model_a": "x", "model_b": "y", "verdict": "a",
            "response_a": "1", "response_b": "2", "vote": 0, "replicate": 0, "status": "ok",
            "judge": {"model": "j"}}  # fmt: skip
    lines = [{"id": f"q{n}", "first": first, **line} for n in range(50) for first in "ab"]
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (run / "judgments.jsonl").write_text(text)
    page = tmp_path / "page"
    assert main(["report", "--judgments", str(run), "--output", str(page)]) == 0
    assert verified(page, capsys)[0] == 0
    (run / "judgments_more.jsonl").write_text(text.replace('"q', '"r'))
    status, said = verified(page, capsys)
    assert status == 1 and "judgments_more.jsonl: it is read now" in said
    assert "pooled[0].n: the page has 50, computed again it is 100" in said


def test_what_is_no_page_is_a_mistake_of_the_user(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "no record of what this page was made from" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_200_000_scores_in_half_a_minute(tmp_path):
    rng = random.Random(0)
    with (tmp_path / "scores.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["item", "model", "score", "run", "cluster"])
        for model in ("ours", "random"):
            for run in range(4):
                table.writerows(
                    (f"q{n}", model, round(rng.random(), 3), run, n // 3) for n in range(25_000)
                )
    start = time.process_time()
    words = ["report", "--scores", str(tmp_path / "scores.csv"), "--output", str(tmp_path / "page")]
    assert main(words) == 0
    assert time.process_time() - start < 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "real"])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_differences_of_scores_hold_the_truth(kind, spread):
    "Where nothing differs, over items in pairs, three runs and 800 experiments."
    rng, held, wrong = np.random.default_rng(0), [], []
    index = pd.MultiIndex.from_product([range(200), range(3)], names=["item", "run"])
    frame = index.to_frame(index=False).astype(str)
    for _ in range(800):
        item, parts = rng.normal(size=(200, 1)), []
        for model in "ab":
            own = rng.normal(size=(100, 1)).repeat(2, axis=0)
            latent = item + own + rng.normal(size=(200, 3)) + spread * rng.normal(size=(1, 3))
            score = (latent > 0).astype(float) if kind == "binary" else latent
            parts.append(frame.assign(model=model, score=score.ravel()))
        rows = pd.concat(parts).assign(test_set="t", metric="m")
        rows["cluster"] = (rows["item"].astype(int) // 2).astype(str)
        entry = compare(Scores(rows), "a")[0][0]
        low, high = entry["difference_ci95"]
        held.append(low <= 0 <= high)
        wrong.append(entry["verdict"] == "supported")
    assert np.mean(held) > 0.93 - 0.015 and np.mean(wrong) < 0.03 + 0.012  # two errors of counting


def table(path: Path, scores: dict, head: tuple = ("item", "model", "run")) -> str:
    "A CSV file of scores by item, model and run."
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([(*head, "score"), *((*k, v) for k, v in scores.items())])
    return str(path)


def scored(tmp_path: Path, capsys, *options: str) -> tuple[int, dict, str]:
    "Exit status, claim and warnings, and what was said, of a report of a file of scores."
    page, rest = tmp_path / "page", ["--output", str(tmp_path / "page"), *options]
    status = main(["report", "--scores", str(tmp_path / "s.csv"), *rest])
    said = capsys.readouterr()
    return status, results_of(page) if not status else {}, said.out + said.err


def runs_of(runs: dict[str, range], seed: int = 0) -> dict:
    "Scores on 200 items, on which ours is ahead by 20 points."
    rng, right = random.Random(seed), {"ours": 0.7, "random": 0.5}
    return {
        (i, m, r): int(rng.random() < right[m]) for m in runs for r in runs[m] for i in range(200)
    }


def test_one_run_that_was_evaluated_three_times_is_one_run(tmp_path, capsys):
    once = runs_of({"ours": range(1), "random": range(1)})
    table(tmp_path / "s.csv", {(i, m, r): v for (i, m, _), v in once.items() for r in range(3)})
    _, results, said = scored(tmp_path, capsys)
    assert results["claim"]["verdict"] == "not tested against run-to-run noise"
    assert "Runs 0 and 1 of ours have the same score on every item" in said


def test_runs_that_only_one_model_has_are_named(tmp_path, capsys):
    table(tmp_path / "s.csv", runs_of({"ours": range(5), "random": range(2, 6)}))
    _, results, _ = scored(tmp_path, capsys)
    assert results["scores"][0]["replicates"] == 3
    told = "ours and random: runs 0, 1, 5 are left out, since only one of them has them."
    assert told in results["warnings"]


def test_options_that_no_score_could_mean_are_refused(tmp_path, capsys):
    table(tmp_path / "s.csv", runs_of({"ours": range(3), "random": range(3)}))
    for options, why in (
        (("--margin", "5"), "margin=5.0: scores from 0 to 1 differ by 1 at most"),
        (("--lower_is_better", "loss"), "--lower_is_better loss: no metric of these is called so"),
        (("--model_a", "ours", "--control", "ours"), "ours is model_a and the control"),
    ):
        status, _, said = scored(tmp_path, capsys, *options)
        assert status == 2 and why in said, said


def test_scores_that_cannot_be_compared_are_refused(tmp_path, capsys):
    far = {(i, m, 0): v for i in range(30) for m, v in (("a", 1e308), ("b", -1e308))}
    nameless = {(i, m, 0): 1 for i in range(30) for m in ("a", "")}
    for scores, why in ((far, "a score is infinite, or over 1e+150"), (nameless, "no name")):
        table(tmp_path / "s.csv", scores)
        status, _, said = scored(tmp_path, capsys)
        assert status == 2 and why in said, said


def test_a_cluster_is_of_its_test_set(tmp_path, capsys):
    scores = runs_of({"ours": range(1), "random": range(1)})
    cells = {(i, m, f"t{i % 2}", f"passage {i // 10}"): v for (i, m, _), v in scores.items()}
    table(tmp_path / "s.csv", cells, ("item", "model", "test_set", "cluster"))
    _, results, _ = scored(tmp_path, capsys)
    assert [e["clusters"] for e in results["scores"]] == [20, 20]
    assert results["scores_pooled"][0]["clusters"] == 40
