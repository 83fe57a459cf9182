"""A model in quantization-aware training computes what its quantized outputs will, and its weights get gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.export import complete_weights, save_huggingface, trained_weights
from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.export.torchao import save_torchao, torchao_config
from kubetune_trainer.lora import LoRALinear, apply_lora, lora_scale, without_adapters
from kubetune_trainer.model import Decoder, load_model
from kubetune_trainer.quantize.layers import linear_layers
from kubetune_trainer.quantize.qat import prepare_qat
from tests.trainer.tiny import make_folder, random_tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
ACTIVATIONS, WEIGHTS = "Int8DynamicActivationInt4Weight", "Int4WeightOnly"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path / "model", **SHAPE)
    return tmp_path / "model"


def prepared(folder: Path, scheme: Any, *, dtype: torch.dtype = torch.float32) -> Decoder:
    model = load_model(folder, dtype=dtype)
    prepare_qat(model, scheme=scheme, group_size=32)
    return model


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(2, 24))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_a_prepared_model_is_that_of_torchao(folder: Path) -> None:
    model, theirs = prepared(folder, ACTIVATIONS), load_model(folder, dtype=torch.float32)
    config = QATConfig(torchao_config(ACTIVATIONS, group_size=32), step="prepare")
    quantize_(theirs.model, config)  # all linear layers but the output head
    assert torch.equal(logits(model), logits(theirs))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert relative(logits(model), logits(load_model(folder, dtype=torch.float32))) > 0.01


def test_converted_it_computes_what_it_was_prepared_for(folder: Path) -> None:
    model = prepared(folder, ACTIVATIONS)
    wanted = logits(model)
    quantize_(model.model, QATConfig(torchao_config(ACTIVATIONS, group_size=32), step="convert"))
    assert relative(logits(model), wanted) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_weights_are_those_of_compressed_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    make_folder(tmp_path / "model", dtype=dtype, **SHAPE)
    model = prepared(tmp_path / "model", WEIGHTS, dtype=dtype)
    save_compressed_tensors(tmp_path / "model", tmp_path / "out", scheme=WEIGHTS, group_size=32)
    stored = load_model(tmp_path / "out", dtype=torch.float32)
    for name in linear_layers(model.config):
        layer, integers = model.get_submodule(name), stored.get_submodule(name)
        groups = integers.weight.float().reshape(*integers.weight_scale.shape, -1)
        dequantized = (groups * integers.weight_scale.unsqueeze(-1)).flatten(1)
        assert torch.equal(layer.weight_fake_quantizer(layer.weight).detach(), dequantized.to(dtype)), name
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert relative(logits(model).float(), logits(stored)) < tolerance


def test_it_computes_what_a_torchao_output_does(folder: Path, tmp_path: Path) -> None:
    save_torchao(folder, tmp_path / "out", scheme=ACTIVATIONS, group_size=32)
    found = logits(load_model(tmp_path / "out", dtype=torch.float32))
    assert relative(logits(prepared(folder, ACTIVATIONS)), found) < 1e-3


@pytest.mark.parametrize("scheme", [ACTIVATIONS, WEIGHTS])
def test_gradients_pass_the_rounding(folder: Path, scheme: str) -> None:
    model = prepared(folder, scheme).train()
    plain = load_model(folder, dtype=torch.float32).train()
    with torch.no_grad():  # what is computed with, as weights of their own
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.weight.copy_(model.get_submodule(name).weight_fake_quantizer(layer.weight))
    tokens, labels = random_tokens(2, 16), random_tokens(2, 16, seed=3)
    for each in (model, plain):
        each(tokens, labels_BT=labels).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        if scheme == WEIGHTS:
            torch.testing.assert_close(weight.grad, plain.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


@pytest.fixture
def adapted(folder: Path, scheme: str) -> Decoder:
    """A prepared model with adapters that have random values, as if trained."""
    model = load_model(folder, dtype=torch.float32)
    apply_lora(model, rank=4, alpha=8, target_modules=["q_proj", "o_proj", "down_proj"])
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    prepare_qat(model, scheme=scheme, group_size=32)
    return model


def merged(model: Decoder, source: Path, target: Path) -> Path:
    """The folder that a run with these adapters leaves."""
    complete = complete_weights(trained_weights(model), source_dir=source, lora_scale=lora_scale(model))
    save_huggingface(complete, source_dir=source, target_dir=target)
    return target


@pytest.mark.parametrize("scheme", [WEIGHTS])
def test_adapters_compute_what_their_merged_and_quantized_output_does(
    adapted: Decoder, folder: Path, tmp_path: Path
) -> None:
    whole = merged(adapted, folder, tmp_path / "merged")
    save_compressed_tensors(whole, tmp_path / "out", scheme=WEIGHTS, group_size=32)
    assert relative(logits(adapted), logits(load_model(tmp_path / "out", dtype=torch.float32))) < 1e-5
    save_compressed_tensors(folder, tmp_path / "base", scheme=WEIGHTS, group_size=32)
    with without_adapters(adapted):
        assert relative(logits(adapted), logits(load_model(tmp_path / "base", dtype=torch.float32))) < 1e-5
    assert relative(logits(adapted), logits(load_model(whole, dtype=torch.float32))) > 0.01, "rounding is to be seen"


@pytest.mark.parametrize("scheme", [ACTIVATIONS])
def test_adapters_compute_what_a_torchao_output_of_theirs_does(adapted: Decoder, folder: Path, tmp_path: Path) -> None:
    save_torchao(merged(adapted, folder, tmp_path / "merged"), tmp_path / "out", scheme=ACTIVATIONS, group_size=32)
    assert relative(logits(adapted), logits(load_model(tmp_path / "out", dtype=torch.float32))) < 1e-3


@pytest.mark.parametrize("scheme", [ACTIVATIONS, WEIGHTS])
def test_only_adapters_get_gradients_which_are_those_of_the_merged_weight(
    adapted: Decoder, folder: Path, tmp_path: Path, scheme: str
) -> None:
    whole = prepared(merged(adapted, folder, tmp_path / "merged"), scheme)
    tokens, labels = random_tokens(2, 16), random_tokens(2, 16, seed=3)
    for each in (adapted.train(), whole.train()):
        each(tokens, labels_BT=labels).backward()
    scale, seen = lora_scale(adapted), 0
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoRALinear):
            gradient, seen = whole.get_submodule(name).weight.grad, seen + 1
            wanted_a, wanted_b = scale * layer.lora_B.weight.T @ gradient, scale * gradient @ layer.lora_A.weight.T
            torch.testing.assert_close(layer.lora_A.weight.grad, wanted_a, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.lora_B.weight.grad, wanted_b, atol=1e-4, rtol=1e-4)
    assert seen == 9
    assert {name.rpartition(".lora_")[2] for name, weight in adapted.named_parameters() if weight.grad is not None} == {
        "A.weight", "B.weight",
    }  # fmt: skip


def test_rows_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, hidden_size=64, intermediate_size=96)
    model = load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"qat\.group_size must divide .* model\.layers\.0\.self_attn\.q_proj has 64"):
        prepare_qat(model, scheme=WEIGHTS, group_size=128)
