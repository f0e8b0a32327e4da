"""Whatever the architecture: the tokens are those of the model's own `generate`, one at a time."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from alpagasus2.core.families import context_length
from alpagasus2.core.files import UserError
from alpagasus2.core.run_folder import manifest_entry
from alpagasus2.data import load_questions
from alpagasus2.generate import GenerateConfig, generate, local_answers
from alpagasus2.model import decode as decoding
from alpagasus2.model.decode import WAYS, cache_budget, chooser, decode, way_of
from alpagasus2.quant_lora import load_tokenizer

RECORDED, REFILLED, PADDED, ALONE = WAYS
USUAL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FOUR = {**USUAL, "num_hidden_layers": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Which way each takes, by what keeps it from the cache: states, distances, windows of its own.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (REFILLED, USUAL),
    "gemma2": (REFILLED, {**USUAL, "head_dim": 16, "sliding_window": 6}),
    "gemma3_text": (
        REFILLED, {**FOUR, "head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}
    ),
    "gemma4_text": (REFILLED, {
        **FOUR, "head_dim": 16, "sliding_window": 6, "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
    }),
    "granite": (REFILLED, {**USUAL, "logits_scaling": 8.0}),
    "cohere2": (REFILLED, {**FOUR, "sliding_window": 6}),
    "gpt_oss": (REFILLED, {**USUAL, **EXPERTS, "head_dim": 16, "sliding_window": 6}),
    "gptj": (REFILLED, {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "bloom": (REFILLED, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (PADDED, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "gpt_neo": (PADDED, {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
        "attention_types": [[["global", "local"], 1]],
    }),
    "llama4_text": (PADDED, {
        **FOUR, **EXPERTS, "head_dim": 8, "attention_chunk_size": 6, "intermediate_size_mlp": 64,
        "num_experts_per_tok": 1,
    }),
    "mamba": (PADDED, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (PADDED, {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8,
        "n_groups": 1,
    }),
    "recurrent_gemma": (
        PADDED, {**USUAL, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6}
    ),
    "qwen3_5_text": (PADDED, {
        **FOUR, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
    "lfm2": (PADDED, {**FOUR, "full_attn_idxs": [1, 3], "block_multiple_of": 32}),
    "falcon_h1": (PADDED, {
        **USUAL, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 8,
    }),
    "deepseek_v32": (ALONE, {  # chooses its keys, padding among them
        **USUAL, "num_key_value_heads": 4, "index_topk": 8, "index_n_heads": 2,
        "index_head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
    }),
    "rwkv": (ALONE, {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
}  # fmt: skip
WORDS, NEW, STOP = 97, 12, {3, 4, 5, 6, 7}
draw = random.Random(1).randrange
PROMPTS = [[8, 9, *(draw(8, WORDS) for _ in range(n))] for n in (1, 24, 4, 9, 15)]
ROOM = 2 * (max(map(len, PROMPTS)) + NEW)  # for two of the longest at a time


def tiny(family: str, words: int = WORDS) -> Any:
    "A random model whose weights are large enough for its tokens to depend on each other."
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=words, **FAMILIES[family][1])
    lm = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for p in lm.requires_grad_(False).parameters():
        p.mul_(4.0 if p.dim() > 1 else 1.0)
    return lm


def own(lm: Any, prompt: list[int]) -> tuple[list[int], bool]:
    "One prompt through Transformers' greedy loop."
    ids = torch.tensor([prompt])
    out = lm.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        eos_token_id=sorted(STOP), pad_token_id=0,
    )  # fmt: skip
    new = out[0, len(prompt) :].tolist()
    return (new[:-1], True) if new[-1] in STOP else (new, False)


def ours(way: Any, lm: Any, temperature: float = 0.0) -> list[tuple[list[int], bool]]:
    choose = chooser(temperature, 0.9, [f"0 {i}" for i in range(len(PROMPTS))])
    found = {i: (new, stopped) for i, new, stopped in way(lm, PROMPTS, NEW, STOP, choose, ROOM)}
    return [found[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_the_models_own(family: str) -> None:
    lm = tiny(family)
    wanted = [own(lm, p) for p in PROMPTS]
    assert ours(decode, lm) == wanted
    assert way_of(lm, PROMPTS, NEW) == FAMILIES[family][0]
    assert len({token for new, _ in wanted for token in new}) > 3  # the prompts matter
    assert cache_budget(lm) > 100


def test_a_window_that_no_short_check_reaches() -> None:
    torch.manual_seed(0)
    prompts = [[8, 9, *(draw(8, WORDS) for _ in range(n))] for n in (60, 100, 90)]
    with patch.dict(FAMILIES["gpt_neo"][1], window_size=70), patch(f"{__name__}.PROMPTS", prompts):
        lm = tiny("gpt_neo")
        assert ours(decode, lm) == [own(lm, p) for p in prompts]
    assert ours(WAYS[REFILLED], lm) == [own(lm, p) for p in PROMPTS]  # it fits short ones


def test_a_seed_gives_the_same_text_whichever_way() -> None:
    lm = tiny("llama")
    lm.generation_config.repetition_penalty = 5.0  # recommended by a model's authors, not asked for
    refilled = ours(WAYS[REFILLED], lm, 1.0)
    assert ours(WAYS[PADDED], lm, 1.0) == ours(WAYS[ALONE], lm, 1.0) == refilled
    assert {stopped for _, stopped in refilled} == {True, False}
    assert refilled != ours(WAYS[REFILLED], lm)


def test_a_model_is_tried_once() -> None:
    lm, seen = tiny("gptj"), []
    counted = {name: lambda *a, w=w, n=name: seen.append(n) or w(*a) for name, w in WAYS.items()}
    with patch.object(decoding, "WAYS", counted):
        assert way_of(lm, PROMPTS, NEW) == way_of(lm, PROMPTS[:1], 1) == REFILLED
    assert seen == [REFILLED]


def imitated(step: Any, inputs: dict[str, torch.Tensor]) -> Any:
    "As a CUDA graph: what Python knows of the rows is as it was, only the inputs are new."
    rows, result = step.__self__, step(**inputs)

    def replay() -> None:
        with patch.multiple(rows, end=-1, live=None, waiting=None, places=None):
            result.copy_(step(**inputs))

    return replay, result


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", RECORDED), ("granite", RECORDED), ("gptj", None), ("bloom", None), ("gemma2", None),
     ("gpt_neo", PADDED), ("mamba", PADDED)],
)  # fmt: skip
def test_recorded_steps_are_taken_only_where_they_are_right(family: str, way: str | None) -> None:
    lm = tiny(family)
    recorded = {**WAYS, RECORDED: partial(decoding._refilled, record=imitated)}
    with (
        patch.object(decoding, "_may_record", lambda lm: True),
        patch.object(decoding, "WAYS", recorded),
    ):
        assert ours(decode, lm) == [own(lm, p) for p in PROMPTS]
        assert way is None or way_of(lm, PROMPTS, NEW) == way


def test_steps_that_cannot_be_recorded_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny("llama")
    with (
        patch.object(decoding, "_may_record", lambda lm: True),
        patch("torch.cuda.CUDAGraph", side_effect=RuntimeError("operation not permitted")),
    ):
        assert ours(decode, lm) == ours(decode, lm) == [own(lm, p) for p in PROMPTS]
        assert way_of(lm, PROMPTS, NEW) == REFILLED
    assert capsys.readouterr().err.count("could not be recorded") == 1


def test_an_adapter_answers_by_either_loop() -> None:
    lm = tiny("gpt_neo")
    base = ours(decode, lm)
    model = get_peft_model(lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    tuned = ours(decode, model)
    assert tuned == [own(model, p) for p in PROMPTS] != base
    with model.disable_adapter():
        assert ours(decode, model) == base


def test_a_long_row_does_not_rescale_its_neighbours() -> None:
    "Phi-3 takes other positions for a whole batch when one of its rows is long."
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [9.0] * 4, "original_max_position_embeddings": 20,
    }  # fmt: skip
    config = transformers.Phi3Config(
        vocab_size=WORDS, **USUAL, rope_parameters=rope, original_max_position_embeddings=20,
        initializer_range=0.6,
    )  # fmt: skip
    lm = transformers.Phi3ForCausalLM(config).eval()
    assert ours(decode, lm) == [own(lm, p) for p in PROMPTS]
    assert way_of(lm, PROMPTS, NEW) == ALONE and way_of(lm, PROMPTS[:1], NEW) == REFILLED
    kinds = {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Gemma3TextConfig(
        vocab_size=WORDS, **USUAL, rope_parameters=kinds, layer_types=[*kinds], head_dim=8,
        sliding_window=8, initializer_range=0.6,
    )  # fmt: skip
    assert way_of(transformers.Gemma3ForCausalLM(config).eval(), PROMPTS, NEW) == ALONE


def test_a_model_that_cannot_generate_is_said_to_in_one_sentence() -> None:
    lm = tiny("llama")
    with (
        patch.object(lm, "forward", side_effect=NotImplementedError("no kernel\nfor this")),
        pytest.raises(UserError, match=r"llama: .*\(NotImplementedError: no kernel\); serve"),
    ):
        ours(decode, lm)


def test_a_half_written_file_goes_on_and_says_which_way(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    lm, questions = tiny("mamba", len(tokenizer)), load_questions("sample_questions")[:3]
    config, output = GenerateConfig(max_new_tokens=5), tmp_path / "responses.jsonl"
    assert context_length(lm.config) is None

    def run() -> list[Any]:
        arms = {"base": lambda asked: local_answers(lm, tokenizer, asked, config)}
        return generate(questions, arms, output, config, progress=False)

    lines = run()
    assert manifest_entry(output)["decoding"] == PADDED
    assert not any("decoding" in line for line in lines)
    output.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]) + '{"id": ')
    manifest = tmp_path / "manifest.json"
    said = json.loads(manifest.read_text())
    said["outputs"][output.name]["decoding"] = REFILLED  # of an earlier version
    manifest.write_text(json.dumps(said))
    key = lambda line: line["id"]  # noqa: E731
    assert sorted(run(), key=key) == sorted(lines, key=key)
    assert manifest_entry(output)["decoding"] == PADDED
