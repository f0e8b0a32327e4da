"""An experiment whose arms are equal in tokens and in cost, and are compared at two learning rates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import tiny_llama

from alpagasus2 import experiment
from alpagasus2.core.files import read_json
from alpagasus2.core.run_folder import latest
from alpagasus2.experiment import Run, quickstart_recipe, run_recipe, summary_lines
from alpagasus2.quant_lora import load_tokenizer
from alpagasus2.recipe import Arm, Recipe
from alpagasus2.train import encode_rows

ROWS = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    "Two replicates of a random model of two layers; the matched arm is named before its pattern."
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder)
    made = quickstart_recipe()
    made.base_model, made.limit, made.replicates, made.rates = str(folder), 16, 2, [2e-3, 2e-4]
    made.generate, made.judge.questions = {"max_new_tokens": 4}, 2
    made.arms = {
        "filtered": Arm("top_k", ROWS),
        "text": Arm("token_matched"),
        "short": Arm("token_matched", to="longest", seed=1),
        "cost": Arm("cost_matched"),
        "random": Arm("random_k", ROWS),
        "longest": Arm("longest_k", ROWS),
    }
    made.controls = ["random", "longest"]
    return made


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("run")
    return folder, dict(run_recipe(recipe, folder, progress=False))


def chosen(folder: Path, arm: str, replicate: int) -> list[dict]:
    return read_json(folder / f"selected/{arm}-{replicate}.json")


def tokens(recipe: Recipe, rows: list[dict]) -> tuple[int, int]:
    "Tokens and target tokens."
    counts = encode_rows(rows, load_tokenizer(recipe.base_model), recipe.training(0)[0])[1]
    return counts["tokens"], counts["target_tokens"]


def test_every_arm_of_a_replicate_draws_from_the_same_rated_part_of_the_pool(recipe, run):
    folder, _ = run
    rated = {x["id"] for x in latest(folder / "ratings.jsonl") if x["score"] is not None}
    started = Run(recipe, folder, progress=False)
    scores = dict.fromkeys(sorted(rated)[:-2], 1.0)  # two rows have no rating
    pools = [{r["id"] for r in experiment._pool(started, k, scores)} for k in (0, 1)]
    assert [len(p) for p in pools] == [round(0.8 * len(scores))] * 2 and pools[0] != pools[1]
    for replicate, name in ((k, n) for k in (0, 1) for n in recipe.arms if n != "cost"):
        pool = {r["id"] for r in experiment._pool(started, replicate, dict.fromkeys(rated, 1.0))}
        assert {r["id"] for r in chosen(folder, name, replicate)} <= pool


def test_matched_arms_have_the_tokens_of_the_other_arm(recipe, run):
    folder, _ = run
    for replicate in (0, 1):
        for name, to in (("text", "filtered"), ("short", "longest")):
            rows, wanted = chosen(folder, name, replicate), chosen(folder, to, replicate)
            got, total = (tokens(recipe, x)[1] for x in (rows, wanted))
            largest = max(tokens(recipe, [r])[1] for r in read_pool(recipe))
            assert abs(got - total) <= largest / 2 or name == "short", (name, replicate)
        drawn = [r["id"] for r in chosen(folder, "random", replicate)]
        text = [r["id"] for r in chosen(folder, "text", replicate)]
        assert set(text) <= set(drawn) or set(drawn) <= set(text)  # one order of drawing


def read_pool(recipe: Recipe) -> list[dict]:
    from alpagasus2.data import load_examples

    return load_examples(recipe.data)[0][: recipe.limit]


def test_the_price_of_the_rating_is_spent_on_random_rows(recipe, run):
    folder, results = run
    spent = results["cost"]
    seconds = [spent["training_seconds"][f"filtered-{k}"] for k in (0, 1)]
    bought = 0.8 * spent["rating_seconds"] / (sum(seconds) / 2)
    for replicate in (0, 1):
        rows = chosen(folder, "cost", replicate)
        wanted = tokens(recipe, chosen(folder, "filtered", replicate))[0] * (1 + bought)
        pool = round(0.8 * 16)
        got = tokens(recipe, rows)[0]
        assert len(rows) == pool or abs(got - wanted) < 300, (got, wanted)
