"""Adapters change nothing before they are trained, are the only thing that trains, and are named as peft names them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.lora import (
    apply_lora,
    copy_adapters,
    init_lora,
    lora_scale,
    lora_state_dict,
    reference_adapters,
    without_adapters,
)
from kubetune_trainer.model import Decoder, build_model, load_model, load_weights, read_config
from tests.trainer.tiny import make_folder, random_tokens

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    make_folder(tmp_path, attention_bias=True)
    return load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("targets", "parts", "layers"),
    [
        (["all-linear"], PROJECTIONS, 3),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 3),
        (["mlp.up_proj"], {"up_proj"}, 3),
        (["layers.1.mlp.up_proj"], {"up_proj"}, 1),
        (["q_proj", "all-linear"], PROJECTIONS, 3),
    ],
)
def test_targets_choose_layers_by_the_ends_of_their_names(
    model: Decoder, targets: list[str], parts: set[str], layers: int
) -> None:
    names = apply_lora(model, rank=4, alpha=8, target_modules=targets)
    assert {name.rpartition(".")[2] for name in names} == parts
    assert len(names) == len(parts) * layers


@pytest.mark.parametrize("target", ["query", "lm_head", "proj", "embed_tokens", ""])
def test_a_target_that_names_no_linear_layer_is_refused(model: Decoder, target: str) -> None:
    with pytest.raises(ConfigError, match=f"lora.target_modules must name linear layers .*got '{target}'"):
        apply_lora(model, rank=4, alpha=8, target_modules=[target])


@pytest.mark.parametrize("has_magnitude", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_logit(model: Decoder, dtype: torch.dtype, has_magnitude: bool) -> None:
    model.to(dtype)
    tokens = random_tokens(2, 10)
    with torch.no_grad():
        before = model(tokens)
        apply_lora(model, rank=4, alpha=8, has_magnitude=has_magnitude)
        if has_magnitude:  # as FSDP casts it for the computation
            model.to(dtype)
        tolerance = 2 * torch.finfo(dtype).eps * before.abs().max().item() if has_magnitude else 0
        torch.testing.assert_close(model(tokens), before, atol=tolerance, rtol=0)


def test_a_magnitude_of_a_row_of_zeros_stays_without_effect(model: Decoder) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
        apply_lora(model, rank=4, alpha=8, has_magnitude=True)
        assert model(random_tokens(1, 5)).isfinite().all()


def test_only_adapters_get_gradients_and_the_base_keeps_its_names(model: Decoder) -> None:
    names = set(model.state_dict())
    layers = apply_lora(model, rank=4, alpha=8)
    model.train()
    model(random_tokens(2, 10), labels_BT=random_tokens(2, 10, seed=5)).backward()
    adapters = {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == adapters
    assert set(model.state_dict()) == names | adapters


def test_an_adapter_adds_its_scaled_product(model: Decoder) -> None:
    apply_lora(model, rank=4, alpha=6, target_modules=["down_proj"])
    layer = model.model.layers[0].mlp.down_proj
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x), x @ (layer.weight + 1.5 * layer.lora_B.weight @ layer.lora_A.weight).T, atol=1e-5, rtol=1e-5
        )
    assert lora_scale(model) == 1.5


def test_dropout_acts_in_training_only(model: Decoder) -> None:
    apply_lora(model, rank=4, alpha=8, dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tokens = random_tokens(1, 10)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), model(tokens))
        assert not torch.equal(model.train()(tokens), model(tokens))


def test_kept_adapters_come_without_dropout_and_go_and_leave_the_trained_ones_bit_for_bit(model: Decoder) -> None:
    apply_lora(model, rank=4, alpha=8, dropout=0.5, has_magnitude=True, trained_ids=[3, 9])
    tokens, adapters = random_tokens(2, 10), [weight for weight in model.parameters() if weight.requires_grad]

    def change() -> Tensor:
        with torch.no_grad():
            for weight in adapters:
                weight.add_(torch.randn_like(weight), alpha=0.1)
            return model.eval()(tokens)

    first, kept = change(), copy_adapters(model)
    change()
    trained = [weight.clone() for weight in adapters]
    model.train()
    for _ in range(2):
        with torch.no_grad(), reference_adapters(model, kept):
            assert torch.equal(model(tokens), first)
        assert model.training
        assert all(map(torch.equal, adapters, trained))
    with torch.no_grad(), reference_adapters(model, {}):
        base = model(tokens)
    with torch.no_grad(), without_adapters(model):
        assert torch.equal(base, model(tokens))


def test_first_values_depend_on_the_seed_alone(tmp_path: Path) -> None:
    make_folder(tmp_path)
    states = []
    for seed in (1, 1, 2):
        model = build_model(read_config(tmp_path))
        apply_lora(model, rank=4, alpha=8)
        model.to_empty(device="cpu")
        load_weights(model, tmp_path)
        init_lora(model, seed=seed)
        states.append(lora_state_dict(model))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    assert all(tensor.abs().max() <= 1 / tensor.shape[1] ** 0.5 for name, tensor in first.items() if "lora_A" in name)


def test_adapters_stay_fp32_beside_a_bf16_base(tmp_path: Path) -> None:
    make_folder(tmp_path)
    model = load_model(tmp_path)
    apply_lora(model, rank=4, alpha=8)
    loss = model(random_tokens(1, 8), labels_BT=random_tokens(1, 8, seed=2))
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
