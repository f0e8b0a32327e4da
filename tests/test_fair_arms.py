"""Arms that are equal in tokens or in cost, and a comparison at two learning rates."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from stand_ins import tiny_llama

from alpagasus2 import cli
from alpagasus2.batches import encode_rows
from alpagasus2.commands import pages
from alpagasus2.core.files import UserError, json_sha256, read_json, write_json
from alpagasus2.core.run_folder import annotate, latest
from alpagasus2.data import Example
from alpagasus2.evidence.scaling import Costs
from alpagasus2.experiment import quickstart_recipe, run_recipe
from alpagasus2.quant_lora import load_tokenizer
from alpagasus2.recipe import Arm, Recipe
from alpagasus2.steps import rows as steps_rows
from alpagasus2.steps import training
from alpagasus2.steps.run import Run
from alpagasus2.steps.training import choose_and_train

ROWS, POOL = 2, 12
tokenizer = cache(load_tokenizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    "A random model of two layers."
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder)
    return str(folder)


def small(base: str, arms: dict[str, Arm], **settings: object) -> Recipe:
    made = quickstart_recipe()
    made.base_model, made.limit, made.arms, made.replicates = base, POOL, arms, 1
    made.generate, made.judge.questions = {"max_new_tokens": 2}, 1
    for name, value in settings.items():
        setattr(made, name, value)
    return made


SECONDS = {"rating": 30.0, "row": 20.0}  # what the stand-ins say that they took


def stand_in_training(_: str, rows: list, output: Path, config: Any, *__: object) -> dict:
    "An adapter that nobody trained, and what its training took."
    steps = math.ceil(len(rows) / config.batch_size) * config.num_epochs
    write_json(output / "train_result.json", {"rows": len(rows), "steps": steps, "left_out": []})
    (output / "adapter_model.safetensors").write_text(str(output))
    annotate(output, seconds=SECONDS["row"] * len(rows))
    return read_json(output / "train_result.json")


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict, dict]:
    "Two replicates; a matched arm is named before the arm that it is matched to."
    arms = {
        "filtered": Arm("top_k", ROWS),
        "text": Arm("token_matched", to="longest"),
        "cost": Arm("cost_matched"),
        "random": Arm("random_k", ROWS),
        "longest": Arm("longest_k", ROWS),
    }
    run = Run(small(base, arms, replicates=2), tmp_path_factory.mktemp("run"), progress=False)
    (run.dir / "ratings.jsonl").touch()
    annotate(run.dir / "ratings.jsonl", seconds=SECONDS["rating"])
    scores = {r["id"]: float(n) for n, r in enumerate(run.rows[1:])}  # one row has no rating
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", stand_in_training)
        return run, scores, choose_and_train(run, scores)


def counted(run: Run, rows: list[Example]) -> tuple[int, int]:
    "Tokens and target tokens."
    config, _ = run.recipe.training(0)
    counts = encode_rows(rows, tokenizer(run.recipe.base_model), config)[1]
    return counts["tokens"], counts["target_tokens"]


def test_all_arms_draw_from_the_rated_rows_of_one_part_of_the_pool(trained):
    run, scores, selected = trained
    pools = [{r["id"] for r in steps_rows._pool(run, k, scores)} for k in (0, 1)]
    assert [len(p) for p in pools] == [round(0.8 * (POOL - 1))] * 2
    assert pools[0] != pools[1] and pools[0] | pools[1] <= set(scores)
    for part, rows in selected.items():
        assert {r["id"] for r in rows} <= pools[int(part[-1])], part


def test_a_token_matched_arm_has_the_target_tokens_of_the_other(trained):
    run, scores, selected = trained
    for replicate in (0, 1):
        pool = steps_rows._pool(run, replicate, scores)
        got, wanted = (counted(run, selected[f"{x}-{replicate}"])[1] for x in ("text", "longest"))
        largest = max(counted(run, [r])[1] for r in pool)
        assert abs(got - wanted) <= largest / 2, (replicate, got, wanted)
        drawn, text = ({r["id"] for r in selected[f"{x}-{replicate}"]} for x in ("random", "text"))
        assert drawn <= text or text <= drawn  # one order of drawing, cut in two places


def test_a_cost_matched_arm_spends_the_price_of_the_rating_on_rows(trained):
    run, scores, selected = trained
    bought = 0.8 * SECONDS["rating"] / (SECONDS["row"] * ROWS)
    for replicate in (0, 1):
        pool = steps_rows._pool(run, replicate, scores)
        wanted = (1 + bought) * counted(run, selected[f"filtered-{replicate}"])[0]
        wanted = min(wanted, counted(run, pool)[0])
        largest = max(counted(run, [r])[0] for r in pool)
        assert abs(counted(run, selected[f"cost-{replicate}"])[0] - wanted) <= largest / 2
        assert ROWS < len(selected[f"cost-{replicate}"]) < len(pool)


def test_the_rows_of_matched_arms_are_read_back(trained, monkeypatch):
    run, scores, selected = trained
    monkeypatch.setattr(steps_rows, "_matched_rows", None)
    monkeypatch.setattr(training, "train", None)
    again = Run(run.recipe, run.dir, progress=False)
    assert choose_and_train(again, scores) == selected


def test_an_unknown_price_stops_before_anything_is_trained_for_it(trained, monkeypatch, tmp_path):
    run, scores, _ = trained
    monkeypatch.setattr(Costs, "rating_in_trainings", lambda *_: None)
    with pytest.raises(UserError, match="price of the rating or the time of training filtered"):
        steps_rows._matched_rows(run, run.arms["cost"], 0, scores)


@pytest.fixture(scope="module")
def at_two_rates(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, dict]:
    arms = {"filtered": Arm("top_k", ROWS), "random": Arm("random_k", ROWS)}
    recipe = small(base, arms, rates=[2e-3, 2e-4], limit=6)
    folder = tmp_path_factory.mktemp("rates")
    return recipe, folder, dict(run_recipe(recipe, folder, progress=False))


def test_each_learning_rate_has_its_adapters_and_the_same_rows(at_two_rates):
    recipe, folder, results = at_two_rates
    other = folder / "rates/0.0002"
    rates = [
        read_json(f / "adapters/manifest.json")["outputs"]["filtered"]["config"]["learning_rate"]
        for f in (folder, other)
    ]
    assert rates == [2e-3, 2e-4]
    assert not (other / "selected").exists() and not (other / "ratings.jsonl").exists()
    assert [x["rate"] for x in results["rates"]] == rates
    assert {x["model"] for x in latest(other / "responses.jsonl")} == {"base", *recipe.arms}
    assert list(results["claim"]["parts"]) == [f"At a learning rate of {r:g}" for r in rates]
    assert read_json(other / "claim.json")["rates"] == rates
    alone = read_json(other / "report/results.json")["claim"]["reason"]
    assert alone.endswith("one of 2 learning rates, and the claim is that of all of them.")
    assert "Learning rates" in (folder / "report/index.html").read_text()


def test_a_page_of_one_rate_is_checked_with_the_rows_of_the_run(at_two_rates, capsys):
    _, folder, _ = at_two_rates
    for where in (folder, folder / "rates/0.0002"):
        assert cli.main(["verify", str(where)]) in (0, None)
        sealed = read_json(where / "report/manifest.json")["outputs"]["index.html"]["inputs"]
        rows = [p for p in sealed if "selected/filtered.json" in p]
        assert rows and (where / "report" / rows[0]).resolve() == folder / "selected/filtered.json"
    capsys.readouterr()


def test_a_report_leaves_locks_alone(at_two_rates, tmp_path, capsys):
    _, folder, _ = at_two_rates
    pages.report(str(tmp_path / "page"), str(folder))
    assert "lock" not in capsys.readouterr().err
    sealed = read_json(tmp_path / "page/manifest.json")["outputs"]["index.html"]["inputs"]
    assert sealed and not [p for p in sealed if "lock" in p]
    assert {"filtered.json", "judgments.jsonl"} <= {Path(p).name for p in sealed}


def test_unequal_text_is_said_where_no_arm_is_matched_to_it(at_two_rates):
    _, folder, results = at_two_rates
    targets = {x["arm"]: x["target_tokens"] for x in results["arms"]}
    alike = 0.9 < targets["filtered"] / targets["random"] < 1.1
    said = "no token_matched arm says what that alone does" in results["claim"]["reason"]
    assert said != alike
    assert "What each arm was given, and gave" in (folder / "report/index.html").read_text()


def test_a_second_run_at_all_rates_changes_nothing(at_two_rates):
    recipe, folder, results = at_two_rates
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert run_recipe(recipe, folder, progress=False) == results
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def judged(folder: Path, wins: int, arms: Sequence[str] = ("filtered",)) -> None:
    "Verdicts of three runs on 80 prompts, of which each arm wins so many against random."
    pair = {"model_b": "random", "test_set": "t", "vote": 0, "status": "ok",
            "input": "", "protocol": "verdict",
            "response_a": "x", "response_b": "y"}  # fmt: skip
    lines = [
        {**pair, "model_a": arm, "id": str(i), "instruction": f"i{i}", "replicate": k,
         "first": first, "verdict": "a" if i < wins else "b"}
        for arm in arms for i in range(80) for k in range(3) for first in "ab"
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judgments.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def claimed(path: Path) -> dict:
    "The claim of a run, as one of three training runs that counted no pairs."
    fixed = {k: v for k, v in read_json(path).items() if k not in ("sha256", "pairs")}
    fixed["seeds"] = [0, 1, 2]
    return {**fixed, "sha256": json_sha256(fixed)}


def report(folder: Path, where: Path) -> dict:
    pages.report(str(where), str(folder))
    return read_json(where / "results.json")["claim"]


def test_a_report_holds_a_claim_at_every_rate(at_two_rates, tmp_path):
    _, folder, _ = at_two_rates
    run, other = tmp_path / "run", tmp_path / "run/rates/0.0002"
    judged(run, 60)
    write_json(run / "claim.json", claimed(folder / "claim.json"))
    assert report(run, tmp_path / "a")["verdict"] == "no control arm: no claim"  # one is missing
    judged(other, 42)
    found = report(run, tmp_path / "b")
    assert found["verdict"] == "within noise"
    assert found["reason"].startswith("It holds at a learning rate of 0.002 only.")
    judged(other, 60)
    assert report(run, tmp_path / "c")["verdict"] == "supported"
    write_json(other / "claim.json", claimed(folder / "rates/0.0002/claim.json"))
    assert "one of 2 learning rates" in report(other, tmp_path / "d")["reason"]


def test_a_report_says_of_a_run_what_the_run_said(at_two_rates, tmp_path):
    _, folder, _ = at_two_rates
    for where in (folder, folder / "rates/0.0002"):
        of_run = read_json(where / "report/results.json")["claim"]
        del of_run["heldout"]  # the losses are not among the verdicts
        assert report(where, tmp_path / where.name) == of_run


def test_every_judge_is_held_against_what_was_fixed(at_two_rates, tmp_path):
    _, folder, _ = at_two_rates
    run, terms = tmp_path / "run", claimed(folder / "rates/0.0002/claim.json")
    judged(run, 60)
    lines = (run / "judgments.jsonl").read_text()
    for name in ("m", "n"):
        by_name = lines.replace('"vote"', f'"judge": {{"model": "{name}"}}, "vote"')
        (run / f"judgments{'-n' if name == 'n' else ''}.jsonl").write_text(by_name)
    fixed = {k: v for k, v in terms.items() if k not in ("sha256", "rates")} | {
        "judges": ["m", "n"]
    }
    write_json(run / "claim.json", {**fixed, "sha256": json_sha256(fixed)})
    report(run, tmp_path / "a")
    beside = read_json(tmp_path / "a/results.json")["judges"]
    assert [x["verdict"] for x in beside] == ["supported", "supported"]
    arm = run / "adapters/filtered-0"
    arm.mkdir(parents=True)
    write_json(arm / "train_result.json", {"rows": ROWS, "steps": 99})
    found = report(run, tmp_path / "b")
    beside = read_json(tmp_path / "b/results.json")["judges"]
    assert (
        [x["verdict"] for x in beside] == [found["verdict"]] * 2 == ["not as fixed: no claim"] * 2
    )


def test_two_selectors_are_corrected_for_and_one_alone_is_not(tmp_path):
    terms = {"recipe": {}, "model_a": "filtered", "control": "random", "aa": None}
    two = {"selectors": {"filtered": ["random"], "theirs": ["random"]}}
    for name, fixed in (("alone", terms), ("both", terms | two)):
        judged(tmp_path / name, 49, ["filtered", "theirs"])
        write_json(tmp_path / name / "claim.json", {**fixed, "sha256": json_sha256(fixed)})
    assert report(tmp_path / "alone", tmp_path / "a")["verdict"] == "supported"
    found = report(tmp_path / "both", tmp_path / "b")
    assert found["verdict"] == "within noise" and 0.0125 < found["p"] < 0.025 < found["holm_p"]
    assert [x["verdict"] for x in found["selectors"].values()] == ["within noise"] * 2
    page = (tmp_path / "b/index.html").read_text()
    assert "Claims of the selectors" in page and "theirs" in page
    judged(tmp_path / "both", 60, ["filtered"])  # the other was not judged: no p-value
    found = report(tmp_path / "both", tmp_path / "c")
    assert found["verdict"] == "supported" and "after Holm's correction over 2" in found["reason"]
    assert found["holm_p"] == pytest.approx(2 * found["p"])
    assert found["selectors"]["theirs"]["verdict"] == "no control arm: no claim"
