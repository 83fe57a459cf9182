"""What each rank of the test of rounding over ranks does; a module of its own, so that a process can import it."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from kubetune_trainer.compact_adamw import CompactAdamW
from kubetune_trainer.distributed import local_part
from kubetune_trainer.parallel import build_mesh

NUM_STEPS = 5


def run(rank: int, folder: Path, num_ranks: int, replicate: int) -> None:
    """Train a matrix whose rows are all alike, with gradients that are; leave this rank's part as `part-<rank>.pt`."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    fully_shard(layer, mesh=build_mesh("cpu", num_ranks=num_ranks, replicate=replicate))
    optimizer = CompactAdamW([{"params": [layer.weight]}], lr=1e-3, rounding_seed=1)
    for _ in range(NUM_STEPS):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    torch.save(local_part(layer.weight.detach()).clone(), folder / f"part-{rank}.pt")
    dist.destroy_process_group()
