"""What `pip install alpagasus2` gives: the right files; every step but the models' without torch.

The short form builds the wheel and hides the training stack; the slow one installs into an empty
venv, which downloads a few hundred MB.
"""

import configparser
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from stand_ins import without
from test_endpoint import serving

import alpagasus2

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"accelerate", "bitsandbytes", "datasets", "gguf", "huggingface_hub", "peft", "psutil"}
MODELS |= {"safetensors", "sentencepiece", "torch", "transformers", "trl"}


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def wheel_of(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        name = next(n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(files.read(name).decode())


def test_the_wheel_holds_the_package_its_types_and_the_data_set(dist):
    with zipfile.ZipFile(wheel_of(dist)) as files:
        names = set(files.namelist())
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "alpagasus2 = alpagasus2.cli:main" in files.read(entry).decode()
    ours = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "alpagasus2").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    ours |= {f"alpagasus2/_dataset/{p.name}" for p in (ROOT / "dataset").iterdir() if p.is_file()}
    assert ours <= names and {"alpagasus2/py.typed", "alpagasus2/report/page.html"} <= ours
    assert any(n.endswith("licenses/LICENSE") for n in names)
    others = {n for n in names if not n.startswith("alpagasus2")}
    assert not others, f"these would be installed beside the package: {others}"


def test_the_sdist_holds_what_a_build_reads(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as files:
        names = {n.partition("/")[2] for n in files.getnames()}
    needed = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert needed | {"constraints.txt", "CITATION.cff", "tests/faulty_server.py"} <= names
    assert {f"dataset/{p.name}" for p in (ROOT / "dataset").iterdir()} <= names


def test_the_base_needs_no_training_stack_and_each_bound_is_a_lower_one(dist):
    wanted = [Requirement(r) for r in metadata_of(wheel_of(dist)).get_all("Requires-Dist")]
    base = {r.name for r in wanted if not r.marker}
    assert not base & MODELS and "openai" in base
    extras = {x for r in wanted if r.marker for x in re.findall(r'extra == "(\w+)"', str(r.marker))}
    assert extras == {"train", "cuda", "serve", "leaderboard", "inspect", "scale", "dev"}
    train = {r.name for r in wanted if r.marker and r.marker.evaluate({"extra": "train"})}
    assert train - base == MODELS
    runs = [r for r in wanted if not r.marker or 'extra == "dev"' not in str(r.marker)]
    unbound = [r.name for r in runs if not any(s.operator == ">=" for s in r.specifier)]
    assert not unbound, f"without a lower bound in settings.ini: {unbound}"


def test_pins_and_bounds_agree():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line)
    for key in ("requirements", "train_requirements", "serve_requirements", "dev_requirements"):
        for text in settings()[key].split():
            r = Requirement(text)
            pin = pins.get(r.name)
            assert pin is None or r.specifier.contains(pin), f"{text} refuses the pin {pin}"


def test_the_version_stands_in_one_place(dist):
    version = settings()["version"]
    assert alpagasus2.__version__ == version, "run nbdev_export"
    assert metadata_of(wheel_of(dist))["Version"] == version
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


# --- without torch ---------------------------------------------------------------------------
HIDE = without(MODELS, """
for words in json.loads(sys.argv[1]):
    if status := main(words):
        sys.exit(f"{words}: status {status}")
""")  # fmt: skip


def steps(address: str, folder: Path) -> list[list[str]]:
    """The commands that an installation without extras is to carry out."""
    row = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    rows = [row, {**row, "instruction": "Name a tree.", "output": "Oak."}]
    question = {"id": "q1", "test_set": "mine", "category": "x", **rows[0], "replicate": 0}
    del question["output"]
    answers = [
        {**question, "model": model, "response": text, "finish_reason": "stop",
         "prompt_tokens": 9, "response_tokens": 2}
        for model, text in (("base", "Red."), ("best", "Blue, like the sky."))
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "responses.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    server = f"--model m --base_url {address}/v1"
    return [
        line.split()
        for line in (
            "--help",
            "check rows.json",
            f"rate --data rows.json --output ratings.jsonl {server}",
            "select --data rows.json --scores ratings.jsonl --top_k 1 --output best.json",
            f"judge --responses responses.jsonl --output judgments.jsonl --model_a best "
            f"--model_b base {server}",
            "report --judgments judgments.jsonl --responses responses.jsonl --output report",
        )
    ]


def came_out(folder: Path) -> None:
    """Each step's output is there."""
    assert len((folder / "ratings.jsonl").read_text().splitlines()) == 2
    assert len(json.loads((folder / "best.json").read_text())) == 1
    results = json.loads((folder / "report" / "results.json").read_text())
    assert results["pairs"][0]["n"] + results["pairs"][0]["failed"] == 1
    assert "Blue, like the sky." in (folder / "report" / "index.html").read_text()


def without_checkout() -> dict[str, str]:
    """An environment in which only what is installed can be imported, and which has no key."""
    dropped = ("OPENAI_", "PYTHONPATH")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


def test_every_step_but_the_models_runs_with_the_training_stack_hidden(tmp_path):
    with serving() as address:
        done = subprocess.run(
            [sys.executable, "-c", HIDE, json.dumps(steps(address, tmp_path))], cwd=tmp_path,
            capture_output=True, text=True, env=without_checkout() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    came_out(tmp_path)


def installed_in(folder: Path, *what: str) -> Path:
    """An empty venv with only these in it; its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run(
        [programs / "python", "-m", "pip", "install", "-q", *constraints, *what],
        env=without_checkout(), check=True,
    )  # fmt: skip
    return programs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_in_an_empty_venv_without_torch(kind, dist, tmp_path):
    programs = installed_in(tmp_path / "venv", str(next(dist.glob(kind))))
    env = without_checkout()
    torch = subprocess.run([programs / "python", "-c", "import torch"], capture_output=True)
    assert b"No module named 'torch'" in torch.stderr
    with serving() as address:
        for words in steps(address, tmp_path):
            done = subprocess.run(
                [programs / "alpagasus2", *words], cwd=tmp_path, env=env,
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    came_out(tmp_path)
    train = ["train", "--base_model", "smollm2-135m", "--data_path", "rows.json"]
    done = subprocess.run(
        [programs / "alpagasus2", *train], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "pip install 'alpagasus2[train]'" in done.stderr
