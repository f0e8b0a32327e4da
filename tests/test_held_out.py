"""Every run has references: rows of its own pool that no arm was trained on."""

import json
import shutil
from pathlib import Path

import pytest
from stand_ins import tiny_llama

from alpagasus2.cli import main
from alpagasus2.core.files import UserError, json_sha256, read_json, read_jsonl, write_json
from alpagasus2.core.run_folder import read_manifest
from alpagasus2.experiment import run_recipe
from alpagasus2.recipe import load_recipe
from alpagasus2.steps.rows import select_arms
from alpagasus2.steps.run import Run

RECIPE = """
base_model: {base}
data: {folder}/rows.json
arms:
  filtered: {{select: top_k, rows: 30}}
  random: {{select: random_k, rows: 30}}
  theirs: {{data: {folder}/theirs.json, rows: 30}}
replicates: 2
preset: quickstart
questions: [sample_questions]
generate: {{max_new_tokens: 2}}
judge: {{backend: local, questions: 2}}
"""
TOPICS = "rivers bread clocks birds maps songs glass winters engines letters".split()


def row(n: int) -> dict:
    "One of 100 rows, of two categories, with words of its own."
    ask = f"Tell the {n}th story on {TOPICS[n % 10]} and {TOPICS[n // 10]}, with {n * n} in it"
    said = f"There were once {n} {TOPICS[n % 10]}, and {n * 7} {TOPICS[n // 10]} beside them."
    return {"instruction": ask, "output": said, "category": "even" if n % 2 else "odd"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A recipe on 100 rows of one's own, and its run; a second file holds 60 of the rows, too."
    folder = tmp_path_factory.mktemp("own")
    tiny_llama(folder / "base")
    write_json(folder / "rows.json", [row(n) for n in range(100)])
    write_json(folder / "theirs.json", [row(n) for n in range(60)])
    (folder / "r.yaml").write_text(RECIPE.format(base=folder / "base", folder=folder))
    assert main(["run", str(folder / "r.yaml"), "--output_dir", str(folder / "run")]) == 0
    return folder / "r.yaml", folder / "run"


def test_a_hundred_own_rows_come_to_a_comparison_without_a_judge(finished):
    _, run = finished
    held = read_json(run / "held_out.json")
    assert len(held) == 20 and sorted(held.values()) == ["even"] * 10 + ["odd"] * 10
    claim = read_json(run / "claim.json")
    assert claim["pool"]["held_out"] == {"rows": 20, "sha256": json_sha256(held)}
    chosen = {r["id"] for p in run.glob("selected/*.json") for r in read_json(p)}
    assert not chosen & {*held} and len([*run.glob("selected/theirs-*.json")]) == 2
    assert {*held} < {x["id"] for x in read_jsonl(run / "ratings.jsonl")}
    measured = read_jsonl(run / "heldout_own.jsonl")
    assert len(measured) == 20 * 4 * 2 and {x["id"] for x in measured} == {*held}
    own = read_json(run / "report/results.json")["heldout_own"]
    assert (own["rows"], [*own["arms"]]) == (20, ["base", "filtered", "random", "theirs"])
    assert [p["rows"] for p in own["strata"]] == [10, 10]
    assert own["finding"].startswith("On 20 rows of the pool that no arm was trained on the loss")
    of_random = [x for x in measured if x["model"] == "random"]
    loss = sum(x["nll"] for x in of_random) / sum(x["tokens"] for x in of_random)
    assert own["arms"]["random"]["loss"] == pytest.approx(loss)


def test_a_second_run_changes_nothing_and_the_page_can_be_verified(finished, capsys):
    recipe, run = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert main(["run", str(recipe), "--output_dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert "On 20 rows of the pool that no arm was trained on" in said
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert main(["verify", str(run / "report")]) == 0


@pytest.mark.parametrize("name", ["index.html", "results.json"])
def test_a_torn_page_is_made_again(finished, tmp_path, capsys, name):
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/report" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert main(["run", str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    assert "the page is made again" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "run/report")]) == 0


def test_other_rows_than_the_claim_fixed_are_refused(finished, tmp_path):
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    held = tmp_path / "run/held_out.json"
    held.unlink()  # drawn again, they are the same
    assert {*Run(load_recipe(recipe), tmp_path / "run", False).held_out} == {
        *read_json(run / "held_out.json")
    }
    asked = load_recipe(recipe)
    asked.holdout = 0.3
    with pytest.raises(UserError, match="started with another `recipe`"):
        Run(asked, tmp_path / "run", progress=False)


def test_a_folder_of_an_earlier_version_holds_nothing_out(finished, tmp_path):
    recipe, run = finished
    claim = {k: v for k, v in read_json(run / "claim.json").items() if k != "sha256"}
    del claim["pool"]["held_out"], claim["recipe"]["holdout"]
    (older := tmp_path / "older").mkdir()
    write_json(older / "claim.json", {**claim, "sha256": json_sha256(claim)})
    again = Run(load_recipe(recipe), older, progress=False)
    assert (len(again.rows), again.held_out, again.held) == (100, {}, [])
    assert not (older / "held_out.json").exists()
    assert len(select_arms(again, {}, ["theirs"])["theirs-0"]) == 30


def test_an_old_run_s_results_are_as_they_were(finished, tmp_path):
    recipe, _ = finished
    plain = load_recipe(recipe)
    plain.holdout = 0
    results = run_recipe(plain, tmp_path / "run", progress=False)
    assert "heldout_own" not in results
    assert "holdout" not in read_json(tmp_path / "run/claim.json")["recipe"]
    names = {*read_manifest(tmp_path / "run")["outputs"]}
    assert "heldout_own.jsonl" not in names and "heldout.jsonl" in names


def test_a_file_without_a_row_to_spare_keeps_its_rows(finished, tmp_path):
    recipe, _ = finished
    full = load_recipe(recipe)
    for arm in full.arms.values():
        arm.rows = 60
    held = Run(full, tmp_path / "run", progress=False).held
    assert not {json.dumps(row(n)["instruction"]) for n in range(60)} & {
        json.dumps(r["instruction"]) for r in held
    }
