"""What each switch of training saves and costs: memory and tokens per second of a step, beside the step without any.

Each side is built as a recipe builds it, of one rank where the switch is not about ranks, and then without FSDP2. A
side of several ranks starts itself again for the others; what it measures is its own memory, and all ranks' tokens.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import Measures, Ratio, Row, Settings, Side, Table, precision, resident_bytes, run_table, smollm2
from training import LEARNING_RATE, measure, token_rows


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What a side switches on."""

    precision: str = "FP32"
    recompute: str = "None"
    is_compiled: bool = False
    chunks_loss: bool = True
    bits: int | None = None
    rounds_by_chance: bool = False
    in_backward: bool = False
    lora_rank: int | None = None
    packs_base: bool = False
    offloads_activations: bool = False
    offloads_weights: bool = False
    ranks: int = 1
    replicate: int = 1
    tensor: int = 1


BY_ITSELF = {
    "base": Switches(),
    "loss not chunked": Switches(chunks_loss=False),
    "activationCheckpointing Selective": Switches(recompute="Selective"),
    "activationCheckpointing Full": Switches(recompute="Full"),
    "compile Blocks": Switches(is_compiled=True),
    "optimizer AdamW8bit": Switches(bits=8),
    "optimizer AdamW4bit": Switches(bits=4),
    "optimizerInBackward": Switches(in_backward=True),
    "Full, AdamW8bit and optimizerInBackward": Switches(recompute="Full", bits=8, in_backward=True),
    "tuning LoRA": Switches(lora_rank=16),
    "activationOffload": Switches(offloads_activations=True),
    "cpuOffload": Switches(offloads_weights=True),
}
PRECISIONS = {
    "base": Switches(),
    "BF16Mixed": Switches(precision="BF16Mixed"),
    "BF16": Switches(precision="BF16"),
    "BF16, stochasticRounding": Switches(precision="BF16", rounds_by_chance=True),
    "LoRA, BF16Mixed": Switches(precision="BF16Mixed", lora_rank=16),
    "QLoRA, BF16Mixed": Switches(precision="BF16Mixed", lora_rank=16, packs_base=True),
}
RANKS = {
    "base": Switches(),
    "2 ranks, FSDP2": Switches(ranks=2),
    "2 ranks, parallelism.replicate 2": Switches(ranks=2, replicate=2),
    "3 ranks, parallelism.tensor 3": Switches(ranks=3, tensor=3),
}
SIDES = {**BY_ITSELF, **PRECISIONS, **RANKS}
SAVE_NOTHING_HERE = {
    "base", "loss not chunked", "compile Blocks", "activationOffload", "cpuOffload", "2 ranks, FSDP2",
    "2 ranks, parallelism.replicate 2",
}  # fmt: skip
"""Sides that need no less memory: on a CPU what is offloaded lies in the memory that it comes from, and two ranks hold
beside their halves of a small model the whole."""
PEER_SECONDS = 60
"""How long another rank may take to end after this one."""


