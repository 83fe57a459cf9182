"""What each rank of test_qlora.py does; a module of its own, so that a spawned process can import it."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kubetune_trainer import parallel
from kubetune_trainer.export import trained_weights
from kubetune_trainer.lora import apply_lora, init_lora, packed_layers
from kubetune_trainer.model import build_model, load_weights, read_config
from kubetune_trainer.model.weights import local_rows
from kubetune_trainer.parallel import build_mesh, parallelize
from tests.trainer.parallel_ranks import NUM_ROWS, train

RANK = 3
"""Of the adapters: rows that ranks cannot share evenly."""
LIMITS = {"whole": 2**30, "sharded": 0}
"""Up to how many bytes a model counts as small."""


def run(rank: int, num_ranks: int, folder: Path) -> None:
    """Train with the base whole on each rank and with its rows shared; rank 0 leaves both in a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/qlora-{num_ranks}", rank=rank, world_size=num_ranks)
    results: dict[str, Any] = {name: _train(folder / "model", limit, rank, num_ranks) for name, limit in LIMITS.items()}
    if rank == 0:
        torch.save({**results, "ranks": num_ranks}, folder / f"qlora-{num_ranks}.pt")
    dist.destroy_process_group()


def _train(model_folder: Path, limit: int, rank: int, num_ranks: int) -> dict[str, Any]:
    parallel.KEEP_WHOLE_BYTES = limit
    model = build_model(read_config(model_folder))
    apply_lora(model, rank=RANK, alpha=4, packs_base=True)
    parallelize(model, precision="FP32", mesh=build_mesh("cpu", num_ranks=num_ranks))
    model.to_empty(device="cpu")
    load_weights(model, model_folder)
    init_lora(model, seed=5)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            local, rows = local_rows(weight)
            whole = nn.init.normal_(torch.empty(weight.shape), std=0.2, generator=generator)
            local.data.copy_(whole[rows])
    packed = [
        local_rows(part)[0]
        for layer in packed_layers(model).values()
        for part in (layer.weight_codes, layer.weight_scales)
    ]
    losses, norms = train(model, rows=slice(rank * NUM_ROWS // num_ranks, (rank + 1) * NUM_ROWS // num_ranks))
    return {
        "losses": losses,
        "norms": norms,
        "trained": dict(trained_weights(model)),
        "packed_bytes": sum(part.nbytes for part in packed),
    }
