"""Attention that passes over blocks of keys that no query sees, by torch's flex_attention (arXiv 2412.05496), for CUDA.

A mask (B, 1, T, T) takes as many products as there are pairs of tokens, of packed rows most for nothing. Here a
function says which key a query sees, tiles in which none is seen are not computed, and no mask is in memory. What it
says is what `attention_mask` says, and a test holds both together.

flex_attention is a kernel only where it is compiled; the CPU has none with a backward pass. It was not run on a GPU by
us. So a run on CUDA first trains a small piece of its own attention both ways, and takes the other way where anything
goes wrong or the numbers differ: `why_not`.

Shapes: B batch, T tokens, N heads, K key and value heads, H head_dim.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kubetune_trainer.loss import soft_capped
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.recompute import ActivationCheckpointing, recomputed

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MAX_COMPILATIONS: Final = 64
"""Of one function: for rows of one length and of many, with and without a mask, in training and in validation."""
TRIED_TOKENS: Final = 320
"""Tokens of the row on which it is tried: two blocks and a half."""
TOLERANCE: Final = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""How far outputs and gradients of the two ways may be apart, relative to the largest: fp32 may be TF32 on a GPU."""


def sees(
    documents_BT: Tensor, positions_BT: Tensor, *, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return what says, for a row and a head, whether a query sees a key: of its document, before it, in its window."""

    def is_seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (documents_BT[row, query] == documents_BT[row, key])
        if window is not None:
            seen = seen & (positions_BT[row, query] - positions_BT[row, key] < window)
        return seen

    return is_seen


def block_mask(documents_BT: Tensor, positions_BT: Tensor, *, window: int | None) -> "BlockMask":
    """Return which tiles of queries and keys have to be computed, and the function for those seen in part."""
    rows, length = documents_BT.shape
    says = sees(documents_BT, positions_BT, window=window)
    create, _ = _kernels(documents_BT.device.type)
    return create(says, rows, None, length, length, device=documents_BT.device)  # type: ignore[no-any-return]


def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: "BlockMask", *, scale: float | None, softcap: float | None
) -> Tensor:
    """Attend with heads (B, N, T, H) over keys and values (B, K, T, H)."""

    def bounded(score: Tensor, *_place: Tensor) -> Tensor:
        return soft_capped(score, softcap)

    _, flex_attention = _kernels(query.device.type)
    change = None if softcap is None else bounded
    return flex_attention(  # type: ignore[no-any-return]
        query, key, value, score_mod=change, block_mask=mask, scale=scale, enable_gqa=True
    )


def why_not(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device, recompute: ActivationCheckpointing
) -> str | None:
    """Try a piece of a model's attention, forward and backward; return why it had better not be used, if so."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="flex_attention called without torch.compile")
            difference = max(
                _difference(config, window, dtype=dtype, device=device, recompute=recompute)
                for window in set(config.windows)
            )
    except Exception as error:  # noqa: BLE001 (a compiler that is missing, a kernel that does not fit: any of it)
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None if difference <= TOLERANCE[dtype] else f"its numbers differ by {difference:.2g}"


def _difference(
    config: ModelConfig, window: int | None, *, dtype: torch.dtype, device: torch.device, recompute: Any
) -> float:
    """Return how far output and gradients are from those of a mask, relative to the largest number of each."""
    from kubetune_trainer.model.attention import attend, attention_mask, within  # noqa: PLC0415 (it asks this module)

    generator = torch.Generator(device).manual_seed(0)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    shapes = [(2, number, TRIED_TOKENS, config.head_dim) for number in heads]
    inputs = [torch.randn(shape, dtype=dtype, device=device, generator=generator) for shape in shapes]
    places_BT = torch.arange(TRIED_TOKENS, device=device).expand(2, -1)
    documents_BT = (places_BT >= TRIED_TOKENS // 3).long()
    positions_BT = places_BT - documents_BT * (TRIED_TOKENS // 3)
    dense = attention_mask(places_BT, documents_BT, None)
    assert dense is not None, "there are two documents"
    masks = (within(dense, window, positions_BT, positions_BT), block_mask(documents_BT, positions_BT, window=window))
    found = []
    for mask in masks:
        given = [tensor.detach().requires_grad_(device.type != "cpu") for tensor in inputs]

        def tried(*given: Tensor, mask: Any = mask) -> Tensor:
            return attend(*given, mask, scale=config.attention_scale, softcap=config.attention_softcap)

        out = recomputed(tried, *given, mode=recompute)
        grads = torch.autograd.grad(out.float().square().sum(), given) if out.requires_grad else ()
        found.append([out.detach(), *grads])
    pairs = zip(*found, strict=True)
    return max(((one - other).abs().max() / one.abs().max()).item() for one, other in pairs)


@cache
def _kernels(device_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return how block masks are made and used; on a CPU step by step, in Python."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415 (slow; CUDA's alone)

    if device_type == "cpu":
        return create_block_mask, flex_attention
    # One function for every window, batch and kind of pass: beyond the limit it would run uncompiled, with all scores.
    torch._dynamo.config.recompile_limit = MAX_COMPILATIONS  # noqa: SLF001 (torch documents it under this name)
    return torch.compile(create_block_mask), torch.compile(flex_attention)
