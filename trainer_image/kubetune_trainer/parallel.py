"""Spread an untouched model over ranks from outside: precision, recomputation, compilation, then FSDP2.

The order is fixed: weights get the type that they are kept in, layers are split over tensor groups, blocks are told to
recompute and where activations wait, they are compiled, and every block becomes one group of fully_shard (arXiv
2304.11277), with embedding, final norm and output head in the root's; the adapters of a small model are all in the
root's. One rank has nobody to share with, and goes without FSDP2 where its layers convert their weights themselves.
This tree's tests run CPU and gloo only; nothing here asks which device it is but `compute_dtype` and `offload_policy`.
"""

from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kubetune_trainer.compiled import compile_blocks
from kubetune_trainer.lora import is_adapter
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.feed_forward import Router
from kubetune_trainer.model.linear import Linear
from kubetune_trainer.model.norm import Embedding, RMSNorm
from kubetune_trainer.model.offload import ActivationOffload
from kubetune_trainer.model.recompute import ActivationCheckpointing
from kubetune_trainer.tensor_parallel import split_layers

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
"""Dimensions of a mesh, the outermost first."""
Precision = Literal["FP32", "BF16Mixed", "BF16"]

CONVERTING: Final = (Linear, RMSNorm, Embedding, Router)
"""Layers that bring their weights to the type of what they are given. So do adapters and packed weights."""
KEEP_WHOLE_BYTES: Final = 2**30
"""A model whose weights take no more than this may lie whole in each rank's memory, which spares traffic: its trained
weights stay gathered from forward to backward, and its frozen ones are not sharded at all."""


