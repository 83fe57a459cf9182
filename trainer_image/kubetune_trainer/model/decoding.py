"""A model while it writes on a CPU: a token reads every weight and computes little, so reading is what is made fast.

The weights of a block lie side by side, in huge pages where the kernel gives any, which are read up to 3 times as fast;
layers that map the same input are multiplied as one, without a copy, since their weights are neighbours; and products
of few tokens take the operators of torch 2.14 that read their weights fastest.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kubetune_trainer.model.linear import Linear
from kubetune_trainer.quantize.linear import IntegerLinear, together

if TYPE_CHECKING:
    from kubetune_trainer.model.decoder import Decoder

FEW_TOKENS: Final = 16
"""Up to so many tokens a product on a CPU reads longer than it computes."""
QUICK_TYPES: Final = (torch.bfloat16, torch.float32)
PIECES: Final = 4
"""One token in fp32 is multiplied with so many pieces of a weight at once: on two cores of an AMD CPU they are read at
16 to 23 GB/s, where MKL's product of a matrix and a vector stays with one core and 12 GB/s (torch 2.14)."""
HUGE_PAGE: Final = 2 * 2**20
NEIGHBOURS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that map the same input."""


Fused = Callable[[Tensor], Tensor]
"""Layers that map the same input, as one."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `functional.linear` does; few tokens take another way there on a CPU, without gradients.

    Four tokens in fp32 take half the time by it on an AMD CPU (torch 2.14).
    """
    num_tokens = x.numel() // x.shape[-1]
    is_quick = x.dtype in QUICK_TYPES and x.device.type == "cpu" and 0 < num_tokens <= FEW_TOKENS
    if not is_quick or torch.is_grad_enabled():
        return functional.linear(x, weight, bias)
    rows = x.reshape(num_tokens, -1)
    out = _of_one_token(rows, weight) if num_tokens == 1 else torch.mm(weight, rows.T).T.contiguous()
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _of_one_token(row: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype != torch.float32 or len(weight) % PIECES:
        return torch.mv(weight, row[0])
    pieces = weight.view(PIECES, -1, weight.shape[1])
    return torch.bmm(row.expand(PIECES, 1, -1), pieces.transpose(1, 2))


@contextmanager
def decoding(model: "Decoder") -> Iterator[None]:
    """While the block runs, layers are quick with few tokens; what they return is the same but for rounding.

    The weights stay where they were laid: same parameters, same values, other memory. Those that are mapped from a file
    are read from it once.

    Args:
        model: Without adapters; nothing happens if it is not on a CPU.
    """
    if model.model.embed_tokens.weight.device.type != "cpu":
        yield
        return
    changed = []
    _lay_weights(model)
    for module in model.model.layers.modules():
        if _is_plain(module):
            module.forward = partial(linear, weight=module.weight, bias=module.bias)
            changed.append((module, "forward"))
        for layers in _neighbours(module):
            module.fused = _joined(layers)
            changed.append((module, "fused"))
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _lay_weights(model: "Decoder") -> None:
    """Lay the weights of each block, and the others, side by side; those of 4 bits are packed before."""
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            module.pack()
    in_blocks: set[Tensor] = set()
    for block in model.model.layers:
        for weights in _movable(block):
            in_blocks |= {*_lay_side_by_side(weights)}
    for weights in _movable(model):
        _lay_side_by_side([weight for weight in weights if weight not in in_blocks])


def _neighbours(module: nn.Module) -> list[list[nn.Module]]:
    """Return the layers of a module that can be one, in their order."""
    found = [[getattr(module, name, None) for name in names] for names in NEIGHBOURS]
    return [layers for layers in found if all(map(_is_plain, layers)) or _are_integers_alike(layers)]


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether this is a linear layer with nothing beside it, whose weight is numbers as they are."""
    return type(layer) is Linear and type(layer.weight.data) is Tensor


def _are_integers_alike(layers: Sequence[nn.Module | None]) -> bool:
    kinds = {
        (layer.bits, layer.weight_scale.shape[1], layer.rounds_activations, layer.packed is None)
        if isinstance(layer, IntegerLinear)
        else None
        for layer in layers
    }
    return len(kinds) == 1 and None not in kinds


def _movable(module: nn.Module) -> list[list[Tensor]]:
    """Return the weights that can be laid anywhere, those of a type together and neighbours first."""
    near = [layer for inner in module.modules() for layers in _neighbours(inner) for layer in layers]
    integers = [layer for layer in module.modules() if isinstance(layer, IntegerLinear)]
    weights = [weight for layer in (*near, *integers) for weight in _weights_of(layer)]
    weights += module.parameters()
    by_type: dict[torch.dtype, dict[Tensor, None]] = {}
    for weight in weights:
        if type(weight.data) is Tensor:
            by_type.setdefault(weight.dtype, {})[weight] = None
    return [list(each) for each in by_type.values()]


def _weights_of(layer: nn.Module) -> list[Tensor]:
    if not isinstance(layer, IntegerLinear):
        return [layer.weight]
    return [layer.weight, layer.weight_scale, *([layer.packed.weight] if layer.packed else ())]


@torch.inference_mode(mode=False)
@torch.no_grad()
def _lay_side_by_side(weights: list[Tensor]) -> list[Tensor]:
    """Move weights into one piece of memory in their order, unless they lie so, and return them."""
    if any(one.data_ptr() + one.nbytes != other.data_ptr() for one, other in pairwise(weights)):
        sizes = [weight.numel() for weight in weights]
        for weight, place in zip(weights, _in_huge_pages(sum(sizes), weights[0].dtype).split(sizes), strict=True):
            weight.data = place.view_as(weight).copy_(weight)
    return weights


def _in_huge_pages(numel: int, dtype: torch.dtype) -> Tensor:
    """Return room for numbers for which the kernel is asked for huge pages; it goes with the last tensor in it."""
    num_bytes = numel * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -room.data_ptr() % HUGE_PAGE
    return room[begin : begin + num_bytes].view(dtype)


def _joined(layers: Sequence[nn.Module]) -> Fused:
    """Return neighbours as one layer, whose weight is their memory."""
    if isinstance(layers[0], IntegerLinear):
        return IntegerLinear.joined(layers).forward
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    whole = together(weights[0], rows=sum(map(len, weights)))
    return partial(linear, weight=whole, bias=None if biases[0] is None else torch.cat(biases))
