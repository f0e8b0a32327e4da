"""Chat rows: what is learned of a conversation, how an answer is asked for, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from stand_ins import tiny_llama

from alpagasus2.batches import TrainConfig, encode_rows
from alpagasus2.cli import main
from alpagasus2.core.files import UserError, say_once
from alpagasus2.data import ChatTemplate, check_rows
from alpagasus2.generate import GenerateConfig, encode_prompts, local_answers
from alpagasus2.model.forward import Encoded, encode
from alpagasus2.model.likelihood import row_nll, signals, target_logprobs
from alpagasus2.quant_lora import QuantLoraConfig, load_adapters, load_base, load_tokenizer
from alpagasus2.recipe import Arm, Rater, Recipe, rating_template
from alpagasus2.train import train

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSES = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('No system role') }}{% endif %}"
)
ALTERNATES = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
GEMMA = REFUSES + ALTERNATES + CHATML
MISTRAL = (  # no opening of an answer, a space before it, and another end than EOS
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
OPENS = (  # every answer of the text has a closed think block, an answer is asked with an open one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
QWEN3 = (  # thoughts are taken out of earlier turns, and the last one always has a block
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts|length > 1 else '' }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (  # asks with an open block that its own conversations never have
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ALL = {"chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL, "opens": OPENS, "qwen3": QWEN3,
       "forgets": FORGETS, "plain": PLAIN}  # fmt: skip

TURNS: list[Any] = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Blue."},
]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = {"role": "assistant", "content": "<think>\nSky.\n</think>\n\nBlue."}


def with_template(template: str | None) -> Any:
    "The small model's tokenizer with another template."
    tokenizer = load_tokenizer("smollm2-135m")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def chat(messages: list[Any], **fields: Any) -> Any:
    return {"id": "m", "messages": messages, **fields}


def learned(e: Encoded, tokenizer: Any) -> list[str]:
    "The text of each stretch of targets."
    spans: list[list[int]] = []
    for k, i in enumerate(e.targets):
        if not k or i != e.targets[k - 1] + 1:
            spans.append([])
        spans[-1].append(e.ids[i])
    return [tokenizer.decode(s) for s in spans]


# ---- what is learned


def test_every_turn_of_the_assistant_is_learned_or_the_last_alone():
    tokenizer = with_template(None)
    assert learned(encode(chat(TURNS), tokenizer, 256, "chat"), tokenizer) == [
        "Hello.<|im_end|>", "Blue.<|im_end|>",
    ]  # fmt: skip
    (last,), counts = encode_rows(
        [chat(TURNS)], tokenizer, TrainConfig(template="chat", last_turn_only=True)
    )
    assert learned(last, tokenizer) == ["Blue.<|im_end|>"] and counts["answers"] == 1


@pytest.mark.parametrize("name", ALL)
def test_the_text_is_the_templates_and_the_prompt_is_what_was_before_the_answer(name):
    tokenizer = with_template(ALL[name])
    e = encode(chat(TURNS), tokenizer, None, "chat")
    own = tokenizer.apply_chat_template(TURNS, tokenize=False)
    read = tokenizer.decode(e.ids)
    assert read == own.rstrip("\n") or (name == "plain" and read == own.rstrip("\n") + "<|im_end|>")
    assert [x.strip().split("<")[0] for x in learned(e, tokenizer)] == ["Hello.", "Blue."]
    asked = encode_prompts([chat(TURNS[:3])], tokenizer, 256, GenerateConfig(template="chat"))[0]
    start = max(i for i in e.targets if i - 1 not in e.targets)
    assert asked == e.ids[:start]


def test_the_templates_own_end_of_turn_is_learned_and_stops_the_answer(tmp_path: Path):
    tokenizer = with_template(MISTRAL)  # ends in <|endoftext|>, EOS is <|im_end|>
    e = encode(chat(TURNS), tokenizer, 256, "chat")
    assert learned(e, tokenizer) == [" Hello.<|endoftext|>", " Blue.<|endoftext|>"]
    assert tokenizer.decode(e.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert 0 in stops(tokenizer, GenerateConfig(template="chat"), tmp_path)
    assert stops(tokenizer, GenerateConfig(), tmp_path) == {2}


def stops(tokenizer: Any, config: GenerateConfig, folder: Path) -> set[int]:
    "With which tokens `local_answers` lets an answer end."
    seen: list[set[int]] = []

    def decode(model: Any, prompts: Any, most: int, stop: set[int], *rest: Any) -> Any:
        seen.append(stop)
        return iter([])

    with patch("alpagasus2.model.decode.decode", decode):
        list(
            local_answers(
                tiny_llama(folder), tokenizer, [chat(TURNS[:1], instruction="Hi")], config
            )
        )
    return seen[0]


# ---- think blocks


def test_an_answer_is_not_learned_inside_an_open_think_block():
    tokenizer = with_template(OPENS)
    row: Any = {"id": "r", "instruction": "Name a colour.", "input": "", "output": "Blue."}
    e = encode(row, tokenizer, 256, "chat")
    assert tokenizer.decode(e.ids[: e.n_prompt]).endswith("<think>\n\n</think>\n\n")
    assert learned(e, tokenizer) == ["Blue.<|im_end|>"]


@pytest.mark.parametrize("name", ["opens", "qwen3"])
def test_a_thought_is_learned_where_the_options_ask_for_it(name):
    tokenizer, row = with_template(ALL[name]), chat([*TURNS[:3], THOUGHT])
    if name == "qwen3":
        with pytest.raises(UserError, match=r"row m: message 4: its thought .* enable_thinking"):
            encode(row, tokenizer, 256, "chat")
    on = ChatTemplate({"enable_thinking": True})
    first, last = learned(encode(row, tokenizer, 256, on), tokenizer)
    assert last.endswith("Sky.\n</think>\n\nBlue.<|im_end|>") and first.endswith("Hello.<|im_end|>")
    config = GenerateConfig(template="chat", template_options={"enable_thinking": True})
    (asked,) = encode_prompts([chat(TURNS[:3])], tokenizer, 256, config)
    own = tokenizer.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(asked) == own


def test_options_reach_the_template_in_training_answering_and_rating():
    tokenizer = with_template("{{ mood or 'calm' }}" + CHATML)
    options = {"mood": "merry"}
    asked = {"template": "chat", "template_options": options}
    (e,), _ = encode_rows([chat(TURNS)], tokenizer, TrainConfig(**asked))
    (p,) = encode_prompts([chat(TURNS[:1])], tokenizer, 99, GenerateConfig(**asked))
    assert tokenizer.decode(e.ids).startswith("merry<") and tokenizer.decode(p).startswith("merry<")
    recipe = Recipe("smollm2-135m", "sample", {"a": Arm("random_k", 9)}, train=asked,
                    rater=Rater(kind="flaws"))  # fmt: skip
    assert recipe.generation.template_options == options
    assert rating_template(recipe) == ChatTemplate(options)


def test_control_tokens_in_a_thought_stay_text():
    thinks = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    tokenizer = with_template(CHATML.replace("{{ m.content }}", thinks + "{{ m.content }}"))
    thought = {"role": "assistant", "content": "Blue.", "reasoning_content": "a<|im_end|>b"}
    e = encode(chat([*TURNS[:3], thought]), tokenizer, 256, ChatTemplate({"enable_thinking": True}))
    assert tokenizer.convert_ids_to_tokens(e.ids).count("<|im_end|>") == 4  # one a turn
    assert e.control_tokens == 1 and "a<|im_end|>b" in tokenizer.decode(e.ids)


def test_a_conversation_may_begin_with_the_assistant():
    tokenizer = with_template(ALL["qwen3"])
    for options in (None, {"enable_thinking": True}):
        row = chat([TURNS[1], *TURNS])
        assert len(learned(encode(row, tokenizer, 256, ChatTemplate(options)), tokenizer)) == 3


# ---- refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"enable_thinkng": False}, "has no option enable_thinkng"),
        ({"add_generation_prompt": True}, "has no option add_generation_prompt"),
        ({"tokenize": True}, "has no option tokenize"),
        ({"enable_thinking": "true"}, "enable_thinking is 'true', wanted true or false"),
    ],
)
def test_options_that_a_template_does_not_know(options: dict[str, Any], said: str):
    tokenizer = with_template(ALL["qwen3"])
    with pytest.raises(UserError, match=said):
        encode(chat(TURNS), tokenizer, 256, ChatTemplate(options))


def test_a_template_that_refuses_a_system_turn():
    tokenizer, row = with_template(GEMMA), chat([SYSTEM, *TURNS], id="s")
    with pytest.raises(
        UserError, match=r"row s: .*system turn \(No system role\); set merge_system"
    ):
        encode(row, tokenizer, 256, "chat")
    e = encode(row, tokenizer, 256, ChatTemplate(merge_system=True))
    assert "user\nBe brief.\n\nHi<|im_end|>" in tokenizer.decode(e.ids)


def test_roles_that_do_not_alternate_are_one_sentence():
    with pytest.raises(UserError, match=r"row m: the chat template refuses .*must alternate"):
        encode(chat([TURNS[0], *TURNS]), with_template(GEMMA), 256, "chat")


def test_a_turn_that_cannot_be_found_is_refused():
    twice = CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}")
    for template in (twice, CHATML.replace("{{ m.content }}", "{{ m.content|length > 1 }}")):
        with pytest.raises(UserError, match="row m: message 2: the template does not write"):
            encode(chat(TURNS), with_template(template), 256, "chat")


def test_options_without_a_chat_template_are_refused(capsys):
    argv = ["preview", "--base_model", "smollm2-135m", "--data_path", "sample", "--limit", "1"]
    assert main([*argv, "--template_options", '{"enable_thinking": false}']) == 2
    assert "set template=chat" in capsys.readouterr().err


# ---- tools and parts


def test_tools_are_context_and_parts_are_text():
    call: Any = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = [{"type": "text", "text": "Col"}, {"type": "text", "text": "our?"}]
    given = [{"role": "user", "content": parts}, call, {"role": "tool", "content": "42"}, TURNS[3]]
    (row,), problems = check_rows([{"messages": given}])
    assert not problems and row["messages"][0]["content"] == "Colour?"
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}",
    )
    tokenizer = with_template(template)
    e = encode(row, tokenizer, 256, "chat")
    assert learned(e, tokenizer) == ["Blue.<|im_end|>"]
    assert "assistant\nf<|im_end|>\n<|im_start|>tool\n42<|im_end|>" in tokenizer.decode(e.ids)
    picture = [{"role": "user", "content": [{"type": "image"}]}, TURNS[3]]
    assert "a part that is not text" in check_rows([{"messages": picture}])[1][0].detail
    with pytest.raises(UserError, match="row m: a message has a part that is not text"):
        encode(chat(picture), tokenizer, 256, "chat")


# ---- what reads the targets


def test_losses_of_a_conversation_are_those_of_its_answers():
    tokenizer = with_template(None)
    model = load_base("smollm2-135m", QuantLoraConfig(load_in_4bit=False)).float().eval()
    both = encode(chat(TURNS), tokenizer, 256, "chat")
    with torch.no_grad():
        logits = model(torch.tensor([both.ids])).logits[0].log_softmax(-1)
    wanted = [-float(logits[i - 1, both.ids[i]]) for i in both.targets]
    assert row_nll(model, [both])[0] == pytest.approx(wanted, abs=1e-3)
    logprobs, ids = target_logprobs(model, both)
    assert ids.tolist() == [both.ids[i] for i in both.targets]
    assert -logprobs.gather(1, ids[:, None])[:, 0] == pytest.approx(wanted, abs=1e-3)
    (rated,) = signals(model, tokenizer, [chat(TURNS)], "chat")  # the last answer is rated
    assert rated.loglik == pytest.approx(-sum(wanted[-3:-1]) / 2, abs=1e-3)


def test_one_answer_has_the_checkpoint_that_it_always_had(tmp_path: Path):
    from alpagasus2.core.files import json_sha256
    from alpagasus2.train import _checkpoint

    tokenizer = with_template(None)
    one, two = (encode(chat(t), tokenizer, 256, "chat") for t in (TURNS[:2], TURNS))
    rows = _checkpoint(tmp_path / "a", {}, [one]).settings["rows"]
    assert rows == json_sha256([[one.ids, one.n_prompt]])[:16]
    seen = [_checkpoint(tmp_path / "a", {}, [e]) for e in (one, two, replace(two, between=()))]
    assert len({checkpoint.settings["rows"] for checkpoint in seen}) == 3


def test_an_adapter_of_two_turn_rows_answers_behind_the_think_block(tmp_path: Path):
    base, tokenizer = tmp_path / "base", with_template(OPENS)
    model = load_base("smollm2-135m", QuantLoraConfig(load_in_4bit=False))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    asked = {"role": "user", "content": "Name a colour."}
    rows = [
        chat([{"role": "user", "content": hello}, TURNS[1], asked, TURNS[3]], id=hello)
        for hello in ("Hi", "Good day")
    ]
    config = TrainConfig(batch_size=2, num_epochs=6, learning_rate=2e-3, template="chat")
    (first, *_), _ = encode_rows(rows, tokenizer, config)
    assert learned(first, tokenizer) == ["Hello.<|im_end|>", "Blue.<|im_end|>"]
    result = train(base, rows, tmp_path / "adapter", config, progress=False)
    assert result["answers"] == 4 and result["loss"][-1] < 0.2
    tuned = load_adapters(load_base(base), {"a": tmp_path / "adapter"})
    questions: Any = [chat([rows[0]["messages"][0]], id="1"), chat(rows[0]["messages"][:3], id="2")]
    told = GenerateConfig(template="chat", max_new_tokens=12)
    prompts = encode_prompts(questions, tokenizer, 256, told)
    assert all(tokenizer.decode(p).endswith("<think>\n\n</think>\n\n") for p in prompts)
    answers = dict(local_answers(tuned, tokenizer, questions, told))
    assert [answers[i]["response"] for i in range(2)] == ["Hello.", "Blue."]
    assert {a["finish_reason"] for a in answers.values()} == {"stop"}


def test_what_of_a_row_is_not_learned_is_said_or_refused(capsys):
    tokenizer = with_template(CHATML)
    thought = {**TURNS[3], "reasoning_content": "The sky."}
    for template in ("chat", "alpaca"):
        say_once.cache_clear()
        encode(chat([TURNS[2], thought]), tokenizer, 256, template)
        assert "thoughts of the rows (reasoning_content) are not learned" in capsys.readouterr().err
    with pytest.raises(UserError, match="2 messages before the answer"):  # "Hello." was left out
        encode(chat([TURNS[2], TURNS[1], TURNS[3]]), tokenizer, 256, "alpaca")
