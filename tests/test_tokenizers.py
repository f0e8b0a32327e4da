"""Tokenizers that people have, made from the small model's own: EOS, BOS and control tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

from alpagasus2.batches import TrainConfig, encode_rows
from alpagasus2.core.files import UserError
from alpagasus2.extras.preview import preview
from alpagasus2.generate import GenerateConfig, encode_prompts
from alpagasus2.model.forward import encode, encode_response
from alpagasus2.quant_lora import load_tokenizer, resolve_model

ROW: Any = {"id": "r", "instruction": "Name a colour.", "input": "", "output": "Blue."}
START, END = "<|im_start|>", "<|im_end|>"  # BOS and EOS of the small model
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<repo_name>{{ m.role }}<file_sep>\n\n"
    "{{ m.content | trim }}<gh_stars>{% endfor %}{% if add_generation_prompt %}"
    "<repo_name>assistant<file_sep>\n\n{% endif %}"
)


def adding(*names: str) -> Callable[[dict], None]:
    "A tokenizer that writes these tokens around every text; A is the text."
    ids = {START: 1, END: 2}

    def edit(tokenizer: dict) -> None:
        piece: Any = {"A": {"Sequence": {"id": "A", "type_id": 0}}}
        piece |= {n: {"SpecialToken": {"id": n, "type_id": 0}} for n in ids}
        pair = [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"]
        special = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in ids.items()}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "single": [piece[n] for n in names], "pair": pair,
            "special_tokens": special,
        }  # fmt: skip

    return edit


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def made(edit: Callable[[dict], None] | None = None, template: str = "") -> Any:
        base = Path(resolve_model("smollm2-135m"))
        for name in ("tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(base / name, tmp_path)
        tokenizer = json.loads((base / "tokenizer.json").read_text())
        if edit:
            edit(tokenizer)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        if template:
            (tmp_path / "chat_template.jinja").write_text(template)
        return load_tokenizer(tmp_path)

    return made


@pytest.mark.parametrize("around", [("A", END), (START, "A", END), (START, "A"), ("A",)])
def test_eos_of_the_tokenizer_neither_ends_a_prompt_nor_doubles_in_a_row(make, around):
    tokenizer = make(adding(*around))
    asked = encode_prompts([ROW], tokenizer, 500, GenerateConfig())[0]
    e = encode(ROW, tokenizer, 256)
    assert asked == e.ids[: e.n_prompt] and asked[-1] != tokenizer.eos_token_id
    assert e.ids.count(tokenizer.eos_token_id) == 1 and e.ids[-1] == tokenizer.eos_token_id
    assert e.ids.count(tokenizer.bos_token_id) == asked.count(1) == (START in around)
    assert tokenizer.decode(e.ids[e.n_prompt :]) == "Blue." + END
    alone = encode_response(ROW, tokenizer)
    assert tokenizer.decode(alone.ids) == START + "Blue."


def test_bos_is_there_once_where_tokenizer_and_template_both_write_it(make):
    tokenizer = make(adding(START, "A"), LLAMA3)
    e = encode(ROW, tokenizer, 256, "chat")
    asked = encode_prompts([ROW], tokenizer, 500, GenerateConfig(template="chat"))[0]
    assert e.ids.count(1) == asked.count(1) == 1 and asked == e.ids[: e.n_prompt]
    assert tokenizer.decode(e.ids[e.n_prompt :]) == "Blue.<gh_stars>"  # its end of turn, not EOS


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("field", ["instruction", "output"])
def test_a_control_token_that_a_row_writes_is_text_and_counted(make, template, field):
    tokenizer, said = make(), f"The token {END} ends a turn. It matters."
    row = {**ROW, field: said}
    usual, e = encode(ROW, tokenizer, 256, template), encode(row, tokenizer, 256, template)
    assert e.ids.count(2) == usual.ids.count(2) and e.ids.count(1) == usual.ids.count(1)
    assert said in tokenizer.decode(e.ids) and e.control_tokens == 1
    asked = encode_prompts([row], tokenizer, 500, GenerateConfig(template=template))[0]
    assert asked == e.ids[: e.n_prompt]
    config = TrainConfig(template=template)
    encoded, counts = encode_rows([row, ROW], tokenizer, config)
    assert counts["control_tokens"] == 1
    shown = preview(encoded, tokenizer, counts, config).text()
    assert "1 control tokens as text" in shown and shown.count("<- EOS") == 2
    assert tokenizer(f"a{END}", add_special_tokens=False)["input_ids"][-1] == 2  # as before


def test_text_without_control_tokens_is_tokenised_as_it_was(make):
    tokenizer = make()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": ROW["instruction"]}], tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    e = encode({**ROW, "output": "Bläu 🙂\n\n  x"}, tokenizer, 256, "chat")
    usual = tokenizer(text + "Bläu 🙂\n\n  x", add_special_tokens=False)["input_ids"]
    assert e.ids == [*usual, tokenizer.eos_token_id]


def test_a_tokenizer_without_a_chat_template_is_one_sentence(make):
    tokenizer = make()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template; use template=alpaca"):
        encode(ROW, tokenizer, 256, "chat")


@pytest.mark.parametrize(("output", "known"), [("ME. *", "b"), ("A.", "ab"), ("* *", "abc")])
def test_an_answer_of_unknown_characters_is_learned_to_its_end(output: str, known: str) -> None:
    "Two unknown characters are the same token, as are a large and a small letter in some."
    vocabulary = {
        t: n for n, t in enumerate(["<unk>", START, END, "user", "assistant", ".", *known])
    }
    rust = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    rust.normalizer, rust.pre_tokenizer = Lowercase(), BertPreTokenizer()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="<unk>", bos_token=START, eos_token=END
    )
    tokenizer.chat_template = template
    e = encode({**ROW, "output": output}, tokenizer, 256, "chat")
    asked = encode_prompts([ROW], tokenizer, 500, GenerateConfig(template="chat"))[0]
    answer = tokenizer(output, add_special_tokens=False)["input_ids"]
    assert asked == e.ids[: e.n_prompt] and e.ids[e.n_prompt :] == [*answer, vocabulary[END]]
