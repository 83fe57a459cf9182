"""Round a model's linear layers by what goes through them: block after block, one of them in memory at a time.

Shapes: B batch, T tokens, N tokens that are not padding, O outputs, I inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.model.blockwise import pass_blocks
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model.feed_forward import Router
from kubetune_trainer.model.weights import WeightFiles
from kubetune_trainer.names import PADDING_DOCUMENT
from kubetune_trainer.quantize.gptq import gptq
from kubetune_trainer.quantize.rounding import Rounded


class RoundedFiles(Mapping[str, Rounded]):
    """Rounded layers in a folder, by name; read when they are asked for, so that one is in memory at a time."""

    def __init__(self, folder: Path, *, bits: int, group_size: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._bits, self._group_size = folder, bits, group_size

    def save(self, name: str, rounded: Rounded) -> None:
        """Keep a layer."""
        save_file({"values": rounded.values, "scales": rounded.scales}, self._folder / f"{name}.safetensors")

    def __getitem__(self, name: str) -> Rounded:
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            raise KeyError(name)
        return Rounded(**load_file(path), bits=self._bits, group_size=self._group_size)

    def __iter__(self) -> Iterator[str]:
        return (path.name.removesuffix(".safetensors") for path in sorted(self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def calibrate(
    source: Path,
    batches: Sequence[Batch],
    *,
    bits: int,
    group_size: int | None,
    folder: Path,
    device: torch.device | str = "cpu",
    done: Callable[[], object] = lambda: None,
) -> RoundedFiles:
    """Round every linear layer of a model but its output head.

    Each block sees what the rounded blocks before it make of the data, so that it makes up for their errors too.

    Args:
        source: Complete model in Hugging Face format.
        batches: Data to calibrate on; padding is not looked at.
        bits: 4 or 8.
        group_size: Weights of a row that share a scale; None means all of them.
        folder: Where rounded layers are kept.
        device: Where it computes.
        done: Called after each layer.
    """
    found = RoundedFiles(folder, bits=bits, group_size=group_size)
    dtypes = _stored_dtypes(source)

    def round_block(name: str, block: nn.Module, passes: Iterable[Batch]) -> None:
        layers = {inner: layer for inner, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        routers = {inner: module for inner, module in block.named_modules() if isinstance(module, Router)}
        hessians = observe_inputs(layers, passes, routers=routers)
        for inner, layer in layers.items():
            if inner not in hessians:  # an expert that no token chose: left to be rounded to the nearest
                done()
                continue
            full = f"{name}.{inner}"
            weight = layer.weight.data.to(dtypes[f"{full}.weight"])  # its scales must be numbers of that type
            rounded = gptq(weight, hessians.pop(inner), bits=bits, group_size=group_size)
            found.save(full, rounded)
            layer.weight.data.copy_(rounded.dequantized())
            done()

    pass_blocks(source, batches, device=device, visit=round_block)
    return found


def observe_inputs(
    layers: Mapping[str, nn.Linear], passes: Iterable[Batch], *, routers: Mapping[str, Router] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Return X^T X / N of each layer's inputs, fp32 (I, I); layers with one input share one matrix.

    Args:
        layers: The layers, by name.
        passes: Yields each batch right after it went through them.
        routers: Those that choose experts among the layers, by name. A layer that saw no token is left out.
    """
    inputs: dict[str, Tensor] = {}
    chosen: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    first_with: dict[str, str] = {}
    tokens = 0

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, given: inputs.__setitem__(name, given[0])

    def watch_router(name: str) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
        return lambda _router, _given, found: chosen.__setitem__(name, found[1])

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    handles += [router.register_forward_hook(watch_router(name)) for name, router in routers.items()]
    try:
        for batch in passes:
            real_BT = batch.documents != PADDING_DOCUMENT
            tokens += int(real_BT.sum())
            first_of = {name: next(other for other in inputs if inputs[other] is inputs[name]) for name in inputs}
            first_with |= first_of
            for name in set(first_of.values()):
                real = _real_rows(name, real_BT.to(inputs[name].device), chosen)
                x_NI = inputs[name][real].float()
                if not len(x_NI):
                    continue
                sums[name] = sums[name].addmm_(x_NI.T, x_NI) if name in sums else x_NI.T @ x_NI
            inputs.clear()
            chosen.clear()
    finally:
        for handle in handles:
            handle.remove()
    means = {name: total / tokens for name, total in sums.items()}
    return {name: means[first] for name, first in first_with.items() if first in means}


def _real_rows(name: str, real_BT: Tensor, chosen: Mapping[str, Tensor]) -> Tensor:
    """Say which rows of a layer's input are no padding; an expert's rows are those of the tokens that chose it."""
    mixture, found, rest = name.partition(".experts.")
    if not found:
        return real_BT
    chosen_NC = chosen[f"{mixture}.gate"]
    of_expert = (chosen_NC.flatten() == int(rest.partition(".")[0])).nonzero()[:, 0]
    return real_BT.flatten()[of_expert // chosen_NC.shape[1]]


def _stored_dtypes(source: Path) -> dict[str, torch.dtype]:
    with WeightFiles(source, tied_embeddings=read_config(source).tied_embeddings) as files:
        return {name: files.dtype(name) for name in files.names}
