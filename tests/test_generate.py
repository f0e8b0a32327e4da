"""What the models are asked; and killed, the answers go on where they stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_endpoint import read, serving

from alpagasus2.data import load_questions
from alpagasus2.generate import GenerateConfig, encode_prompts

# One question in each of the four test sets' own schemas.
SCHEMAS = {
    "koala": {"id": "koala_1", "prompt": "List three films."},
    "sinstruct": {
        "id": "user_oriented_task_0",
        "motivation_app": "Grammarly",
        "instruction": "Make the sentence clearer.",
        "instances": [{"input": "Let me know if questions you have.", "output": "Ask me."}],
    },
    "vicuna": {"question_id": 1, "text": "How do I plan my day?", "category": "generic"},
    "wizardlm": {"idx": 1, "Skill": "Math", "Instruction": "What is 2 + 3?"},
}
SHARED = Path(__file__).resolve().parents[2] / "shared/data/test_sets/sinstruct_test_set.jsonl"

SCRIPT = """
import sys
from alpagasus2.data import load_questions
from alpagasus2.generate import GenerateConfig, generate, local_answers
from alpagasus2.quant_lora import QuantLoraConfig, load_base, load_tokenizer
model = load_base("smollm2-135m", QuantLoraConfig(load_in_4bit=False)).float()
tokenizer = load_tokenizer("smollm2-135m")
config = GenerateConfig(max_new_tokens=int(sys.argv[2]), token_budget=400)
arms = {"base": lambda questions: local_answers(model, tokenizer, questions, config)}
questions = load_questions("sample_questions")[: int(sys.argv[3])]
generate(questions, arms, sys.argv[1], config, "smollm2-135m", progress=False)
"""


def write_schemas(folder: Path) -> list[str]:
    """A file a test set, with one question in its schema."""
    files = {name: folder / f"{name}_test_set.jsonl" for name in SCHEMAS}
    for name, path in files.items():
        path.write_text(json.dumps(SCHEMAS[name]) + "\n")
    return [str(path) for path in files.values()]


def prompts_of(questions: list[dict]) -> list[str]:
    """The texts that reach the model."""
    from alpagasus2.quant_lora import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    return [
        tokenizer.decode(p) for p in encode_prompts(questions, tokenizer, 8192, GenerateConfig())
    ]


def test_the_self_instruct_inputs_are_in_the_prompts(tmp_path):
    paths = [Path(p) for p in write_schemas(tmp_path)]
    if SHARED.exists():
        paths.append(SHARED)
    for path in paths:
        if "sinstruct" not in path.name:
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        inputs = [row["instances"][0]["input"] for row in rows]
        assert any(text.strip() for text in inputs)
        for text, seen in zip(inputs, prompts_of(load_questions(path)), strict=True):
            assert text in seen
            assert ("### Input:" in seen) == bool(text.strip())


def test_four_test_sets_three_arms_one_load(tmp_path, monkeypatch):
    from alpagasus2 import cli, local
    from alpagasus2.quant_lora import add_lora, load_base

    for seed, arm in enumerate(("filtered", "random")):
        tuned = add_lora(load_base("smollm2-135m"), seed=seed)
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.data += 0.02
        tuned.save_pretrained(tmp_path / arm)
    loads: list[str] = []

    def counted(name: str, *rest: object) -> object:
        loads.append(name)
        return load_base(name, *rest)

    monkeypatch.setattr(local, "load_base", counted)
    adapters = [f"{arm}={tmp_path / arm}" for arm in ("filtered", "random")]
    options = ["--base_model", "smollm2-135m", "--max_new_tokens", "4", "--export", "seed"]
    command = ["generate", "--questions", *write_schemas(tmp_path), *options]
    output = tmp_path / "out" / "responses.jsonl"
    assert cli.main([*command, "--adapters", *adapters, "--output", str(output)]) in (0, None)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(loads) == 1
    assert {(x["test_set"], x["model"]) for x in lines} == {
        (test_set, arm) for test_set in SCHEMAS for arm in ("base", "filtered", "random")
    }
    assert len({x.get("adapter") for x in lines}) == 3
    seed_form = json.loads((output.parent / "koala_seed_0.json").read_text())
    assert set(seed_form[0]) == {"question_id", "prompt", "base", "filtered", "random"}


NO_TORCH = """
import sys
sys.modules.update(torch=None, transformers=None)
from alpagasus2.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_server_answers_on_a_machine_without_torch(tmp_path):
    output, manifest = tmp_path / "responses.jsonl", tmp_path / "manifest.json"
    with serving() as address:
        words = ["generate", "--questions", "sample_questions", "--limit", 5, "--output", output]
        words += ["--base_model", "m", "--base_url", f"{address}/v1", "--price_in", 1]
        command = [sys.executable, "-c", NO_TORCH, *words, "--price_out", 2]

        def run(*more: str) -> tuple[int, str]:
            done = subprocess.run([*map(str, command), *more], capture_output=True, text=True)
            return done.returncode, done.stderr

        status, said = run()
        assert status == 0, said
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(answers) == read(address)["requests"] == 5
        cost = json.loads(manifest.read_text())["outputs"]["responses.jsonl"]["cost"]
        assert cost["usd"] > 0 and cost["calls"] == 5
        assert run()[0] == 0 and read(address)["requests"] == 5  # the file has them
        status, said = run("--max_new_tokens", "9")
        assert status == 2 and "max_new_tokens was 256 and is now 9" in said
        output.unlink()
        assert run()[0] == 0 and read(address)["requests"] == 5  # the cache has them
    again = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert sorted(again) == sorted(x["response"] for x in answers)


