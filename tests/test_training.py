"""Whatever interrupts a training, and however many processes share it, the adapter is the same."""

import json
import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stand_ins import tiny_llama

import alpagasus2.train as training
from alpagasus2.cli import main
from alpagasus2.core.files import UserError
from alpagasus2.core.run_folder import hold
from alpagasus2.data import load_examples
from alpagasus2.model.budget import TOKEN_BUDGET
from alpagasus2.model.checkpoint import Checkpoint
from alpagasus2.quant_lora import QuantLoraConfig, load_tokenizer

STEPS = 24  # 24 rows, 4 a step, 4 epochs
FEW = {"batch_size": 4, "num_epochs": 4, "learning_rate": 1e-2}
LAUNCH = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
LAUNCH += "--mixed_precision no --dynamo_backend no"
# `alpagasus2` in a launched process, which also notes what it trained on and wrote.
SPY = """
import json, os, sys
from pathlib import Path
import alpagasus2.train as training
from alpagasus2.model.checkpoint import Checkpoint
from alpagasus2.cli import main
seen = {"rows": [], "saves": 0, "adapters": 0}
nll, save, adapter = training.target_nll, Checkpoint.save, training.save_adapter
def noted_nll(model, batch):
    seen["rows"] += [e.id for e in batch]
    return nll(model, batch)
def noted_save(*arguments):
    seen["saves"] += 1
    save(*arguments)
def noted_adapter(*arguments):
    seen["adapters"] += 1
    adapter(*arguments)
training.target_nll, Checkpoint.save, training.save_adapter = noted_nll, noted_save, noted_adapter
status = main(sys.argv[2:])
Path(f"{sys.argv[1]}-{os.environ['RANK']}.json").write_text(json.dumps(seen))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return load_examples("sample")[0][:24]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> Path:
    """A folder with `tiny`, a random Llama, and `rows.json`."""
    folder = tmp_path_factory.mktemp("bench")
    bos = load_tokenizer("smollm2-135m").bos_token_id
    tiny_llama(folder / "tiny", torch.bfloat16, num_key_value_heads=2, bos_token_id=bos)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def words(bench: Path, output: Path, model: str = "tiny", **settings: object) -> list[str]:
    """The arguments of a training."""
    base = model if model == "smollm2-135m" else bench / model
    named = {"base_model": base, "data_path": bench / "rows.json", "output_dir": output}
    values = {**named, **FEW, "save_steps": 1, **settings}
    return ["train", *(str(w) for k, v in values.items() for w in (f"--{k}", v))]


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "alpagasus2", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def state(output: Path) -> Path:
    return output.with_name(f".{output.name}.checkpoint")


def step_of(output: Path) -> int:
    """The steps that the checkpoint holds; 0 before the first. It has to be readable always."""
    if not state(output).exists():
        return 0
    with safe_open(state(output), "pt") as file:
        return json.loads(file.metadata()["step"])


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    end = time.monotonic() + 300
    while step_of(output) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"step {step} was not reached in 5 minutes"
        time.sleep(0.01)


def weights(output: Path) -> bytes:
    assert not state(output).exists(), "the checkpoint of a finished training is removed"
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(bench: Path) -> bytes:
    assert main(words(bench, bench / "whole")) == 0
    return weights(bench / "whole")


def said(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The sentence with which a command that ends with status 2 ends."""
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_one_training_at_a_time_in_a_folder(bench, tmp_path, capsys):
    output = tmp_path / "adapter"
    with hold(output):
        assert "another process is writing it" in said(words(bench, output), capsys)
    assert [p.name for p in tmp_path.iterdir()] == [".adapter.lock"]


def test_a_finished_training_is_not_done_again(bench, uninterrupted, capsys):
    output, made = bench / "whole", (bench / "whole/train_result.json").stat().st_mtime_ns
    assert main(words(bench, output)) == 0
    assert "is finished" in capsys.readouterr().err
    assert (output / "train_result.json").stat().st_mtime_ns == made
    assert "trained on other rows" in said(words(bench, output, limit=20), capsys)
    assert "learning_rate was" in said(words(bench, output, learning_rate=1e-3), capsys)


