"""Quantization-aware training: linear layers compute with weights as they will be when they are quantized.

torchao's prepare puts rounding into the layers, forward only: gradients pass it as if it were not there. Its rounding
is that of its own outputs and of ExecuTorch's. The weights of CompressedTensors have another scale, the largest
magnitude on the largest integer, and so has what is trained for them.

Beside adapters what is rounded is the sum: the base's weight with the update in it, as an output has it when it is
quantized. Only the adapters are trained.
"""

from typing import Final, Literal

from torch import Tensor, nn
from torch.nn import functional

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.export.torchao import torchao_config
from kubetune_trainer.lora import LoRALinear, merge_update
from kubetune_trainer.quantize.layers import KEPT
from kubetune_trainer.quantize.rounding import round_to_nearest

QatScheme = Literal["Int8DynamicActivationInt4Weight", "Int4WeightOnly"]
BITS: Final = 4
NOT_ROUNDED: Final = (KEPT, ".lora_A", ".lora_B")
"""Ends of the names of linear layers that stay as they are; the last two are part of a layer that is rounded."""


def prepare_qat(model: nn.Module, *, scheme: QatScheme, group_size: int) -> None:
    """Let a model's linear layers but the output head compute with rounded weights, in place.

    Args:
        model: Changed in place; may stand on the meta device, and have adapters already. Names of weights stay.
        scheme: Int8DynamicActivationInt4Weight rounds the layers' inputs too, to 8 bits for each token.
        group_size: Weights of a row that share a scale.

    Raises:
        ConfigError: The group size does not divide the rows of a layer.
    """
    from torchao.quantization import quantize_  # noqa: PLC0415 (slow, and only where it is asked for)
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig  # noqa: PLC0415 (as above)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith(NOT_ROUNDED) and layer.in_features % group_size:
            raise ConfigError(
                f"qat.group_size must divide the inputs of each linear layer: {name} has {layer.in_features}, "
                f"got {group_size}",
                hint="Choose a smaller group size.",
            )
    config = QATConfig(torchao_config(scheme, group_size=group_size), step="prepare")
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    quantize_(model, config, lambda layer, name: isinstance(layer, nn.Linear) and not name.endswith(NOT_ROUNDED))
    for layer in model.modules():
        if scheme == "Int4WeightOnly" and isinstance(layer, FakeQuantizedLinear):
            layer.weight_fake_quantizer = RoundedWeight(group_size)
    for name, layer in adapted.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, RoundedLoRALinear(layer, rounding=model.get_submodule(name)))


class RoundedLoRALinear(LoRALinear):
    """A layer with an adapter that computes with what their merged weight will be when it is quantized.

    Args:
        layer: The layer; its weights become this one's. It has no dropout and no magnitude.
        rounding: What torchao's prepare made of the layer, which rounds a weight and, if its scheme does, inputs.
    """

    def __init__(self, layer: LoRALinear, *, rounding: nn.Module) -> None:
        rank = layer.lora_A.out_features
        super().__init__(layer, rank=rank, scale=layer.scale, dropout=0.0)
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.weight_fake_quantizer = rounding.weight_fake_quantizer
        self.activation_fake_quantizer = rounding.activation_fake_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        weight = self.weight
        if self.enabled:
            weight = merge_update(weight, self.lora_A.weight, self.lora_B.weight, scale=self.scale).to(x.dtype)
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        return functional.linear(x, self.weight_fake_quantizer(weight), self.bias)


class RoundedWeight(nn.Module):
    """Rounds a weight as CompressedTensors outputs do; its gradient is that of the weight.

    Args:
        group_size: Weights of a row that share a scale.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as it will be."""
        rounded = round_to_nearest(weight.detach(), bits=BITS, group_size=self.group_size).dequantized(weight.dtype)
        return weight + (rounded - weight).detach()
