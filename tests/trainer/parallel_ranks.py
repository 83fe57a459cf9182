"""What each rank of test_parallel.py and test_tensor_parallel.py does: a spawned process can import this module."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kubetune_trainer.export import trained_weights
from kubetune_trainer.lora import apply_lora, init_lora, lora_state_dict, whole_tensor
from kubetune_trainer.model import Decoder, build_model, load_weights, read_config
from kubetune_trainer.optim import build_optimizer, clip_grad_norm
from kubetune_trainer.parallel import build_mesh, parallelize
from kubetune_trainer.trained_tokens import IDS_SUFFIX
from tests.trainer.tiny import random_tokens

NUM_STEPS = 3
NUM_ROWS = 6
CASES: dict[str, dict[str, Any]] = {
    "full fp32": {"precision": "FP32", "lora": False, "checkpointing": "None"},
    "full fp32, recomputed": {"precision": "FP32", "lora": False, "checkpointing": "Full"},
    "lora fp32": {"precision": "FP32", "lora": True, "checkpointing": "None"},
    "full bf16 mixed": {"precision": "BF16Mixed", "lora": False, "checkpointing": "None"},
    "lora bf16 mixed": {"precision": "BF16Mixed", "lora": True, "checkpointing": "Full"},
    "lora bf16": {"precision": "BF16", "lora": True, "checkpointing": "None"},
    "dora fp32": {"precision": "FP32", "lora": True, "checkpointing": "None", "has_magnitude": True},
    "lora and tokens fp32": {"precision": "FP32", "lora": True, "checkpointing": "None", "trained_ids": (96, 5, 40)},
}


MESHES: dict[str, dict[str, int]] = {
    "1 rank": {"num_ranks": 1},
    "2 ranks": {"num_ranks": 2},
    "3 ranks": {"num_ranks": 3},
    "2 copies on 2 ranks each": {"num_ranks": 4, "replicate": 2},
    "2 groups of 2 that split layers": {"num_ranks": 4, "tensor": 2},
}


def has_plan(case: str, mesh: str) -> bool:
    """Whether what a case trains can be split over the tensor groups of a mesh, if it has any."""
    return "tensor" not in MESHES[mesh] or not CASES[case].get("has_magnitude")


def run(rank: int, mesh: str, folder: Path, cases: Collection[str] = tuple(CASES)) -> None:
    """Train cases for a few steps; rank 0 leaves what came out in `<folder>/<mesh>.pt`."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{mesh}", rank=rank, world_size=MESHES[mesh]["num_ranks"]
    )
    results = {
        name: _train(folder / "model", rank=rank, mesh=MESHES[mesh], **case)
        for name, case in CASES.items()
        if name in cases and has_plan(name, mesh)
    }
    if rank == 0:
        torch.save(results, folder / f"{mesh}.pt")
    dist.destroy_process_group()


def run_families(rank: int, mesh: dict[str, int], folder: Path, cases: Mapping[str, dict[str, Any]]) -> None:
    """Train cases, each the settings of `_train` under `<family> …`; every rank leaves in `<ranks>-<rank>.pt` its own.

    The model of a family is in `<folder>/<family>`.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = mesh["num_ranks"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    results = {name: _train(folder / name.split()[0], rank=rank, mesh=mesh, **case) for name, case in cases.items()}
    torch.save(results, folder / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()


def _train(
    model_folder: Path,
    *,
    rank: int,
    mesh: dict[str, int],
    precision: str,
    lora: bool,
    checkpointing: str,
    has_magnitude: bool = False,
    trained_ids: Sequence[int] = (),
) -> dict[str, Any]:
    model = build_model(read_config(model_folder))
    if lora:
        # Two rows over three ranks: one rank has none.
        apply_lora(model, rank=2, alpha=4, has_magnitude=has_magnitude, trained_ids=trained_ids)
    parallelize(model, precision=precision, activation_checkpointing=checkpointing, mesh=build_mesh("cpu", **mesh))
    model.to_empty(device="cpu")
    load_weights(model, model_folder)
    init_lora(model, seed=5)
    loaded = {name: whole_tensor(parameter).clone() for name, parameter in model.named_parameters()}
    tensor = mesh.get("tensor", 1)
    reader, num_readers = rank // tensor, mesh["num_ranks"] // tensor
    rows = slice(reader * NUM_ROWS // num_readers, (reader + 1) * NUM_ROWS // num_readers)
    losses, norms = train(model, rows=rows)
    losses = [loss / tensor for loss in losses]  # each rank of a group has added the same
    return {
        "loaded": loaded,
        "num_groups": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "losses": losses,
        "norms": norms,
        "trained": {name: tensor for name, tensor in trained_weights(model) if not name.endswith(IDS_SUFFIX)},
        "adapters": {name: tensor for name, tensor in lora_state_dict(model).items() if not name.endswith(IDS_SUFFIX)},
    }


def train(model: Decoder, *, rows: slice) -> tuple[list[float], list[float]]:
    """Take a few steps on some rows of a fixed batch; return loss per token and gradient norm of each step."""
    tokens, labels, documents, positions = batch()
    num_trained = int((labels != -100).sum())
    optimizer = build_optimizer(model, SimpleNamespace(learning_rate=0.01, weight_decay=0.1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, norms = [], []
    model.train()
    for _ in range(NUM_STEPS):
        loss = model(tokens[rows], labels_BT=labels[rows], documents_BT=documents[rows], positions_BT=positions[rows])
        loss.backward()
        for parameter in trained:
            parameter.grad.div_(num_trained)
        norms.append(clip_grad_norm(trained, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().double()
        if dist.is_initialized():
            dist.all_reduce(total)
        losses.append(total.item() / num_trained)
    return losses, norms


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of two documents and padding; the last rows train nothing at all, as may happen to a whole rank."""
    tokens = random_tokens(NUM_ROWS, 24)
    labels = tokens.roll(-1, dims=1)
    labels[:, :4] = labels[:, 9] = labels[:, 19:] = -100
    labels[4:] = -100
    documents = torch.zeros_like(tokens)
    documents[:, 10:], documents[:, 20:] = 1, -1
    positions = torch.arange(24).expand(NUM_ROWS, 24).clone()
    positions[:, 10:] -= 10
    return tokens, labels, documents, positions
