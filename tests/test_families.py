"""Whatever the architecture: the loss of a row is the model's own, alone and among others."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from alpagasus2.batches import TrainConfig
from alpagasus2.core.files import UserError
from alpagasus2.extras.merge import merge
from alpagasus2.model.check import check
from alpagasus2.model.forward import Encoded, encode, micro_batches, target_nll
from alpagasus2.model.likelihood import row_nll
from alpagasus2.model.sft import trl_steps
from alpagasus2.quant_lora import QuantLoraConfig, add_lora, load_base, load_tokenizer
from alpagasus2.train import fit, own_steps, train, training_step

TOKENIZER = load_tokenizer("smollm2-135m")
SHARED = {
    "vocab_size": len(TOKENIZER), "hidden_size": 64, "pad_token_id": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
USUAL = {
    **SHARED, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 512,
}  # fmt: skip
FOUR = {**USUAL, "num_hidden_layers": 4}
LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
# A model of each kind, by what would go wrong in it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": USUAL,  # nothing
    "gemma2": {**USUAL, "head_dim": 16},  # soft caps, on the attention and the logits
    "granite": {**USUAL, "logits_scaling": 8.0},  # logits divided
    "cohere": USUAL,  # logits multiplied
    "cohere2": USUAL,
    "hyperclovax": {**USUAL, "logits_scaling": 4.0},  # logits multiplied by Granite's field
    "falcon_h1": {
        **USUAL, "lm_head_multiplier": 0.04, "mamba_d_ssm": 64, "mamba_n_heads": 4,
        "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
    },
    "bloom": {"vocab_size": len(TOKENIZER), "hidden_size": 64, "n_layer": 2, "n_head": 4},  # ALiBi
    "mpt": {
        "vocab_size": len(TOKENIZER), "d_model": 64, "n_layers": 2, "n_heads": 4,
        "max_seq_len": 512,
    },
    "xglm": {
        "vocab_size": len(TOKENIZER), "d_model": 64, "num_layers": 2, "attention_heads": 4,
        "ffn_dim": 128, "max_position_embeddings": 512,
    },  # no mask from positions
    "stablelm": USUAL,  # layers that do not pass the layout on
    "nemotron": USUAL,
    "gpt_oss": {**USUAL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "qwen3_5_text": {**FOUR, **LINEAR},  # a state that runs along the tokens
    "lfm2": {**FOUR, "conv_L_cache": 3, "full_attn_idxs": [1, 3], "block_multiple_of": 32},
    "mamba2": {
        **SHARED, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16,
        "n_groups": 1,
    },
    "recurrent_gemma": {**USUAL, "num_hidden_layers": 3, "lru_width": 64},
    "modernbert-decoder": USUAL,  # more than one layer behind the backbone
}  # fmt: skip
ROWS: list[Any] = [
    {"id": str(n), "instruction": asked, "input": "", "output": answer}
    for n, (asked, answer) in enumerate([
        ("Name a colour.", "Blue is a colour."), ("Add two.", "Five."),
        ("Write a line.", "Rain falls on the roof."),
    ])
]  # fmt: skip


def tiny(family: str) -> Any:
    "A random model whose weights are large enough for its tokens to depend on each other."
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    lm = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for p in lm.requires_grad_(False).parameters():
        p.mul_(4.0 if p.dim() > 1 else 1.0)
    return lm


def own_nll(lm: Any, e: Encoded) -> torch.Tensor:
    "The loss of each target by the model's own forward pass, without adapters of ours around it."
    logits = lm(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0].float()
    targets = torch.tensor(e.ids[e.n_prompt :])
    return torch.nn.functional.cross_entropy(logits[e.n_prompt - 1 : -1], targets, reduction="none")


@pytest.fixture(scope="module")
def encoded() -> list[Encoded]:
    return [encode(row, TOKENIZER, 256) for row in ROWS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own(family: str, encoded: list[Encoded]) -> None:
    lm = tiny(family)
    with torch.no_grad():
        wanted = [own_nll(lm, e) for e in encoded]
    assert max(float(w.std()) for w in wanted) > 0.01  # the tokens matter
    for found in (row_nll(lm, encoded), [row_nll(lm, [e])[0] for e in encoded]):
        for nll, own in zip(found, wanted, strict=True):
            assert torch.allclose(torch.tensor(nll).float(), own, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "granite", "cohere2", "qwen3_5_text", "gpt_oss"])
def test_the_gradient_is_the_models_own(family: str, encoded: list[Encoded]) -> None:
    model = get_peft_model(tiny(family), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in adapter.values():
        torch.nn.init.normal_(p, std=0.05)  # B is not zero
    total = sum(e.n_targets for e in encoded)
    (sum(own_nll(model, e).sum() for e in encoded) / total).backward()
    wanted = {n: p.grad.clone() for n, p in adapter.items()}
    model.zero_grad()
    training_step(model, encoded, TrainConfig(max_grad_norm=0))
    for name, p in adapter.items():
        scale = wanted[name].abs().max()
        assert scale > 0 and (p.grad - wanted[name]).abs().max() < 1e-3 * scale, name


def first_losses(folder: Path, encoded: list[Encoded]) -> tuple[float, float]:
    "Of a training on the base in this folder: what its first step reports, and the base's own."
    TOKENIZER.save_pretrained(folder / "base")
    config = TrainConfig(batch_size=3, num_epochs=1)
    result = train(folder / "base", ROWS, folder / "adapter", config, progress=False)
    base = load_base(folder / "base")
    with torch.no_grad():
        own = torch.cat([own_nll(base, e) for e in encoded]).mean()
    return result["loss"][0], float(own)


@pytest.mark.parametrize("family", ["granite", "cohere2", "qwen3_5_text", "gpt_oss"])
def test_training_reports_the_models_own_loss(
    family: str, encoded: list[Encoded], tmp_path: Path
) -> None:
    tiny(family).save_pretrained(tmp_path / "base")
    reported, own = first_losses(tmp_path, encoded)
    assert reported == pytest.approx(own, abs=1e-3)


def test_rows_that_may_not_share_a_pass_never_do(encoded: list[Encoded]) -> None:
    "A family that nobody has looked at runs as its authors wrote it."
    lm = tiny("stablelm")
    seen: list[Any] = []
    forward: Callable[..., Any] = lm.forward
    lm.forward = lambda **given: seen.append(given["input_ids"].shape) or forward(**given)
    batches = micro_batches(lm, encoded)
    for batch in batches:
        target_nll(lm, [encoded[i] for i in batch])
    assert seen == [(3, max(len(e.ids) for e in encoded))]


RANDOM: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # layers of dropout
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},  # dropout by number
    "mixtral": {"router_jitter_noise": 0.5, "num_local_experts": 4},
    "llama": {"attention_dropout": 0.5},  # which our kernels do not have
}


@pytest.mark.parametrize("family", RANDOM)
def test_a_base_draws_nothing_at_random(
    family: str, encoded: list[Encoded], tmp_path: Path
) -> None:
    "Its draws would depend on how rows are cut into micro-batches."
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(family).to_dict()
    config = {k: v for k, v in USUAL.items() if k in known} | RANDOM[family]
    lm = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **config)
    )
    lm.save_pretrained(tmp_path)
    plain = QuantLoraConfig(load_in_4bit=False, lora_dropout=0.0)
    model = add_lora(load_base(tmp_path, plain), plain).float()
    with torch.no_grad():
        own = torch.cat([own_nll(model.eval(), e) for e in encoded]).mean()
    steps = [{}, {"micro_batch_size": 1}]
    losses = [training_step(model.train(), encoded, TrainConfig(**s))[0] for s in steps]
    assert losses == pytest.approx([float(own)] * 2, abs=1e-4)


def test_a_model_that_trains_otherwise_than_it_reads_is_refused() -> None:
    lm = tiny("llama")
    lm.model.norm.register_forward_hook(lambda m, _, x: x * 1.5 if m.training else x)
    model = get_peft_model(lm, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="no way of running its rows gives the loss"):
        check(model, gradient=True)


def test_what_a_model_cannot_read_is_refused_before_it_trains(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    short = {**USUAL, "max_position_embeddings": 40}
    kinds = {  # rows of more than 40 tokens, a token that was added to the tokenizer alone
        "row 2: 60 tokens, but the model reads 40": [
            transformers.LlamaConfig(**short, rope_parameters=rope),
            transformers.GPT2Config(**SHARED, n_layer=1, n_head=4, n_positions=40),
        ],
        r"row 0: it has token \d+, but the model knows only 9000": [
            transformers.LlamaConfig(**{**USUAL, "vocab_size": 9000}),
        ],
    }
    rows = [*ROWS[:2], {**ROWS[2], "output": "Rain falls on the roof. " * 4}]
    for said, configs in kinds.items():
        for config in configs:
            base = tmp_path / f"{config.model_type}-{config.vocab_size}"
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
            TOKENIZER.save_pretrained(base)
            with pytest.raises(UserError, match=said):
                train(base, rows, tmp_path / "adapter", progress=False)


def test_a_checkpoint_without_its_output_layer_is_no_base(tmp_path: Path) -> None:
    tiny("llama").model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight, or has it in another shape"):
        load_base(tmp_path)
    tiny("llama").save_pretrained(tmp_path)
    wider = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 50000}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight and 1 more, or has it in another"):
        load_base(tmp_path)


def test_half_of_an_encoder_with_a_decoder_is_no_base(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bart is an encoder with a decoder"):
        load_base(tmp_path)


def edited(folder: Path, **changes: Any) -> Path:
    "A base whose config says something else."
    tiny("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_of_another_model_is_no_base(tmp_path: Path) -> None:
    "Its weights would be left out, or its code, without a word."
    auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    kinds: dict[str, dict[str, Any]] = {
        r"has model\.layers\.1\.input_layernorm\.weight and 8 more": {"num_hidden_layers": 1},
        r"code of its own \(MineForCausalLM\), which is not run here": {"auto_map": auto_map},
        r"quantised already \(gptq\); name the base in 16 bits": {
            "quantization_config": {"quant_method": "gptq", "bits": 4}
        },
        "did not give a model: KeyError: 'nonesuch'": {"hidden_act": "nonesuch"},
        "not a multiple of the number of attention heads": {"num_attention_heads": 5},
    }
    for n, (said, changes) in enumerate(kinds.items()):
        with pytest.raises(UserError, match=said):
            load_base(edited(tmp_path / str(n), **changes))
    weights = load_file(tmp_path / "0" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(weights, edited(tmp_path / "bias") / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias, for"):
        load_base(tmp_path / "bias")
    cut = edited(tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:9999])
    with pytest.raises(UserError, match="did not give a model: SafetensorError"):
        load_base(tmp_path / "cut")
    same = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    assert load_base(edited(tmp_path / "same", auto_map=same, num_nextn_predict_layers=1))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_that_was_saved_quantised_trains_answers_and_merges(
    bits: str, encoded: list[Encoded], tmp_path: Path
) -> None:
    "Whatever type its weights had before."
    tiny("llama").save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(**{bits: True})
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float16, quantization_config=how
    )
    lm.save_pretrained(tmp_path / "base")
    reported, own = first_losses(tmp_path, encoded)
    assert reported == pytest.approx(own, abs=1e-2)
    merged = merge(tmp_path / "adapter", tmp_path / "merged", encoded)
    assert merged["kinds"]["dequantised"]["kl"] < 1e-2


ROPE = {"rope_theta": 1e4, "factor": 4.0}
LENGTHS: dict[str, dict[str, Any]] = {  # rows whose length, or whose batch, decides their loss
    "dynamic": {
        "rope_parameters": {**ROPE, "rope_type": "dynamic", "original_max_position_embeddings": 48},
        "max_position_embeddings": 48,
    },
    "longrope": {"rope_parameters": {
        **ROPE, "rope_type": "longrope", "original_max_position_embeddings": 48,
        "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)],
    }},
    "indexer": {
        "num_key_value_heads": 4, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 64,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("trainer", [None, "trl"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_the_length_of_a_row_is_its_own(kind: str, trainer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = "deepseek_v32" if kind == "indexer" else "llama"
    config = transformers.AutoConfig.for_model(family, **{**USUAL, **LENGTHS[kind]})
    lm = transformers.AutoModelForCausalLM.from_config(config)
    for p in lm.parameters():
        p.data.mul_(4.0 if p.dim() > 1 else 1.0)
    lm.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(0)
    rows = [
        Encoded(str(n), torch.randint(3, 900, (n,), generator=draw).tolist(), 4)
        for n in (30, 160, 50, 20, 90, 40)
    ]
    wanted = []
    plain = QuantLoraConfig(load_in_4bit=False, lora_dropout=0.0)
    for e in rows:  # each by a model that has read nothing before
        fresh = load_base(tmp_path, plain).float().eval()
        with torch.no_grad():
            wanted.append(own_nll(fresh, e))
    mean = float(torch.cat(wanted).mean())
    model = add_lora(load_base(tmp_path, plain).float(), plain)
    for found, own in zip(row_nll(model, rows), wanted, strict=True):
        assert torch.allclose(torch.tensor(found).float(), own, atol=1e-4)
    settings = TrainConfig(batch_size=6, num_epochs=1, trainer=trainer, learning_rate=1e-6)
    steps = partial(trl_steps, TOKENIZER) if trainer else own_steps
    log = fit(model, rows, settings, progress=False, steps=steps)
    assert log["loss"][0] == pytest.approx(mean, abs=1e-4)
