"""A killed rating by the local model reads no row twice."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RATING = """
import sys
from alpagasus2 import local
from alpagasus2.data import load_examples
from alpagasus2.model import likelihood
from alpagasus2.quant_lora import QuantLoraConfig
likelihood.CHUNK = 16
read = local.signals
def counted(model, tokenizer, rows, template):
    for row, found in zip(rows, read(model, tokenizer, rows, template), strict=True):
        print(row["id"], flush=True)
        yield found
local.signals = counted
rows = load_examples("sample")[0][:48]
models = local.Models("smollm2-135m", QuantLoraConfig())
local.rate_by_signals(models, rows, "flaws", sys.argv[1], progress=False)
"""


def rate_locally(output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RATING, str(output)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_local_rating_reads_no_row_twice(tmp_path):
    cut, whole = tmp_path / "cut/ratings.jsonl", tmp_path / "whole/ratings.jsonl"
    process = rate_locally(cut)
    said = [process.stdout.readline() for _ in range(20)]
    process.kill()
    said += process.communicate()[0].splitlines(keepends=True)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    kept = [json.loads(line) for line in cut.read_text().splitlines() if line.endswith("}")]
    assert kept and not any("score" in x for x in kept), "a row that is not ranked has no score"
    said += rate_locally(cut).communicate()[0].splitlines(keepends=True)
    assert rate_locally(whole).wait() == 0
    finished, expected = (
        {x["id"]: x for x in map(json.loads, path.read_text().splitlines())}
        for path in (cut, whole)
    )
    assert set(finished) == set(expected) and len(expected) == 48
    assert {x["status"] for x in finished.values()} == {"ok"}
    twice = len(said) - len(set(said))
    assert twice <= 1, f"{twice} rows were read again"  # the one whose line the kill cut off
    for key, line in expected.items():  # in bf16, other rows in a pack move the last digits
        assert finished[key]["score"] == pytest.approx(line["score"], abs=0.05)
