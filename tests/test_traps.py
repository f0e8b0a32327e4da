"""Every place where other trainers fail in silence: the check, and what it would have caught.

Each test that can, runs the old behaviour too and asserts that the check sees it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from stand_ins import tiny_llama

from alpagasus2.batches import TrainConfig, batch_schedule, encode_rows, split_rows
from alpagasus2.cli import main
from alpagasus2.core.files import UserError
from alpagasus2.core.settings import build
from alpagasus2.data import load_examples, prompt
from alpagasus2.extras.merge import divergence, merged_model
from alpagasus2.generate import GenerateConfig, local_answers
from alpagasus2.model.forward import Encoded, encode, packs, target_nll
from alpagasus2.quant_lora import (
    QuantLoraConfig,
    adapter_parameters,
    add_lora,
    compute_dtype,
    load_base,
    load_tokenizer,
    pick_device,
)
from alpagasus2.train import fit, train, training_step

TOKEN = "hf_THISisTHEsecret"
PACKED = QuantLoraConfig(unpacked=False, lora_dropout=0.0)
PLAIN = QuantLoraConfig(load_in_4bit=False, lora_dropout=0.0)
ROWS = [
    {
        "id": str(i),
        "instruction": f"Name {i + 1} colours.",
        "input": "",
        "output": " ".join(["Blue."] * (i + 1)),
    }
    for i in range(6)
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers, with weights large enough for attention to matter."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": True}
    tiny_llama(folder, **shape)
    return folder


@pytest.fixture(scope="session")
def encoded(tokenizer: Any) -> list[Encoded]:
    return encode_rows(ROWS, tokenizer, TrainConfig())[0]


def tuned(base: Path, config: QuantLoraConfig = PLAIN) -> Any:
    """The base with an adapter whose B is not zero, so that A has a gradient from the start."""
    model = add_lora(load_base(base, config), config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, p in adapter_parameters(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    return model


def gradient(model: Any, batch: list[Encoded]) -> float:
    """Norm of the adapter's gradient."""
    model.zero_grad()
    nll = target_nll(model, batch)[0].sum()
    if not nll.requires_grad:
        return 0.0
    nll.backward()
    grads = [p.grad for p in adapter_parameters(model).values() if p.grad is not None]
    return sum(float(g.norm()) ** 2 for g in grads) ** 0.5


# ---- the libraries' traps


def test_an_evaluation_does_not_stop_4bit_training(base, encoded):
    def before_and_after(model: Any) -> tuple[float, float]:
        before = gradient(model, encoded)
        model.eval()
        with torch.no_grad():
            target_nll(model, encoded)
        model.train()
        return before, gradient(model, encoded)

    before, after = before_and_after(tuned(base, PACKED))
    assert before > 0 and after == pytest.approx(before, rel=0.05)
    trapped = tuned(base, PACKED)
    layers = [m for m in trapped.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)
    if not bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512-BF16, so the old behaviour cannot be shown")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # the library's default here
    try:
        before, after = before_and_after(trapped)
    except RuntimeError:  # some versions refuse, which is seen at least
        return
    assert before > 0 and not after == pytest.approx(before, rel=0.05)


def test_fp32_adapters_move_at_a_low_rate_and_bf16_ones_do_not(base, encoded):
    config = TrainConfig(learning_rate=2e-5, batch_size=2, num_epochs=2, warmup_ratio=0.0)

    def moved(dtype: torch.dtype) -> float:
        model = tuned(base)
        a = {n: p for n, p in adapter_parameters(model).items() if "lora_A" in n}
        for p in adapter_parameters(model).values():
            assert p.dtype == torch.float32
            p.data = p.data.to(dtype)
        before = {n: p.detach().clone() for n, p in a.items()}
        fit(model, encoded, config, progress=False)
        same = sum(int((p == before[n]).sum()) for n, p in a.items())
        return 1 - same / sum(p.numel() for p in a.values())

    assert moved(torch.float32) > 0.99
    assert moved(torch.bfloat16) < 0.5


