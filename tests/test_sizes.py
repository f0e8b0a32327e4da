"""Quality against size: fixed in the claim, resumed, refused where it cannot be, and drawn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import tiny_llama

from alpagasus2.cli import main
from alpagasus2.core.files import UserError
from alpagasus2.experiment import run_recipe
from alpagasus2.recipe import Arm, Judge, Recipe
from alpagasus2.report.page import write_report
from alpagasus2.steps import training

NAMES = ("filtered@2", "random@2", "filtered@3", "random@3")


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A random model of two layers, eight rows, arms of four and the sizes 2 and 3, twice over."""
    base = tmp_path_factory.mktemp("base")
    tiny_llama(base)
    return Recipe(
        str(base),
        "sample",
        {"filtered": Arm("quantile", 4, value=0.3), "random": Arm("random_k", 4)},
        sizes=[3, 2],
        replicates=2,
        price_hour=3.6,
        limit=8,
        judge=Judge(backend="local", questions=1),
        preset="quickstart",
        train={"batch_size": 2, "num_epochs": 1},
        generate={"max_new_tokens": 2},
    )


@pytest.fixture(scope="module")
def run(ablation: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of a run that has ended, and what it found."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run_recipe(ablation, folder, progress=False)


def told(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_size_is_chosen_trained_and_measured_as_an_arm_is(run, ablation):
    folder, _ = run
    claim = json.loads((folder / "claim.json").read_text())
    assert claim["steps"] == 2
    assert claim["sizes"] == {"arms": ["filtered", "random"], "steps": {"2": 1, "3": 2}}
    assert claim["recipe"]["sizes"] == [2, 3]
    held = told(folder / "heldout.jsonl")
    for replicate in (0, 1):
        for name in NAMES:
            arm, rows = name.split("@")
            trained = folder / "adapters" / f"{name}-{replicate}" / "train_result.json"
            assert len(json.loads(trained.read_text())["loss"]) == claim["sizes"]["steps"][rows]
            kept, own = (
                {
                    r["id"]
                    for r in json.loads((folder / f"selected/{n}-{replicate}.json").read_text())
                }
                for n in (name, arm)
            )
            assert len(kept) == int(rows) and kept < own
            lines = [(x["model"], x["replicate"]) for x in held]
            assert lines.count((name, replicate)) == lines.count(("base", replicate)) == 8
    assert {x["model"] for x in told(folder / "responses.jsonl")} == {"base", *ablation.arms}


def test_figures_are_those_of_a_hand_computation(run):
    folder, results = run
    held, cost = told(folder / "heldout.jsonl"), results["cost"]

    def loss(model: str) -> float:
        lines = [x for x in held if x["model"] == model]
        return sum(x["nll"] for x in lines) / sum(x["tokens"] for x in lines)

    assert [(p["arm"], p["rows"]) for p in results["sizes"]] == [
        ("base", 0), *(("filtered", k) for k in (2, 3, 4)), *(("random", k) for k in (2, 3, 4))
    ]  # fmt: skip
    for p in results["sizes"][1:]:
        name = p["arm"] if p["rows"] == 4 else f"{p['arm']}@{p['rows']}"
        assert p["loss"] == pytest.approx(loss(name))
        assert p["difference"] == pytest.approx(loss(name) - loss("base"))
        low, high = p["difference_ci95"]
        assert low <= p["difference"] <= high
        if p["rows"] < 4:
            assert p["to_largest"] == pytest.approx(loss(name) - loss(p["arm"]))
        else:
            assert p["to_largest"] is None
        seconds = sum(cost["training_seconds"][f"{name}-{r}"] for r in (0, 1)) / 2
        rating = cost["rating_seconds"] if p["arm"] == "filtered" else 0
        assert p["training_seconds"] == pytest.approx(seconds)
        assert p["total_seconds"] == pytest.approx(seconds + rating)
        assert p["total_usd"] == pytest.approx((seconds + rating) / 1000)  # $3.6 an hour
    assert cost["rating_seconds"] > 0
    own = {p["arm"]: p for p in results["sizes"] if p["rows"] in (0, 4)}
    assert list(results["heldout"]) == ["base", "filtered", "random"]  # the claim's arms alone
    for arm, measured in results["heldout"].items():
        assert own[arm]["loss"] == measured["loss"]
        assert own[arm]["loss_ci95"] == measured["ci95"]


def test_the_page_has_a_section_only_with_sizes(run, tmp_path):
    folder, results = run
    page = (folder / "report" / "index.html").read_text()
    assert "Quality against size and cost" in page
    assert "held-out loss" in results["sizes_summary"]
    for shown in ("by number of rows, with 95%", "by total cost, with 95%", "US dollars"):
        assert shown in page
    assert page.count("base, untrained") == 2
    without = {k: v for k, v in results.items() if not k.startswith("sizes")}
    assert 'id="sizes"' not in write_report(without, tmp_path).read_text()


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_what_is_done_is_not_done_again(run, ablation, monkeypatch):
    folder, results = run
    before = stamps(folder)

    def refused(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("alpagasus2.local.load_base", refused)
    monkeypatch.setattr(training, "train", refused)
    assert run_recipe(ablation, folder, progress=False) == results
    assert stamps(folder) == before


def counted(monkeypatch: pytest.MonkeyPatch, name: str, what: Callable) -> list:
    """Note, of every call of a function of the recipe's, `what` of its arguments."""
    calls: list = []
    real = getattr(training, name)

    def call(*args: object) -> object:
        calls.append(what(*args))
        return real(*args)

    monkeypatch.setattr(training, name, call)
    return calls


def test_only_the_size_that_is_missing_is_made(run, ablation, monkeypatch):
    folder, results = run
    (folder / "adapters" / "random@2-1" / "train_result.json").rename(folder / "kept.json")
    adapter = (folder / "adapters" / "random@2-1").rename(folder / "adapters" / "gone")
    held = folder / "heldout.jsonl"
    lines = held.read_text().splitlines(keepends=True)
    held.write_text("".join(x for x in lines[:-3]))
    lost = [json.loads(x)["model"] for x in lines[-3:]]
    trained = counted(monkeypatch, "train", lambda _, rows, output, *rest: output.name)
    measured = counted(monkeypatch, "heldout_nll", lambda *args: 1)
    again = run_recipe(ablation, folder, progress=False)
    assert trained == ["random@2-1"] and set(lost) == {"random@3"} and measured == [1]
    # three references alone give the last digits of a loss other than among eight
    first, second = (
        [{k: v for k, v in p.items() if "seconds" not in k and "usd" not in k}
         for p in json.loads(json.dumps(found["sizes"]), parse_float=lambda x: round(float(x), 6))]
        for found in (results, again)
    )  # fmt: skip
    assert first == second
    assert adapter.exists()


def test_another_size_is_another_experiment(run, ablation):
    folder, _ = run
    for sizes in ([], [2], [2, 3, 5]):
        with pytest.raises(UserError, match="started with another `recipe`"):
            run_recipe(replace(ablation, sizes=sizes), folder, progress=False)


def test_a_size_that_cannot_be_is_refused_before_any_work(ablation, tmp_path):
    over = replace(ablation, sizes=[9])
    with pytest.raises(UserError, match="9 rows for filtered, but sample has 8; ask for fewer"):
        run_recipe(over, tmp_path / "over", progress=False)
    questions = tmp_path / "questions.jsonl"
    asked = {"id": "q", "test_set": "t", "category": "c", "instruction": "Why?", "input": ""}
    questions.write_text(json.dumps(asked) + "\n")
    with pytest.raises(UserError, match=r"no question of .* has a `reference`"):
        run_recipe(replace(ablation, questions=[str(questions)]), tmp_path / "no", progress=False)
    assert not (tmp_path / "over").exists() and not (tmp_path / "no").exists()


def test_a_size_that_the_filter_cannot_fill_is_refused_before_any_training(ablation, tmp_path):
    with pytest.raises(UserError, match="filtered@7-0: random_k=7, but between 1 and 6 rows"):
        run_recipe(replace(ablation, sizes=[7], pool_share=1.0), tmp_path, progress=False)
    assert not (tmp_path / "adapters").exists()


def test_the_command_says_it_in_one_sentence(tmp_path, capsys):
    text = "base_model: m\ndata: sample\narms: {a: {select: random_k, rows: 4}}\nsizes: [4]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry_run"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "sizes=[4]: give a list of different numbers" in said


def test_a_dry_run_names_the_sizes(tmp_path, capsys):
    arms = (
        "{filtered: {select: quantile, value: 0.3, rows: 4}, random: {select: random_k, rows: 4}}"
    )
    text = f"base_model: smollm2-135m\ndata: sample\nsizes: [2, 3]\narms: {arms}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["run", str(tmp_path / "recipe.yaml"), "--dry_run", "true"]) == 0
    assert "1 x filtered and random at 2, 3 rows, too" in capsys.readouterr().out
