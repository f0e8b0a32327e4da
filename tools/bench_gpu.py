"""Measure training and answering on a CUDA machine: one run of eight minutes, one JSON line a part.

    python tools/bench_gpu.py --output FOLDER    # what `make bench-gpu` runs
    python tools/bench_gpu.py --output FOLDER --dry    # the same code, tiny, on any machine

Needs no network: models have random weights and are made here, with a tokenizer learned from the
rows. Every part is caught on its own. Parts run in processes: when one dies, another takes what is
left; what changes its libraries (Liger, unsloth) has one to itself. A deadline ends the list.
"""

import argparse
import faulthandler
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 600,
}  # fmt: skip
SHAPES = {
    "7b": {"vocab_size": 32000},  # and the defaults of LlamaConfig
    "13b": {
        "vocab_size": 32000,
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
}  # fmt: skip
PART_SECONDS = 120  # after which a part that hangs is ended
LOST = 75  # status of a process whose device no longer answers
MODULES = {"liger": "liger_kernel", "unsloth": "unsloth"}  # what a group of parts needs


@dataclass
class Bench:
    "The settings of a run, and what several parts need."

    options: argparse.Namespace

    @property
    def dry(self) -> bool:
        "Whether everything is tiny."
        return self.options.dry

    @property
    def path(self) -> Path:
        "The file of figures."
        return Path(self.options.output) / "gpu.jsonl"

    def write(self, part: str, **figures: Any) -> None:
        "Append a line, and show it."
        line = json.dumps({"part": part, **rounded(figures)})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def lines(self) -> list[dict]:
        "What is in the file."
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def rows(self) -> list[dict]:
        "The rows of the trainings, in a seeded order."
        from alpagasus2.data import load_examples

        rows, _ = load_examples(self.options.rows)
        random.Random(0).shuffle(rows)
        return rows[:32] if self.dry else rows

    def model(self, shape: str) -> str:
        "The folder of a checkpoint, made on first use."
        folder = Path(self.options.models) / shape
        if not (folder / "generation_config.json").exists():
            sizes = TINY if self.dry else SHAPES[shape]
            make_checkpoint(folder, sizes, [" ".join(map(str, r.values())) for r in self.rows])
        return str(folder)

    @property
    def matrix_rate(self) -> float | None:
        "Operations a second, as the first part has measured them."
        found = (x["matrix_tflops"] * 1e12 for x in self.lines() if "matrix_tflops" in x)
        return next(found, None)


def rounded(value: Any) -> Any:
    "Four significant digits of every number."
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# Checkpoints


def learned_tokenizer(
    folder: Path,  # where it is saved
    texts: Sequence[str],  # from which it learns its words
    size: int,  # how many words at most
) -> None:
    "A byte-level tokenizer with the three special tokens of Llama 2."
    import tokenizers
    import transformers

    special = ["<unk>", "<s>", "</s>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=special[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_checkpoint(
    folder: Path,  # made
    sizes: dict[str, int],  # of a LlamaConfig
    texts: Sequence[str],  # for the tokenizer
) -> None:
    "A Llama with random weights, one file a layer; the tensors are drawn on the GPU."
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
        max_position_embeddings=4096, architectures=["LlamaForCausalLM"], dtype="bfloat16", **sizes,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    where: dict[str, str] = {}
    for layer, named in groupby(empty.state_dict().items(), lambda x: layer_of(x[0])):
        file = f"model-{layer}.safetensors"
        weights = {name: random_weight(name, tuple(like.shape)) for name, like in named}
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    learned_tokenizer(folder, texts, sizes["vocab_size"])
    transformers.GenerationConfig(
        eos_token_id=2, bos_token_id=1, pad_token_id=0
    ).save_pretrained(folder)  # fmt: skip # the last file: it says that all are there


def layer_of(name: str) -> str:
    "The number of a weight's layer, or its own name outside the layers."
    found = re.search(r"\.layers\.(\d+)\.", name)
    return found[1] if found else name.replace(".", "-")


def random_weight(name: str, size: tuple[int, ...]) -> Any:
    "Ones for a norm, otherwise as Llama is initialised."
    import torch

    if "norm" in name:
        return torch.ones(size, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()


# Time and memory


def synchronize() -> None:
    "Wait until the device has done what it was given."
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    "Give back memory, and forget the peak."
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, float]:
    "Peaks since `free`: of tensors, of what the allocator held, and with what CUDA takes itself."
    import torch

    if not torch.cuda.is_available():
        return {}
    left, total = torch.cuda.mem_get_info()
    beside = total - left - torch.cuda.memory_reserved()
    reserved = torch.cuda.max_memory_reserved()
    sizes = {"allocated": torch.cuda.max_memory_allocated(), "reserved": reserved}
    return {f"{k}_gb": v / 1e9 for k, v in (sizes | {"device": reserved + beside}).items()}


def seconds_each(work: Callable[[], Any], repeats: int) -> float:
    "Mean time of some work, after one that does not count."
    work()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def speed(bench: Bench, shape: str, tokens: float, seconds: float) -> dict[str, float]:
    "Real tokens a second; the share of the matrix rate that 4 operations a weight and token are."
    from alpagasus2.extras.estimate import shape_of

    found = {"tokens_per_second": tokens / seconds}
    sizes = shape_of(bench.model(shape))
    if rate := bench.matrix_rate:
        weights = sizes.quantised + sizes.hidden * sizes.vocab
        found["share"] = 4 * weights * found["tokens_per_second"] / rate
    return found


# The parts: each takes the settings and a shape, and returns figures


def device(bench: Bench, shape: str) -> dict[str, Any]:
    "What this machine is and does."
    import torch

    cuda = torch.cuda.is_available()
    where = "cuda" if cuda else "cpu"
    n = 256 if bench.dry else 8192
    a, b = torch.randn(2, n, n, device=where).to(torch.bfloat16)
    source = torch.empty(n * n * 16, device=where, dtype=torch.uint8)
    target = torch.empty_like(source)
    names = ("torch", "transformers", "trl", "bitsandbytes", *MODULES.values())
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
        "held_to_gb": bench.options.memory,
        "matrix_tflops": 2e-12 * n**3 / seconds_each(lambda: a @ b, 20),
        "copy_tb_per_second": 2e-12 * len(source) / seconds_each(lambda: target.copy_(source), 10),
        "date": time.strftime("%Y-%m-%d"),
        "commit": bench.options.commit,
        "versions": {name: version for name in names if (version := installed(name))},
    }  # fmt: skip


