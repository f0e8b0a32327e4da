"""The command as a user meets it: a mistake is one sentence on stderr and exit status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROW = {"instruction": "Name a colour.", "input": "", "output": "Blue."}


def alpagasus2(*words: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")} | environ
    command = [sys.executable, "-m", "alpagasus2", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def fails_with(done: subprocess.CompletedProcess, *parts: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("alpagasus2: ")
    for part in parts:
        assert part in lines[-1], done.stderr


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, {**ROW, "instruction": "Name a tree."}]))
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"instruction": "a", "input": ""}]', "row 0 has no `output`"),
        (b'[{"instruction": "a", "output": "b"', "cut short"),
        ('[{"instruction": "café", "output": "b"}]'.encode("latin1"), "not UTF-8"),
        (b"[]", "is empty"),
        (b"", "line 1, column 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, says):
    (tmp_path / "rows.json").write_bytes(content)
    done = alpagasus2(
        "select", "--data", "rows.json", "--random_k", 1, "--output", "o.json", cwd=tmp_path
    )
    fails_with(done, "rows.json", says)
    assert not (tmp_path / "o.json").exists()


def test_wrong_options_and_missing_files(tmp_path, rows):
    select = ("select", "--data", rows, "--output", "o.json")
    fails_with(alpagasus2(*select, "--topk", 1, cwd=tmp_path), "--top_k")
    fails_with(alpagasus2(*select, "--top_k", 1, cwd=tmp_path), "no")
    missing = ("--scores", "none.csv", "--top_k", 1)
    fails_with(alpagasus2(*select, *missing, cwd=tmp_path), "none.csv")
    fails_with(alpagasus2("slect", cwd=tmp_path), "did you mean select?")
    fails_with(alpagasus2("run", "none.yaml", cwd=tmp_path), "none.yaml: no such file")


def test_check_lists_every_row(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([ROW, {**ROW, "output": ""}, ROW]))
    done = alpagasus2("check", "rows.json", "--output", "good.json", cwd=tmp_path)
    fails_with(done, "2 rows have a problem")
    assert "row 1: empty" in done.stdout and "row 2: duplicate" in done.stdout
    assert len(json.loads((tmp_path / "good.json").read_text())) == 1


def test_endpoint_without_key_or_server(tmp_path, rows):
    rate = ("rate", "--data", rows, "--output", "r.jsonl", "--model", "m")
    fails_with(alpagasus2(*rate, cwd=tmp_path), "OPENAI_API_KEY")
    local = (*rate, "--base_url", "http://127.0.0.1:9/v1")
    fails_with(alpagasus2(*local, cwd=tmp_path), "nothing answers there")
    dry = alpagasus2(*local, "--dry_run", "true", cwd=tmp_path)
    assert dry.returncode == 0 and "m at http://127.0.0.1:9/v1: 2 calls" in dry.stderr


def test_a_secret_is_neither_printed_nor_kept(tmp_path, rows):
    words = ("train", "--base_model", "b", "--data_path", rows, "--auth_token", "hf_secret123")
    done = alpagasus2(*words, "--print_config", cwd=tmp_path)
    assert done.returncode == 0 and "base_model: b" in done.stdout
    assert "hf_secret123" not in done.stdout + done.stderr
    key = alpagasus2(
        "rate", "--data", rows, "--output", "r.jsonl", "--model", "m", "--base_url",
        "http://127.0.0.1:9/v1", cwd=tmp_path, OPENAI_API_KEY="sk-secret123",
    )  # fmt: skip
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "sk-secret123" not in key.stdout + key.stderr and b"sk-secret123" not in kept


def test_seed_verdicts_become_a_report(tmp_path):
    source = SHARED / "judgments"
    if not source.exists():
        pytest.skip("the seed's real verdicts are not here")
    done = alpagasus2(
        "report", "--judgments", source, "--model_a", "alpagasus2", "--output", "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    pair = results["pairs"][0]
    assert (pair["win"], pair["tie"], pair["lose"]) == (40, 38, 2)
    assert (pair["first_slot_wins"], pair["second_slot_wins"]) == (44, 116)
    assert results["claim"]["verdict"] == "judge unfit: no claim"
    assert "vicuna_result.json" in done.stderr
    assert (tmp_path / "out/index.html").stat().st_size > 100_000
