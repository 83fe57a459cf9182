"""Which weights of a model are quantized: those of its linear layers, but for the output head."""

from pathlib import Path

from torch import nn

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model.weights import build_model

KEPT = "lm_head"
"""The output head stays as it is: it is often the embedding too, and rounding it costs the most."""
ROUTERS = r"re:.*\.gate$"
"""What chooses experts, as engines' patterns call it; no linear layer to us."""


def linear_layers(config: ModelConfig) -> dict[str, nn.Linear]:
    """Return the layers whose weights are quantized, without memory, by their names."""
    found = build_model(config).named_modules()
    return {name: layer for name, layer in found if isinstance(layer, nn.Linear) and name != KEPT}


def kept_layers(config: ModelConfig) -> list[str]:
    """Return what engines must be told not to take for quantized layers: the output head, and routers as a pattern."""
    return [KEPT] if config.experts is None else [KEPT, ROUTERS]


def check_groups(folder: Path, *, group_size: int) -> None:
    """Refuse a group size that does not divide the rows of every layer.

    Raises:
        ConfigError: Names the first layer that cannot be cut.
    """
    for name, layer in linear_layers(read_config(folder)).items():
        if layer.in_features % group_size:
            raise ConfigError(
                f"group_size must divide the inputs of each linear layer: {name} has {layer.in_features}, "
                f"got {group_size}",
                hint="Choose a smaller group size, or a scheme with 8 bits.",
            )
