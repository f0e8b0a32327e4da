"""Beyond one process: a base in parts on two, a cluster of two nodes, killed actors and drivers."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from stand_ins import tiny_llama, without

from alpagasus2.cli import main
from alpagasus2.core.files import adapter_sha256
from alpagasus2.data import iter_rows, load_examples
from alpagasus2.quant_lora import load_tokenizer

ROWS = 16
FEW = {"batch_size": 5, "num_epochs": 2, "learning_rate": 1e-2, "lora_dropout": 0.0}
FEW |= {"token_budget": 256}
# The second process is asked to stop after step 3; each says whether its base lies in parts.
STOP = """
import os, signal, sys
from torch.distributed.fsdp import FSDPModule
import alpagasus2.scale.sharding as sharding, alpagasus2.train as training
from alpagasus2.cli import main
after, split = training._Around.after, sharding.split
def stopping(self, done, figures):
    if done == 3 and os.environ["RANK"] == "1":
        self.stop.signal = signal.SIGTERM
    after(self, done, figures)
def told(model):
    split(model)
    parts = any(isinstance(m, FSDPModule) for m in model.modules())
    sys.stderr.write(f"in parts: {parts}\\n")  # in one piece: both processes write here
training._Around.after, sharding.split = stopping, told
sys.exit(main(sys.argv[1:]))
"""
# `accelerate launch` starts one process on a CPU whatever the file says: its variables do it.
PARTS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny`, a random Llama, and `rows.json`."""
    folder = tmp_path_factory.mktemp("bench")
    bos = load_tokenizer("smollm2-135m").bos_token_id
    tiny_llama(folder / "tiny", torch.bfloat16, num_key_value_heads=2, bos_token_id=bos)
    (folder / "rows.json").write_text(json.dumps(load_examples("sample")[0][:ROWS]))
    (folder / "stop.py").write_text(STOP)
    return folder


def train_words(bench: Path, output: Path, unpacked: bool) -> list[str]:
    """The arguments of a training."""
    named = {"base_model": bench / "tiny", "data_path": bench / "rows.json", "output_dir": output}
    values = {**named, **FEW, "unpacked": unpacked}
    return ["train", *(str(w) for k, v in values.items() for w in (f"--{k}", v))]


