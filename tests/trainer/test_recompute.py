"""What a block's backward pass makes again instead of keeping: the same gradients, of fewer tensors."""

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kubetune_trainer import load_model
from kubetune_trainer.lora import apply_lora
from kubetune_trainer.model import recompute
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.recompute import made_again, recomputed
from tests.trainer.tiny import make_folder, random_tokens


class Squares:
    """Projects the squares of what it is given twice, and counts how often they are made again."""

    def __init__(self) -> None:
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)
        self.made = 0
        self.product: weakref.ref[Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        product = made_again(x.square(), lambda: self.again(x.detach()))
        self.product = weakref.ref(product)
        return self.first(product) * self.second(product.flatten(0, 1)).view(2, 3, 4)

    def again(self, x: Tensor) -> Tensor:
        self.made += 1
        return x.square()


def gradients(function: Squares, x: Tensor, *, inside: bool) -> list[Tensor]:
    out = recomputed(function, x, mode="None") if inside else function(x)
    assert function.product is not None
    assert (function.product() is None) == inside, "it is kept where nobody makes it again, and nowhere else"
    return list(torch.autograd.grad(out.sum(), [x, function.first.weight, function.second.weight]))


def test_what_can_be_made_again_is_not_kept_and_made_once() -> None:
    torch.manual_seed(0)
    function, x = Squares(), torch.randn(2, 3, 8, requires_grad=True)
    kept = gradients(function, x, inside=False)
    assert function.made == 0
    made = gradients(function, x, inside=True)
    assert function.made == 1, "two layers need it, and it is made for both at once"
    assert all(map(torch.equal, made, kept))


def test_nothing_is_made_again_where_others_decide_what_is_kept() -> None:
    torch.manual_seed(0)
    function, x = Squares(), torch.randn(2, 3, 8, requires_grad=True)
    wanted = gradients(function, x, inside=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        out = recomputed(function, x, mode="None")
    whole = checkpoint(lambda given: recomputed(function, given, mode="None"), x, use_reentrant=False)
    for each in (out, whole):
        found = torch.autograd.grad(each.sum(), [x, function.first.weight, function.second.weight])
        assert all(map(torch.equal, found, wanted))
    assert function.made == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tuning", ["Full", "LoRA", "LoRA with dropout"])
def test_gradients_are_bit_for_bit_those_of_a_model_that_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: str, dtype: torch.dtype
) -> None:
    make_folder(tmp_path, dtype=dtype)
    model = load_model(tmp_path, dtype=dtype).train()
    if tuning != "Full":
        apply_lora(model, rank=2, alpha=4, dropout=0.3 if "dropout" in tuning else 0.0)
    found, num_made = step(model)
    monkeypatch.setattr(recompute, "_remaking", nullcontext)
    wanted, num_without = step(model)
    # Two norms and a gated product a block. With dropout, adapters keep what is left of them instead.
    assert (num_made, num_without) == (0 if "dropout" in tuning else 9, 0)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def step(model: Decoder) -> tuple[dict[str, Tensor], int]:
    """Returns the gradients of a step and how many tensors were made again."""
    made = 0
    again = recompute._Again.__call__

    def counted(self: recompute._Again) -> Tensor:
        nonlocal made
        made += self._made is None
        return again(self)

    torch.manual_seed(1)
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute._Again, "__call__", counted)
        tokens = random_tokens(2, 9)
        model(tokens, labels_BT=tokens).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: gradient.clone() for name, gradient in gradients.items()}, made


@pytest.mark.parametrize(("rank", "num_kept"), [(2, 2), (16, 4)], ids=["a few ranks", "many ranks"])
def test_selective_keeps_products_that_take_long(rank: int, num_kept: int) -> None:
    """Of an adapted layer: its own product and the inner one; the update and the whole one where they are as wide."""
    made: list[str] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _types: Any, given: Any = (), options: Any = None) -> Any:
            if function is torch.ops.aten.mm.default:
                made.append(str(function))
            return function(*given, **(options or {}))

    class Packed(torch.autograd.Function):
        """As the product with a weight in NF4, within which no gradients are recorded."""

        @staticmethod
        def forward(_context: Any, x: Tensor) -> Tensor:
            return x @ base

        @staticmethod
        def backward(_context: Any, gradient: Tensor) -> Tensor:
            return gradient @ base.T

    base, inner, update = torch.randn(64, 64), torch.randn(64, rank), torch.randn(rank, 64)
    factors = [factor.requires_grad_() for factor in (inner, update)]

    def layer(x: Tensor) -> Tensor:
        with torch.no_grad():
            lengths = (base + inner @ update).norm(dim=1)
        return (Packed.apply(x) + x @ factors[0] @ factors[1]) * lengths

    out = recomputed(layer, torch.randn(8, 64, requires_grad=True), mode="Selective")
    with Counted():
        out.sum().backward()
    gradients = 1 + 2 * 2  # of what the frozen weight is multiplied with, and of both factors of the others
    assert len(made) == gradients + 4 - num_kept
