"""Activations that wait elsewhere: the same numbers, each storage once, and no more on the device than two blocks'."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kubetune_trainer.model import offload as module
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.offload import ActivationOffload
from kubetune_trainer.model.recompute import ActivationCheckpointing
from kubetune_trainer.model.weights import build_model
from tests.trainer.tiny_model import model_config

NUM_LAYERS = 5
CPU = torch.device("cpu")


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Everything that is stored, as long as it lives."""
    living = module.WeakValueDictionary()
    plain = module._Stored

    def watched(*args: Any, **kwargs: Any) -> Any:
        each = plain(*args, **kwargs)
        living[len(living) and max(living) + 1] = each
        return each

    monkeypatch.setattr(module, "_Stored", watched)
    gc.disable()
    yield living
    gc.enable()


def made(**shape: Any) -> Decoder:
    model = build_model(ModelConfig.from_hf(model_config(num_hidden_layers=NUM_LAYERS, **shape))).float()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model


def loss(model: Decoder) -> Tensor:
    """Of packed rows, so that all blocks share a mask."""
    tokens_BT = torch.arange(2 * 64).view(2, 64) % 250
    documents_BT = (torch.arange(64) >= 30).long().expand(2, 64)
    return model(tokens_BT, documents_BT=documents_BT, labels_BT=tokens_BT)


def trained(
    mode: ActivationCheckpointing, offload: ActivationOffload | None, **shape: Any
) -> tuple[list[float], list[Tensor]]:
    """The losses of two micro batches, and the gradients of both."""
    model = made(**shape)
    for block in model.model.layers:
        block.recompute, block.offload = mode, offload
    losses = []
    for _ in range(2):
        found = loss(model)
        found.backward()
        losses.append(found.item())
    return losses, [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("shape", [{}, {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}])
@pytest.mark.parametrize("mode", ["None", "Selective", "Full"])
def test_offloaded_activations_give_the_same_loss_and_gradients_bit_for_bit(
    mode: ActivationCheckpointing, shape: dict[str, Any]
) -> None:
    losses, gradients = trained(mode, None, **shape)
    again, same = trained(mode, ActivationOffload(CPU, smallest_bytes=0), **shape)
    assert again == losses
    assert all(torch.equal(one, other) for one, other in zip(same, gradients, strict=True))


def test_the_device_keeps_one_block_after_forward_and_two_in_backward(stored: Any) -> None:
    model, offload, on_device = made(), ActivationOffload(CPU, smallest_bytes=0), []
    for block in model.model.layers:
        block.offload = offload
        block.register_full_backward_pre_hook(lambda *_: on_device.append(shelves_on_device(stored)))
    found = loss(model)
    assert shelves_on_device(stored) == 1, "the last one"
    assert len({id(each.shelf) for each in stored.values()}) == NUM_LAYERS
    found.backward()
    assert len(on_device) == NUM_LAYERS
    assert max(on_device) <= 2
    assert len(stored) == 0, "all is freed, without the garbage collector"


def shelves_on_device(stored: Any) -> int:
    return len({id(each.shelf) for each in stored.values() if each.here is not None})


def test_each_storage_travels_once_and_weights_and_what_blocks_share_stay(stored: Any) -> None:
    kept: dict[int, Tensor] = {}
    model = made()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model)
    all_bytes = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights)
    offload = ActivationOffload(CPU, smallest_bytes=0)
    for block in model.model.layers:
        block.offload = offload
    found = loss(model)
    sent = sum(each.away.nbytes for each in stored.values())
    assert 0.7 * all_bytes < sent < all_bytes, "all but what embedding, head, masks and rotations keep"
    for each in stored.values():
        assert each.here is None or each.here.data_ptr() != each.away.data_ptr()
    del found


def test_small_storages_stay(stored: Any) -> None:
    model, offload = made(), ActivationOffload(CPU)
    for block in model.model.layers:
        block.offload = offload
    assert loss(model).item() > 0
    assert len(stored) == 0


def test_graphs_may_wait_for_each_other_and_be_gone_through_twice() -> None:
    plain, offloaded, offload = made(), made(), ActivationOffload(CPU, smallest_bytes=0)
    for block in offloaded.model.layers:
        block.offload = offload
    for model in (plain, offloaded):
        found = model(torch.arange(40)[None]).square().mean()
        found.backward(retain_graph=True)
        other = model(torch.arange(30)[None] + 9).square().mean()
        found.backward()
        other.backward()
    for one, same in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(one.grad, same.grad)
