"""TRL's trainer takes the same steps as ours, whatever stands around them."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from alpagasus2.batches import TrainConfig
from alpagasus2.core.files import UserError
from alpagasus2.core.run_folder import manifest_entry
from alpagasus2.quant_lora import QuantLoraConfig, load_tokenizer
from alpagasus2.train import train

TINY = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
ROWS: list[Any] = [
    {"id": str(n), "instruction": f"Count to {n}.", "input": "", "output": "One. " * (1 + n % 5)}
    for n in range(18)
]
PLAIN = QuantLoraConfig(load_in_4bit=False, lora_dropout=0.0)
TWENTY: dict[str, Any] = {
    "batch_size": 4, "num_epochs": 4, "learning_rate": 0.005, "micro_batch_size": 2,
    "val_set_size": 0,
}  # fmt: skip # 5 steps an epoch, the last of 2 rows


def base(folder: Path, family: str, **options: Any) -> Path:
    "A random model in fp32 whose tokens depend on each other."
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(TINY | options))
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(2.0 if p.dim() > 1 else 1.0)
    lm.save_pretrained(folder / "base")
    load_tokenizer("smollm2-135m").save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(autouse=True)
def in_fp32() -> Any:
    with patch("alpagasus2.quant_lora.compute_dtype", lambda device=None: torch.float32):
        yield


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("recurrent_gemma", {"logits_soft_cap": 1.0, "lru_width": 64, "num_hidden_layers": 3}),
    ],
    ids=["llama", "granite", "recurrent_gemma"],
)
def test_both_trainers_take_the_same_steps(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = base(tmp_path, family, **options)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    mine = train(model, ROWS, ours, TrainConfig(**TWENTY), PLAIN, progress=False)
    peer = train(model, ROWS, theirs, TrainConfig(**TWENTY, trainer="trl"), PLAIN, progress=False)
    assert len(peer["loss"]) == len(mine["loss"]) == 20
    assert mine["loss"][-1] < mine["loss"][0] - 0.01
    assert peer["loss"] == pytest.approx(mine["loss"], abs=1e-4)
    assert peer["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    assert peer["learning_rate"] == pytest.approx(mine["learning_rate"])
    found = weights(theirs)
    for name, w in weights(ours).items():
        assert torch.allclose(found[name], w, atol=1e-3), name
    assert (mine["trainer"], peer["trainer"]) == ("alpagasus2", "trl")
    assert manifest_entry(theirs)["config"]["trainer"] == "trl"
    assert set(peer) == set(mine)


def test_a_loss_that_is_no_number_stops_it(tmp_path: Path) -> None:
    model = base(tmp_path, "llama")
    broken = load_file(model / "model.safetensors")
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, model / "model.safetensors", {"format": "pt"})
    config = TrainConfig(**TWENTY, trainer="trl")
    with pytest.raises(UserError, match="not a finite number"):
        train(model, ROWS, tmp_path / "adapter", config, PLAIN, progress=False)
    with patch("alpagasus2.train.check_own"), pytest.raises(FloatingPointError, match="step 0: "):
        train(model, ROWS, tmp_path / "adapter", config, PLAIN, progress=False)
    assert not (tmp_path / "adapter").exists()


def test_stopped_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    model = base(tmp_path, "llama")
    config = TrainConfig(**{**TWENTY, "num_epochs": 2}, trainer="trl", save_steps=3)
    dropout = QuantLoraConfig(load_in_4bit=False, lora_dropout=0.1)
    whole = train(model, ROWS, tmp_path / "whole", config, dropout, progress=False)
    from alpagasus2.model.checkpoint import Checkpoint

    save = Checkpoint.save

    def killed(self: Checkpoint, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        raise KeyboardInterrupt

    with patch.object(Checkpoint, "save", killed), pytest.raises(KeyboardInterrupt):
        train(model, ROWS, tmp_path / "cut", config, dropout, progress=False)
    seen: list[int] = []
    after = Checkpoint.save

    def noted(self: Checkpoint, step: int, *rest: Any) -> None:
        seen.append(step)
        after(self, step, *rest)

    with patch.object(Checkpoint, "save", noted):
        resumed = train(model, ROWS, tmp_path / "cut", config, dropout, progress=False)
    assert seen[0] == 6  # not 3: those steps were done
    assert resumed["loss"] == whole["loss"]
    for name, w in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], w), name


def test_a_hybrid_that_our_step_refuses_trains_by_trl(tmp_path: Path) -> None:
    model = base(tmp_path, "qwen3_5_text", **LINEAR, layer_types=["linear_attention"] * 2)
    lora = QuantLoraConfig(load_in_4bit=False, lora_target_modules="all-linear")
    config: dict[str, Any] = {**TWENTY, "num_epochs": 1, "val_set_size": 2}
    with (
        patch("alpagasus2.model.check.GRADIENT", -1.0),
        pytest.raises(UserError, match="trainer trl"),
    ):
        train(model, ROWS, tmp_path / "ours", TrainConfig(**config), lora, progress=False)
    result = train(
        model, ROWS, tmp_path / "peer", TrainConfig(**config, trainer="trl"), lora, progress=False
    )
    assert len(result["eval_loss"]) == 1 and result["check"] is None
    assert json.loads((tmp_path / "peer/train_result.json").read_text())["trainer"] == "trl"
    assert any(w.abs().sum() > 0 for n, w in weights(tmp_path / "peer").items() if "lora_B" in n)