def build_mesh(device_type: str, *, num_ranks: int, replicate: int = 1, tensor: int = 1) -> DeviceMesh:
    """Arrange the ranks: those of a tensor group lie side by side, then those that share a copy of the weights.

    Args:
        device_type: Where they compute.
        num_ranks: All of them; a multiple of `replicate` x `tensor`.
        replicate: Copies of the weights, each sharded over its part of the ranks (HSDP).
        tensor: Ranks over which the layers of a block are split.
    """
    sizes = {REPLICATE: replicate, SHARD: num_ranks // (replicate * tensor), TENSOR: tensor}
    used = {name: size for name, size in sizes.items() if size > 1 or name == SHARD}
    return init_device_mesh(device_type, tuple(used.values()), mesh_dim_names=tuple(used))


def parallelize(
    model: Decoder,
    *,
    precision: Precision,
    activation_checkpointing: ActivationCheckpointing = "None",
    activation_offload: ActivationOffload | None = None,
    attends_by_blocks: bool = False,
    is_compiled: bool = False,
    cpu_offload: bool = False,
    mesh: DeviceMesh,
) -> torch.dtype:
    """Make a model ready to train on a mesh, in place; its weights must not be loaded yet (meta device).

    A small model (KEEP_WHOLE_BYTES) is whole on each rank while it computes; of its weights only the trained ones are
    sharded, and the frozen ones never travel. On one rank alone FSDP2 would copy every weight and gradient to and fro:
    there it is used with `cpu_offload`, and to convert weights where layers do not (QAT) or would keep their copies for
    backward (compiled, or with offloaded activations).

    Afterwards: `model.to_empty(device=…)`, of the CPU with `cpu_offload`, `load_weights`, and `init_lora` where there
    are adapters. Gradients are summed over ranks, not averaged: the recipe divides by the number of trained tokens of
    all ranks.

    Args:
        model: Changed in place; adapters must be applied already.
        precision: FP32 keeps and computes everything in fp32. BF16Mixed keeps trained weights in fp32 and frozen ones
            in bf16, and computes in bf16; a small model's frozen ones are kept in the type that it computes in. BF16
            keeps and computes everything in bf16. Ranks sum gradients in fp32. Micro batches are summed in the
            type of the weight, with BF16 in bf16: over 256 of them that is 1.8 % off the exact sum; only adapters on
            several ranks are summed in fp32. Weights in NF4 are kept, sharded and sent as they are, and become the type
            of what they are multiplied with.
        activation_checkpointing: Full keeps only each block's input and computes the rest again in backward; Selective
            also keeps what products of matrices and attention return.
        activation_offload: Where activations wait for backward; None is the device.
        attends_by_blocks: Keep documents apart by `block_attention` in place of a mask.
        is_compiled: Compile each block.
        cpu_offload: Keep weights, gradients and the optimizer's state in host memory, where its steps are computed; a
            block's weights come to the device while it computes. All weights are sharded then, however few they are.
            Run by us on CPUs only, where both memories are one.
        mesh: What `build_mesh` returns.

    Returns:
        The type that it computes in: what `precision` says, but fp32 where some rank's CPU has no bf16 arithmetic.
    """
    names = mesh.mesh_dim_names or ()
    shards = mesh[REPLICATE, SHARD] if REPLICATE in names else mesh[SHARD]
    dtype = torch.float32 if precision == "FP32" else _agreed_compute_dtype(mesh.device_type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole = stays_whole(model, dtype) and not cpu_offload
    set_dtypes(model, precision=precision, frozen=dtype if whole else None)
    if TENSOR in names:
        split_layers(model, mesh[TENSOR])
    frozen = {weight for weight in model.parameters() if not weight.requires_grad} if whole else set()
    model.attends_by_blocks = attends_by_blocks
    for block in model.model.layers:
        block.recompute, block.offload = activation_checkpointing, activation_offload
    if is_compiled:
        compile_blocks(model)
    may_convert = not is_compiled and activation_offload is None
    if mesh.size() == 1 and not cpu_offload and needs_no_conversion(model, dtype, by=CONVERTING if may_convert else ()):
        model.model.embed_tokens.computes_in = dtype
        return dtype
    place = offload_policy(mesh.device_type) if cpu_offload else OffloadPolicy()
    # Adapters beside whole weights are few: ranks wait for each other once per pass and not once per block.
    for block in () if frozen else model.model.layers:
        fully_shard(
            block, mesh=shards, mp_policy=policy, offload_policy=place, reshard_after_forward=not whole,
            ignored_params=frozen,
        )  # fmt: skip
    fully_shard(model, mesh=shards, mp_policy=policy, offload_policy=place, ignored_params=frozen)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)  # gloo has no other sum with a factor
    return dtype


def offload_policy(device_type: str) -> CPUOffloadPolicy:
    """Keep what is sharded in host memory, which CUDA reads and writes faster where it is pinned."""
    return CPUOffloadPolicy(pin_memory=device_type == "cuda")


def stays_whole(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether each rank may hold all weights at once, packed or else in the type that they are computed in."""
    return sum(held_bytes(weight, dtype) for weight in model.parameters()) <= KEEP_WHOLE_BYTES


def needs_no_conversion(model: nn.Module, dtype: torch.dtype, *, by: tuple[type[nn.Module], ...]) -> bool:
    """Whether all weights are in the type that is computed in, but those of layers of these classes, and adapters."""
    return all(
        weight.dtype == dtype or not weight.is_floating_point() or isinstance(layer, by) or is_adapter(name)
        for prefix, layer in model.named_modules()
        for name, weight in layer.named_parameters(prefix, recurse=False)
    )


def held_bytes(weight: torch.Tensor, dtype: torch.dtype) -> int:
    """Return what a weight takes in this type; integers, which are packed weights, stay as they are."""
    return weight.numel() * (dtype if weight.is_floating_point() else weight.dtype).itemsize


def compute_dtype(device: str | torch.device) -> torch.dtype:
    """Return the type in which a device multiplies bf16 weights best: bf16, or fp32 on a CPU without bf16 arithmetic.

    There torch 2.14 is 10 to 40 times slower in bf16 than in fp32 (measured on AVX2).
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - torch has no public way to ask
    return torch.bfloat16 if has_bf16 else torch.float32


def _agreed_compute_dtype(device_type: str) -> torch.dtype:
    """Ask all ranks: weights travel in this type, so that one rank must not differ."""
    has_bf16 = torch.tensor(int(compute_dtype(device_type) == torch.bfloat16), device=device_type)
    dist.all_reduce(has_bf16, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if has_bf16.item() else torch.float32


def set_dtypes(model: nn.Module, *, precision: Precision, frozen: torch.dtype | None = None) -> None:
    """Give each weight the type in which it is kept between steps; unset, `precision` says that of frozen ones too.

    Weights in NF4 stay packed.
    """
    trained = torch.bfloat16 if precision == "BF16" else torch.float32
    frozen = frozen or (torch.float32 if precision == "FP32" else torch.bfloat16)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
