"""Has a rank's activations wait in other memory of its CPU, all of them; see `Gang.start(before=…)`."""

from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.distributed import World
from kubetune_trainer.model.offload import ActivationOffload
from kubetune_trainer.training import job


def before() -> None:
    def offload(config: FineTuneConfig, world: World) -> ActivationOffload | None:
        return ActivationOffload(world.device, smallest_bytes=0) if config.training.activation_offload else None

    job.activation_offload = offload