def test_a_changed_adapter_is_no_finished_training(bench, uninterrupted, tmp_path, capsys):
    shutil.copytree(bench / "whole", tmp_path / "whole")
    shutil.copy(bench / "manifest.json", tmp_path)
    file = tmp_path / "whole/adapter_model.safetensors"
    file.write_bytes(uninterrupted[:-1] + bytes([uninterrupted[-1] ^ 1]))
    assert "weights differ" in said(words(bench, tmp_path / "whole"), capsys)
    assert main(words(bench, tmp_path / "whole", overwrite=True)) == 0
    assert weights(tmp_path / "whole") == uninterrupted


def kill_and_finish(arguments: list[str], output: Path, kills: int, last: int, seed: int) -> None:
    """SIGKILL at random steps, in rising order and a random moment after each; then finish."""
    draw = random.Random(seed)
    for step in sorted(draw.sample(range(1, last), kills)):
        process = start(arguments)
        wait_for_step(process, output, step)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert step_of(output) >= step
    assert main(arguments) == 0


def test_killed_twice_it_ends_with_the_same_bytes(bench, uninterrupted, tmp_path):
    output = tmp_path / "adapter"
    kill_and_finish(words(bench, output), output, kills=2, last=STEPS - 8, seed=0)
    assert weights(output) == uninterrupted


@pytest.mark.slow
def test_a_real_model_killed_five_times_ends_with_the_same_bytes(bench, tmp_path):
    settings = {"model": "smollm2-135m", "batch_size": 4, "num_epochs": 2}
    whole, output = tmp_path / "whole", tmp_path / "adapter"
    assert main(words(bench, whole, **settings)) == 0
    kill_and_finish(words(bench, output, **settings), output, kills=5, last=10, seed=1)
    assert weights(output) == weights(whole)


def save_forever(path: Path, layer: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    torch.set_num_threads(1)
    for step in range(1, 10**9):
        with torch.no_grad():
            layer.weight.fill_(step)
        Checkpoint(path, {}).save(step, {"weight": layer.weight}, optimizer, {})


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path):
    layer = torch.nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    path, draw = tmp_path / "state", random.Random(0)
    arguments, found = (path, layer, optimizer), []
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=arguments)
        process.start()
        time.sleep(draw.uniform(0.05, 0.25))
        process.kill()
        process.join()
        step, _ = Checkpoint(path, {}).load({"weight": layer.weight}, optimizer)
        assert not step or layer.weight.unique().tolist() == [step]
        found.append(step)
    assert len(set(found)) > 2, f"the kills did not come at different moments: {found}"


