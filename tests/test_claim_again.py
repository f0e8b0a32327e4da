"""A claim with a mistake is fixed again before anything is measured, and no training is lost."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import tiny_llama

from alpagasus2.core.files import UserError, read_json
from alpagasus2.core.run_folder import is_complete, manifest_entry
from alpagasus2.evidence.claim_file import read_claim
from alpagasus2.experiment import quickstart_recipe
from alpagasus2.recipe import Arm, Recipe
from alpagasus2.steps import training
from alpagasus2.steps.run import Run
from alpagasus2.steps.training import choose_and_train

ARMS = {"longer": Arm("longest_k", 3), "random": Arm("random_k", 3)}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    base = tmp_path / "base"
    tiny_llama(base)
    made = quickstart_recipe()
    made.base_model, made.limit, made.arms, made.margin = str(base), 12, ARMS, 0.4
    made.replicates, made.holdout = 1, 0
    return made


def train(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train what is left; the names of the adapters that were trained."""
    made, real = [], training.train

    def noted(base: str, rows: list, output: Path, *more: object) -> dict:
        made.append(output.name)
        return real(base, rows, output, *more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", noted)
        choose_and_train(Run(recipe, folder, progress=False), {})
    return made


def weights(folder: Path, part: str) -> bytes:
    return (folder / "adapters" / part / "adapter_model.safetensors").read_bytes()


def test_a_mistake_costs_no_training(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert train(recipe, folder, monkeypatch) == ["longer", "random"]
    first, kept = read_claim(folder / "claim.json"), weights(folder, "longer")
    other = {"filtered": ARMS["longer"], "random": replace(ARMS["random"], seed=5)}
    assert train(replace(recipe, margin=0.05, arms=other), folder, monkeypatch) == ["random"]
    second = read_claim(folder / "claim.json")
    assert read_json(folder / "claim-1.json") == first and second["replaces"] == first["sha256"]
    assert second["recipe"]["margin"] == 0.05 and second["model_a"] == "filtered"
    assert weights(folder, "filtered") == kept and is_complete(folder / "adapters" / "filtered")
    assert manifest_entry(folder / "adapters" / "filtered")["seconds"] > 0
    assert (folder / "claim-1" / "adapters" / "random" / "train_result.json").exists()


def test_other_settings_train_again(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train(recipe, folder, monkeypatch)
    slower = replace(recipe, train={"learning_rate": 1e-4})
    assert train(slower, folder, monkeypatch) == ["longer", "random"]
    assert train(recipe, folder, monkeypatch) == [], "the first claim's trainings are still there"
    assert read_json(folder / "claim-2.json")["recipe"]["train"] == {"learning_rate": 1e-4}


def test_once_measured_a_claim_stays(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train(recipe, folder, monkeypatch)
    (folder / "responses.jsonl").touch()
    with pytest.raises(UserError, match="started with another `recipe`"):
        Run(replace(recipe, margin=0.05), folder, progress=False)
    assert not (folder / "claim-1.json").exists() and (folder / "selected").exists()


DYING: list[int] = []  # renames that this process may still do


def _die(event: str, args: tuple) -> None:
    if DYING and event in ("os.rename", "os.remove"):
        DYING[0] -= 1
        if DYING[0] < 0:
            os._exit(9)


sys.addaudithook(_die)


def died(recipe: Recipe, folder: Path, renames: int) -> bool:
    """Whether a process that may rename so often is dead before its run has begun."""
    if (child := os.fork()) == 0:
        DYING.append(renames)
        try:
            Run(recipe, folder, progress=False)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_process_that_dies_while_a_claim_is_fixed_again_loses_nothing(
    recipe, tmp_path, monkeypatch
):
    train(recipe, tmp_path / "run", monkeypatch)
    kept = weights(tmp_path / "run", "longer")
    other = replace(recipe, margin=0.05, arms=ARMS | {"random": replace(ARMS["random"], seed=5)})
    for renames in range(100):
        shutil.copytree(tmp_path / "run", folder := tmp_path / f"died-{renames}")
        if not died(other, folder, renames):
            break
        shutil.copytree(folder, tmp_path / f"back-{renames}")
        assert train(other, folder, monkeypatch) == ["random"]
        assert read_claim(folder / "claim.json")["recipe"]["margin"] == 0.05
        assert weights(folder, "longer") == kept
        assert train(recipe, tmp_path / f"back-{renames}", monkeypatch) == []
    assert renames > 3
