"""Low-rank adaptation (LoRA, arXiv 2106.09685) as surgery on a model's linear layers, with peft's names.

The base keeps Hugging Face's names, `q_proj.weight`; beside it come `q_proj.lora_A.weight` (rank, in) and
`q_proj.lora_B.weight` (out, rank), and with DoRA (arXiv 2402.09353) `q_proj.lora_magnitude_vector` (out), the length
that each row of the adapted weight has. With QLoRA (arXiv 2305.14314) the base's weight is packed in NF4:
`q_proj.weight_codes` and `q_proj.weight_scales` stand in its place. Rows of the embedding that are trained beside all
that are `trained_tokens`; they count as adapters, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional

from kubetune_trainer.distributed import local_part
from kubetune_trainer.errors import ConfigError
from kubetune_trainer.quantize import nf4
from kubetune_trainer.trained_tokens import IDS_SUFFIX, ROWS_SUFFIX, TokenAdapter, token_ids, train_tokens, with_rows

ALL_LINEAR = "all-linear"
OUTPUT_HEAD = "lm_head"
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
PACKED_SUFFIXES = (".weight_codes", ".weight_scales")
SMALLEST_NORM = 1e-12
"""Rows of nothing but zeros keep the magnitude 0 and are divided by this."""


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trained update of low rank: x W^T + b + scale dropout(x) A^T B^T.

    With a magnitude m (DoRA) each row of W + scale B A is brought to the length that m has for it.

    Args:
        base: The layer that it stands in for; its weight becomes this one's.
        rank: Inner width of the update.
        scale: What the update is multiplied with.
        dropout: Part of the update's input that is dropped in training.
        has_magnitude: Whether the rows' lengths are trained by themselves.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self, base: nn.Linear, *, rank: int, scale: float, dropout: float, has_magnitude: bool = False
    ) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        """Whether the update is added; see `without_adapters`."""
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        magnitude = nn.Parameter(torch.ones(base.out_features, device=device)) if has_magnitude else None
        self.register_parameter("lora_magnitude_vector", magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = functional.dropout(x, self.dropout, self.training)
        inner = functional.linear(dropped, self.lora_A.weight.to(x.dtype))
        update = functional.linear(inner * self.scale, self.lora_B.weight.to(x.dtype))
        if self.lora_magnitude_vector is None:
            return out + update
        if self.training and self.dropout:
            base = functional.linear(dropped, self.weight)  # the same dropout as the update's, as in peft
        else:
            base = out if self.bias is None else out - self.bias
        stretch = self._stretch(self.lora_magnitude_vector).to(x.dtype)
        return out + (stretch - 1) * base + stretch * update

    def base(self, x: Tensor) -> Tensor:
        """Map as the layer does without its adapter."""
        return functional.linear(x, self.weight, self.bias)

    def _stretch(self, magnitude: Tensor) -> Tensor:
        """Return what each output is multiplied with, fp32; lengths count as constants in backward (section 4.3)."""
        with torch.no_grad():
            adapted = merge_update(self.weight, self.lora_A.weight, self.lora_B.weight, scale=self.scale)
            # In the magnitude's own type, so that a fresh adapter changes nothing when FSDP has rounded that.
            norm = row_norms(adapted).to(magnitude.dtype).float()
        return magnitude.float() / norm


class QLoRALinear(LoRALinear):
    """The same over a base in NF4, which becomes numbers when it is used and only then.

    Its codes and scales are frozen parameters, which FSDP shards by rows as any other; the few numbers beside them are
    buffers, whole on each rank.

    Args:
        base: The layer that it stands in for; its weight is packed, unless it has no memory yet.
        rank: Inner width of the update.
        scale: What the update is multiplied with.
        dropout: Part of the update's input that is dropped in training.
    """

    weight_factors: Tensor
    weight_mean: Tensor

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        self.weight = None
        shape, device = (base.out_features, base.in_features), base.weight.device
        packed = nf4.Packed.empty(shape, device=device) if base.weight.is_meta else nf4.Packed.of(base.weight)
        self.weight_codes = nn.Parameter(packed.codes, requires_grad=False)
        self.weight_scales = nn.Parameter(packed.scales, requires_grad=False)
        self.register_buffer("weight_factors", packed.factors, persistent=False)
        self.register_buffer("weight_mean", packed.mean, persistent=False)

    def base(self, x: Tensor) -> Tensor:
        """Map as the layer does without its adapter."""
        out = nf4.linear(x, self.packed)
        return out if self.bias is None else out + self.bias

    @property
    def packed(self) -> nf4.Packed:
        """The base's weight."""
        return nf4.Packed(self.weight_codes, self.weight_scales, self.weight_factors, self.weight_mean)

    def load(self, weight: Tensor) -> None:
        """Pack a weight, given whole, and keep this rank's rows of it."""
        from kubetune_trainer.model.weights import local_place  # noqa: PLC0415 - as in `init_lora`

        packed = nf4.Packed.of(weight)
        for parameter, whole in ((self.weight_codes, packed.codes), (self.weight_scales, packed.scales)):
            local, place = local_place(parameter)
            local.copy_(whole[place])
        self.weight_factors.copy_(packed.factors)
        self.weight_mean.copy_(packed.mean)