def installed(name: str) -> str | None:
    "The version of a package."
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def configs(
    bench: Bench, preset: str, attention: str | None = None, rows: int | None = None
) -> tuple[Any, Any]:
    "A preset's settings for one epoch, with its rows a step or so many; few when dry."
    from alpagasus2.batches import preset_configs

    rows = 4 if bench.dry else rows
    a_step = {"batch_size": rows} if rows else {}
    return preset_configs(preset, num_epochs=1, attention=attention, **a_step)


def trained(bench: Bench, shape: str, n_rows: int, config: Any, quant_lora: Any) -> dict[str, Any]:
    "`train`, as a user runs it, on the first so many rows."
    from alpagasus2.train import train

    rows = bench.rows[:n_rows]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        return train(bench.model(shape), rows, out, config, quant_lora, progress=False)


def rows_of(bench: Bench, shape: str, n_rows: int, config: Any) -> list[Any]:
    "The first so many rows as tokens."
    from alpagasus2.batches import encode_rows
    from alpagasus2.quant_lora import load_tokenizer

    return encode_rows(bench.rows[:n_rows], load_tokenizer(bench.model(shape)), config)[0]


def expected_gb(bench: Bench, shape: str, rows: Any, quant_lora: Any) -> float:
    "What `estimate` says of a training whose heaviest micro-batch is known."
    from alpagasus2.extras.estimate import STEPS, Device, estimate
    from alpagasus2.quant_lora import compute_dtype

    device = Device(80e9, None, compute_dtype().itemsize, STEPS["cuda"])
    model = bench.model(shape)
    return estimate(model, device=device, micro_batch=rows, quant_lora=quant_lora).total / 1e9


