"""A killed run, started again, ends as if nothing had happened."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_ins import tiny_llama

# In bf16 an answer may depend on which others are written beside it, and after a kill fewer are.
SCRIPT = """
import sys, torch
from alpagasus2 import quant_lora
from alpagasus2.experiment import quickstart_recipe, run_recipe
quant_lora.compute_dtype = lambda device=None: torch.float32
recipe = quickstart_recipe()
recipe.base_model = sys.argv[2]
recipe.limit, recipe.judge.questions, recipe.replicates = 8, 2, 1
recipe.generate = {"max_new_tokens": 8}
for arm in recipe.arms.values():
    arm.rows = 4
run_recipe(recipe, sys.argv[1], progress=False)
"""
STEPS = ("ratings.jsonl", "selected/random.json", "adapters/random", "responses.jsonl")


def start(folder: Path, base: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), base], env=os.environ)


def kill_when(process: subprocess.Popen, path: Path, delay: float) -> bool:
    """SIGKILL the process `delay` seconds after `path` appears; False if it ended by itself."""
    while process.poll() is None:
        if path.exists():
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.02)
    return False


def finish(folder: Path, base: str) -> dict:
    """Run to the end; what the run found, without its times."""
    assert start(folder, base).wait() == 0
    results = json.loads((folder / "report/results.json").read_text())
    return {k: v for k, v in results.items() if k not in ("manifest", "cost")}


def processor_seconds() -> float:
    """What the runs so far have computed: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of two layers, whose run takes seconds."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(folder, tiny)


def test_killed_after_each_step_it_ends_the_same(uninterrupted, tiny, tmp_path):
    whole, expected = uninterrupted
    seed = random.Random(0)
    kills = [kill_when(start(tmp_path, tiny), tmp_path / s, seed.uniform(0, 0.5)) for s in STEPS]
    assert sum(kills) >= 2, f"too few of the runs were still alive when killed: {kills}"
    assert finish(tmp_path, tiny) == expected
    for name in ("adapters/filtered", "adapters/random"):
        weights = "adapter_model.safetensors"
        assert (tmp_path / name / weights).read_bytes() == (whole / name / weights).read_bytes()


def test_a_second_run_changes_nothing(uninterrupted, tiny):
    folder, expected = uninterrupted
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    began = processor_seconds()
    assert finish(folder, tiny) == expected
    assert processor_seconds() - began < 20
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_twenty_kills_at_random_moments_of_the_real_model(tmp_path):
    expected = finish(tmp_path / "whole", "smollm2-135m")
    seed = random.Random(1)
    for _ in range(20):
        kill_when(start(tmp_path / "run", "smollm2-135m"), tmp_path / "run", seed.uniform(2, 40))
    assert finish(tmp_path / "run", "smollm2-135m") == expected