def apply_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    rank_stabilized: bool = False,
    has_magnitude: bool = False,
    packs_base: bool = False,
    trained_ids: Sequence[int] = (),
) -> list[str]:
    """Freeze a model and put fp32 adapters beside its linear layers, in place.

    Args:
        model: Changed in place; may stand on the meta device, `init_lora` then follows the loading of the weights.
        rank: Inner width of the updates.
        alpha: The updates are scaled by alpha / rank.
        dropout: Part of the updates' input that is dropped in training.
        target_modules: Last parts of the names of linear layers (q_proj) or longer ends of them (layers.0.mlp.up_proj);
            all-linear means all but the output head.
        rank_stabilized: Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
        has_magnitude: Train the rows' lengths by themselves (DoRA).
        packs_base: Keep the weights of the layers that get an adapter in NF4 (QLoRA); not with has_magnitude.
        trained_ids: Tokens whose rows of the embedding, and of an output head of its own, are trained.

    Returns:
        The names of the layers that have an adapter now.

    Raises:
        ConfigError: A target names no linear layer, or the output head, or one whose rows cannot be packed.
    """
    model.requires_grad_(requires_grad=False)
    names = _targeted(model, target_modules)
    scale = update_scale(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    if packs_base:
        _check_rows(model, names)
    for name in names:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        if packs_base:
            layer: LoRALinear = QLoRALinear(base, rank=rank, scale=scale, dropout=dropout)
        else:
            layer = LoRALinear(base, rank=rank, scale=scale, dropout=dropout, has_magnitude=has_magnitude)
        setattr(model.get_submodule(parent), child, layer)
    if trained_ids:
        train_tokens(model, trained_ids)
    if not any(parameter.is_meta for parameter in model.parameters()):
        init_lora(model, seed=0)
    return names


def _check_rows(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        inputs = model.get_submodule(name).in_features
        if inputs % nf4.BLOCK:
            raise ConfigError(
                f"tuning QLoRA needs layers whose inputs are divisible by {nf4.BLOCK}: {name} has {inputs}",
                hint="Use tuning LoRA, or leave this layer out of lora.target_modules.",
            )


def update_scale(*, rank: int, alpha: float, rank_stabilized: bool) -> float:
    """Return what updates are multiplied with."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model computes what it would without its adapters."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear | TokenAdapter)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def copy_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's parts of the adapters as they are now, for `reference_adapters`."""
    return {name: local_part(weight.detach()).clone() for name, weight in model.named_parameters() if is_adapter(name)}


@contextmanager
def reference_adapters(model: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """While the block runs, the model computes with adapters that were kept and no dropout; with none, as the base.

    Not between a forward pass and its backward pass: values change places.

    Args:
        model: Has its own adapters again afterwards, bit for bit.
        kept: What `copy_adapters` returned; empty means `without_adapters`.
    """
    if not kept:
        with without_adapters(model):
            yield
        return
    was_training = model.training
    _exchange(model.eval(), kept)
    try:
        yield
    finally:
        _exchange(model.train(was_training), kept)


def _exchange(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Let a model's adapters and kept ones change places, one by one, so that no third copy is needed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # else the next pass would compute with what the last one gathered
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in kept:
                mine = local_part(weight)
                before = mine.clone()
                mine.copy_(kept[name])
                kept[name].copy_(before)


def init_lora(model: nn.Module, *, seed: int) -> None:
    """Give adapters their first values: A uniform as peft's, B zero, the same on any number of ranks.

    Magnitudes begin as the lengths of the base's rows; the weights must be loaded. Trained rows of tokens are left as
    they are.
    """
    from kubetune_trainer.model.weights import (  # noqa: PLC0415 - weights asks this module what an adapter is
        local_place,
        local_rows,
    )

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith((A_SUFFIX, B_SUFFIX)):
                continue
            local, place = local_place(parameter)
            if "lora_B" in name:
                local.zero_()
                continue
            whole = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            local.copy_(whole[place])
        for module in model.modules():
            if isinstance(module, LoRALinear) and module.lora_magnitude_vector is not None:
                # A rank has at least the rows whose lengths it keeps: the base is sharded by rows too, or whole.
                (local, rows), (weight, held) = local_rows(module.lora_magnitude_vector), local_rows(module.weight)
                mine = slice(rows.start - held.start, rows.stop - held.start)
                local.copy_(row_norms(weight[mine].float()))


def set_lora(model: nn.Module, adapters: Mapping[str, Tensor]) -> None:
    """Give adapters the values of others, whole, by the model's own names; each rank keeps its part."""
    from kubetune_trainer.model.weights import local_place  # noqa: PLC0415 - as above

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                local, place = local_place(parameter)
                local.copy_(adapters[name][place])


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX, ROWS_SUFFIX, IDS_SUFFIX))


def is_packed(name: str) -> bool:
    """Whether a parameter is part of a weight in NF4."""
    return name.endswith(PACKED_SUFFIXES)


def packed_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """Return the layers whose weights are in NF4, by the names that these weights have in files."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, QLoRALinear)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gather the adapters whole, on CPU; every rank must call this at the same time.

    Returns:
        `….lora_A.weight`, `….lora_B.weight` and `….lora_magnitude_vector` under the model's own names; trained rows of
        tokens with whose they are.
    """
    adapters = {name: whole_tensor(parameter) for name, parameter in model.named_parameters() if is_adapter(name)}
    return adapters | dict(token_ids(model))


def whole_tensor(parameter: Tensor) -> Tensor:
    """Gather a parameter from its shards, on CPU; every rank must call this at the same time."""
    parameter = parameter.detach()
    if isinstance(parameter, DTensor):
        # What training.cpu_offload keeps on the CPU travels between the devices all the same.
        parameter = parameter.to(parameter.device_mesh.device_type).full_tensor()
    return parameter.cpu()


def lora_scale(model: nn.Module) -> float:
    """Return the scale of the updates of a model with adapters."""
    return next(module.scale for module in model.modules() if isinstance(module, LoRALinear))


def merge_adapters(
    name: str, weight: Tensor, adapters: Mapping[str, Tensor], *, scale: float, packed: bool = False
) -> Tensor:
    """Merge into a weight the adapters of its layer, in fp32; one without adapters is returned as it is.

    Of the embedding these are the trained rows of tokens.

    Args:
        name: Name of the weight.
        weight: The base's.
        adapters: What `lora_state_dict` gathered.
        scale: What updates are multiplied with.
        packed: Merge into what the weight is in NF4, as QLoRA trains on.
    """
    layer = name.removesuffix(".weight")
    if layer + A_SUFFIX not in adapters:
        return with_rows(name, weight, adapters)
    if packed:
        weight = nf4.rounded_to_nf4(weight)
    merged = merge_update(weight, adapters[layer + A_SUFFIX], adapters[layer + B_SUFFIX], scale=scale)
    magnitude = adapters.get(layer + MAGNITUDE_SUFFIX)
    return merged if magnitude is None else merged * (magnitude.float() / row_norms(merged))[:, None]


def merge_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """Add an update to the weight that it belongs to, in fp32."""
    return weight.float() + scale * (lora_b.float() @ lora_a.float())


def row_norms(weight: Tensor) -> Tensor:
    """Return the length of each row, (out)."""
    return torch.linalg.vector_norm(weight, dim=1).clamp(min=SMALLEST_NORM)


def _targeted(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    eligible = [name for name in linear if name != OUTPUT_HEAD]
    chosen: set[str] = set()
    for target in target_modules:
        matches = eligible if target == ALL_LINEAR else [n for n in eligible if n == target or n.endswith(f".{target}")]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in eligible})
            raise ConfigError(
                f"lora.target_modules must name linear layers ({', '.join(known)}) or {ALL_LINEAR}, got {target!r}"
            )
        chosen.update(matches)
    return [name for name in eligible if name in chosen]
