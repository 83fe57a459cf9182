"""A merged model is compared with the adapters that it was made of, and one that computes something else is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kubetune_trainer.data.sampler import collate
from kubetune_trainer.data.store import Row
from kubetune_trainer.errors import DataError
from kubetune_trainer.export import complete_weights, save_huggingface, trained_weights
from kubetune_trainer.export.check import BOUNDS, MergeCheck
from kubetune_trainer.lora import apply_lora, init_lora, lora_state_dict
from kubetune_trainer.model import Decoder, build_model, load_weights, read_config
from tests.trainer.tiny import make_folder

TUNINGS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"has_magnitude": True}, "QLoRA": {"packs_base": True}}
BATCHES = [collate([Row.of(list(range(begin, begin + 20)), [True] * 20)], pad_id=0) for begin in (3, 40)]
SCALE = 2.0


@pytest.fixture(params=TUNINGS)
def tuning(request: pytest.FixtureRequest) -> str:
    return request.param


def trained(folder: Path, tuning: str) -> Decoder:
    """A model whose adapters do something."""
    make_folder(folder, hidden_size=64, intermediate_size=128, attention_bias=True)
    model = build_model(read_config(folder))
    apply_lora(model, rank=4, alpha=8, **TUNINGS[tuning])
    model.to_empty(device="cpu")
    load_weights(model, folder)
    init_lora(model, seed=1)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1, generator=generator)
        if "magnitude" in name:
            weight.data.mul_(1.1)
    return model


def check(folder: Path, model: Decoder, tuning: str) -> MergeCheck:
    adapters = lora_state_dict(model)
    return MergeCheck(folder, adapters, scale=SCALE, packed=tuning == "QLoRA", batches=BATCHES)


def merge(
    folder: Path, model: Decoder, target: Path, *, tuning: str, scale: float = SCALE, dtype: Any = "FP32"
) -> Path:
    weights = trained_weights(model)
    complete = complete_weights(weights, source_dir=folder, lora_scale=scale, packed=tuning == "QLoRA")
    save_huggingface(complete, source_dir=folder, target_dir=target, dtype=dtype)
    return target


def test_the_reference_is_the_model_with_its_adapters(tmp_path: Path, tuning: str) -> None:
    model = trained(tmp_path / "model", tuning)
    found = check(tmp_path / "model", model, tuning)
    with torch.no_grad():
        for batch in BATCHES:
            wanted = model(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents)
            torch.testing.assert_close(found._wanted(batch), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["FP32", "BF16"])
def test_merged_weights_are_good_and_the_difference_is_told(tmp_path: Path, tuning: str, dtype: str) -> None:
    model = trained(tmp_path / "model", tuning)
    merged = merge(tmp_path / "model", model, tmp_path / "merged", tuning=tuning, dtype=dtype)
    found = check(tmp_path / "model", model, tuning).difference(merged)
    stored = torch.float32 if dtype == "FP32" else torch.bfloat16
    assert found.bound == BOUNDS[stored]
    assert (1e-9 < found.relative < 1e-5) if dtype == "FP32" else (1e-4 < found.relative < 0.02)
    assert found.largest > 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_a_wrong_scale_is_refused(tmp_path: Path, tuning: str, scale: float) -> None:
    model = trained(tmp_path / "model", tuning)
    wrong = merge(tmp_path / "model", model, tmp_path / "wrong", tuning=tuning, scale=scale, dtype="BF16")
    with pytest.raises(DataError, match=r"may differ by 0\.05 of the logits' size in bfloat16, and differ by"):
        check(tmp_path / "model", model, tuning).difference(wrong)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = trained(tmp_path / "model", "LoRA")
    good = check(tmp_path / "model", model, "LoRA")
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(DataError, match="differ by nan"):
        good.difference(merge(tmp_path / "model", model, tmp_path / "wrong", tuning="LoRA"))