def start(output: Path, tokens: int, questions: int) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SCRIPT, str(output), str(tokens), str(questions)]
    return subprocess.Popen(arguments, env=os.environ)


def answered(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def kill_at(process: subprocess.Popen, output: Path, lines: int) -> bool:
    """SIGKILL once the file has so many lines; False if the process ended by itself."""
    while process.poll() is None:
        if answered(output) >= lines:
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.01)
    return False


def texts(output: Path) -> dict[str, str]:
    """Answers by id; no id may have been answered twice."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["response"] for row in rows}


def undecided(parted: dict[str, tuple[str, str]]) -> dict[str, float]:
    """By id, the gap of the two best logits where the two answers part, one prompt at a time."""
    import torch

    from alpagasus2.quant_lora import QuantLoraConfig, load_base, load_tokenizer

    model = load_base("smollm2-135m", QuantLoraConfig(load_in_4bit=False)).float()
    tokenizer = load_tokenizer("smollm2-135m")
    questions = {q["id"]: q for q in load_questions("sample_questions")}
    gaps = {}
    for name, pair in parted.items():
        (prompt,) = encode_prompts([questions[name]], tokenizer, 4096, GenerateConfig())
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)
        both = zip([*a, -1], [*b, -1], strict=False)
        same = next(i for i, (x, y) in enumerate(both) if x != y)
        with torch.no_grad():
            best = model(torch.tensor([prompt + a[:same]])).logits[0, -1].topk(2).values
        gaps[name] = float(best[0] - best[1])
    return gaps


def check_killed(tmp_path: Path, kills: list[int], tokens: int, questions: int) -> None:
    """Killed at these line counts, the file ends as the uninterrupted one."""
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken" / "responses.jsonl"
    assert start(whole, tokens, questions).wait() == 0
    killed = [kill_at(start(broken, tokens, questions), broken, n) for n in kills]
    assert any(killed), "every run ended before it could be killed"
    assert start(broken, tokens, questions).wait() == 0
    expected, found = texts(whole), texts(broken)
    assert set(found) == set(expected) and len(found) == questions
    parted = {i: (expected[i], found[i]) for i in expected if found[i] != expected[i]}
    gaps = undecided(parted) if parted else {}
    assert all(gap < 1e-4 for gap in gaps.values()), gaps


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    check_killed(tmp_path, [2], tokens=8, questions=5)


@pytest.mark.slow
def test_five_kills_at_random(tmp_path):
    draw = random.Random(0)
    check_killed(tmp_path, sorted(draw.sample(range(1, 16), 5)), tokens=48, questions=16)
