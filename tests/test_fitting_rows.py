"""Arms stay equal: rows that do not fit leave the pool, and every run is held against its claim."""

import json
import shutil
from pathlib import Path

import pytest
from stand_ins import tiny_llama

from alpagasus2.cli import main
from alpagasus2.core.files import UserError, json_sha256, read_json, write_json
from alpagasus2.evidence.claim import UNLIKE
from alpagasus2.recipe import load_recipe
from alpagasus2.steps.rows import select_arms
from alpagasus2.steps.run import Run
from alpagasus2.steps.training import train_arms

RECIPE = """
base_model: {base}
data: {data}
rater: {{kind: flaws, template: chat}}
arms:
  filtered: {{select: quantile, value: 0.4, rows: 30}}
  random: {{select: random_k, rows: 30}}
  longest: {{select: longest_k, rows: 30}}
preset: quickstart
questions: [sample_questions]
generate: {{max_new_tokens: 2}}
judge: {{backend: local, questions: 2}}
holdout: 0
"""


def dolly(n: int) -> dict:
    "A row in Dolly's own form."
    return {
        "instruction": f"What does passage {n} say?",
        "context": f"Passage {n} says that {n} is a number." if n % 3 else "",
        "response": f"It says that {n} is a number, and nothing more. " * (1 + n % 3),
        "category": "closed_qa" if n % 3 else "open_qa",
    }


def long_row(n: int) -> dict:
    "One whose prompt, or whose answer, fills 256 tokens."
    field = "context" if n % 2 else "response"
    return dolly(n) | {field: f"Passage {n} goes on and on. " * 60}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder)
    return str(folder)


def recipe_file(folder: Path, base: str, rows: list[dict], more: str = "") -> Path:
    data, path = folder / "dolly.jsonl", folder / "recipe.yaml"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    path.write_text(RECIPE.format(base=base, data=data) + more)
    return path


def trained(run: Path) -> dict[str, tuple[int, int]]:
    "Rows and steps of each adapter."
    results = {p.parent.name: read_json(p) for p in run.glob("adapters/*/train_result.json")}
    return {name: (x["rows"], x["steps"]) for name, x in results.items()}


EQUAL = dict.fromkeys(("filtered", "random", "longest"), (30, 8))


