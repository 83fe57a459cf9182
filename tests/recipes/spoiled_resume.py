"""What is resumed from a checkpoint has a NaN in a trained weight of the last rank; see `Gang.start(before=…)`."""

import os
from typing import Any

from kubetune_trainer.distributed import local_part
from kubetune_trainer.training import job


def before() -> None:
    """Every checkpoint that this process loads goes wrong from now on."""
    load = job.load_checkpoint

    def load_and_spoil(*given: Any, model: Any, **others: Any) -> Any:
        loaded = load(*given, model=model, **others)
        parts = [local_part(weight.detach()) for weight in model.parameters() if weight.requires_grad]
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            next(part for part in parts if part.numel()).view(-1)[-1] = float("nan")
        return loaded

    job.load_checkpoint = load_and_spoil
