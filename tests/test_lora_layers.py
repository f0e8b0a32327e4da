"""Where LoRA goes: mixtures of experts, joined projections, models with a picture tower."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from alpagasus2.batches import TrainConfig
from alpagasus2.core.files import UserError
from alpagasus2.extras.merge import merged_model
from alpagasus2.model.check import checked
from alpagasus2.model.forward import encode
from alpagasus2.model.lora import in_one_step
from alpagasus2.quant_lora import (
    QuantLoraConfig,
    add_lora,
    load_adapters,
    load_base,
    load_tokenizer,
)
from alpagasus2.train import train, training_step

TEXT = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
MIXTURE = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
ROWS: list[Any] = [
    {"id": str(n), "instruction": f"Count to {n}.", "input": "", "output": "One, two."}
    for n in range(4)
]


def text(family: str, **options: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **TEXT, **options)


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=text("gemma3_text", sliding_window=8),
        vision_config=transformers.SiglipVisionConfig(**EYES), mm_tokens_per_image=4,
        image_token_index=49151, boi_token_index=49150, eoi_token_index=49149,
    )  # fmt: skip


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config=text("mistral"),
        vision_config=transformers.PixtralVisionConfig(**EYES, head_dim=16),
        image_token_id=49151,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    "Saves a random model of a config with the small model's tokenizer."

    def save(config: Any) -> str:
        torch.manual_seed(0)
        kinds = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        auto = (
            transformers.AutoModelForCausalLM
            if type(config) in kinds
            else transformers.AutoModelForImageTextToText
        )
        auto.from_config(config).save_pretrained(tmp_path / "base")
        load_tokenizer("smollm2-135m").save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


def layers(model: Any) -> set[str]:
    "The last parts of the names of the layers that have LoRA."
    found = (n for n, p in model.named_parameters() if p.requires_grad)
    return {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in found}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_experts_are_left_out_and_it_is_said(
    family: str, saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = MIXTURE if "moe" in family else {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = load_base(saved(text(family, **options)))
    model = add_lora(base, QuantLoraConfig(lora_target_modules="all-linear", lora_dropout=0.05))
    said = capsys.readouterr().err
    assert "of the weights are quantised; experts stay in 16 bits" in said
    assert f"{family}: its experts get no LoRA, its other layers do" in said
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= layers(model)
    assert not layers(model) & {"experts", "gate_up_proj", "lm_head"}


def test_joined_projections_take_the_place_of_the_default(
    saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(transformers.Phi3Config(**TEXT))
    assert layers(add_lora(load_base(base))) == {"qkv_proj"}
    assert "phi3 has no q_proj and v_proj: LoRA goes on qkv_proj" in capsys.readouterr().err
    with pytest.raises(
        UserError, match="no k_proj to train here; the model has down_proj, gate_up_proj"
    ):
        add_lora(load_base(base), QuantLoraConfig(lora_target_modules=["k_proj"]))
    for wrong in ("lm_head", "down_projj"):  # beside a name that is right
        both = QuantLoraConfig(lora_target_modules=["down_proj", wrong])
        with pytest.raises(UserError, match=f"no {wrong} to train here"):
            add_lora(load_base(base), both)


@pytest.mark.parametrize("config", [gemma3, mistral3])
def test_a_model_with_a_picture_tower_learns_in_its_language_model(config: Any, saved: Any) -> None:
    base = saved(config())
    for wanted in (["q_proj", "v_proj"], "all-linear"):
        model = add_lora(load_base(base), QuantLoraConfig(lora_target_modules=wanted))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names and all("language_model" in n for n in names)
    assert checked(model, gradient=True).way == "packed"


@pytest.mark.parametrize("config", [mistral3, lambda: text("qwen3_moe", **MIXTURE)])
def test_trained_and_merged_they_are_the_same(config: Any, saved: Any, tmp_path: Path) -> None:
    base, adapter = saved(config()), tmp_path / "adapter"
    quant = QuantLoraConfig(lora_target_modules="all-linear", load_in_4bit=False)
    train(base, ROWS, adapter, TrainConfig(learning_rate=0.01), quant, progress=False)
    trained = load_adapters(load_base(base, quant), {"default": adapter}).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, plain = trained(ids).logits, load_base(base, quant).eval()(ids).logits
        merged = merged_model(adapter, base, quant)(ids).logits
    apart = (found.float() - merged.float()).norm()
    assert apart < 0.1 * (found.float() - plain.float()).norm()


def of_another_tool(base: str, adapter: Path, **options: Any) -> None:
    "Saves an adapter of PEFT's that changes the base much."
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    given = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    tuned = get_peft_model(model, LoraConfig(**given))
    for p in tuned.parameters():
        p.data += 0.3 * torch.randn_like(p) if p.requires_grad else 0.0
    tuned.save_pretrained(adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True}, {"trainable_token_indices": [*range(5, 25)]}, {"lora_bias": True},
        {"use_rslora": True}, {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens"]},
    ],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_adapters_of_other_tools_are_merged_as_peft_does(
    options: dict[str, Any], saved: Any, tmp_path: Path
) -> None:
    base, quant = saved(text("qwen2")), QuantLoraConfig(load_in_4bit=False)
    of_another_tool(base, tmp_path / "adapter", **options)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        before = plain(ids).logits
        wanted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(ids).logits
        merged = merged_model(tmp_path / "adapter", base, quant).float()(ids).logits
    assert (merged - wanted).norm() < 0.05 * (wanted - before).norm()


def test_an_adapter_that_no_merge_can_hold_is_refused(saved: Any, tmp_path: Path) -> None:
    base, quant = (
        saved(text("llama", tie_word_embeddings=True)),
        QuantLoraConfig(load_in_4bit=False),
    )
    of_another_tool(base, tmp_path / "tied", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="whose weights are the output layer's, too"):
        merged_model(tmp_path / "tied", base, quant)
    of_another_tool(base, tmp_path / "twice", layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(UserError, match="it repeats layers of the base"):
        load_adapters(load_base(base, quant), {"twice": tmp_path / "twice"})
    of_another_tool(base, tmp_path / "bias", lora_bias=True)
    with pytest.raises(UserError, match="PEFT cannot merge it: Impossible"):
        merged_model(tmp_path / "bias", base, quant)


def test_biases_are_trained_where_a_layer_is_one_step(saved: Any) -> None:
    config = QuantLoraConfig(load_in_4bit=False, lora_bias="all", lora_dropout=0.0)
    model = in_one_step(add_lora(load_base(saved(text("qwen2")), config), config))
    rows = [encode(row, load_tokenizer("smollm2-135m")) for row in ROWS]
    training_step(model, rows, TrainConfig())
    biases = [p for n, p in model.named_parameters() if "bias" in n and p.requires_grad]
    assert biases and all(p.grad is not None and p.grad.any() for p in biases)


KINDS: list[tuple[Any, str]] = [
    (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
    (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
    (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
    (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "ADALORA"),
    (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[9]), "aLoRA"),
]


@pytest.mark.parametrize(("config", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_an_adapter_that_is_no_lora_is_refused(
    config: Any, kind: str, saved: Any, tmp_path: Path
) -> None:
    "An aLoRA would answer as the base: what switches it on is a wrapper that is not asked here."
    base = saved(text("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"adapter x: .* of the kind {kind}, and only LoRA"):
        load_adapters(load_base(base), {"x": tmp_path / "other"})


def test_an_adapter_of_another_tool_stands_on_the_base_that_it_names(
    saved: Any, tmp_path: Path
) -> None:
    base = saved(text("llama"))
    of_another_tool(base, tmp_path / "a", trainable_token_indices=[7])
    of_another_tool(base, tmp_path / "b", modules_to_save=["lm_head"])
    for names in ("ab", "ba"):
        with pytest.raises(UserError, match=r"adapter a: .* trains single tokens .* ask it alone"):
            load_adapters(load_base(base), {n: tmp_path / n for n in names})
    weights = load_file(tmp_path / "b" / "adapter_model.safetensors")
    left = {n: w for n, w in weights.items() if "lm_head" not in n}
    save_file(left, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"b lacks base_model\.model\.lm_head\.weight"):
        load_adapters(load_base(base), {"b": tmp_path / "b"})
    load_adapters(load_base(base), {"a": tmp_path / "a"})
    other = transformers.AutoModelForCausalLM.from_config(text("llama"))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"adapter a: .* trained on another base"):
        load_adapters(load_base(tmp_path / "other"), {"a": tmp_path / "a"})


def test_lora_stands_where_text_is_read(saved: Any) -> None:
    "Not in a tower that lies within the language model, nor where the output layer is a decoder."
    git = transformers.GitConfig(
        vision_config=EYES, vocab_size=500, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    modern = transformers.ModernBertDecoderConfig(**{**TEXT, "vocab_size": 500})
    for config, wanted in ((git, ["query", "value"]), (modern, "all-linear")):
        quant = QuantLoraConfig(lora_target_modules=wanted, lora_dropout=0.0)
        model = add_lora(load_base(saved(config)), quant)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names and not any("vision" in n for n in names)
        assert checked(model, gradient=True).is_right
    quant = QuantLoraConfig(lora_target_modules=["visual_projection.0"])
    with pytest.raises(UserError, match="take no part in reading text alone"):
        checked(add_lora(load_base(saved(git)), quant), gradient=True)
