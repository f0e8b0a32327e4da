"""The command as a user meets it: a mistake is one sentence on stderr and exit status 2."""

import ast
import hashlib
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from stand_ins import without

from alpagasus2.catalog import dataset_path, describe_data
from alpagasus2.cli import COMMANDS, build_parser, main
from alpagasus2.core.files import dumps

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
        (b"", "is empty"),
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


SEED_COMMANDS = (
    """python AlpaGasus2-QLoRA/training/finetune.py \\
    --base_model 'meta-llama/Llama-2-7b-hf' \\
    --data_path 'AlpaGasus2-QLoRA/dataset/alpaca_t45.json' \\
    --data_type 'json' --output_dir './results' \\
    --hub_path 'Hub path to upload the model' --auth_token 'hf_secret123' \\
    --num_epochs 3 --learning_rate 2e-5 --val_set_size 0.05""",
    """python AlpaGasus2-QLoRA/training/finetune.py \\
    --base_model 'meta-llama/Llama-2-13b-hf' \\
    --data_path 'AlpaGasus2-QLoRA/dataset/alpaca_t45.json' \\
    --data_type 'json' --output_dir './results' \\
    --hub_path 'Hub path to upload the model' --auth_token 'hf_secret123' \\
    --num_epochs 5 --learning_rate 1e-5 --val_set_size 0.05""",
    """python AlpaGasus2-QLoRA/training/finetune.py \\
    --base_model 'your model' --data_path 'your data' --data_type 'hf' \\
    --hub_path 'Hub path to upload the model' --auth_token 'hf_secret123' \\
    --output_dir './results' --batch_size 128 --micro_batch_size 4 --num_epochs 3 \\
    --learning_rate 2e-5 --cutoff_len 512 --val_set_size 0.05 --load_in_4bit True \\
    --bnb_4bit_quant_type 'nf4' --bnb_4bit_double_quant True --lora_r 8 --lora_alpha 32 \\
    --lora_dropout 0.05 --lora_bias 'none' --lora_task_type 'CAUSAL_LM' \\
    --lora_target_modules '[q_proj,v_proj]'""",
)  # its README's three, with the line continuations that they lack; the third with every option


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_the_seeds_commands_parse_with_only_the_program_name_changed(command, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")  # put back afterwards
    python, script, *words = shlex.split(command.replace("\\\n", ""))
    assert (python, Path(script).name) == ("python", "finetune.py")
    with pytest.raises(SystemExit) as leaving:
        main(["train", *words, "--print_config"])
    said = capsys.readouterr()
    assert not leaving.value.code, said.err
    config = yaml.safe_load(said.out)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.pop("--auth_token") == os.environ["HF_TOKEN"] == "hf_secret123"
    assert "hf_secret123" not in said.out + said.err and "auth_token" not in config
    for option, text in options.items():
        given = float(text) if "e-" in text else yaml.safe_load(text)
        assert config[option.removeprefix("--")] == given, option


def test_a_hub_path_of_the_seeds_readme_is_refused_before_anything_loads(rows, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    words = [
        "train",
        "--base_model",
        "none",
        "--data_path",
        str(rows),
        "--auth_token",
        "your token",
    ]
    assert main([*words, "--hub_path", "Hub path to upload"]) == 2
    assert "USER/NAME" in capsys.readouterr().err
    assert main([*words, "--hub_path", "ada/x"]) == 2
    said = capsys.readouterr().err
    assert "characters that no token has" in said and "your token" not in said


def test_preview_needs_no_weights_and_colours_a_terminal(tmp_path, rows, capsys):
    from alpagasus2.quant_lora import load_tokenizer

    words = tmp_path / "words"  # a tokenizer, no model
    load_tokenizer("smollm2-135m").save_pretrained(words)
    command = ["preview", "--base_model", str(words), "--data_path", str(rows), "--limit", "1"]
    page = tmp_path / "page.html"
    assert main([*command, "--preset", "strong", "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "[Blue][.][<|im_end|>] <- EOS" in said and "\033" not in said
    assert "row 2" not in said and re.search(r"rows that end in EOS +2\n", said)
    assert "&lt;|im_end|&gt;" in page.read_text()
    assert "\033[30;42mBlue" in in_a_terminal(*command, cwd=tmp_path)


def in_a_terminal(*words: object, cwd: Path, **environ: str) -> str:
    """What a command writes to a terminal of its own."""
    near, side = pty.openpty()
    command = [sys.executable, "-m", "alpagasus2", *map(str, words)]
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environ
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=side, stderr=side) as process:
        os.close(side)
        parts = []
        while True:
            try:
                parts.append(os.read(near, 4096))
            except OSError:  # the other end is closed
                break
            if not parts[-1]:
                break
        assert process.wait() == 0, b"".join(parts).decode()
    os.close(near)
    return b"".join(parts).decode()


WITHOUT_TORCH = without(
    {"torch", "bitsandbytes", "peft", "transformers"}, "sys.exit(main(sys.argv[1:]))"
)


def test_doctor_shows_no_secret_and_works_without_torch(tmp_path):
    env = os.environ | {"OPENAI_API_KEY": "sk-secret123", "HF_TOKEN": "hf_secret123",
                        "HF_ENDPOINT": "http://127.0.0.1:9"}  # fmt: skip
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(
        [*command, "doctor"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "secret123" not in done.stdout + done.stderr
    assert done.stdout.count('pip install "alpagasus2[train]"') >= 2
    assert "HF_TOKEN is there; http://127.0.0.1:9 did not answer" in done.stdout
    assert done.returncode == 0, done.stdout  # nothing here is broken, some of it is not installed
    train = ["train", "--base_model", "b", "--data_path", "d.json"]
    done = subprocess.run([*command, *train], cwd=tmp_path, env=env, capture_output=True, text=True)
    fails_with(done, "pip install 'alpagasus2[train]'")


def test_doctor_fails_with_a_status_and_one_closing_sentence(tmp_path):
    code = (
        "import shutil, sys; from collections import namedtuple;"
        "shutil.disk_usage = lambda p: namedtuple('Usage', 'free')(1e6);"
        "from alpagasus2.cli import main; sys.exit(main(['doctor']))"
    )
    env = os.environ | {"HF_TOKEN": "", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    fails_with(done, "disk, results", "disk, models", "say what to do")
    assert "fail  disk, results  0.0 GB free" in done.stdout and "-> make room" in done.stdout


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


def test_the_claim_of_a_run_decides_its_report(tmp_path, capsys):
    shared = {"test_set": "t", "category": None, "instruction": "q", "input": "", "replicate": 0,
              "model_a": "zeta", "model_b": "alpha", "vote": 0, "protocol": "verdict",
              "response_a": "good", "response_b": "bad", "status": "ok", "review": "",
              "judge": {"model": "j"}, "usage": None, "score_a": None, "score_b": None}  # fmt: skip
    lines = [
        {"id": f"q{i}", "first": first, "verdict": "a" if i % 3 else "b", **shared}
        for i in range(60)
        for first in "ab"
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "judgments.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    plan = {"recipe": {"margin": 0.05}, "model_a": "zeta", "control": "alpha", "aa": None}
    digest = hashlib.sha256(dumps(plan).encode()).hexdigest()
    (run / "claim.json").write_text(json.dumps({**plan, "sha256": digest}))
    words = ["report", "--judgments", str(run), "--output", str(tmp_path / "page")]
    assert main(words) == 0
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert results["pooled"][0]["model_a"] == "zeta"  # not the first by name
    assert "is not worse than alpha by more than 5 points" in results["claim"]["reason"]
    plan["control"] = "somebody"
    (run / "claim.json").write_text(json.dumps({**plan, "sha256": digest}))
    capsys.readouterr()
    assert main(words) == 2
    assert "a claim cannot be changed" in capsys.readouterr().err


def test_kept_rows_carry_the_licence_of_their_set(tmp_path):
    for data, output in (("sample", "some.json"), (str(tmp_path / "some.json"), "fewer.json")):
        words = ["--data", data, "--random_k", "5", "--output", str(tmp_path / output)]
        assert main(["select", *words]) == 0
        assert describe_data(tmp_path / output, 5)["licence"] == "CC0-1.0"


# --- for scripts ---------------------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_quiet_and_json_and_its_example_parses(command):
    parser = build_parser(command)
    found = parser.parse_args([*shlex.split(COMMANDS[command].example), "--quiet", "--json"])
    assert found.quiet and found.json
    text = parser.format_help().replace("\\\n", "")  # as a shell joins the lines of one command
    assert f"example: alpagasus2 {command} {COMMANDS[command].example}" in " ".join(text.split())


def _misplaced(path: Path) -> Iterator[str]:
    "Parameters and fields whose comment is on the last of several lines, where it is not found."
    text = path.read_text()
    words = tokenize.generate_tokens(io.StringIO(text).readline)
    said = {t.start[0] for t in words if t.type == tokenize.COMMENT and "fmt:" not in t.string}
    nodes = [*ast.walk(ast.parse(text))]
    fields = [x for n in nodes if isinstance(n, ast.ClassDef) for x in n.body]
    found = [n for n in nodes if isinstance(n, ast.arg)]
    found += [x for x in fields if isinstance(x, ast.AnnAssign)]
    for x in found:
        if x.end_lineno != x.lineno and x.end_lineno in said:
            yield f"{path.name}:{x.lineno}"


def test_every_option_has_a_help_of_its_own():
    "The help is the comment beside a parameter, which is read from the first of its lines."
    for command in COMMANDS:
        for action in build_parser(command)._actions:
            assert action.help and "(type:" not in action.help, (command, action.dest)
    folder = Path(__file__).parents[1] / "alpagasus2"
    assert [x for p in folder.rglob("*.py") for x in _misplaced(p)] == []


CHEAP = {
    "plan": "--prompts 80 --runs 3",
    "fetch": "",
    "check": "rows.json --output good.json",
    "select": "--data rows.json --random_k 4 --output best.json",
    "rate": "--data rows.json --output ratings.jsonl --rater flaws --dry_run",
    "preview": "--base_model smollm2-135m --data_path rows.json",
    "estimate": "--base_model llama-2-7b",
    "train": "--base_model smollm2-135m --data_path rows.json --preset quickstart --dry_run",
    "generate": "--base_model smollm2-135m --questions sample_questions --output r.jsonl --dry_run",
    "report": "--output page --responses answers.jsonl",
    "verify": "page",
}


def test_json_is_one_object_with_the_documented_fields_and_quiet_says_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = json.loads(dataset_path("sample.json").read_text())[:12]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked = {"id": "q", "test_set": "own", "instruction": "Name a colour.", "input": ""}
    answers = [asked | {"model": m, "response": m, "replicate": 0, "finish_reason": "stop",
                        "prompt": "p"} for m in "ab"]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in answers))
    for command, words in CHEAP.items():
        assert main([command, *words.split(), "--json"]) == 0, command
        found = json.loads(capsys.readouterr().out)  # nothing stands beside the object
        assert list(found) == ["command", "status", "error", "result", "printed"]
        assert (found["command"], found["status"], found["error"]) == (command, 0, None)
        assert set(found["result"]) <= set(COMMANDS[command].result), command
        if COMMANDS[command].result and "--dry_run" not in words:
            assert found["result"], command
        assert main([command, *words.split(), "--quiet"]) == 0
        assert capsys.readouterr().out == "", command
