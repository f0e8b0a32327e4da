"""The measurement on a GPU, dry: the very code of the real run, tiny, with no part failing."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "bench_gpu.py"
UNSLOTH = """
import peft
from alpagasus2.quant_lora import load_base, load_tokenizer

class FastLanguageModel:
    @staticmethod
    def from_pretrained(name, max_seq_length, load_in_4bit):
        return load_base(name), load_tokenizer(name)

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, target_modules,
                       use_gradient_checkpointing):
        return peft.get_peft_model(model, peft.LoraConfig(
            r=r, lora_alpha=lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM"))
"""


FEW = ["device", "same answers", "ours, strong", "unsloth", "profile, strong"]


@pytest.mark.parametrize("only", [FEW, pytest.param([], marks=pytest.mark.slow)])
def test_the_dry_run_has_a_line_for_every_part(only: list[str], tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "unsloth.py").write_text(UNSLOTH)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    words = [sys.executable, SCRIPT, "--dry", "--output", tmp_path / "out", "--models", tmp_path]
    done = subprocess.run(
        [*words, *(["--only", *only] if only else [])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(x) for x in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    found = {x["part"]: x for x in lines}
    wanted = [p.key for p in bench.PARTS if not only or any(word in p.key for word in only)]
    assert sorted(found) == sorted(wanted) and len(found) == len(lines)
    assert found["same answers as generate"]["same"] == found["same answers as generate"]["of"]
    assert found["ours, strong"]["tokens_per_second"] > 0
    assert "mm" in (tmp_path / "out" / "profile-strong.txt").read_text()
    if only:
        return
    liger = importlib.util.find_spec("liger_kernel") is not None
    assert [x["part"] for x in lines if "skipped" in x] == ["trl, packed, liger"][liger:]
    losses = [found[f"{peer}, packed"]["loss"][0] for peer in ("unsloth", "trl")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    kinds = found["profile, seed-7b"]["ms"]
    assert {"matrix products", "attention"} <= {*kinds} <= {*bench.KINDS, "other"}


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = loaded()


def run(folder: Path, seconds: float = 60) -> Any:
    options = {"output": str(folder), "deadline": time.time() + seconds, "memory": 0, "dry": True}
    return bench.Bench(argparse.Namespace(unsloth_python=sys.executable, **options))


def works(run: Any, shape: str) -> dict[str, Any]:
    return {"figure": 1 / 3}


def fails(run: Any, shape: str) -> dict[str, Any]:
    raise RuntimeError(f"no such shape as {shape}")


def told(run: Any) -> dict[str, str]:
    "What became of every part."
    kinds = ("figure", "error", "skipped")
    return {x["part"]: next(k for k in kinds if k in x) for x in run.lines()}


def test_a_part_that_fails_is_a_line_and_the_others_follow(tmp_path: Path) -> None:
    parts = [bench.Part("a", works), bench.Part("b", fails, "13b"), bench.Part("c", works)]
    bench.go_through(run(tmp_path), parts, bench.child)
    assert told(run(tmp_path)) == {"a": "figure", "b, 13b": "error", "c": "figure"}
    assert run(tmp_path).lines()[1]["error"] == "RuntimeError: no such shape as 13b"
    assert run(tmp_path).lines()[0]["figure"] == 0.3333


@pytest.mark.parametrize("status", [-11, 1, 0])
def test_a_process_that_dies_costs_one_part(tmp_path: Path, status: int) -> None:
    def dying(run: Any, parts: Any) -> int:
        "Dies in b, whatever comes before it, without a line."
        if parts[0].name != "b":
            bench.child(run, parts[:1])
        return status if len(parts) > 1 or parts[0].name == "b" else 0

    bench.go_through(run(tmp_path), [bench.Part(x, works) for x in "abc"], dying)
    assert told(run(tmp_path)) == {"a": "figure", "b": "error", "c": "figure"}


def test_a_lost_device_gets_a_new_process(tmp_path: Path) -> None:
    starts: list[list[str]] = []

    def losing(run: Any, parts: Any) -> int:
        starts.append([p.name for p in parts])
        bench.child(run, parts[:1])
        return bench.LOST if len(parts) > 1 else 0

    bench.go_through(run(tmp_path), [bench.Part(x, works) for x in "ab"], losing)
    assert starts == [["a", "b"], ["b"]]
    assert told(run(tmp_path)) == {"a": "figure", "b": "figure"}


def test_the_deadline_ends_the_list(tmp_path: Path) -> None:
    late = run(tmp_path, seconds=0.5)

    def slow(run: Any, shape: str) -> dict[str, Any]:
        time.sleep(0.6)
        return {"figure": 1}

    parts = [bench.Part("a", slow), bench.Part("b", works), bench.Part("c", works, group="liger")]
    bench.go_through(late, parts, bench.child)
    assert told(late) == {"a": "figure", "b": "skipped", "c": "skipped"}


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODULES, "liger", "no_such_module")
    bench.go_through(run(tmp_path), [bench.Part("c", works, group="liger")], never)
    assert run(tmp_path).lines() == [{"part": "c", "skipped": "no_such_module is not installed"}]


def never(run: Any, parts: Any) -> int:
    raise AssertionError("started")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matrix products"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("void at::native::indexing_backward_kernel<c10::BFloat16>", "gathers and scatters"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantisation"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "concatenation"),
        ("Memcpy HtoD (Pageable -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
        ("some_new_kernel", "other"),
    ],
)
def test_kernels_have_a_kind(kernel: str, kind: str) -> None:
    assert bench.kind_of(kernel) == kind