@pytest.mark.parametrize(("asked", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_says_so_and_goes_on(asked, status, bench, uninterrupted, tmp_path):
    output = tmp_path / "adapter"
    arguments = words(bench, output, save_steps=5)
    process = start(arguments)
    wait_for_step(process, output, 5)
    process.send_signal(asked)
    said = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == status, said
    expected = f"stopped after step {step_of(output)} of {STEPS}; run the same command to go on"
    assert said[-1] == f"alpagasus2: {expected}"
    assert not any("Traceback" in line for line in said)
    assert main(arguments) == 0
    assert weights(output) == uninterrupted


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit")
def test_on_a_full_disk_the_last_checkpoint_stays(bench, uninterrupted, tmp_path):
    output = tmp_path / "adapter"
    process = start(words(bench, output))
    wait_for_step(process, output, 2)
    full = state(output).stat().st_size - 1000  # bytes that a file may have from now on
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (full, full))
    said = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 2, said
    assert said[-1].startswith("alpagasus2: ") and "could not be written" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert step_of(output) >= 2
    left = sorted(p.name for p in tmp_path.glob(".adapter*"))
    assert left == [".adapter.checkpoint", ".adapter.lock"]
    assert main(words(bench, output)) == 0
    assert weights(output) == uninterrupted


def test_a_loss_that_is_no_number_names_the_rows(bench, rows, tmp_path, capsys):
    kept, _ = training.encode_rows(rows, load_tokenizer(bench / "tiny"), training.TrainConfig())
    times = Counter(t for e in kept for t in set(e.ids[: e.n_prompt]))
    row, token = next((e, t) for e in kept for t in e.ids[: e.n_prompt] if times[t] == 1)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (bench / "tiny").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    schedule = training.batch_schedule(len(kept), training.TrainConfig(**FEW))
    at = next(s for s, batch in enumerate(schedule) if row.id in {kept[i].id for i in batch})
    assert main(words(bench, tmp_path / "adapter", base_model=broken)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"alpagasus2: step {at}: loss nan"), said
    assert said.endswith("rows " + ", ".join(kept[i].id for i in schedule[at]))
    assert step_of(tmp_path / "adapter") == at
    assert not (tmp_path / "adapter").exists()


class Stop(Exception):
    """Raised in place of a training step."""


@pytest.mark.parametrize("begun", [0, 3])
def test_two_processes_train_as_one(begun, bench, rows, tmp_path):
    exact = {"batch_size": 8, "num_epochs": 2, "lora_dropout": 0.1, "token_budget": 256}
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(words(bench, one, **exact)) == 0
    if begun:  # one process takes the first steps
        calls, step = iter(range(99)), training.training_step

        def some(*arguments):
            if next(calls) == begun:
                raise Stop
            return step(*arguments)

        with patch("alpagasus2.train.training_step", some), pytest.raises(Stop):
            main(words(bench, two, **exact))
    script = tmp_path / "spy.py"
    script.write_text(SPY)
    command = [sys.executable, "-m", *LAUNCH.split(), str(script), str(tmp_path / "seen")]
    command += words(bench, two, **exact)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 steps over 24 rows") == 1
    assert done.stderr.count("<?, ?row/s]") == 1, "one bar, begun once"

    found, expected = (json.loads((p / "train_result.json").read_text()) for p in (two, one))
    assert (found["processes"], expected["processes"]) == (2, 1)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(p / "adapter_model.safetensors") for p in (two, one))
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() < 1e-2 * weight.abs().max(), name

    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    times = Counter(seen[0]["rows"] + seen[1]["rows"])
    assert sum(times.values()) == 48 - 8 * begun and set(times) == {r["id"] for r in rows}
    assert all(len(s["rows"]) > 8 for s in seen), "both processes have to work"
    assert [(s["saves"], s["adapters"]) for s in seen] == [(6 - begun, 1), (0, 0)]


def holds(tokens: int):
    """A device on which a pass over more tokens runs out of memory, if it is over several rows."""
    nll = training.target_nll

    def limited(model, rows):
        if len(rows) > 1 and sum(len(e.ids) for e in rows) > tokens:
            raise torch.OutOfMemoryError("simulated")
        return nll(model, rows)

    return patch("alpagasus2.train.target_nll", limited)


def test_memory_that_runs_out_changes_the_micro_batches_and_not_the_adapter(
    bench, tmp_path, capsys
):
    settings = {"batch_size": 8, "lora_dropout": 0.1, "learning_rate": 1e-3}
    whole, small, cut = tmp_path / "whole", tmp_path / "small", tmp_path / "cut"
    in_fp32 = patch("alpagasus2.quant_lora.compute_dtype", lambda device=None: torch.float32)
    with in_fp32:
        assert main(words(bench, whole, **settings)) == 0
        capsys.readouterr()
        with holds(300):
            assert main(words(bench, small, **settings)) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "fit into memory" in line]
        assert said and all(line.startswith("step 1: ") for line in said), (
            "the budget stays smaller"
        )
        one, other = (json.loads((p / "train_result.json").read_text()) for p in (whole, small))
        assert other["token_budget"] < one["token_budget"] == TOKEN_BUDGET
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (whole, small))
        for name, weight in theirs.items():
            assert (ours[name] - weight).norm() < 1e-2 * weight.norm(), name

        step, calls = training.training_step, iter(range(99))

        def some(*arguments):
            if next(calls) == 6:
                raise Stop
            return step(*arguments)

        with holds(300), patch("alpagasus2.train.training_step", some), pytest.raises(Stop):
            main(words(bench, cut, **settings))
        assert step_of(cut) > 1
        assert main(words(bench, cut, **settings)) == 0  # with all the memory
        assert weights(cut) == weights(small)


