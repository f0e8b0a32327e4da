"""What changes between a part of a run and the rest of it: it goes on, or the change is named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from stand_ins import tiny_llama
from test_endpoint import lines, read, serving

import alpagasus2.train as training
from alpagasus2.cli import main
from alpagasus2.core.files import UserError, read_json, write_json, write_jsonl
from alpagasus2.core.run_folder import annotate, latest
from alpagasus2.data import load_examples
from alpagasus2.experiment import run_recipe
from alpagasus2.judge import JudgeConfig, canary_pairs, comparison_plan
from alpagasus2.recipe import Arm, Judge, Rater, Recipe
from alpagasus2.steps.rows import rate_pool
from alpagasus2.steps.run import Run
from alpagasus2.train import TrainConfig, train

Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Said:
    """Run a command; what it says."""

    def run(*words: object, status: int = 0) -> str:
        assert (main([*map(str, words)]) or 0) == status, capsys.readouterr().err
        found = capsys.readouterr()
        return found.out + found.err

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "base")
    return tmp_path / "base"


def other_weights(base: Path) -> None:
    """Another model at the same path."""
    model = tiny_llama(base)
    model.model.layers[0].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(base)


def write_rows(path: Path, said: str = "5") -> Path:
    texts = {"a": "4", "b": said, "c": "12"}
    rows = [{"id": k, "instruction": f"Compute {k}.", "output": x} for k, x in texts.items()]
    write_json(path, [{"input": "", **row} for row in rows])
    return path


def scores(output: Path) -> dict[str, float]:
    return {x["id"]: x["score"] for x in latest(output)}


def test_an_edited_row_is_rated_again_and_no_other(tmp_path, said):
    rows, output = write_rows(tmp_path / "rows.json"), tmp_path / "ratings.jsonl"
    with serving() as address:
        rate = ["rate", "--data", rows, "--output", output, "--base_url", f"{address}/v1"]
        said(*rate, "--model", "m")
        write_rows(rows, "7")
        keep = ["select", "--data", rows, "--scores", output, "--top_k", 2, "--output"]
        edited = said(*keep, tmp_path / "best.json", status=2)
        assert "row 'b' was edited since it was rated" in edited
        said(*rate, "--model", "m")
        said(*keep, tmp_path / "best.json")
        assert read(address)["requests"] == 4
        said(*rate, "--model", "m")
        assert read(address)["requests"] == 4
    assert "backend was 'endpoint'" in said(
        *rate[:-2], "--model", "m", "--backend", "local", status=2
    )
    assert [x["id"] for x in lines(output)] == ["a", "b", "c", "b"]


def test_an_edited_row_is_read_again_by_a_local_model(base, tmp_path, said):
    rows, output = write_rows(tmp_path / "rows.json"), tmp_path / "ratings.jsonl"
    rate = ["rate", "--rater", "flaws", "--model", base, "--data", rows, "--output"]
    said(*rate, output)
    write_rows(rows, "An answer of more than one word.")
    said(*rate, output)
    said(*rate, tmp_path / "anew/ratings.jsonl")
    assert scores(output) == pytest.approx(scores(tmp_path / "anew/ratings.jsonl"))


def test_ratings_and_answers_of_two_bases_do_not_mix(base, tmp_path, said):
    rows, output = write_rows(tmp_path / "rows.json"), tmp_path / "ratings.jsonl"
    answers, questions = tmp_path / "responses.jsonl", tmp_path / "q.jsonl"
    write_jsonl(questions, [{"id": k, "instruction": f"Compute {k}."} for k in "ab"])
    rate = ["rate", "--rater", "flaws", "--data", rows, "--output", output, "--model"]
    ask = ["generate", "--questions", questions, "--output", answers, "--max_new_tokens", 4,
           "--base_model"]  # fmt: skip
    said(*rate, base, "--limit", 2)
    said(*ask, base, "--limit", 1)
    shutil.move(base, moved := tmp_path / "moved")
    said(*ask, moved)
    assert len(lines(answers)) == 2
    shutil.move(moved, base)
    said(*ask, base)
    other_weights(base)
    assert "base_weights was" in said(*rate, base, status=2)
    assert "base_weights was" in said(*ask, base, status=2)


def test_an_unfinished_training_goes_on_with_its_own_base(base, tmp_path):
    rows = load_examples("sample")[0][:8]
    config = TrainConfig(batch_size=4, num_epochs=2, save_steps=1, learning_rate=1e-2)
    calls, real = iter(range(9)), training.training_step

    def cut_short(*given: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    with patch("alpagasus2.train.training_step", cut_short), pytest.raises(KeyboardInterrupt):
        train(str(base), rows, tmp_path / "adapter", config, progress=False)
    shutil.copytree(base, moved := tmp_path / "moved")
    other_weights(base)
    with pytest.raises(UserError, match=r"base_weights was .* put it back to go on"):
        train(str(base), rows, tmp_path / "adapter", config, progress=False)
    train(str(moved), rows, tmp_path / "adapter", config, progress=False)
    train(str(moved), rows, tmp_path / "whole", config, progress=False)
    cut, whole = (tmp_path / n / "adapter_model.safetensors" for n in ("adapter", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_training_of_an_earlier_version_is_finished(base, tmp_path, capsys):
    rows = load_examples("sample")[0][:4]
    train(str(base), rows, tmp_path / "adapter", TrainConfig(num_epochs=1), progress=False)
    manifest = read_json(tmp_path / "manifest.json")
    for name in ("base_weights", "merge_system", "trainer"):
        manifest["outputs"]["adapter"]["config"].pop(name, None)
    write_json(tmp_path / "manifest.json", manifest)
    with patch("alpagasus2.train.load_base", None):  # nothing is trained
        again = TrainConfig(num_epochs=1, micro_batch_size=1)
        train(str(base), rows, tmp_path / "adapter", again, progress=False)
    assert "is finished" in capsys.readouterr().err


def test_a_server_may_move(tmp_path, said):
    questions, output = tmp_path / "q.jsonl", tmp_path / "responses.jsonl"
    write_jsonl(questions, [{"id": k, "instruction": f"Compute {k}."} for k in "abc"])
    ask = ["generate", "--base_model", "m", "--questions", questions, "--output", output]
    with serving() as one, serving() as two:
        said(*ask, "--limit", 1, "--base_url", f"{one}/v1")
        said(*ask, "--base_url", f"{two}/v1")
        assert (read(one)["requests"], read(two)["requests"]) == (1, 2)
        write_jsonl(questions, [{"id": "a", "instruction": "Compute a."}])
        assert "2 lines are of what is not asked now" in said(*ask, "--base_url", f"{two}/v1")


def test_sanity_checks_of_questions_with_one_id_in_two_test_sets_go_on():
    asked = [{"id": "1", "test_set": t, "instruction": t, "input": "", "model": "m",
              "response": f"Of {t}."} for t in ("one", "two")]  # fmt: skip
    plan = comparison_plan(canary_pairs(asked, "m"), JudgeConfig(), "judge")
    keys = [(x["id"], x["model_a"], x["model_b"], x["first"]) for x in plan.lines]
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of two arms of two rows, and its recipe; a server judges."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_llama(folder / "base")
    texts = {"0": "Name a colour.", "1": "Name a number."}
    asked = [{"id": k, "instruction": x, "reference": x} for k, x in texts.items()]
    write_jsonl(folder / "questions.jsonl", asked)
    arms = {"filtered": Arm("longest_k", 2), "random": Arm("random_k", 2)}
    with serving() as address:
        recipe = Recipe(
            str(folder / "base"), "sample", arms, limit=8, preset="quickstart",
            questions=[str(folder / "questions.jsonl")], generate={"max_new_tokens": 4},
            judge=Judge(model="judge", base_url=f"{address}/v1"),
            train={"batch_size": 2, "num_epochs": 1},
        )  # fmt: skip
        run_recipe(recipe, folder / "run", progress=False)
        yield recipe, folder / "run"


@pytest.fixture
def run(whole, tmp_path) -> tuple[Recipe, Path]:
    recipe, folder = whole
    return recipe, Path(shutil.copytree(folder, tmp_path / "run"))


def test_verdicts_on_other_answers_are_no_verdicts(run):
    recipe, folder = run
    told = lines(folder / "responses.jsonl")
    write_jsonl(folder / "responses.jsonl", [x | {"response": "Another."} for x in told])
    with pytest.raises(UserError, match="was judged with other answers"):
        run_recipe(recipe, folder, progress=False)


def test_an_arm_that_was_trained_again_is_measured_again(run):
    recipe, folder = run
    before = {x["model"]: x["nll"] for x in latest(folder / "heldout.jsonl") if x["id"] == "0"}
    config, quant_lora = recipe.training(0)
    rows = read_json(folder / "selected/random.json")
    given = rows, folder / "adapters/random", replace(config, seed=9), quant_lora
    train(recipe.base_model, *given, progress=False, overwrite=True)
    with pytest.raises(UserError, match="the adapter of random was"):
        run_recipe(recipe, folder, progress=False)
    after = {x["model"]: x["nll"] for x in latest(folder / "heldout.jsonl") if x["id"] == "0"}
    assert {m for m in before if before[m] != after[m]} == {"random"}


def test_sanity_checks_that_were_asked_again_are_on_the_page(run):
    recipe, folder = run
    checks = lines(folder / "canaries.jsonl")
    first = run_recipe(recipe, folder, progress=False)["canaries"]
    lost = [x | {"verdict": None, "status": "unparsed"} for x in checks]
    write_jsonl(folder / "canaries.jsonl", lost)
    assert run_recipe(recipe, folder, progress=False)["canaries"] != first


def test_a_judge_may_move(run):
    recipe, folder = run
    with serving() as address:
        moved = replace(recipe, judge=Judge(model="judge", base_url=f"{address}/v1"))
        whole = lines(folder / "judgments.jsonl")
        write_jsonl(folder / "judgments.jsonl", whole[:-1])
        annotate(folder / "judgments.jsonl", ended=None)
        run_recipe(moved, folder, progress=False)
        assert read(address)["requests"] == 1 and len(lines(folder / "judgments.jsonl")) == len(
            whole
        )
    with pytest.raises(UserError, match="another `recipe`: judge was"):
        run_recipe(replace(recipe, judge=Judge(model="other")), folder, progress=False)


def test_a_rating_prompt_is_fixed_with_the_claim(run, tmp_path):
    recipe, _ = run
    (tmp_path / "prompt.txt").write_text("Rate from 0 to 5: {instruction} {response}")
    rater = Rater(model="m", base_url="http://localhost:9/v1", prompt=str(tmp_path / "prompt.txt"))
    recipe = replace(recipe, rater=rater)
    Run(recipe, tmp_path / "other", progress=False)
    (tmp_path / "other/responses.jsonl").touch()
    (tmp_path / "prompt.txt").write_text("Rate from 0 to 5, sternly: {instruction} {response}")
    with pytest.raises(UserError, match=r"`files`: .*prompt\.txt was edited"):
        Run(recipe, tmp_path / "other", progress=False)


def test_a_rating_that_rows_were_chosen_by_stays(run, tmp_path):
    recipe, _ = run
    with serving() as address:
        rater = Rater(model="m", base_url=f"{address}/v1")
        arms = {"filtered": Arm("top_k", 2), "random": Arm("random_k", 2)}
        begun = Run(replace(recipe, rater=rater, arms=arms), tmp_path / "other", progress=False)
        rate_pool(begun)
        output, asked = begun.dir / "ratings.jsonl", read(address)["requests"]
        first, *others = lines(output)

        def rated_again() -> int:
            """Calls for a row whose call had failed, and whose reply is nowhere."""
            write_jsonl(output, [first | {"status": "error", "score": None}, *others])
            for path in begun.dir.glob("cache.sqlite*"):
                path.unlink()
            rate_pool(begun)
            return read(address)["requests"] - asked

        assert rated_again() == 1
        write_json(begun.dir / "selected/filtered.json", [])
        assert rated_again() == 1, "an arm was chosen by the other rows, and the next would not be"
