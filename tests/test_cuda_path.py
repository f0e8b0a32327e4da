"""The code path of a GPU, on a device that computes nothing but shapes."""

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from alpagasus2.model.forward import Encoded, packed_attention, target_nll

ROWS = [Encoded(str(n), [*range(5), *range(50, 50 + n)], 7) for n in (9, 5, 30)]
SMALL = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16,
}  # fmt: skip


class OneDevice(TorchDispatchMode):
    "What CUDA refuses: an operation on tensors of two devices, unless one is a single number."

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values, _ = tree_flatten((args, kwargs))
        tensors = [x for x in values if isinstance(x, torch.Tensor) and x.dim()]
        devices = {x.device.type for x in tensors}
        assert len(devices) < 2, f"{func} got tensors on {devices}"
        return func(*args, **(kwargs or {}))


def on_meta(family: str, **options: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **SMALL, **options)
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for block in lm.model.layers:
        block.self_attn.v_proj.requires_grad_(True)
    return lm


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),  # narrower than a row
        ("gemma3_text", {"sliding_window": 8}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_a_training_step_stays_on_its_device(family: str, options: dict[str, Any]) -> None:
    lm = on_meta(family, **options)
    with OneDevice(), packed_attention(lm):
        nll, row_of = target_nll(lm, ROWS)
        nll.sum().backward()
    assert nll.shape == row_of.shape == (sum(e.n_targets for e in ROWS),)
    assert nll.device.type == "meta"
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)


def test_two_devices_are_noticed() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="got tensors on"):
        torch.ones(3, device="meta").masked_fill_(torch.ones(3, dtype=torch.bool), 0)
