"""Activations that the backward pass computes again instead of keeping them (arXiv 1604.06174, arXiv 2205.05198)."""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["None", "Selective", "Full"]

_aten = torch.ops.aten
EXPENSIVE: Final = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 (operators are called what they are)
    _aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
    _aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    _aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
    torch.ops.higher_order.flex_attention,
]
"""What Selective does not compute twice: products of matrices, and attention."""


def recomputed(function: Callable[..., Tensor], *inputs: object, mode: ActivationCheckpointing) -> Tensor:
    """Call a function so that backward computes its activations again, with the same dropout.

    Args:
        function: What to call.
        inputs: Its arguments; they are kept.
        mode: Full keeps nothing else. Selective also keeps what the EXPENSIVE operators return. None keeps everything.
    """
    if mode == "None" or not torch.is_grad_enabled():
        return function(*inputs)
    if mode == "Full":
        return checkpoint(function, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    contexts = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    return checkpoint(  # type: ignore[no-any-return]
        function, *inputs, use_reentrant=False, context_fn=contexts, respect_saved_tensors_hooks=True
    )
