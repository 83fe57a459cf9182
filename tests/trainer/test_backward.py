"""The parts of a block with a backward pass of their own: the same gradients as autograd's, of less that is kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from kubetune_trainer.model.config import NormStyle
from kubetune_trainer.model.feed_forward import gated
from kubetune_trainer.model.norm import RMSNorm
from kubetune_trainer.model.rope import rotate

TOLERANCE = 1e-5
"""Relative and absolute, in fp32: the same sums in another order."""


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns what a function returns and the gradients of what it is given."""
    given = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*given)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), given))


def kept_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Returns the size of what a function keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*[tensor.clone().requires_grad_() for tensor in inputs])
    return sum(sizes.values())


def assert_same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    out, found = gradients(ours, *inputs)
    expected_out, expected = gradients(plain, *inputs)
    assert torch.equal(out, expected_out)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("style", ["Llama", "Gemma", "OLMo"])
def test_a_norm_has_the_gradients_of_autograd(style: NormStyle) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-5, style=style)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return normed * (1.0 + weight) if style == "Gemma" else weight * normed

    assert_same(ours, plain, torch.randn(2, 5, 16), torch.randn(16))


def test_a_frozen_norm_keeps_its_input_alone() -> None:
    norm = RMSNorm(16, eps=1e-5, style="Llama").bfloat16().requires_grad_(requires_grad=False)
    x = torch.randn(4, 8, 16, dtype=torch.bfloat16)
    assert kept_bytes(norm, x) == x.nbytes + 4 * 8 * 4 + norm.weight.nbytes


@pytest.mark.parametrize("is_gelu", [False, True])
def test_a_gate_has_the_gradients_of_autograd_and_keeps_what_it_is_given(is_gelu: bool) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(3, 7), torch.randn(3, 7)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return (functional.gelu(gate, approximate="tanh") if is_gelu else functional.silu(gate)) * up

    assert_same(lambda gate, up: gated(gate, up, is_gelu=is_gelu), plain, gate, up)
    assert kept_bytes(lambda gate, up: gated(gate, up, is_gelu=is_gelu), gate, up) == gate.nbytes + up.nbytes


@pytest.mark.parametrize("rotated", [8, 4])
def test_a_rotation_has_the_gradients_of_autograd(rotated: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(2, 1, 5, rotated // 2)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        first, second = x[..., :rotated].chunk(2, dim=-1)
        turned = x[..., :rotated] * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, x[..., rotated:]), dim=-1)

    signed = torch.cat((-sin[..., : rotated // 2], sin[..., rotated // 2 :]), dim=-1)  # as rotary_tables has them
    assert_same(lambda x: rotate(x, cos, signed), plain, torch.randn(2, 3, 5, 8))
