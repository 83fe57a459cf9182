"""How long training waits for a checkpoint: mode Async beside mode Sync."""

import tempfile
import time
from pathlib import Path

from harness import Measures, Ratio, Row, Settings, Side, Table, run_table, smollm2


def train(settings: Settings, *, mode: str | None) -> Measures:
    """Takes full fine-tuning steps, saving in the middle as the recipe does, unless mode is None."""
    import torch

    from kubetune_trainer.checkpoint import Checkpointer
    from kubetune_trainer.config import Checkpoint
    from kubetune_trainer.distributed import join_world
    from kubetune_trainer.model.weights import load_model
    from kubetune_trainer.storage import open_store

    model = load_model(Path(settings["model"]), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.arange(256)[None] % model.config.vocab_size
    stall = 0.0

    def step() -> None:
        model(tokens, labels_BT=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder, join_world() as world:
        checkpointer = Checkpointer(
            open_store(f"file://{folder}/checkpoints"),
            settings=Checkpoint(every_steps=2, mode=mode or "Async"),
            world=world,
            scratch=Path(folder) / "scratch",
            record={},
        )
        step()
        if mode:  # the first save makes what later ones use again
            checkpointer.save(1, model, optimizer)
            checkpointer.finish()
        began = time.perf_counter()
        for number in range(2, 2 + settings["steps"]):
            step()
            checkpointer.advance(checkpointer.uploaded_step)
            if mode and number == 2:
                saving = time.perf_counter()
                checkpointer.save(number, model, optimizer)
                stall = time.perf_counter() - saving
        seconds = time.perf_counter() - began
        checkpointer.wait()
    return {"stallSeconds": stall, "loopSeconds": seconds}


SIDES = ("async", "sync", "none")
TABLE = Table(
    name="checkpoint",
    file=__file__,
    title="Full fine-tuning of SmolLM2-135M-Instruct with one checkpoint, of 1.6 GB, among its steps.",
    notes=(
        "fp32, one row of 256 tokens a step, all trained, no activation checkpointing, onto the local disk, by way "
        "of the local scratch folder. `stall` is what "
        "the loop waits in the save; `loop` is all steps, which an asynchronous save slows where it shares the cores: "
        "on two of them, what the writing takes is taken from the steps beside it."
    ),
    sides={
        "async": Side(run=lambda settings: train(settings, mode="Async")),
        "sync": Side(run=lambda settings: train(settings, mode="Sync")),
        "none": Side(run=lambda settings: train(settings, mode=None)),
    },
    rows=[Row(name="one save", settings={"model": smollm2(), "steps": 6}, sides=SIDES)],
    ratios=[
        Ratio(name="stall, Async ÷ Sync", row=0, measure="stallSeconds", side="async", peer="sync", target="<= 0.10"),
        Ratio(name="loop, Async ÷ none", row=0, measure="loopSeconds", side="async", peer="none", target="<= 1.2"),
        Ratio(name="loop, Async ÷ Sync", row=0, measure="loopSeconds", side="async", peer="sync", target="<= 1.0"),
    ],
    rounds=1,
    same_without_bf16=True,
    clocks=("wall",),  # of which a stall is made, whoever has the cores
)

if __name__ == "__main__":
    run_table(TABLE)
