"""The layer that keeps its weight as integers computes what its dequantized weight would."""

import pytest
import torch
from torch import nn

from kubetune_trainer.quantize import linear as integer_linear
from kubetune_trainer.quantize.linear import IntegerLinear, round_tokens
from kubetune_trainer.quantize.rounding import round_to_nearest


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_it_computes_what_a_dense_layer_with_the_same_weight_does(
    monkeypatch: pytest.MonkeyPatch, *, bias: bool, group_size: int | None, dtype: torch.dtype, near: float, tokens: int
) -> None:
    monkeypatch.setattr(integer_linear, "CACHED_ELEMENTS", 1000)  # so that a small layer is cut as a large one is
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias, dtype=dtype)
    rounded = round_to_nearest(dense.weight, bits=8, group_size=group_size)
    layer = IntegerLinear(dense, num_groups=rounded.scales.shape[1], dtype=dtype)
    layer.weight.copy_(rounded.values)
    layer.weight_scale.copy_(rounded.scales)
    if bias:
        layer.bias.copy_(dense.bias)
    dense.weight.data.copy_(rounded.dequantized())
    x = torch.randn(2, tokens, 64, dtype=dtype) if tokens > 1 else torch.randn(1, 1, 64, dtype=dtype)
    with torch.no_grad():
        wanted, found = dense(x).float(), layer(x)
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() / wanted.norm() < near


def test_tokens_are_rounded_one_by_one() -> None:
    x = torch.tensor([[0.3, -1.0, 0.004], [0.3 * 1024, -1024.0, 0.004 * 1024], [0.0, 0.0, 0.0]])
    found = round_tokens(x)
    assert torch.allclose(found[1], found[0] * 1024)
    assert ((found - x).abs() <= x.abs().amax(-1, keepdim=True) / 127.5 * 0.51).all()
    assert found[0, 2] != 0.004