def test_rows_of_a_pack_do_not_see_each_other(base, encoded):
    model = load_base(base, PLAIN).float()
    (pack,) = packs(encoded, 10_000)
    nll, row_of = target_nll(model, [encoded[i] for i in pack])
    alone = {i: target_nll(model, [encoded[i]])[0] for i in pack}
    for k, i in enumerate(pack):
        assert torch.allclose(nll[row_of == k], alone[i], atol=1e-3)
    first, last = encoded[0], encoded[-1]
    ids = torch.tensor([[*first.ids, *last.ids]])
    logits = model(ids, use_cache=False).logits[0, len(first.ids) + last.n_prompt - 1 : -1]
    wanted = torch.tensor(last.ids[last.n_prompt :])
    usual = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    assert (usual - alone[len(encoded) - 1]).abs().max() > 0.1  # end to end without isolation


def test_a_merge_is_the_model_that_was_trained(base, encoded, tmp_path):
    config = QuantLoraConfig(lora_dropout=0.0)
    model = tuned(base, config)
    model.save_pretrained(tmp_path)
    trained = model.float().eval()
    kl = {
        kind: divergence(trained, merged_model(tmp_path, base, config, kind).float(), encoded)["kl"]
        for kind in ("dequantised", "original")
    }
    assert kl["dequantised"] < 1e-3 and kl["original"] > 20 * kl["dequantised"], kl


def test_the_objective_does_not_depend_on_micro_batches(base, encoded):
    def step(**changes: Any) -> tuple[float, torch.Tensor]:
        model = tuned(base)
        loss, _ = training_step(model, encoded, TrainConfig(max_grad_norm=0, **changes))
        return loss, torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])

    (a, grad_a), (b, grad_b) = step(), step(micro_batch_size=1)
    assert a == pytest.approx(b, rel=1e-2)
    assert (grad_a - grad_b).norm() < 0.05 * grad_a.norm()
    model = tuned(base)
    with torch.no_grad():
        means = [float(target_nll(model, [e])[0].mean()) for e in encoded]
    assert abs(sum(means) / len(means) - a) > 0.01 * a  # the mean of means is another objective


def test_embeddings_and_norms_are_not_upcast(base):
    def dtypes(model: Any) -> set[torch.dtype]:
        return {p.dtype for p in model.parameters() if p.is_floating_point()}

    assert dtypes(load_base(base, PACKED)) == {compute_dtype()}
    old = peft.prepare_model_for_kbit_training(load_base(base, PACKED))
    assert torch.float32 in dtypes(old)


