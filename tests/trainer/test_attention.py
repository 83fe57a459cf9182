"""Attention's gradients in bf16 beside those of the same numbers in fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.model import attention
from kubetune_trainer.model.attention import SHORT_ROW, attend

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def heads(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    rows = [torch.randn(2, length, number, HEAD_DIM, dtype=torch.bfloat16) for number in (HEADS, KV_HEADS, KV_HEADS)]
    return [row.transpose(1, 2).requires_grad_() for row in rows]


def two_documents(length: int) -> Tensor:
    documents = torch.arange(length) >= length // 3
    return ((documents[:, None] == documents) & torch.ones(length, length).tril().bool()).expand(2, 1, -1, -1)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("length", [1, 37, SHORT_ROW])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("has_tiles", [True, False])
def test_short_rows_take_their_gradients_in_fp32(
    length: int, *, is_packed: bool, scale: float | None, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out within 4e-3 of fp64's, relative to its size; gradients within 3e-3, which bf16 arithmetic misses."""
    monkeypatch.setattr(attention, "HAS_BF16_TILES", has_tiles)
    seen = two_documents(length) if is_packed else None
    mask = None if seen is None else torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
    given = heads(length)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    out = attend(*given, mask, scale=scale)
    assert out.grad_fn is not None
    assert (out.grad_fn.name() == "_ShortAttentionBackward") is has_tiles
    wanted = functional.scaled_dot_product_attention(
        *exact, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True
    )
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad.double())
    assert (out - wanted).norm() <= 4e-3 * wanted.norm()
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == torch.bfloat16
        assert (one.grad - other.grad).norm() <= 3e-3 * other.grad.norm() + 1e-2 * (length == 1)


def test_longer_rows_stay_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "HAS_BF16_TILES", True)
    out = attend(*heads(SHORT_ROW + 1), None)
    assert out.grad_fn is not None
    assert out.grad_fn.name() != "_ShortAttentionBackward"