def step_with(settings: Settings, *, side: str) -> Measures:
    """Measures steps with a side's switches on."""
    import torch

    from kubetune_trainer.distributed import join_world

    switches = SIDES[side]
    torch.set_num_threads(max(1, settings["threads"] // switches.ranks))
    with other_ranks(side, settings, count=switches.ranks), join_world(tensor=switches.tensor) as world:
        measures = measure_steps(switches, settings, world=world)
    torch.set_num_threads(settings["threads"])  # as the calibration before had
    if switches.packs_base:
        del measures["loss"]  # that of other weights, which no other side has
    return measures


@contextmanager
def other_ranks(side: str, settings: Settings, *, count: int) -> Iterator[None]:
    """Makes this process the first of some ranks and starts the others, unless it is one of those."""
    if count == 1 or "RANK" in os.environ:
        yield
        return
    from kubetune_trainer.launch import Gang

    gang = Gang.from_environment({"PET_NPROC_PER_NODE": str(count)})
    command = [sys.executable, __file__, "--side", side]
    others = []
    for rank in range(1, count):
        environment = {**os.environ, **gang.rank_environment(rank)}
        other = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert other.stdin is not None  # noqa: S101 (PIPE)
        with other.stdin:
            json.dump(settings, other.stdin)
        others.append(other)
    first = gang.rank_environment(0)
    os.environ.update(first)
    try:
        yield
    finally:
        for name in first:
            del os.environ[name]
        for other in others:
            try:
                other.wait(timeout=PEER_SECONDS)
            finally:
                other.kill()


def measure_steps(switches: Switches, settings: Settings, *, world: Any) -> Measures:
    """Builds the model as the recipe does, and takes its steps."""
    from types import SimpleNamespace

    import torch
    from torch.nn import functional

    from kubetune_trainer.distributed import gather_vector
    from kubetune_trainer.lora import apply_lora, init_lora
    from kubetune_trainer.model.config import read_config
    from kubetune_trainer.model.offload import ActivationOffload
    from kubetune_trainer.model.weights import build_model, load_weights
    from kubetune_trainer.optim import StepInBackward, build_optimizer, clip_grad_norm
    from kubetune_trainer.parallel import build_mesh, parallelize

    tokens, labels = token_rows(settings)
    labels = labels.roll(-1, dims=1)
    labels[:, -1] = -100
    trained = int((labels != -100).sum())
    tokens, labels = (each[world.data_rank :: world.data_size] for each in (tokens, labels))
    baseline = resident_bytes()
    model = build_model(read_config(Path(settings["model"])))
    if switches.lora_rank is not None:
        rank = switches.lora_rank
        apply_lora(model, rank=rank, alpha=2 * rank, packs_base=switches.packs_base)
    parallelize(
        model,
        precision=precision(switches.precision),
        activation_checkpointing=switches.recompute,
        activation_offload=ActivationOffload(world.device) if switches.offloads_activations else None,
        is_compiled=switches.is_compiled,
        cpu_offload=switches.offloads_weights,
        mesh=build_mesh("cpu", num_ranks=world.size, replicate=switches.replicate, tensor=switches.tensor),
    )
    model.to_empty(device="cpu")
    load_weights(model, settings["model"])
    init_lora(model, seed=0)
    training = SimpleNamespace(learning_rate=LEARNING_RATE, weight_decay=0.0)
    optimizer = build_optimizer(
        model, training, bits=switches.bits, rounding_seed=0 if switches.rounds_by_chance else None
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    stepper = StepInBackward(optimizer) if switches.in_backward else None

    def summed_loss() -> torch.Tensor:
        if switches.chunks_loss:
            loss: torch.Tensor = model(tokens, labels_BT=labels)
            return loss
        return functional.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten(), reduction="sum")

    def step() -> float:
        loss = summed_loss() / trained
        loss.backward()
        if stepper is None:
            clip_grad_norm(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        else:
            stepper.grad_norm()
        return gather_vector([loss.item()]).sum().item() / switches.tensor

    return measure(step, settings, baseline=baseline)


SETTINGS = {"model": smollm2(), "rows": 2, "length": 256, "share": 0.375, "steps": 2}
TABLE = Table(
    name="ladder",
    file=__file__,
    title="The switches of training on SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "fp32 and all weights where the row does not say otherwise, built as the recipes do: one rank is without "
        "FSDP2, but for cpuOffload. 2 rows of 256 tokens, all real, not packed, the last 0.375 of each trained. "
        "Memory is the peak less what the process holds "
        "after its imports, with what glibc keeps of freed temporaries: up to a third of stochasticRounding's row, "
        "which by an allocator that keeps nothing is 1.05 of BF16's. Compilation is not in the time, but in the peak. "
        "activationOffload and cpuOffload save memory of a GPU; on a CPU, where both memories are one, they show what "
        "copies cost. Ranks share the cores, a row each, or both rows together with parallelism.tensor, which has to "
        "divide the model's 3 key and value heads; memory is that of the first. A model of less than 1 GiB stays "
        "gathered from forward to backward: what two ranks save of weights, gradients and the optimizer's state, the "
        "gathered ones take."
    ),
    sides={name: Side(run=partial(step_with, side=name)) for name in SIDES},
    rows=[
        Row(name="each switch by itself", settings=SETTINGS, sides=tuple(BY_ITSELF)),
        Row(name="precisions", settings={**SETTINGS, "precision": precision("BF16Mixed")}, sides=tuple(PRECISIONS)),
        Row(name="ranks", settings=SETTINGS, sides=tuple(RANKS)),
    ],
    ratios=[
        Ratio(name=f"memory, {name} ÷ base", row=row, measure="peakBytes", peer="base", side=name, target="<= 1.0")
        for row, sides in enumerate((BY_ITSELF, PRECISIONS, RANKS))
        for name in sides
        if name not in SAVE_NOTHING_HERE
    ],
    rounds=1,
    drift_allowed=0.25,
)

if __name__ == "__main__":
    run_table(TABLE)