def ours(
    bench: Bench, shape: str, preset: str, attention: str | None = None, rows: int | None = None
) -> dict[str, Any]:
    "A preset: the token budget it takes, then speed and peak with this budget."
    from alpagasus2.batches import batch_schedule
    from alpagasus2.extras.estimate import heaviest

    config, quant_lora = configs(bench, preset, attention, rows)
    n = 2 * config.batch_size
    chosen = trained(bench, shape, n, config, quant_lora)["token_budget"]
    free()
    config, n = replace(config, token_budget=chosen), 4 * config.batch_size if bench.dry else 1024
    result = trained(bench, shape, n, config, quant_lora)
    peak, encoded = memory(), rows_of(bench, shape, n, config)
    lengths = [len(e.ids) for e in encoded]
    tokens = [sum(lengths[i] for i in step) for step in batch_schedule(n, config)]
    half = len(tokens) // 2  # the first half of the steps warms up
    return {
        **speed(bench, shape, sum(tokens[half:]), sum(result["step_seconds"][half:])),
        "step_seconds": statistics.median(result["step_seconds"][half:]),
        "first_half_seconds": sum(result["step_seconds"][:half]),
        "tokens_a_step": sum(tokens) / len(tokens),
        "token_budget": chosen,
        "recordings": result["recordings"],
        **peak,
        "estimate_gb": expected_gb(bench, shape, heaviest(encoded, config), quant_lora),
        "loss": result["loss"][:4],
    }


def unrecorded_steps(bench: Bench, shape: str, preset: str) -> dict[str, Any]:
    "A preset without recorded steps, for what these are worth."
    from unittest.mock import patch

    with patch("alpagasus2.train.may_record", lambda *a: False):
        return ours(bench, shape, preset)


def same_training(bench: Bench, shape: str) -> dict[str, Any]:
    "Of a tiny model: how far losses and adapters of recorded steps are from those of usual ones."
    from safetensors.torch import load_file

    from alpagasus2.batches import preset_configs
    from alpagasus2.train import train

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_checkpoint(base, TINY, [" ".join(map(str, r.values())) for r in bench.rows[:200]])
        for way in ("recorded", "padded"):  # the kernel for padded rows is never recorded
            attention = None if way == "recorded" else "padded"
            config, quant_lora = preset_configs(
                "strong", num_epochs=1, attention=attention, batch_size=8
            )
            out = Path(folder) / way
            result = train(str(base), bench.rows[:256], out, config, quant_lora, progress=False)
            found[way] = result, load_file(out / "adapter_model.safetensors")
    (first, a), (second, b) = found.values()
    losses = (abs(x - y) for x, y in zip(first["loss"], second["loss"], strict=True))
    return {
        "recordings": first["recordings"],
        "steps": first["steps"],
        "loss_difference": max(losses),
        "loss": [first["loss"][0], first["loss"][-1]],
        "adapter_difference": max((a[k] - b[k]).abs().max().item() for k in a),
        "adapter_size": max(x.abs().max().item() for x in a.values()),
    }


def after_a_failure(bench: Bench, shape: str) -> dict[str, Any]:
    "Whether PyTorch draws and gives memory back after a step that cannot be recorded."
    import torch

    from alpagasus2.model.recording import cuda_graph

    if not torch.cuda.is_available():
        return {"draws": None, "reserved_gb": None}
    try:
        cuda_graph(lambda x: x * x.sum().item(), {"x": torch.ones(3, device="cuda")}, warm=False)
    except RuntimeError:
        torch.ones(2**30, device="cuda")
        torch.cuda.empty_cache()
        drew = torch.rand(3, device="cuda").sum().item() > 0
        return {"draws": drew, "reserved_gb": torch.cuda.memory_reserved() / 1e9}
    raise AssertionError("a step that waits for the device was recorded")


def unfused(bench: Bench, shape: str, preset: str) -> dict[str, Any]:
    "The same without Liger's layers, for what these are worth."
    from unittest.mock import patch

    with patch("alpagasus2.model.fused._functions", lambda device: None):
        return ours(bench, shape, preset)


def pairs(bench: Bench) -> Any:
    "512 rows as TRL takes them."
    from datasets import Dataset

    from alpagasus2.data import prompt, response_of

    rows = bench.rows[: 8 if bench.dry else 512]
    return Dataset.from_list([{"prompt": prompt(r), "completion": response_of(r)} for r in rows])