@pytest.fixture(scope="module")
def finished(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A recipe of 120 rows, of which 40 do not fit; its run."
    folder = tmp_path_factory.mktemp("long")
    rows = [dolly(n) for n in range(80)] + [long_row(n) for n in range(80, 120)]
    recipe = recipe_file(folder, base, rows)
    assert main(["run", str(recipe), "--output_dir", str(folder / "run")]) == 0
    return recipe, folder / "run"


@pytest.mark.slow
def test_a_first_data_set_finishes_at_the_first_try(base, tmp_path, capsys):
    recipe = recipe_file(tmp_path, base, [dolly(n) for n in range(120)])
    assert main(["check", str(tmp_path / "dolly.jsonl")]) == 0
    assert "120 of 120 rows are good" in capsys.readouterr().out
    assert main(["run", str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    assert trained(tmp_path / "run") == EQUAL
    assert read_json(tmp_path / "run/left_out.json") == {}


def test_rows_that_do_not_fit_leave_the_pool_and_the_arms_are_equal(finished):
    _, run = finished
    assert trained(run) == EQUAL
    left_out = read_json(run / "left_out.json")
    assert sorted(left_out.values()) == ["answer"] * 20 + ["prompt"] * 20
    claim = read_json(run / "claim.json")
    assert claim["pool"]["left_out"] == {"rows": 40, "sha256": json_sha256(left_out)}
    chosen = [r["id"] for p in run.glob("selected/*.json") for r in read_json(p)]
    assert not {*chosen} & {*left_out} and len(chosen) == 90
    assert read_json(run / "report/results.json")["claim"]["verdict"] != UNLIKE


def test_check_and_select_leave_the_same_rows_out(finished, base, tmp_path, capsys):
    recipe, run = finished
    data, kept = str(recipe.parent / "dolly.jsonl"), tmp_path / "kept.json"
    fit = ["--base_model", base, "--cutoff_len", "256"]
    assert main(["check", data, *fit]) == 2
    told = capsys.readouterr()
    assert "20 rows: long: the prompt alone fills cutoff_len: rows 81, 83" in told.out
    assert "80 of 120 rows are good" in told.out and "leave the long ones out" in told.err
    select = ["select", "--data", data, "--output", str(kept), "--longest_k"]
    assert main([*select, "30", *fit]) == 0
    assert "40 do not fit in cutoff_len" in capsys.readouterr().out
    assert read_json(kept) == read_json(run / "selected/longest.json")
    assert main([*select, "90", *fit]) == 2
    assert main([*select, "100", *fit, "--keep_cut"]) == 0
    assert main([*select, "30", "--keep_cut"]) == 2
    assert "add --base_model" in capsys.readouterr().err


def test_a_recipe_may_keep_answers_that_are_cut(finished, tmp_path):
    recipe, _ = finished
    path = tmp_path / "keep.yaml"
    path.write_text(recipe.read_text() + "keep_cut: true\n")
    run = Run(load_recipe(path), tmp_path / "run", progress=False)
    assert (len(run.rows), {*run.left_out.values()}) == (100, {"prompt"})


def test_arms_that_the_fitting_rows_cannot_fill_are_refused_before_anything(finished, tmp_path):
    recipe, _ = finished
    path = tmp_path / "many.yaml"
    path.write_text(recipe.read_text().replace("rows: 30", "rows: 90"))
    with pytest.raises(UserError, match="filtered: 90 rows, but 80 rows of the pool fit"):
        Run(load_recipe(path), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/claim.json").exists()


def test_a_cut_off_above_the_context_is_refused_before_anything(base, tmp_path):
    rows = [dolly(n) for n in range(80)]
    recipe = recipe_file(tmp_path, base, rows, "train: {cutoff_len: 4096}\n")
    with pytest.raises(UserError, match=r"train: cutoff_len=4096, but .* reads 2048 tokens"):
        Run(load_recipe(recipe), tmp_path / "run", progress=False)


def test_an_arm_s_own_file_loses_its_long_rows_too(finished, base, tmp_path):
    recipe, _ = finished
    own = tmp_path / "own.json"
    write_json(own, [dolly(n) for n in range(200, 231)] + [long_row(n) for n in range(231, 260)])
    path = tmp_path / "own.yaml"
    theirs = f"  longest: {{data: {own}, rows: 30}}"
    lines = [theirs if "longest" in x else x for x in recipe.read_text().splitlines()]
    path.write_text("\n".join(lines))
    run = Run(load_recipe(path), tmp_path / "run", progress=False)
    rows = select_arms(run, {}, ["longest"])["longest"]
    assert len(rows) == 30 and all("on and on" not in str(r) for r in rows)


def spoil(run: Path, fixed: dict[str, int]) -> None:
    "An adapter that was trained on other numbers."
    path = run / "adapters/random/train_result.json"
    write_json(path, read_json(path) | fixed)


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, Path]:
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    return recipe, tmp_path / "run"


@pytest.mark.parametrize("fixed", [{"rows": 28}, {"steps": 7}])
def test_every_run_and_every_report_is_held_against_the_claim(copied, fixed, capsys):
    recipe, run = copied
    spoil(run, fixed)
    for _ in range(3):  # a third try is refused as the first was
        assert main(["run", str(recipe), "--output_dir", str(run)]) == 2
        said = capsys.readouterr().err
        assert "by claim.json it is 30 rows in 8" in said and "delete selected/random.json" in said
    page = run.parent / "page"
    assert main(["report", "--judgments", str(run), "--output", str(page)]) == 0
    claim = read_json(page / "results.json")["claim"]
    assert claim["verdict"] == UNLIKE
    assert (
        claim["reason"].startswith("random was trained on") and "fixed 30 rows" in claim["reason"]
    )


def test_a_folder_of_an_earlier_version_keeps_its_pool(finished, tmp_path):
    recipe, run = finished
    claim = {k: v for k, v in read_json(run / "claim.json").items() if k != "sha256"}
    claim["pool"].pop("left_out")
    older = tmp_path / "older"
    older.mkdir()
    write_json(older / "claim.json", {**claim, "sha256": json_sha256(claim)})
    again = Run(load_recipe(recipe), older, progress=False)
    assert (len(again.rows), again.left_out) == (120, None)
    chosen = select_arms(again, {}, ["longest"])  # its rows are too long, and one is not trained on
    train_arms(again, chosen, ["longest"])
    assert not (older / "left_out.json").exists()
    assert trained(older)["longest"][0] < 30


def test_a_dry_run_is_the_plan_and_names_all_that_would_stop_the_run(finished, tmp_path, capsys):
    recipe, _ = finished
    assert main(["run", str(recipe), "--dry_run", "--output_dir", str(tmp_path / "run")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("train filtered"))
    assert line.split()[2:5] == ["1", "30", "8"] and not (tmp_path / "run").exists()
    faulty = tmp_path / "faulty.yaml"
    text = (
        recipe.read_text().replace("rows: 30", "rows: 90").replace("[sample_", "[nothing, sample_")
    )
    faulty.write_text(text + "train: {lora_target_modules: [q_proj, v_prj, k_prj]}\n")
    assert main(["run", str(faulty), "--dry_run"]) == 2
    said = capsys.readouterr().err
    for what in (
        "3 things",
        "but 80 rows of the pool fit",
        "nothing",
        "no linear layer k_prj, v_prj",
    ):
        assert what in said
