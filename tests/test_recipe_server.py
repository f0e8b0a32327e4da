"""A recipe whose arms are answered by a server: asked once, resumed, never with old answers."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import tiny_llama
from test_endpoint import read, serving

from alpagasus2 import experiment
from alpagasus2.core.files import UserError
from alpagasus2.experiment import run_recipe
from alpagasus2.recipe import Arm, Judge, Recipe

ASKED = 3  # questions


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, address: str) -> Recipe:
    "A random model of two layers, arms of two rows, questions without references."
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder)
    texts = ["Name a colour.", "Name a number.", "Add them."]
    inputs = ["", "", "2 3"]
    lines = [
        {"id": str(i), "test_set": "t", "instruction": x, "input": y}
        for i, (x, y) in enumerate(zip(texts, inputs, strict=True))
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Recipe(
        str(folder),
        "sample",
        {"filtered": Arm("longest_k", 2), "random": Arm("random_k", 2)},
        limit=8,
        questions=[str(folder / "questions.jsonl")],
        judge=Judge(model="judge", base_url=f"{address}/v1"),
        preset="quickstart",
        train={"batch_size": 2, "num_epochs": 1},
        generate={
            "max_new_tokens": 9, "base_url": f"{address}/v1", "models": {"filtered": "served"},
        },
    )  # fmt: skip


def answered(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def test_a_server_answers_for_all_arms_and_is_asked_once(
    recipe: Recipe, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a model of this machine was asked")

    monkeypatch.setattr("alpagasus2.local.local_answers", refused)
    told: list[str] = []
    monkeypatch.setattr(experiment.Run, "say", lambda self, text: told.append(text))
    before = read(address)["requests"]
    results = run_recipe(recipe, tmp_path, progress=False)
    lines = answered(tmp_path)
    assert {(x["model"], x["id"]) for x in lines} == {
        (model, str(i)) for model in ("base", "filtered", "random") for i in range(ASKED)
    }
    assert all(x["response"] and x["usage"]["completion_tokens"] for x in lines)
    assert {bool(x.get("adapter")) for x in lines if x["model"] != "base"} == {True}
    adapter = tmp_path / "adapters/filtered"
    assert any(f"as `served`, and has to serve {adapter}" in text for text in told), told
    assert any("1 of 3 questions has an input" in text for text in told), told
    assert results["cost"]["endpoint"]["calls"] >= 3 * ASKED
    spent = read(address)["requests"] - before
    (tmp_path / "judgments.jsonl").unlink()
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, lines[:4])) + "\n")
    faster = replace(recipe, generate={**recipe.generate, "workers": 2})
    run_recipe(faster, tmp_path, progress=False)
    again = {(x["model"], x["id"]): x["response"] for x in answered(tmp_path)}
    assert again == {(x["model"], x["id"]): x["response"] for x in lines}
    assert read(address)["requests"] - before == spent, "a reply was asked for twice"


def test_a_reply_from_before_the_training_is_no_answer(
    recipe: Recipe, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = experiment.Run(recipe, tmp_path, False)
    questions = run.questions

    def ask(trained: str) -> int:
        "Calls that were made."
        entry = {"ended": trained}
        monkeypatch.setattr(experiment.run_folder, "manifest_entry", lambda path: entry)
        before = read(address)["requests"]
        arm = experiment.served_arm(run, recipe.server, 0, "random")
        assert len(list(arm(questions))) == ASKED
        return read(address)["requests"] - before

    assert ask("2020-01-01T00:00:00+00:00") == ASKED
    assert ask("2020-01-01T00:00:00+00:00") == 0
    assert ask("2999-01-01T00:00:00+00:00") == ASKED


def test_a_server_may_move_and_may_not_be_left_out(recipe: Recipe, tmp_path: Path) -> None:
    experiment.Run(recipe, tmp_path, False)
    (tmp_path / "responses.jsonl").touch()
    elsewhere = {**recipe.generate, "base_url": "http://localhost:9/v1"}
    experiment.Run(replace(recipe, generate=elsewhere), tmp_path, False)
    with pytest.raises(UserError, match="another `recipe`"):
        experiment.Run(replace(recipe, generate={"max_new_tokens": 9}), tmp_path, False)


def test_a_server_that_is_not_there_is_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    gone = {**recipe.generate, "base_url": "http://localhost:9/v1", "max_retries": 0}
    run = experiment.Run(replace(recipe, generate=gone), tmp_path, False)
    arm = experiment.served_arm(run, run.recipe.server, 0, "base")
    with pytest.raises(UserError, match="localhost:9"):
        list(arm(run.questions))