def test_tensorboard_shows_the_figures_of_train_result(bench, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "adapter"
    assert main(words(bench, output, num_epochs=1, report_to="tensorboard")) == 0
    result = json.loads((output / "train_result.json").read_text())
    log = events.EventAccumulator(str(tmp_path / "adapter-logs/alpagasus2")).Reload()
    for name in ("loss", "learning_rate", "grad_norm"):
        shown = log.Scalars(name)
        assert [s.step for s in shown] == list(range(1, 7))
        assert [s.value for s in shown] == pytest.approx(result[name], rel=1e-6)


def test_every_tracker_is_finished(bench, rows, tmp_path):
    pytest.importorskip("tensorboard")
    tracker = "accelerate.tracking.TensorBoardTracker.finish"
    config = training.TrainConfig(batch_size=4, num_epochs=1)
    folder = tmp_path / "adapter"
    arguments = (str(bench / "tiny"), rows[:4], folder, config, None, False, "tensorboard")
    with patch(tracker) as finish:
        with patch("alpagasus2.train.fit", side_effect=Stop), pytest.raises(Stop):
            training.train(*arguments)
        assert finish.call_count == 1


@pytest.mark.parametrize("unpacked", [None, False])
def test_eight_bits_train_also_after_an_evaluation(unpacked, bench, rows, tmp_path):
    config = training.TrainConfig(**FEW, val_set_size=8, eval_steps=1)
    quant = QuantLoraConfig(load_in_8bit=True, lora_dropout=0.0, unpacked=unpacked)
    result = training.train(str(bench / "tiny"), rows, tmp_path / "a", config, quant, False)
    assert min(result["grad_norm"]) > 0
    assert result["eval_loss"][-1] < result["eval_loss"][0]
    plain = QuantLoraConfig(load_in_4bit=False, lora_dropout=0.0)
    same = training.train(str(bench / "tiny"), rows, tmp_path / "b", config, plain, False)
    assert result["loss"] == pytest.approx(same["loss"], rel=2e-3)
    assert result["loss"] != same["loss"]


def test_what_can_be_refused_is_refused_before_the_base_is_loaded(bench, rows, tmp_path):
    output, few = tmp_path / "adapter", {**FEW, "save_steps": 1}

    def refused(report_to: str | None = None, **settings: object) -> str:
        config = training.TrainConfig(**{**few, **settings})
        with (
            patch("alpagasus2.train.load_base", side_effect=AssertionError("it was loaded")),
            pytest.raises(UserError) as error,
        ):
            training.train(str(bench / "tiny"), rows, output, config, report_to=report_to)
        return str(error.value)

    if not torch.cuda.is_available():
        assert "needs CUDA" in refused(optimizer="paged_adamw")
    assert "report_to=tensorbored" in refused("tensorbored")
    steps = [(1.0, 1.0), (1.0, 1.0), Stop]
    with patch("alpagasus2.train.training_step", side_effect=steps), pytest.raises(Stop):
        training.train(str(bench / "tiny"), rows, output, training.TrainConfig(**few))
    assert step_of(output) == 2
    assert "learning_rate was 0.01 and is now 0.5" in refused(learning_rate=0.5)
    state(output).write_bytes(state(output).read_bytes()[:1000])
    assert "is no checkpoint" in refused()
