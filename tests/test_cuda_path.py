"""The code path of a GPU: its numbers on a CPU, and its operators on a device without numbers."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from stand_ins import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from alpagasus2.batches import TrainConfig
from alpagasus2.model.attention import Kernel, layout_of
from alpagasus2.model.forward import (
    Encoded,
    attend_by,
    micro_batches,
    packed_attention,
    shared_prefix,
    target_nll,
)
from alpagasus2.model.gradients import Gradients
from alpagasus2.model.lora import in_one_step
from alpagasus2.quant_lora import QuantLoraConfig, adapter_parameters, add_lora, load_base
from alpagasus2.train import train, training_step

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


KERNELS: list[Kernel] = ["padded", "unpadded"]


def on_meta(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **options})
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm.requires_grad_(False)
    for block in lm.model.layers:
        block.self_attn.v_proj.requires_grad_(True)
    return lm


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),  # narrower than a row
        ("gemma3_text", {"sliding_window": 8}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_a_training_step_stays_on_its_device(
    family: str, options: dict[str, Any], kernel: Kernel
) -> None:
    lm = on_meta(family, torch.bfloat16, **options)
    attend_by(lm, kernel)
    with OneDevice(), packed_attention(lm):
        nll, row_of = target_nll(lm, ROWS)
        nll.sum().backward()
    assert nll.shape == row_of.shape == (sum(e.n_targets for e in ROWS),)
    assert nll.device.type == "meta"
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)


def test_two_devices_are_noticed() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="got tensors on"):
        torch.ones(3, device="meta").masked_fill_(torch.ones(3, dtype=torch.bool), 0)


def on_cpu(family: str, kernel: Kernel, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model whose rows attend as on a GPU, with an adapter that changes something."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **options})
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    for p in lm.parameters():
        p.mul_(4.0 if p.dim() > 1 else 1.0)
    model = add_lora(lm, QuantLoraConfig(lora_dropout=0))
    for name, p in adapter_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    attend_by(model, kernel)
    return model


def some(n: int, shared: int, longest: int) -> list[Encoded]:
    """Rows that begin alike, of one target to `longest`."""
    draw = torch.Generator().manual_seed(n)
    rows = []
    for i in range(n):
        size = longest if i == 0 else int(torch.randint(1, longest + 1, (), generator=draw))
        own = torch.randint(100, 1000, (size,), generator=draw).tolist()
        rows.append(Encoded(str(i), [*range(shared), i + 1, *own], shared + 1))
    return rows


def alone(model: Any, rows: list[Encoded]) -> torch.Tensor:
    """The summed loss of rows that Transformers runs one by one."""
    total = torch.zeros(())
    for e in rows:
        logits = model(input_ids=torch.tensor([e.ids])).logits[0, e.n_prompt - 1 : -1]
        wanted = torch.tensor(e.ids[e.n_prompt :])
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "family, options, rows",
    [
        ("llama", {}, some(5, 0, 30)),
        ("llama", {}, some(5, 90, 30)),
        ("llama", {"num_key_value_heads": 4}, some(3, 7, 20)),
        ("llama", {"num_key_value_heads": 1}, some(1, 7, 20)),
        ("llama", {}, some(64, 20, 12)),
        ("mistral", {"sliding_window": 8}, some(4, 20, 30)),
        ("mistral", {"sliding_window": 8}, some(4, 0, 30)),
        ("gemma3_text", {"sliding_window": 8}, some(4, 5, 30)),
        ("qwen3", {}, some(4, 5, 30)),
    ],
    ids=lambda x: f"{len(x)} rows" if isinstance(x, list) else None,
)
def test_loss_and_gradient_are_those_of_rows_alone(
    family: str, options: dict[str, Any], rows: list[Encoded], kernel: Kernel
) -> None:
    model = on_cpu(family, kernel, **options)
    trained = list(adapter_parameters(model).values())
    wanted, n = alone(model, rows), sum(e.n_targets for e in rows)
    gradient = torch.autograd.grad(wanted, trained)
    (pack,) = micro_batches(model, rows, 10**6)
    assert shared_prefix(sorted(rows, key=lambda e: e.ids)) == (rows[0].n_prompt - 1) * (
        len(rows) > 1
    )
    with packed_attention(model):
        loss = target_nll(model, [rows[i] for i in pack])[0].sum()
        found = torch.autograd.grad(loss, trained)
    assert abs(loss - wanted) / n < 1e-5
    scale = max(g.abs().max() for g in gradient)
    for a, b in zip(found, gradient, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() / scale < 1e-5


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.seen["nonzero"] += 1  # what it does inside
        if name == "_to_copy" and (kwargs or {}).get("device", args[0].device) != args[0].device:
            self.seen["sent"] += 1
        return func(*args, **(kwargs or {}))

    @property
    def copies(self) -> int:
        return self.seen["_to_copy"] + self.seen["copy_"]


SLOW = {"index_put", "_index_put_impl_", "index_put_", "nonzero", "masked_select", "index_add"}


def step_of(rows: list[Encoded], kernel: Kernel) -> Operators:
    """The operators of a whole training step, in 16 bits, through a window and a full layer."""
    model = on_cpu("gemma3_text", kernel, torch.bfloat16, sliding_window=8, num_hidden_layers=6)
    with Operators() as seen:
        training_step(model, rows, TrainConfig())
    return seen


def equal_targets(n: int) -> list[Encoded]:
    """64 targets in n rows."""
    own = 64 // n
    return [Encoded(str(i), [*range(9), *range(100 + i, 100 + i + own)], 9) for i in range(n)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_has_no_scatter_in_sorted_order(kernel: Kernel) -> None:
    seen = step_of(some(9, 20, 12), kernel).seen
    assert not SLOW & seen.keys()
    assert seen["index_select"] and seen["index_copy_"]  # what moves positions in their place
    with Operators() as usual:  # would they be seen?
        x = torch.ones(9, requires_grad=True)
        x[torch.tensor([0, 0, 1])][torch.tensor([True, False, True])].sum().backward()
    assert SLOW & usual.seen.keys() == {"index_put", "nonzero"}


def test_copies_do_not_grow_with_the_rows() -> None:
    few, many = (step_of(equal_targets(n), "padded") for n in (2, 64))
    assert few.copies == many.copies > 0
    assert abs(few.seen.total() - many.seen.total()) < 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_sent_to_the_device_inside_a_layer(kernel: Kernel) -> None:
    sent = []
    for layers in (6, 12):  # the sixth sees all keys, the others a window
        lm = on_meta("gemma3_text", torch.bfloat16, sliding_window=8, num_hidden_layers=layers)
        attend_by(lm, kernel)
        with Operators() as seen, packed_attention(lm):
            target_nll(lm, ROWS)[0].sum().backward()
        sent.append(seen.seen["sent"])
        assert (seen.seen["_varlen_attn"] == layers) == (kernel == "unpadded")
    assert sent[0] == sent[1] > 2  # the layout


def test_a_training_attends_as_it_is_told(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", num_key_value_heads=2, initializer_range=0.2)
    rows: list[Any] = [
        {"instruction": f"Say {word}", "input": "", "output": f"{word} {word}"}
        for word in ("one", "two", "three", "four")
    ]
    losses, kernels = {}, [None, *KERNELS]
    with patch("alpagasus2.quant_lora.compute_dtype", lambda device: torch.float32):
        for kernel in kernels:
            config = TrainConfig(attention=kernel, batch_size=2, learning_rate=1e-2)
            with patch("alpagasus2.model.forward.layout_of", side_effect=layout_of) as asked:
                result = train(
                    str(tmp_path / "base"), rows, tmp_path / str(kernel), config, progress=False
                )
            assert {call.args[3] for call in asked.call_args_list} == {kernel}
            losses[kernel] = result["loss"]
    for kernel in KERNELS:
        assert losses[kernel] == pytest.approx(losses[None], abs=1e-4)
    assert losses[None][0] > losses[None][-1]


def replayed(gradients: list[Gradients]) -> Any:
    """Stands for CUDA graphs: takes the step again in place of replaying it."""

    def record(step: Any, inputs: dict[str, torch.Tensor]) -> Any:
        before = [x.clone() for x in gradients[0].sums]
        with torch.random.fork_rng():  # recording itself changes nothing
            result = step(**inputs).clone()
        torch._foreach_copy_(gradients[0].sums, before)
        return lambda: result.copy_(step(**inputs)), result

    return record


def test_one_operation_a_layer_and_recorded_steps_add_the_same_gradient(tmp_path: Path) -> None:
    tiny_llama(tmp_path, num_key_value_heads=2, initializer_range=0.2)
    config = QuantLoraConfig(lora_target_modules="all-linear", unpacked=False)
    steps = [some(7, 9, 20)[i:] for i in (0, 1, 0, 2)]
    found = {}
    for way in ("usual", "one step", "recorded"):
        with patch("alpagasus2.quant_lora.compute_dtype", lambda device=None: torch.float32):
            model = add_lora(load_base(tmp_path, config), config)
        attend_by(model, "unpadded")
        for name, p in adapter_parameters(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
        made: list[Gradients] = []
        if way != "usual":
            in_one_step(model)
        if way == "recorded":
            made.append(Gradients(model, 60, replayed(made)))
        gradients = []
        for step, rows in enumerate(steps):
            model.zero_grad()
            training_step(model, rows, TrainConfig(), step, gradients=made[0] if made else None)
            gradients.append(
                torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])
            )
        found[way] = torch.stack(gradients)
    assert made[0].run and made[0].run.made == 1 and made[0].compared
    for way in ("one step", "recorded"):
        error = (found[way] - found["usual"]).norm(dim=1) / found["usual"].norm(dim=1)
        assert error.max() < 1e-5, (way, error)


def test_a_recorded_step_asks_and_sends_nothing() -> None:
    lm = on_meta("llama", torch.bfloat16)
    seen: list[Counter[str]] = []

    def record(step: Any, inputs: dict[str, torch.Tensor]) -> Any:
        with OneDevice(), Operators() as operators:
            result = step(**inputs)
        seen.append(operators.seen)
        return lambda: None, result

    attend_by(lm, "unpadded")
    gradients = Gradients(lm, 60, record)
    gradients.compared = True  # there is nothing to compare on a device without numbers
    gradients.begin()
    for _ in range(2):
        gradients.add(ROWS, torch.ones((), device="meta"))
    assert seen[0]["mm"] and not (SLOW | {"sent", "_local_scalar_dense", "item"}) & seen[0].keys()
