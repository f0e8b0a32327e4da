"""SECURITY.md's promises about models: no code of theirs runs, and no pickle is read."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from alpagasus2.core.files import UserError
from alpagasus2.quant_lora import QuantLoraConfig, load_adapters, load_base, load_tokenizer

PLAIN = QuantLoraConfig(load_in_4bit=False)
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "vocab_size": 64}


def tiny() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


def test_python_files_of_a_model_are_not_run(tmp_path):
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = {"model_type": "theirs", "auto_map": {
        "AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for load in (lambda: load_base(folder, PLAIN), lambda: load_tokenizer(folder)):
        with pytest.raises(UserError):
            load()
    assert not ran.exists()


def pickled(folder: Path, weights: dict) -> Path:
    """A model whose weights lie there as a pickle only."""
    tiny().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_a_base_as_a_pickle_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "safe")
    assert load_base(tmp_path / "safe", PLAIN) is not None
    with pytest.raises(UserError, match="safetensors"):
        load_base(pickled(tmp_path / "pickle", tiny().state_dict()), PLAIN)


def test_an_adapter_as_a_pickle_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load_adapters(tiny(), {"a": tmp_path})
