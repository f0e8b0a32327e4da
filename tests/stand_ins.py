"""What several tests need in place of the real thing: a tiny model, a machine without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def tiny_llama(folder: Path, dtype: Any = None, **shape: Any) -> Any:
    """Save a random Llama of two small layers with the small model's tokenizer; the model."""
    import torch
    import transformers

    from alpagasus2.quant_lora import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.save_pretrained(folder)
    small: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**small, **shape}))
    model = model.to(dtype or torch.float32)
    model.save_pretrained(folder)
    return model


def without(modules: Iterable[str], then: str) -> str:
    """A script in which these modules are not installed, and what it does."""
    return f"""
import importlib.util, json, sys
HIDDEN = {sorted(modules)!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n in HIDDEN else find(n, p)
from alpagasus2.cli import main
{then}
"""
