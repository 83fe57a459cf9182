"""Quantization-aware training: linear layers compute with weights as they will be when they are quantized.

torchao's prepare puts rounding into the layers, forward only: gradients pass it as if it were not there. Its rounding
is that of its own outputs and of ExecuTorch's. The weights of CompressedTensors have another scale, the largest
magnitude on the largest integer, and so has what is trained for them.
"""

from typing import Final, Literal

from torch import Tensor, nn

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.export.torchao import torchao_config
from kubetune_trainer.quantize.layers import KEPT
from kubetune_trainer.quantize.rounding import round_to_nearest

QatScheme = Literal["Int8DynamicActivationInt4Weight", "Int4WeightOnly"]
BITS: Final = 4


def prepare_qat(model: nn.Module, *, scheme: QatScheme, group_size: int) -> None:
    """Let a model's linear layers but the output head compute with rounded weights, in place.

    Args:
        model: Changed in place; may stand on the meta device. Names of weights stay.
        scheme: Int8DynamicActivationInt4Weight rounds the layers' inputs too, to 8 bits for each token.
        group_size: Weights of a row that share a scale.

    Raises:
        ConfigError: The group size does not divide the rows of a layer.
    """
    from torchao.quantization import quantize_  # noqa: PLC0415 (slow, and only where it is asked for)
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig  # noqa: PLC0415 (as above)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != KEPT and layer.in_features % group_size:
            raise ConfigError(
                f"qat.group_size must divide the inputs of each linear layer: {name} has {layer.in_features}, "
                f"got {group_size}",
                hint="Choose a smaller group size.",
            )
    config = QATConfig(torchao_config(scheme, group_size=group_size), step="prepare")
    quantize_(model, config, lambda layer, name: isinstance(layer, nn.Linear) and name != KEPT)
    if scheme == "Int4WeightOnly":
        for layer in model.modules():
            if isinstance(layer, FakeQuantizedLinear):
                layer.weight_fake_quantizer = RoundedWeight(group_size)


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