def done(words: list, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with some arguments."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


def losses(output: Path) -> list[float]:
    return json.loads((output / "train_result.json").read_text())["loss"]


@pytest.mark.parametrize("unpacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_a_base_in_parts_and_one_or_two_go_on(unpacked, bench, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert done(["-m", "alpagasus2", *train_words(bench, whole, unpacked)]).returncode == 0
    run = ["-m", "torch.distributed.run", "--nproc_per_node", "2", bench / "stop.py"]
    stopped = done([*run, *train_words(bench, parts, unpacked)], **PARTS)
    assert stopped.stderr.count("in parts: True") == 2, stopped.stderr
    assert stopped.stderr.count("stopped after step 3 of 8") == 2, stopped.stderr
    two = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if unpacked else []
    again = [*two, "-m", "alpagasus2", *train_words(bench, parts, unpacked)]
    ended = done(again, **(PARTS if unpacked else {}))
    assert ended.returncode == 0, ended.stderr
    assert losses(parts) == pytest.approx(losses(whole), abs=5e-4)
    assert {p.name for p in parts.iterdir()} == {p.name for p in whole.iterdir()}


# --- trainings side by side --------------------------------------------------------------------
ARMS = """
import json, sys
from pathlib import Path
from alpagasus2.quant_lora import QuantLoraConfig
from alpagasus2.scale.arms import Training, train_apart
from alpagasus2.batches import TrainConfig
if __name__ == "__main__":  # a worker imports this file, too
    bench, folder = map(Path, sys.argv[1:])
    rows = json.loads((bench / "rows.json").read_text())
    few = {"batch_size": 4, "num_epochs": 60, "learning_rate": 1e-2, "token_budget": 256}
    settings = TrainConfig(**few, save_steps=4), QuantLoraConfig(lora_dropout=0.0)
    given = [(f"arm-{i}", str(bench / "tiny"), rows[i::2], folder / f"arm-{i}") for i in range(2)]
    train_apart([Training(*arm, settings) for arm in given], 2, progress=False)
"""


def arms_words(bench: Path, folder: Path) -> list:
    """The arguments of two trainings at once, of 120 steps each."""
    (bench / "arms.py").write_text(ARMS)
    return [bench / "arms.py", bench, folder]


@pytest.fixture(scope="module")
def adapters(bench, tmp_path_factory) -> list[str]:
    """What they make when nothing happens."""
    folder = tmp_path_factory.mktemp("arms")
    assert done(arms_words(bench, folder)).returncode == 0
    return [adapter_sha256(folder / f"arm-{i}") for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["driver", "worker"])
def test_arms_go_on_after_a_kill_and_nobody_writes_on_without_their_driver(
    killed, bench, adapters, tmp_path
):
    words = [sys.executable, *arms_words(bench, tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=env, stderr=subprocess.PIPE, start_new_session=True) as driver:
        wait_for(lambda: len([*tmp_path.glob(".arm-?.checkpoint")]) == 2)
        children = psutil.Process(driver.pid).children()
        workers = [p for p in children if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        if killed == "driver":
            os.killpg(driver.pid, 9)  # all that the terminal knows of
        else:
            workers[0].kill()
        assert not psutil.wait_procs(workers, timeout=60)[1]
        said = driver.stderr.read().decode()
    assert killed == "driver" or "ended with status -9; what it saved is kept" in said, said
    assert not [*tmp_path.glob("arm-?")] and len([*tmp_path.glob(".arm-?.checkpoint")]) == 2
    assert done(arms_words(bench, tmp_path)).returncode == 0
    assert [adapter_sha256(tmp_path / f"arm-{i}") for i in range(2)] == adapters


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    code = without(["ray"], "from alpagasus2.cli import main; sys.exit(main(sys.argv[1:]))")
    words = ["rate", "--data", "sample", "--limit", "3", "--output", tmp_path / "r.jsonl"]
    words += ["--model", "m", "--base_url", "http://127.0.0.1:9/v1", "--engine", "ray"]
    asked = done(["-c", code, *words])
    assert asked.returncode == 2
    assert asked.stderr.strip().endswith('run `pip install "alpagasus2[scale]"`'), asked.stderr


def test_nothing_loads_ray_before_it_is_asked_for():
    code = "import sys, alpagasus2.cli, alpagasus2.commands.ask, alpagasus2.scale.rows, "
    code += "alpagasus2.scale.engine, alpagasus2.experiment; sys.exit('ray' in sys.modules)"
    assert done(["-c", code]).returncode == 0


# --- a cluster ---------------------------------------------------------------------------------
CLUSTER = """
import os, sys, time
os.environ["RAY_worker_niceness"] = "0"
import ray
from ray.cluster_utils import Cluster
for left in range(4, -1, -1):  # its agent has 15 s to start: https://github.com/ray-project/ray/issues/65983
    try:
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
        nodes.add_node(num_cpus=4)
        break
    except Exception:
        if not left:
            raise
print(nodes.address, flush=True)
sys.stdin.read()
nodes.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """The address of two nodes of four logical CPUs each, on this machine."""
    pytest.importorskip("ray", reason='the extra "scale" is not installed')
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nodes:
        yield nodes.stdout.readline().strip()
        nodes.stdin.close()


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers after 50 ms, and counts."""
    words = [sys.executable, Path(__file__).with_name("faulty_server.py"), "--latency", "0.05"]
    with subprocess.Popen([*words, "--headers", "0"], stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


def calls(server: str) -> int:
    """How many chats were answered."""
    with urllib.request.urlopen(f"{server}/hashes") as answer:
        return sum(n for n, _ in json.load(answer).values())


def rate_words(folder: Path, output: Path, server: str, *more: str) -> list[str]:
    """The arguments of a rating."""
    words = ["-m", "alpagasus2", "rate", "--data", folder / "many.jsonl", "--output", output]
    return [*words, "--model", "m", "--base_url", f"{server}/v1", *more]


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.2)


def lines(path: Path) -> int:
    growing = sorted(path.glob("_part-*.jsonl")) if path.is_dir() else [path]
    return sum(p.read_bytes().count(b"\n") for p in growing if p.exists())


def rows_of(folder: Path, n: int) -> None:
    """Rows, each of its own."""
    given = [{"instruction": f"Add {i} and {i + 1}.", "output": f"{2 * i + 1}"} for i in range(n)]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


def by_id(path: Path) -> dict[str, dict]:
    """The lines of a file; which of two calls served a row, and in which order, is chance."""
    return {line["id"]: line for line in iter_rows(path)}


def test_commands_keep_the_same_rows_from_parquet_and_from_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_of(tmp_path, 40)
    for end in ("json", "parquet"):
        assert main(["check", "many.jsonl", "--output", f"in/rows.{end}"]) == 0
        for engine in ([], ["--engine", "ray"]):
            out = f"out/best{len(engine)}.{end}"
            words = ["--data", f"in/rows.{end}", "--random_k", "9", "--output", out, *engine]
            assert main(["select", *words]) == 0
    kept = [load_examples(path)[0] for path in sorted(Path("out").glob("best*"))]
    assert len(kept) == 4 and all(rows == kept[0] for rows in kept)
    Path("set").mkdir()
    Path("out/best0.parquet").rename("set/a.parquet")
    Path("set").rename("out/set")  # a folder whose name could be a hub id
    assert load_examples("out/set")[0] == kept[0]


@pytest.mark.slow  # in CI the cells of scale/rows do this on one node
def test_a_cluster_writes_the_file_of_one_process(cluster, server, tmp_path):
    rows_of(tmp_path, 600)
    one, many = tmp_path / "one" / "r.jsonl", tmp_path / "many" / "r.jsonl"
    assert done(rate_words(tmp_path, one, server)).returncode == 0
    spread = done(rate_words(tmp_path, many, server, "--engine", "ray", "--address", cluster))
    assert spread.returncode == 0, spread.stderr
    assert by_id(many) == by_id(one) and lines(many) == 600
    before = calls(server)
    again = done(rate_words(tmp_path, many, server, "--engine", "ray", "--address", cluster))
    assert again.returncode == 0 and calls(server) == before, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_a_worker_and_the_driver_are_killed_and_nothing_is_asked_again(
    name, cluster, server, tmp_path
):
    rows_of(tmp_path, 4000)
    output = tmp_path / name
    words = rate_words(tmp_path, output, server, "--engine", "ray", "--address", cluster)
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL) as driver:
        wait_for(lambda: lines(output) > 500)
        worker = subprocess.run(["pgrep", "-n", "-f", "ray::MapWorker"], capture_output=True)
        os.kill(int(worker.stdout), 9)
        wait_for(lambda: lines(output) > 2000)
        driver.kill()
    ended = done(words)
    assert ended.returncode == 0, ended.stderr
    assert len([*iter_rows(output)]) == len(by_id(output)) == 4000
    assert name == "r.jsonl" or [p.name for p in output.iterdir()] == ["part-00000.parquet"]
    assert 4000 <= calls(server) <= 4000 + 8 + 16  # what was under way at the two kills


@pytest.mark.slow
def test_signals_of_two_actors_are_those_of_one_process(cluster, bench, tmp_path):
    rows_of(tmp_path, 1200)
    one, many = tmp_path / "one.jsonl", tmp_path / "many.parquet"
    words = ["-m", "alpagasus2", "rate", "--data", tmp_path / "many.jsonl", "--rater", "flaws"]
    words += ["--model", bench / "tiny", "--template", "alpaca", "--output"]
    assert done([*words, one]).returncode == 0
    spread = done([*words, many, "--engine", "ray", "--address", cluster])
    assert spread.returncode == 0, spread.stderr
    here, there = by_id(one), by_id(many)
    assert here.keys() == there.keys()
    for key, line in here.items():
        assert there[key]["signals"] == pytest.approx(line["signals"], abs=1e-6)
        assert there[key]["score"] == pytest.approx(line["score"], abs=1e-6)
