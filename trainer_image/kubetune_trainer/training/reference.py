"""What DPO and KTO measure answers against: another model, or the one before training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kubetune_trainer.lora import copy_adapters, reference_adapters
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.training.job import Job, build_frozen


@dataclass(frozen=True)
class Reference:
    """A model that is asked and never trained, or the trained one with the adapters that training began with."""

    model: Decoder
    """The model to ask."""
    adapters: Mapping[str, Tensor] | None = None
    """The adapters to ask the trained model with, empty for none; unset where the model is another one."""

    @contextmanager
    def asked(self) -> Iterator[Decoder]:
        """While the block runs, the model computes as the reference, without gradients."""
        swapped = nullcontext() if self.adapters is None else reference_adapters(self.model, self.adapters)
        with torch.no_grad(), swapped:
            yield self.model


def build_reference(job: Job, field: str) -> Reference:
    """The reference that a field names, or else the model before training.

    Belongs before `resume`: later the model has the adapters of a checkpoint. New adapters change nothing, so that they
    are turned off; those of `lora.adapter` are kept. Without adapters the model is built once more.

    Args:
        job: The run, not resumed yet.
        field: Where its config may name a model, as in dpo.reference.
    """
    if (other := job.local.others.get(field)) is not None:
        return Reference(build_frozen(job, other.model_dir))
    if job.config.lora is None:
        return Reference(build_frozen(job, job.local.model_dir))
    return Reference(job.model, copy_adapters(job.model) if job.local.first_adapters_dir is not None else {})
