"""Low-rank adaptation (LoRA, arXiv 2106.09685) as surgery on a model's linear layers, with peft's names.

The base keeps Hugging Face's names, `q_proj.weight`; beside it come `q_proj.lora_A.weight` (rank, in) and
`q_proj.lora_B.weight` (out, rank).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from kubetune_trainer.errors import ConfigError

ALL_LINEAR = "all-linear"
OUTPUT_HEAD = "lm_head"


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trained update of low rank: x W^T + b + (alpha / rank) dropout(x) A^T B^T.

    Args:
        base: The layer that it stands in for; its weight becomes this one's.
        rank: Inner width of the update.
        alpha: Numerator of the update's scale.
        dropout: Part of the update's input that is dropped in training.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.dropout = dropout
        self.enabled = True
        """Whether the update is added; see `without_adapters`."""
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        out = functional.linear(x, self.weight, self.bias)
        if not self.enabled:
            return out
        update = functional.linear(functional.dropout(x, self.dropout, self.training), self.lora_A.weight.to(x.dtype))
        return out + functional.linear(update * self.scale, self.lora_B.weight.to(x.dtype))


def apply_lora(
    model: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, target_modules: Sequence[str] = (ALL_LINEAR,)
) -> list[str]:
    """Freeze a model and put fp32 adapters beside its linear layers, in place.

    Args:
        model: Changed in place; may stand on the meta device, `init_lora` then follows the loading of the weights.
        rank: Inner width of the updates.
        alpha: The updates are scaled by alpha / rank.
        dropout: Part of the updates' input that is dropped in training.
        target_modules: Last parts of the names of linear layers (q_proj) or longer ends of them (layers.0.mlp.up_proj);
            all-linear means all but the output head.

    Returns:
        The names of the layers that have an adapter now.

    Raises:
        ConfigError: A target names no linear layer, or the output head.
    """
    model.requires_grad_(requires_grad=False)
    names = _targeted(model, target_modules)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank=rank, alpha=alpha, dropout=dropout)
        setattr(model.get_submodule(parent), child, layer)
    if not any(parameter.is_meta for parameter in model.parameters()):
        init_lora(model, seed=0)
    return names


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model computes what it would without its adapters."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def init_lora(model: nn.Module, *, seed: int) -> None:
    """Give adapters their first values: A uniform as peft's, B zero, the same on any number of ranks."""
    from kubetune_trainer.model.weights import local_rows  # noqa: PLC0415 - weights asks this module what an adapter is

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_adapter(name):
                continue
            local, rows = local_rows(parameter)
            if "lora_B" in name:
                local.zero_()
                continue
            whole = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            local.copy_(whole[rows])


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gather the adapters whole, on CPU; every rank must call this at the same time.

    Returns:
        `….lora_A.weight` and `….lora_B.weight` under the model's own names.
    """
    return {name: whole_tensor(parameter) for name, parameter in model.named_parameters() if is_adapter(name)}


def whole_tensor(parameter: Tensor) -> Tensor:
    """Gather a parameter from its shards, on CPU; every rank must call this at the same time."""
    parameter = parameter.detach()
    if isinstance(parameter, DTensor):
        parameter = parameter.full_tensor()
    return parameter.cpu()


def lora_scale(model: nn.Module) -> float:
    """Return the scale of the updates of a model with adapters."""
    return next(module.scale for module in model.modules() if isinstance(module, LoRALinear))


def merge_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """Add an update to the weight that it belongs to, in fp32."""
    return weight.float() + scale * (lora_b.float() @ lora_a.float())


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
