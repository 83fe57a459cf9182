"""Split the layers of each block over the ranks of a tensor group, from outside (Megatron-LM, arXiv 1909.08053).

The projections into a block's heads and inner width are split by their outputs, those back by their inputs, so that a
rank computes some heads and a part of the inner width, and one sum over the group ends attention and one the
feed-forward block. Norms, embedding and output head are whole on every rank of the group; FSDP shards them. All ranks
compute the same with them and have the same gradients, but for the norms of heads, of which a rank has some: their
gradients are summed over the group. Adapters are split with their layers: of a layer that is split by outputs B, of one
that is split by inputs A.

The ranks of a group see the same rows. This tree's tests run it with gloo on CPUs; it was not run on GPUs by us.
"""

from dataclasses import replace
from typing import Any, Final

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from kubetune_trainer.errors import ConfigError
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import Decoder

BY_OUTPUTS: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
BY_INPUTS: Final = ("self_attn.o_proj", "mlp.down_proj")
WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
PLACES: Final[dict[bool, dict[str, Placement]]] = {
    True: {"weight": ROWS, "bias": ROWS, "lora_A.weight": WHOLE, "lora_B.weight": ROWS},
    False: {"weight": COLUMNS, "bias": WHOLE, "lora_A.weight": COLUMNS, "lora_B.weight": WHOLE},
}
"""How each parameter of a layer lies, by whether the layer is split by outputs."""


def check_divides(config: ModelConfig, size: int) -> None:
    """Refuse a model that cannot be split over this many ranks.

    Raises:
        ConfigError: Heads or inner width do not divide, or the architecture has parts that have no plan.
    """
    field = "training.parallelism.tensor"
    for what, number in (
        ("attention heads", config.num_heads),
        ("key and value heads", config.num_kv_heads),
        ("units of the feed-forward block", config.intermediate_size),
    ):
        if number % size:
            raise ConfigError(f"{field} must divide the model's {number} {what}, got {size}")
    for what, has_it in (
        ("experts", config.experts is not None),
        ("fused projections", config.fused_projections),
        ("norms over all queries and keys", config.query_key_norm == "Whole"),
    ):
        if has_it:
            raise ConfigError(f"{field} must be 1 for a model with {what}, got {size}")


def shape_of_rank(config: ModelConfig, size: int) -> ModelConfig:
    """Return the shape of the model whose layers are a rank's parts of this one's, in a tensor group of this size."""
    if size == 1:
        return config
    check_divides(config, size)
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def split_layers(model: Decoder, mesh: DeviceMesh) -> None:
    """Split the layers of all blocks over a mesh of one dimension, in place; the weights must not be loaded yet.

    Raises:
        ConfigError: The model cannot be split over this many ranks.
    """
    check_divides(model.config, mesh.size())
    for block in model.model.layers:
        for name in BY_OUTPUTS:
            _split(block.get_submodule(name), mesh, by_outputs=True)
        for name in BY_INPUTS:
            _split(block.get_submodule(name), mesh, by_outputs=False)
        if model.config.query_key_norm == "Head":
            for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
                _place(norm, "weight", mesh, WHOLE)


def _place(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Spread a parameter over a group; in backward the group sums what its ranks find for one that is whole."""
    whole = module.get_parameter(name)
    placed = nn.Parameter(distribute_tensor(whole.data, mesh, [placement]), requires_grad=whole.requires_grad)
    module.register_parameter(name, placed)


def _split(layer: nn.Module, mesh: DeviceMesh, *, by_outputs: bool) -> None:
    for name, placement in PLACES[by_outputs].items():
        owner, _, last = name.rpartition(".")
        module = layer.get_submodule(owner) if not owner or hasattr(layer, owner) else None
        if module is not None and getattr(module, last, None) is not None:
            _place(module, last, mesh, placement)
    given, returned = (WHOLE, Shard(-1)) if by_outputs else (Shard(-1), WHOLE)

    def enter(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (DTensor.from_local(inputs[0], mesh, [given], run_check=False), *inputs[1:])

    def leave(_layer: nn.Module, _inputs: Any, out: DTensor) -> Tensor:
        return out.redistribute(placements=[returned]).to_local()

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
