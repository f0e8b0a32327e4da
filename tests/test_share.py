"""A push against a hub that really answers; a refusal before the training, not after it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from stand_ins import tiny_llama

TOKEN = "hf_THISisTHEsecret"
ROWS = [
    {"instruction": f"Name colour {i}.", "input": "", "output": f"Colour {i} is blue."}
    for i in range(6)
]
SMALL = ("--batch_size", 3, "--num_epochs", 1, "--cutoff_len", 64, "--learning_rate", 1e-3)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    user = {"name": "ada", "role": "write", "orgs": []}
    with HubServer({TOKEN: user, "hf_reader": {**user, "role": "read"}}) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers under a path that must not travel."""
    folder = tmp_path_factory.mktemp("home-of-ada") / "tiny-llama"
    tiny_llama(folder)
    return folder


def train(
    cwd: Path, base: Path, *words: object, endpoint: str, token: str = ""
) -> subprocess.CompletedProcess:
    """`alpagasus2 train` in a process of its own, with the library's loudest log."""
    (cwd / "rows.json").write_text(json.dumps(ROWS))
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "debug",
            "HF_HOME": str(cwd / "hf")}  # fmt: skip
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "alpagasus2", "train", "--base_model", base, "--data_path",
               "rows.json", "--output_dir", "out/mine", *SMALL, *words]  # fmt: skip
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def last_line(done: subprocess.CompletedProcess) -> str:
    """The sentence that ends a refused command, below the library's log."""
    assert TOKEN not in done.stdout + done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("alpagasus2: "), done.stderr
    return line


def test_the_adapter_arrives_in_one_commit_and_the_token_nowhere(tmp_path, base, hub):
    words = ("--hub_path", "ada/mine", "--auth_token", TOKEN, "--data_type", "json")
    done = train(tmp_path, base, *words, endpoint=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert f"pushed to {hub.endpoint}/ada/mine" in done.stdout
    repo, folder = hub.repos["ada/mine"], tmp_path / "out/mine"
    assert repo["private"] and len(repo["commits"]) == 1
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert repo["files"][name] == (folder / name).read_bytes(), name
    everything = b"".join(repo["files"].values())
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"home-of-ada" not in everything and str(tmp_path).encode() not in everything
    assert TOKEN.encode() not in everything + kept
    card = repo["files"]["README.md"].decode()
    assert '"ada/mine")' in card and "| learning_rate | 0.001 |" in card and "rows.json" in card
    written = hub.asked.index("GET /api/models/ada/mine/auth-check/write")  # before the training
    assert written < hub.asked.index("POST /api/models/ada/mine/preupload/main")


@pytest.mark.parametrize(
    ("words", "token", "says"),
    [
        (("--hub_path", "ada/mine"), "hf_reader", "may not write there"),
        (("--hub_path", "ada/mine"), "", "set HF_TOKEN or pass --auth_token"),
    ],
)
def test_a_push_that_would_be_refused_stops_before_the_training(
    tmp_path, base, hub, words, token, says
):
    done = train(tmp_path, base, *words, endpoint=hub.endpoint, token=token)
    assert done.returncode == 2 and says in last_line(done)
    assert not (tmp_path / "out").exists() and not hub.repos


def test_no_network_stops_before_the_training(tmp_path, base):
    words = ("--hub_path", "ada/mine")
    done = train(tmp_path, base, *words, endpoint="http://127.0.0.1:9", token=TOKEN)
    assert done.returncode == 2 and "cannot be reached" in last_line(done)
    assert not (tmp_path / "out").exists()


def test_a_push_that_breaks_off_leaves_the_adapter_and_says_how_to_go_on(tmp_path, base, hub):
    hub.fail["PUT /lfs/"] = 403
    done = train(tmp_path, base, "--hub_path", "ada/mine", endpoint=hub.endpoint, token=TOKEN)
    assert done.returncode == 2
    assert "out/mine is complete" in last_line(done) and "extras.hub.push(" in last_line(done)
    assert (tmp_path / "out/mine/adapter_model.safetensors").exists()
    assert hub.repos["ada/mine"]["files"] == {}  # nothing in part
    hub.fail.clear()
    call = last_line(done).split("push it with ")[1]
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    code = f"import alpagasus2.extras.hub; {call}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)
    assert "adapter_model.safetensors" in hub.repos["ada/mine"]["files"]


def test_an_output_folder_that_cannot_be_written_is_found_first(tmp_path, base, hub):
    (tmp_path / "out").write_text("a file")
    done = train(tmp_path, base, endpoint=hub.endpoint)
    assert done.returncode == 2 and "cannot be written" in last_line(done)


def test_a_merged_model_names_its_base_its_recipe_and_its_rows(tmp_path, base):
    assert train(tmp_path, base, endpoint="http://127.0.0.1:9").returncode == 0
    words = [sys.executable, "-m", "alpagasus2", "merge", "--adapter", "out/mine",
             "--output_dir", "out/whole", "--data_path", "rows.json", "--compare"]  # fmt: skip
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "dequantised" in done.stdout and "original" in done.stdout
    entry = json.loads((tmp_path / "out/manifest.json").read_text())["outputs"]["whole"]
    assert entry["ended"] and entry["config"]["base_model"] == str(base)
    card = (tmp_path / "out/whole/README.md").read_text()
    for part in (
        "Merged weights of a LoRA adapter of **tiny-llama**",
        "| learning_rate | 0.001 |",
        "| file | rows.json |",
        'AutoModelForCausalLM.from_pretrained("whole"',
    ):
        assert part in card, card
    assert "home-of-ada" not in card
