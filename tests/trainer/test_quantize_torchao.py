"""Models in torchao's formats: what transformers makes of them, and what ours does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kubetune_trainer.errors import ConfigError, DataError, DoesNotFitError
from kubetune_trainer.export.torchao import save_torchao
from kubetune_trainer.model.weights import load_model
from tests.trainer.tiny import make_folder, random_tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SHAPE = {"hidden_size": 64, "intermediate_size": 128}
SCHEMES = {
    "Int8WeightOnly": 0.1,
    "Int8DynamicActivation": 0.1,
    "Int4WeightOnly": 0.9,
    "Int8DynamicActivationInt4Weight": 0.9,
    "Float8WeightOnly": 0.5,
}
"""With how much of the logits may change: the models are random, and each layer makes the difference larger."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_and_our_own_loader_compute_the_same_with_it(tmp_path: Path, scheme: str) -> None:
    make_folder(tmp_path / "model", **SHAPE)
    save_torchao(tmp_path / "model", tmp_path / "out", scheme=scheme, group_size=32, max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        wanted, found = theirs(tokens).logits, load_model(tmp_path / "out", dtype=torch.float32)(tokens)
        source = load_model(tmp_path / "model", dtype=torch.float32)(tokens)
    assert (found - wanted).norm() / wanted.norm() < (3e-2 if "Dynamic" in scheme else 1e-5)
    assert 1e-4 < (found - source).norm() / source.norm() < SCHEMES[scheme]


@pytest.mark.parametrize("scheme", [*SCHEMES, "NF4"])
def test_a_model_computes_in_another_type_than_it_was_stored_in(tmp_path: Path, scheme: str) -> None:
    make_folder(tmp_path / "model", dtype=torch.bfloat16, **SHAPE)
    save_torchao(tmp_path / "model", tmp_path / "out", scheme=scheme, group_size=32)
    tokens = random_tokens(1, 16)
    with torch.no_grad():
        wide = load_model(tmp_path / "out", dtype=torch.float32)(tokens)
        narrow = load_model(tmp_path / "out", dtype=torch.bfloat16)(tokens)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert (wide - narrow).norm() / wide.norm() < 0.2


def test_nf4_is_half_a_byte_a_weight_and_near_the_model(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", **SHAPE)
    save_torchao(tmp_path / "model", tmp_path / "out", scheme="NF4", group_size=32)
    source, model = (load_model(tmp_path / name, dtype=torch.float32) for name in ("model", "out"))
    weight, rounded = (each.model.layers[0].mlp.up_proj.weight for each in (source, model))
    assert rounded.quantized_data.numel() == weight.numel() // 2
    error = rounded.get_original_weight() - weight
    assert 0.02 < error.norm() / weight.norm() < 0.12
    with torch.no_grad():
        found, wanted = model(random_tokens(1, 16)), source(random_tokens(1, 16))
    assert (found - wanted).norm() / wanted.norm() < 0.9


def test_float8_activations_are_refused_without_a_device_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_folder(tmp_path / "model", **SHAPE)
    with pytest.raises(DoesNotFitError, match=r"capability 8\.9") as refused:
        save_torchao(tmp_path / "model", tmp_path / "out", scheme="Float8DynamicActivation", group_size=32)
    assert refused.value.exit_code == 66
    assert not (tmp_path / "out").exists()


def test_rows_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", hidden_size=64, intermediate_size=80)
    with pytest.raises(ConfigError, match="has 80, got 32"):
        save_torchao(tmp_path / "model", tmp_path / "out", scheme="Int4WeightOnly", group_size=32)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", **SHAPE)
    save_torchao(tmp_path / "model", tmp_path / "out", scheme="Int8WeightOnly", group_size=32)
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(DataError, match=r"not those of the model: model\.layers\.3"):
        load_model(tmp_path / "out")
