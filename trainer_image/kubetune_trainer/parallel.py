"""Spread an untouched model over ranks from outside: precision, recomputation, then FSDP2 (arXiv 2304.11277).

The order is fixed: weights get the type that they are kept in, blocks are told to recompute, and every block becomes
one group of fully_shard, with embedding, final norm and output head in the root's. This tree's tests run CPU and gloo
only; nothing here asks which device it is but `compute_dtype`.
"""

from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from kubetune_trainer.model.decoder import Decoder

Precision = Literal["FP32", "BF16Mixed", "BF16"]
ActivationCheckpointing = Literal["None", "Full"]

KEEP_WHOLE_BYTES: Final = 2**30
"""A model whose weights take no more than this may lie whole in each rank's memory, which spares traffic: its trained
weights stay gathered from forward to backward, and its frozen ones are not sharded at all."""


def parallelize(
    model: Decoder,
    *,
    precision: Precision,
    activation_checkpointing: ActivationCheckpointing = "None",
    mesh: DeviceMesh,
) -> torch.dtype:
    """Make a model ready to train on a mesh, in place; its weights must not be loaded yet (meta device).

    A small model (KEEP_WHOLE_BYTES) is whole on each rank while it computes; of its weights only the trained ones are
    sharded, and the frozen ones never travel.

    Afterwards: `model.to_empty(device=…)`, `load_weights`, and `init_lora` where there are adapters. Gradients are
    summed over ranks, not averaged: the recipe divides by the number of trained tokens of all ranks.

    Args:
        model: Changed in place; adapters must be applied already.
        precision: FP32 keeps and computes everything in fp32. BF16Mixed keeps trained weights in fp32 and frozen ones
            in bf16, and computes in bf16; a small model's frozen ones are kept in the type that it computes in. BF16
            keeps and computes everything in bf16. Gradients are summed in fp32.
        activation_checkpointing: Full keeps only each block's input and computes the rest again in backward.
        mesh: One dimension, all ranks.

    Returns:
        The type that it computes in: what `precision` says, but fp32 where some rank's CPU has no bf16 arithmetic.
    """
    for block in model.model.layers:
        block.recompute = activation_checkpointing == "Full"
    dtype = torch.float32 if precision == "FP32" else _agreed_compute_dtype(mesh)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole = stays_whole(model, dtype)
    frozen = {weight for weight in model.parameters() if not weight.requires_grad} if whole else set()
    set_dtypes(model, precision=precision)
    for weight in frozen:
        weight.data = weight.data.to(dtype)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not whole, ignored_params=frozen)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)  # gloo has no other sum with a factor
    return dtype


def stays_whole(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether each rank may hold all weights at once, in the type that they are computed in."""
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize <= KEEP_WHOLE_BYTES


def compute_dtype(device: str | torch.device) -> torch.dtype:
    """Return the type in which a device multiplies bf16 weights best: bf16, or fp32 on a CPU without bf16 arithmetic.

    There torch 2.14 is 10 to 40 times slower in bf16 than in fp32 (measured on AVX2).
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - torch has no public way to ask
    return torch.bfloat16 if has_bf16 else torch.float32


def _agreed_compute_dtype(mesh: DeviceMesh) -> torch.dtype:
    """Ask all ranks: weights travel in this type, so that one rank must not differ."""
    has_bf16 = torch.tensor(int(compute_dtype(mesh.device_type) == torch.bfloat16), device=mesh.device_type)
    dist.all_reduce(has_bf16, op=dist.ReduceOp.MIN, group=mesh.get_group())
    return torch.bfloat16 if has_bf16.item() else torch.float32


def set_dtypes(model: nn.Module, *, precision: Precision) -> None:
    """Give each weight the type in which it is kept between steps."""
    trained = torch.bfloat16 if precision == "BF16" else torch.float32
    frozen = torch.float32 if precision == "FP32" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
