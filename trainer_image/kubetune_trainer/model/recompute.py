"""Activations that the backward pass computes again instead of keeping them (arXiv 1604.06174, arXiv 2205.05198)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["None", "Selective", "Full"]

_aten = torch.ops.aten
PRODUCTS: Final = {_aten.mm.default: 1, _aten.addmm.default: 2, _aten.bmm.default: 1, _aten.baddbmm.default: 2}
"""Products of matrices, and which of their arguments is the right factor, (…, inner width, columns)."""
ATTENTION: Final = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 (operators are called what they are)
    _aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
    _aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    _aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
    torch.ops.higher_order.flex_attention,
}
NARROW: Final = 16
"""A product with no more columns than this many times its inner width is worth keeping."""


def is_worth_keeping(inner: int, columns: int) -> bool:
    """Whether a product takes so long for each number that it returns that Selective keeps them.

    Those of an adapter's few ranks with its many outputs are as soon made again as what is computed by elements; DoRA
    makes one as large as each weight.
    """
    return columns <= NARROW * inner


def _decide(_context: object, operator: object, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    """Says what Selective keeps: products of matrices that are worth it, and attention."""
    right = PRODUCTS.get(operator)
    is_kept = operator in ATTENTION if right is None else is_worth_keeping(*arguments[right].shape[-2:])
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(function: Callable[..., Tensor], *inputs: object, mode: ActivationCheckpointing) -> Tensor:
    """Call a function so that backward computes its activations again, with the same dropout.

    Args:
        function: What to call.
        inputs: Its arguments; they are kept.
        mode: Full keeps nothing else. Selective also keeps what takes long, products of matrices and attention. None
            keeps everything but what `made_again` is told of.
    """
    is_plain = mode == "None"
    if not torch.is_grad_enabled() or (is_plain and torch.compiler.is_compiling()):
        return function(*inputs)
    if is_plain:
        with _remaking():
            return function(*inputs)
    if mode == "Full":
        return checkpoint(function, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    contexts = partial(create_selective_checkpoint_contexts, _decide)
    return checkpoint(  # type: ignore[no-any-return]
        function, *inputs, use_reentrant=False, context_fn=contexts, respect_saved_tensors_hooks=True
    )


def made_again(product: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return a tensor of which autograd keeps how to make it, and not the tensor, while `recomputed` calls a function.

    For what is cheap to make of tensors that are kept anyway. Nothing is done where somebody else decides what is kept:
    a compiler, recomputation of the whole, or offloading.

    Args:
        product: The tensor; nobody may write to it.
        make: Returns the same numbers laid out the same way; called once, when backward first asks for them.
    """
    if not torch.compiler.is_compiling() and (table := _table.get()) is not None and product.numel():
        table[product.data_ptr()] = _Remade(product, _Again(make))
    return product


class _Again:
    """A tensor that is made when it is first asked for; it goes with the last operator that asks."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
        return self._made


class _Remade(NamedTuple):
    product: Tensor
    """Held while the function runs, so that no other tensor comes to lie there."""
    again: _Again


class _Kept(NamedTuple):
    """What autograd keeps in place of a tensor."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]


_table: ContextVar[dict[int, _Remade] | None] = ContextVar("table", default=None)
"""By their address, the tensors of the function that runs which can be made again."""


@contextmanager
def _remaking() -> Iterator[None]:
    # There is no public way to ask for others' hooks.
    is_taken = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # noqa: SLF001
    if is_taken:
        yield
        return
    table: dict[int, _Remade] = {}

    def pack(tensor: Tensor) -> Tensor | _Kept:
        remade = table.get(tensor.data_ptr()) if type(tensor) is Tensor else None
        if remade is None or (remade.product.numel(), remade.product.dtype) != (tensor.numel(), tensor.dtype):
            return tensor
        return _Kept(remade.again, tensor.size(), tensor.stride())

    before = _table.set(table)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _table.reset(before)
        table.clear()  # autograd keeps `pack`, which knows the table


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.again().as_strided(kept.size, kept.stride) if isinstance(kept, _Kept) else kept
