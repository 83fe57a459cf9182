"""Spread an untouched model over ranks from outside: precision, recomputation, then FSDP2 (arXiv 2304.11277).

The order is fixed: weights get the type that they are kept in, blocks are told to recompute, and every block becomes one group of
fully_shard, with embedding, final norm and output head in the root's. Only CPU with gloo is run by this tree's tests.
"""

from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from kubetune_trainer.model.decoder import Decoder

Precision = Literal["FP32", "BF16Mixed", "BF16"]
ActivationCheckpointing = Literal["None", "Full"]


def parallelize(
    model: Decoder,
    *,
    precision: Precision,
    activation_checkpointing: ActivationCheckpointing = "None",
    mesh: DeviceMesh,
) -> None:
    """Make a model ready to train on a mesh, in place; its weights must not be loaded yet (meta device).

    Afterwards: `model.to_empty(device=…)`, `load_weights`, and `init_lora` where there are adapters. Gradients are summed over ranks,
    not averaged: the recipe divides by the number of trained tokens of all ranks.

    Args:
        model: Changed in place; adapters must be applied already.
        precision: FP32 keeps and computes everything in fp32. BF16Mixed keeps trained weights in fp32 and frozen ones in bf16, computes
            in bf16 and sums gradients in fp32. BF16 keeps and computes everything in bf16, and still sums gradients in fp32.
        activation_checkpointing: Full keeps only each block's input and computes the rest again in backward.
        mesh: One dimension, all ranks.
    """
    set_dtypes(model, precision=precision)
    for block in model.model.layers:
        block.recompute = activation_checkpointing == "Full"
    compute_dtype = None if precision == "FP32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)  # gloo knows no other sum with a factor


def set_dtypes(model: nn.Module, *, precision: Precision) -> None:
    """Give each weight the type in which it is kept between steps."""
    trained = torch.bfloat16 if precision == "BF16" else torch.float32
    frozen = torch.float32 if precision == "FP32" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
