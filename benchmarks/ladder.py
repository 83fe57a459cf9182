"""What each switch of training saves and costs: memory and tokens per second of a step, beside the step without any."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from harness import Measures, Ratio, Row, Settings, Side, Table, resident_bytes, run_table, smollm2
from training import LEARNING_RATE, measure, token_rows

SWITCHES: dict[str, dict[str, Any]] = {
    "base": {},
    "activationCheckpointing Selective": {"recompute": "Selective"},
    "activationCheckpointing Full": {"recompute": "Full"},
    "compile Blocks": {"is_compiled": True},
    "optimizer AdamW8bit": {"bits": 8},
    "optimizer AdamW4bit": {"bits": 4},
    "optimizerInBackward": {"in_backward": True},
    "Full, AdamW8bit and optimizerInBackward": {"recompute": "Full", "bits": 8, "in_backward": True},
    "tuning LoRA": {"lora_rank": 16},
    "activationOffload": {"offload": "activations"},
    "cpuOffload": {"offload": "weights"},
}
"""Each side, and what it switches on."""
SAVE_NOTHING_HERE = {"base", "compile Blocks", "activationOffload", "cpuOffload"}
"""Sides that need no less memory: on a CPU what is offloaded lies in the memory that it comes from."""


def step_with(
    settings: Settings,
    *,
    recompute: str = "None",
    is_compiled: bool = False,
    bits: int | None = None,
    in_backward: bool = False,
    lora_rank: int | None = None,
    offload: str | None = None,
) -> Measures:
    """Measures steps with some switches on; weights that are offloaded are FSDP's, of one rank."""
    import torch

    from kubetune_trainer.distributed import join_world
    from kubetune_trainer.model.offload import ActivationOffload

    with join_world() if offload == "weights" else nullcontext():
        return _step_with(
            settings,
            recompute=recompute,
            is_compiled=is_compiled,
            bits=bits,
            in_backward=in_backward,
            lora_rank=lora_rank,
            is_sharded=offload == "weights",
            away=ActivationOffload(torch.device("cpu")) if offload == "activations" else None,
        )


def _step_with(
    settings: Settings,
    *,
    recompute: str,
    is_compiled: bool,
    bits: int | None,
    in_backward: bool,
    lora_rank: int | None,
    is_sharded: bool,
    away: Any,
) -> Measures:
    from types import SimpleNamespace

    from kubetune_trainer.compiled import compile_blocks
    from kubetune_trainer.lora import apply_lora, init_lora
    from kubetune_trainer.model.config import read_config
    from kubetune_trainer.model.weights import build_model, load_weights
    from kubetune_trainer.optim import StepInBackward, build_optimizer, clip_grad_norm
    from kubetune_trainer.parallel import build_mesh, parallelize

    tokens, labels = token_rows(settings)
    labels = labels.roll(-1, dims=1)
    labels[:, -1] = -100
    trained = int((labels != -100).sum())
    baseline = resident_bytes()
    model = build_model(read_config(Path(settings["model"])))
    if lora_rank is not None:
        apply_lora(model, rank=lora_rank, alpha=2 * lora_rank)
    if is_sharded:
        parallelize(model, precision="FP32", cpu_offload=True, mesh=build_mesh("cpu", num_ranks=1))
    model.float().to_empty(device="cpu")
    load_weights(model, settings["model"])
    init_lora(model, seed=0)
    for block in model.model.layers:
        block.recompute, block.offload = recompute, away
    if is_compiled:
        compile_blocks(model)
    training = SimpleNamespace(learning_rate=LEARNING_RATE, weight_decay=0.0)
    optimizer = build_optimizer(model, training, bits=bits)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    stepper = StepInBackward(optimizer) if in_backward else None

    def step() -> float:
        loss = model(tokens, labels_BT=labels) / trained
        loss.backward()
        if stepper is None:
            clip_grad_norm(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        else:
            stepper.grad_norm()
        return float(loss.detach())

    return measure(step, settings, baseline=baseline)


TABLE = Table(
    name="ladder",
    file=__file__,
    title="The switches of training on SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "fp32, all weights but in the last row, one process without FSDP, 2 rows of 256 tokens, all real. Memory is "
        "the peak less what the process holds after its imports. Compilation is not in the time, but in the peak. "
        "activationOffload and cpuOffload save memory of a GPU; on a CPU, where both memories are one, they show what "
        "copies cost, and cpuOffload what FSDP of one rank does."
    ),
    sides={name: Side(run=partial(step_with, **switches)) for name, switches in SWITCHES.items()},
    rows=[
        Row(
            name="each switch by itself",
            settings={"model": smollm2(), "rows": 2, "length": 256, "share": 0.375, "steps": 2},
            sides=tuple(SWITCHES),
        ),
    ],
    ratios=[
        Ratio(name=f"memory, {name} ÷ base", row=0, measure="peakBytes", peer="base", side=name, target="<= 1.0")
        for name in SWITCHES
        if name not in SAVE_NOTHING_HERE
    ],
    rounds=1,
    drift_allowed=0.25,
)

if __name__ == "__main__":
    run_table(TABLE)