# ---- the seed's


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("lora_traget_modules", "lora_target_modules"), ("cut_off_len", "cutoff_len"),
     ("gradinet_acc_calc", "")],
)  # fmt: skip
def test_an_unknown_setting_is_refused_by_name(wrong, near, tmp_path, capsys):
    hint = f"did you mean --{near}?" if near else ""
    argv = ["train", "--base_model", "b", "--data_path", "d", f"--{wrong}", "1"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert f"unknown option --{wrong}" in said and hint in said
    cls = QuantLoraConfig if wrong.startswith("lora") else TrainConfig
    with pytest.raises(UserError, match=wrong) as refused:
        build(cls, {wrong: 1})
    assert near in str(refused.value)


@pytest.mark.parametrize("double", [True, False])
def test_compute_dtype_and_double_quantisation_reach_bitsandbytes(base, double):
    config = QuantLoraConfig(unpacked=False, bnb_4bit_double_quant=double)
    layers = [m for m in load_base(base, config).modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {m.compute_dtype for m in layers} == {compute_dtype()}
    assert {m.weight.quant_state.nested for m in layers} == {double}
    assert {m.weight.quant_state.quant_type for m in layers} == {"nf4"}


def test_the_wrong_keywords_are_swallowed_by_the_library():
    wrong = {"bnb_4bit_compute_type": torch.bfloat16, "bnb_4bit_double_quant": True}
    old = transformers.BitsAndBytesConfig(load_in_4bit=True, **wrong)
    assert old.bnb_4bit_compute_dtype == torch.float32 and not old.bnb_4bit_use_double_quant
    with pytest.raises(UserError, match="bnb_4bit_compute_type"):
        build(QuantLoraConfig, wrong)


def test_eos_is_a_target_although_it_pads():
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.pad_token = tokenizer.eos_token
    kept, counts = encode_rows(ROWS, tokenizer, TrainConfig())
    assert all(e.ids[-1] == tokenizer.eos_token_id and e.n_targets > 1 for e in kept)
    assert counts["eos_targets"] == len(ROWS) and counts["truncated"] == 0
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    labels = collate([{"input_ids": e.ids} for e in kept])["labels"]
    assert (labels == tokenizer.eos_token_id).sum() == 0  # the seed's way never learns it
    cut, counts = encode_rows(ROWS[-1:], tokenizer, TrainConfig(cutoff_len=len(kept[-1].ids) - 1))
    assert (counts["eos_targets"], counts["truncated"]) == (0, 1) and cut[0].truncated


def test_only_the_response_is_learned_unless_asked_otherwise(tokenizer):
    (row,), _ = encode_rows(ROWS[:1], tokenizer, TrainConfig())
    assert tokenizer.decode(row.ids[row.n_prompt :]) == ROWS[0]["output"] + tokenizer.eos_token
    (whole,), _ = encode_rows(ROWS[:1], tokenizer, TrainConfig(train_on_prompt=True))
    assert whole.ids == row.ids and whole.n_targets == len(row.ids) - 1 > 2 * row.n_targets


class Hub:
    """What `datasets.load_dataset` gives."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.split = ""

    def __call__(self, name: str, split: str) -> "Hub":
        """As `load_dataset` is called."""
        self.split = split
        return self

    def to_list(self) -> list[dict]:
        """Its rows."""
        return self.rows


def test_a_data_set_of_the_hub_is_checked_and_formatted(tokenizer):
    hub = Hub([{"instruction": "Name a colour.", "input": "", "output": "Blue."}])
    with patch("datasets.load_dataset", hub):
        rows, _ = load_examples("org/rows")
    assert hub.split == "train"
    assert tokenizer.decode(encode(rows[0], tokenizer).ids).startswith("Below is an instruction")
    with patch("datasets.load_dataset", Hub([{"title": "a", "body": "b"}])):
        with pytest.raises(UserError, match="org/rows: row 0 has no `instruction`"):
            load_examples("org/rows")


def test_without_a_held_out_part_every_row_is_trained_on():
    rows = [{"id": str(i)} for i in range(10)]
    config = TrainConfig(val_set_size=0, batch_size=4, num_epochs=2)
    kept, held = split_rows(rows, config)
    assert (kept, held) == (rows, []) and len(batch_schedule(len(kept), config)) == 6


def test_the_split_is_seeded():
    rows = [{"id": str(i)} for i in range(50)]

    def held(seed: int) -> list[dict]:
        return split_rows(rows, TrainConfig(val_set_size=10, seed=seed))[1]

    assert held(0) == held(0) != held(1) and len(held(1)) == 10


def test_steps_are_not_floored(base, encoded):
    schedule = batch_schedule(9229, TrainConfig())
    assert len(schedule) == 3 * 73 > 3 * (9229 // 128)
    assert sorted(i for s in schedule[:73] for i in s) == list(range(9229))
    seen: list[int] = []

    def nll(model: Any, pack: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend(int(e.id) for e in pack)
        return target_nll(model, pack)

    with patch("alpagasus2.train.target_nll", nll):  # five rows, two at a time: none is dropped
        training_step(tuned(base), encoded[:5], TrainConfig(micro_batch_size=2))
    assert sorted(seen) == list(range(5))


@pytest.fixture
def nothing_loads() -> Any:
    """A model that is loaded is a check that came too late."""
    with patch("alpagasus2.train.load_base", side_effect=AssertionError("loaded first")) as load:
        yield load


def test_the_fixture_sees_a_late_check(base, tmp_path, nothing_loads):
    with pytest.raises(AssertionError, match="loaded first"):
        train(str(base), ROWS, tmp_path / "a", progress=False)


def test_what_happens_after_training_is_checked_before(base, tmp_path, nothing_loads):
    def refused(match: str, output: Path, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            train(str(base), ROWS, output, progress=False, **options)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused("holds something", tmp_path / "mine")
    refused("written", tmp_path / "mine" / "thesis.txt" / "adapter")
    refused("report_to=tensorbored", tmp_path / "a", report_to="tensorbored")


def test_the_hub_is_asked_before(base, tmp_path, monkeypatch, capsys, nothing_loads):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with patch(
        "alpagasus2.extras.hub.check_push", side_effect=UserError("hub_path: refused")
    ) as ask:
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        argv = ["train", "--base_model", str(base), "--data_path", str(tmp_path / "rows.json"),
                "--output_dir", str(tmp_path / "a"), "--hub_path", "ada/x"]  # fmt: skip
        assert main(argv) == 2
    assert ask.call_args.args == ("ada/x", True) and "refused" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "pushes"), [(None, 1), ("0", 1), ("1", 0)])
def test_one_process_pushes(rank, pushes, tmp_path, monkeypatch):
    """Under `accelerate launch` every process runs the command; the first alone asks and pushes."""
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    result = {"steps": 1, "rows": 6, "loss": [2.0], "seconds": 1.0}
    with (
        patch("alpagasus2.train.train", return_value=result),
        patch("alpagasus2.extras.hub.check_push", return_value="ada/x") as ask,
        patch("alpagasus2.extras.hub.check_weights"),
        patch("alpagasus2.extras.hub.push", return_value="there") as push,
    ):
        argv = ["train", "--base_model", "b", "--data_path", str(tmp_path / "rows.json"),
                "--output_dir", str(tmp_path / "a"), "--hub_path", "ada/x"]  # fmt: skip
        assert main(argv) == 0
    assert (ask.call_count, push.call_count) == (pushes, pushes)
    assert (tmp_path / "a" / "README.md").exists() == bool(pushes)


def test_a_token_is_in_no_output_and_no_file(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")  # put back after the test: the command sets it
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    argv = [
        "train",
        "--base_model",
        str(base),
        "--data_path",
        str(tmp_path / "rows.json"),
        "--output_dir",
        str(tmp_path / "out/a"),
        "--auth_token",
        TOKEN,
        "--num_epochs",
        "1",
    ]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert any(p.name == "manifest.json" for p in files)
    assert not [p for p in files if TOKEN.encode() in p.read_bytes()]
    assert "auth_token" not in TrainConfig.__dataclass_fields__


def test_no_remote_code_and_one_device(base):
    real, seen = transformers.AutoModelForCausalLM.from_pretrained, []

    def spy(*words: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*words, **options)

    with patch.object(transformers.AutoModelForCausalLM, "from_pretrained", spy):
        load_base(base, PLAIN)
    assert seen[0]["trust_remote_code"] is False and seen[0]["device_map"] == {"": pick_device()}


class Echo:
    """Stands for `decode`: writes given tokens up to a stop token, and keeps what it was asked."""

    def __init__(self, new: list[int]):
        self.new, self.prompts = new, list[list[int]]()

    def __call__(
        self, model: Any, prompts: list[list[int]], most: int, stop: set[int], *rest: Any
    ) -> Iterator[tuple[int, list[int], bool]]:
        self.prompts += prompts
        end = next(i for i, token in enumerate(self.new) if token in stop)
        yield from ((i, self.new[:end], True) for i in range(len(prompts)))


def test_generation_reads_the_prompt_of_the_training_and_keeps_the_answer(base, tokenizer):
    said = "Use Markdown:\n### Response:\nThree hashes."
    new = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id, 5, 6]
    with_input = {"id": "b", "instruction": "Translate.", "input": "Bonjour", "output": said}
    echo, rows = Echo(new), [{**ROWS[0], "output": said}, with_input]
    model, config = load_base(base, PLAIN), GenerateConfig(max_new_tokens=64)
    with patch("alpagasus2.model.decode.decode", echo):
        answers = dict(local_answers(model, tokenizer, rows, config))
    trained = [encode(r, tokenizer) for r in rows]
    assert sorted(echo.prompts) == sorted(e.ids[: e.n_prompt] for e in trained)
    assert "Bonjour" in prompt(with_input)  # the seed's Self-Instruct inputs never arrived
    assert {a["response"] for a in answers.values()} == {said}
    assert {a["finish_reason"] for a in answers.values()} == {"stop"}
    assert said.split("###")[0] != said  # the seed's way to end an answer