def trl_settings(folder: str, packed: bool, few: bool = False, **options: Any) -> Any:
    "TRL's settings as a careful user has them: no checkpointing, bf16 where the device has it."
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    bf16 = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    rows, steps, length = (4, 4, 1024) if packed else (16, 8, 256)
    rows, steps = (2, 1) if few else (rows, steps)
    return SFTConfig(
        folder, per_device_train_batch_size=rows, gradient_accumulation_steps=steps,
        max_length=length, packing=packed, num_train_epochs=1, learning_rate=2e-5, bf16=bf16,
        fp16=not bf16, use_cpu=not cuda, gradient_checkpointing=False, completion_only_loss=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip


def timed_trl(bench: Bench, shape: str, trainer: Any) -> dict[str, Any]:
    "Train; the first step does not count."
    import transformers

    stamps = []

    class Stamps(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize()
            stamps.append(time.perf_counter())

    trainer.add_callback(Stamps())
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    start = time.perf_counter()
    loss = trainer.train().training_loss
    taken = [b - a for a, b in zip([start, *stamps], stamps, strict=False)]
    counted = taken[1:] or taken
    real = tokens * len(counted) / len(taken)
    return {
        **speed(bench, shape, real, sum(counted)),
        "step_seconds": statistics.median(counted),
        "steps": len(taken),
        **memory(),
        "loss": [loss],
    }


def trl(
    bench: Bench, shape: str, packed: bool, every_layer: bool = False, liger: bool = False,
    few: bool = False,
) -> dict[str, Any]:  # fmt: skip
    "TRL's trainer on the same base and rows, with the adapter of seed-7b or strong."
    import peft
    import trl

    from alpagasus2.quant_lora import load_base, load_tokenizer

    lora = peft.LoraConfig(
        r=16 if every_layer else 8, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM",
        target_modules="all-linear" if every_layer else ["q_proj", "v_proj"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            load_base(bench.model(shape)),
            trl_settings(folder, packed, few, use_liger_kernel=liger),
            train_dataset=pairs(bench), processing_class=load_tokenizer(bench.model(shape)),
            peft_config=lora,
        )  # fmt: skip
        return timed_trl(bench, shape, trainer)


def unsloth(bench: Bench, shape: str) -> dict[str, Any]:
    "unsloth, packed; without dropout, which its fast path does not have."
    FastLanguageModel = importlib.import_module("unsloth").FastLanguageModel
    import trl  # after unsloth, which changes it

    model, tokenizer = FastLanguageModel.from_pretrained(
        bench.model(shape), max_seq_length=1024, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=32, lora_dropout=0, target_modules=["q_proj", "v_proj"],
        use_gradient_checkpointing=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model, trl_settings(folder, packed=True), train_dataset=pairs(bench),
            processing_class=tokenizer,
        )  # fmt: skip
        return timed_trl(bench, shape, trainer)


def answering(bench: Bench, shape: str, unpacked: bool, own: bool) -> dict[str, Any]:
    "80 instructions of the rows, 64 new tokens each: by us, or by `generate` on all at once."
    from alpagasus2.quant_lora import QuantLoraConfig, load_base, load_tokenizer, weights_held

    model = load_base(bench.model(shape), QuantLoraConfig(unpacked=unpacked)).eval()
    tokenizer = load_tokenizer(bench.model(shape))
    n, new = (6, 4) if bench.dry else (80, 64)
    asked = [{**row, "id": str(i)} for i, row in enumerate(bench.rows[:n])]
    answer = our_answers if own else generated
    answer(model, tokenizer, asked[:2], 4)  # the first call also looks for the fastest way
    synchronize()
    start = time.perf_counter()
    tokens = answer(model, tokenizer, asked, new)
    synchronize()
    seconds = time.perf_counter() - start
    figures = {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "weights": weights_held(model),
    }
    return figures | ({"decoding": way(model)} if own else {}) | memory()


def way(model: Any) -> str:
    "How our decoding answers with a model that it knows."
    from alpagasus2.model.decode import way_of

    return way_of(model, [[1]], 1)


def unrecorded(bench: Bench, shape: str) -> dict[str, Any]:
    "Our answers without CUDA graphs, for what these are worth."
    from unittest.mock import patch

    with patch("alpagasus2.model.decode._may_record", lambda lm: False):
        return answering(bench, shape, unpacked=True, own=True)


def our_answers(model: Any, tokenizer: Any, asked: list[dict], new: int) -> int:
    "How many tokens our answers have."
    from alpagasus2.generate import GenerateConfig, local_answers

    config = GenerateConfig(max_new_tokens=new)
    return sum(x["response_tokens"] for _, x in local_answers(model, tokenizer, asked, config))


def generated(model: Any, tokenizer: Any, asked: list[dict], new: int) -> int:
    "How many tokens those of Transformers' `generate` have, on one padded batch."
    from alpagasus2.data import prompt

    texts = [prompt(q) for q in asked]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    batch = {k: v.to(model.device) for k, v in batch.items() if k != "token_type_ids"}
    out = model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return len(out) * (out.shape[1] - batch["input_ids"].shape[1])


def same_answers(bench: Bench, shape: str) -> dict[str, Any]:
    "Of a tiny model in fp32: how many greedy answers are those of `generate`, one at a time."
    import torch
    import transformers

    from alpagasus2.model.decode import cache_budget, chooser, decode

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.requires_grad_(False).parameters():
        p.mul_(4.0 if p.dim() > 1 else 1.0)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    draw = random.Random(0)
    n, new = (6, 8) if bench.dry else (24, 32)
    prompts = [[draw.randrange(3, 600) for _ in range(draw.randrange(4, 40))] for _ in range(n)]
    budget = cache_budget(model)
    found = {i: t for i, t, _ in decode(model, prompts, new, set(), chooser(0, 1, []), budget)}
    same = 0
    for i, p in enumerate(prompts):
        ids = torch.tensor([p], device=model.device)
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        same += out[0, len(p) :].tolist() == found[i]
    return {"same": same, "of": n, "decoding": way(model)}


# The profile

KINDS = {  # the first that a kernel's or operator's name holds
    "dequantisation": ("dequant", "kgemm_4bit"),
    "loss": ("log_softmax", "cunn_softmax", "nll_loss", "cross_entropy"),
    "attention": ("flash", "fmha", "attention", "softmax"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "aten::mm", "addmm", "bmm", "matmul"),
    "gathers and scatters": ("index", "gather", "scatter", "embedding"),
    "concatenation": ("catarray", "aten::cat"),
    "copies": ("copy", "memcpy", "memset", "aten::clone", "aten::fill_"),
    "dropout": ("dropout", "distribution", "bernoulli", "aten::random_"),
    "norms": ("rms_norm", "layer_norm", "rmsnorm", "layernorm"),
    "optimiser": ("adam", "multi_tensor"),
    "reductions": ("reduce", "aten::sum", "aten::mean"),
    "elementwise": ("elementwise", "aten::mul", "aten::add", "aten::silu", "aten::neg"),
}


def kind_of(kernel: str) -> str:
    "What sort of work a kernel or operator does, by its name."
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "other")


def own_times(profile: Any, cuda: bool) -> dict[str, tuple[float, int]]:
    "Seconds and calls of each kernel; on a CPU of each operator."
    found = {}
    for event in profile.key_averages():
        if (event.device_type.name == "CUDA") == cuda:
            took = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[event.key] = (took / 1e6, event.count)
    return found


def profile(
    bench: Bench, shape: str, preset: str, attention: str | None = None
) -> dict[str, Any]:  # fmt: skip
    "One optimiser step of 128 rows, by kind of kernel; the kernels themselves go to a file."
    import torch

    from alpagasus2.batches import encode_rows
    from alpagasus2.model.check import checked
    from alpagasus2.model.forward import attend_by
    from alpagasus2.quant_lora import add_lora, load_base, load_tokenizer
    from alpagasus2.train import training_step

    config, quant_lora = configs(bench, preset, attention)
    ran = (x for x in bench.lines() if x["part"] == f"ours, {preset}" and "token_budget" in x)
    config = replace(config, token_budget=next(ran, {}).get("token_budget"))
    model = add_lora(load_base(bench.model(shape), quant_lora), quant_lora)
    attend_by(model, attention)
    checked(model, gradient=True)
    size = 4 if bench.dry else 128
    tokenizer = load_tokenizer(bench.model(shape))
    rows, _ = encode_rows(bench.rows[: 2 * size], tokenizer, config)
    training_step(model, rows[:size], config)
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    synchronize()
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as seen:
        start = time.perf_counter()
        training_step(model, rows[size:], config, 1)
        synchronize()
        wall = time.perf_counter() - start
    times = own_times(seen, cuda)
    by_kind: Counter[str] = Counter()
    for name, (seconds, _) in times.items():
        by_kind[kind_of(name)] += 1000 * seconds
    name = "-".join(filter(None, ("profile", preset, attention)))
    write_kernels(Path(bench.options.output) / f"{name}.txt", times)
    return {
        "wall_ms": 1000 * wall,
        "launches": sum(count for _, count in times.values()),
        "ms": dict(by_kind.most_common()),
    }


def write_kernels(path: Path, times: dict[str, tuple[float, int]]) -> None:
    "The kernels that took longest."
    longest = sorted(times.items(), key=lambda x: -x[1][0])[:80]
    lines = (
        f"{1000 * s:9.2f} ms {n:6d} x  {kind_of(k):22} {k[:150]}" for k, (s, n) in longest
    )  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# The list, and how it is gone through


@dataclass
class Part:
    "One line of the file."

    name: str
    run: Callable[..., dict[str, Any]]  # takes the settings and the shape
    shape: str = "7b"
    group: str = "main"  # parts of one group share a process

    @property
    def key(self) -> str:
        "Its name in the file."
        return self.name if self.shape == "7b" else f"{self.name}, {self.shape}"


PARTS = [
    Part("device", device),
    Part("same answers as generate", same_answers),
    Part("same training as without recording", same_training),
    Part("ours, seed-7b", partial(ours, preset="seed-7b")),
    Part("ours, strong", partial(ours, preset="strong")),
    Part("ours, strong, 128 rows a step", partial(ours, preset="strong", rows=128)),
    Part("trl, packed", partial(trl, packed=True)),
    Part("trl, packed, all-linear", partial(trl, packed=True, every_layer=True)),
    Part("unsloth, packed", unsloth, group="unsloth"),
    Part("answers, ours, 16 bits", partial(answering, unpacked=True, own=True)),
    Part("answers, generate, 16 bits", partial(answering, unpacked=True, own=False)),
    Part("answers, ours, NF4", partial(answering, unpacked=False, own=True)),
    Part("answers, generate, NF4", partial(answering, unpacked=False, own=False)),
    Part("ours, seed-7b", partial(ours, preset="seed-7b"), "13b"),
    Part("ours, strong", partial(ours, preset="strong"), "13b"),
    Part("profile, seed-7b", partial(profile, preset="seed-7b")),
    Part("profile, strong", partial(profile, preset="strong")),
    Part("ours, seed-7b, padded", partial(ours, preset="seed-7b", attention="padded")),
    Part("ours, strong, not recorded", partial(unrecorded_steps, preset="strong")),
    Part(
        "trl, packed, all-linear, 2,048 tokens a step",
        partial(trl, packed=True, every_layer=True, few=True),
    ),
    Part("ours, seed-7b, not fused", partial(unfused, preset="seed-7b")),
    Part("trl, packed, liger", partial(trl, packed=True, liger=True), group="liger"),
    Part("answers, ours, 16 bits, steps not recorded", unrecorded),
    Part("trl, padded", partial(trl, packed=False)),
    Part("after a recording that failed", after_a_failure, group="failure"),
]


def caught(bench: Bench, part: Part) -> bool:
    "Run a part and write its line, whatever happens; whether the device still works."
    left = bench.options.deadline - time.time()
    faulthandler.dump_traceback_later(max(1, min(PART_SECONDS, left)), exit=True)
    start = time.perf_counter()
    try:
        figures = part.run(bench, part.shape)
    except Exception as e:
        figures = {"error": f"{type(e).__name__}: {e}"[:600]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    bench.write(part.key, seconds=time.perf_counter() - start, **figures)
    try:
        free()
    except Exception:  # an error that CUDA keeps: only a new process gets rid of it
        return False
    return True


def child(bench: Bench, parts: Sequence[Part]) -> int:
    "Run parts in this process until the deadline, or until the device is lost."
    import torch

    if torch.cuda.is_available() and bench.options.memory:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, bench.options.memory * 1e9 / total))
    for part in parts:
        if time.time() > bench.options.deadline:
            break
        if not caught(bench, part):
            return LOST
    return 0


def started(bench: Bench, parts: Sequence[Part]) -> int:
    "Run parts in a process of its own; its status."
    options = bench.options
    python = options.unsloth_python if parts[0].group == "unsloth" else sys.executable
    words = [python, __file__, "--child", *(p.key for p in parts), "--output", options.output]
    words += ["--rows", options.rows, "--models", options.models, "--memory", options.memory]
    words += ["--deadline", options.deadline, "--commit", options.commit]
    words += ["--dry"] if options.dry else []
    left = max(1.0, options.deadline - time.time())
    try:
        offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        return subprocess.run(
            [str(w) for w in words], timeout=left + 30, env=os.environ | offline
        ).returncode
    except subprocess.TimeoutExpired:
        return LOST


def missing(part: Part, options: argparse.Namespace) -> str | None:
    "The module that a part needs and this Python has not."
    module = MODULES.get(part.group)
    elsewhere = part.group == "unsloth" and options.unsloth_python != sys.executable
    return None if not module or elsewhere or importlib.util.find_spec(module) else module


def go_through(
    bench: Bench, parts: Sequence[Part], start: Callable[[Bench, Sequence[Part]], int] = started
) -> None:
    "All parts, group by group; each gets exactly one line."
    absent = {p.key: module for p in parts if (module := missing(p, bench.options))}
    there = [p for p in parts if p.key not in absent]
    for key, module in absent.items():
        bench.write(key, skipped=f"{module} is not installed")
    for _, group in groupby(there, lambda p: p.group):
        left = list(group)
        while left and time.time() < bench.options.deadline:
            before, status = left, start(bench, left)
            left = unwritten(bench, left)
            if left and (status not in (0, LOST) or left == before):  # it died in the first
                bench.write(left.pop(0).key, error=f"its process ended with status {status}")
        for part in left:
            bench.write(part.key, skipped="the deadline came first")


def unwritten(bench: Bench, parts: Sequence[Part]) -> list[Part]:
    "Those without a line."
    have = {line["part"] for line in bench.lines()}
    return [p for p in parts if p.key not in have]


def commit_here() -> str:
    "The commit of this checkout, where git knows it."
    words = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    if not shutil.which("git"):
        return "unknown"
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", required=True, help="folder of gpu.jsonl and the profiles")
    add("--rows", default="sample", help="training rows: a file, or a catalogued name")
    add("--models", default=str(Path(tempfile.gettempdir()) / "alpagasus2-bench"),
        help="folder of the checkpoints: 13.5 GB and 26 GB")  # fmt: skip
    add("--memory", type=float, default=40, help="GB that may be used; 0: all")
    add("--seconds", type=float, default=480, help="after which no part begins")
    add("--only", nargs="*", default=[""], help="run only parts whose name has one of these")
    add("--unsloth_python", default=os.environ.get("UNSLOTH_PYTHON", sys.executable),
        help="the Python of an environment with unsloth")  # fmt: skip
    add("--commit", default="", help="of the code, where git does not know it")
    add("--dry", action="store_true", help="tiny models, few rows; on a CPU, too")
    add("--child", nargs="*", help=argparse.SUPPRESS)
    add("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.commit = options.commit or commit_here()
    options.deadline = options.deadline or time.time() + options.seconds
    return options


def main() -> int:
    "Start what was asked for; status 1 when a part failed."
    sys.path.insert(0, str(ROOT))  # another Python, that of unsloth say, may not have the package
    options = options_of()
    bench = Bench(options)
    if options.child is not None:
        return child(bench, [p for p in PARTS if p.key in options.child])
    Path(options.output).mkdir(parents=True, exist_ok=True)
    if bench.path.exists():
        print(f"{bench.path} is there already: choose another --output, or delete it")
        return 2
    go_through(bench, [p for p in PARTS if any(word in p.key for word in options.only)])
    return int(any("error" in line for line in bench.lines()))


if __name__ == "__main__":
    sys.exit(main())
