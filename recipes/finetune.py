"""Fine-tune a language model on examples (SFT): all of its weights, or LoRA adapters.

    torchrun --nproc-per-node 2 recipes/finetune.py --config recipes/configs/smollm2_lora.yaml training.max_steps=10

The script reads from top to bottom: `main` meets the other ranks, `finetune` is the run (get the data, build the model,
resume, train, export), `train` is the loop, and what follows are its parts. Clone it and change it:
`kubetune recipes cp finetune`.

A run can be killed at any moment and started again with the same command: it goes on from its newest complete
checkpoint with the same numbers, bit for bit, as if nothing had happened.

Shapes: B rows of a micro batch, T tokens.
"""

import argparse
import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from kubetune_trainer.checkpoint import Checkpointer, find_checkpoint, load_checkpoint
from kubetune_trainer.config import FineTuneConfig, load_config
from kubetune_trainer.data.prepare import Local, Prepared, fetch, prepare
from kubetune_trainer.data.sampler import Batch, collate, rows_for_step, total_steps
from kubetune_trainer.distributed import (
    StepTotals,
    StopSignal,
    World,
    barrier,
    broadcast_object,
    exchange,
    gather_vector,
    join_world,
)
from kubetune_trainer.errors import ConfigError, NonFiniteLossError, PreemptedError
from kubetune_trainer.export import complete_weights, save_huggingface, save_peft, trained_weights
from kubetune_trainer.export.convert import convert
from kubetune_trainer.export.huggingface import OutputDtype
from kubetune_trainer.export.store import StoredOutput, store_output
from kubetune_trainer.lineage import lineage_sources, record_lineage
from kubetune_trainer.logs import keep_log
from kubetune_trainer.lora import apply_lora, init_lora, lora_scale, lora_state_dict
from kubetune_trainer.memory import peak_memory_bytes
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import build_model, load_weights
from kubetune_trainer.names import CHECKPOINTS_DIR, OUTPUTS_DIR
from kubetune_trainer.optim import build_optimizer, clip_grad_norm, learning_rate_factor
from kubetune_trainer.parallel import parallelize
from kubetune_trainer.report import (
    attempt,
    end_with,
    last_step,
    open_log,
    report,
    run,
    serve_metrics,
    write_termination_message,
)
from kubetune_trainer.storage import open_store, scratch_dir
from kubetune_trainer.tokenizer import load_tokenizer


def main(arguments: Sequence[str]) -> None:
    """Reads the config and joins the other ranks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file, as those in recipes/configs")
    parser.add_argument("overrides", nargs="*", help="field=value each, as in training.max_steps=10")
    options = parser.parse_args(arguments)
    config = load_config(options.config, overrides=options.overrides)
    stop = StopSignal(leave=lambda: end_with(PreemptedError("stopped outside of training; no finished step is lost")))
    with join_world() as world:
        finetune(config, world, stop)


@dataclass(frozen=True)
class Job:
    """What the loop works with."""

    config: FineTuneConfig
    world: World
    stop: StopSignal
    prepared: Prepared
    local: Local
    model: Decoder
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    pad_id: int
    total_steps: int

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def finetune(config: FineTuneConfig, world: World, stop: StopSignal) -> None:
    """The whole run, from nothing or from where the last attempt stopped, to its outputs."""
    config.accumulation_steps(world.size)  # refuses a batch that the ranks cannot share
    serve_metrics()
    log = scratch_dir() / f"attempt-{attempt()}.jsonl"
    open_log(log)
    try:
        job = set_up(config, world, stop)
        first_step = resume(job)
        report(
            "start",
            attempt=attempt(),
            step=first_step,
            total_steps=job.total_steps,
            world_size=world.size,
            device=world.device.type,
            parameters=sum(parameter.numel() for parameter in job.model.parameters()),
            trainable_parameters=sum(weight.numel() for weight in job.weights),
        )
        with stop.deferred():
            train(job, first_step)
        outputs = export(job)
    finally:
        if world.is_first:
            keep_log(config, log)
    report("done", step=job.total_steps)
    if world.is_first:
        write_termination_message("Complete", exit_code=0, outputs=outputs, progress=last_step())


def set_up(config: FineTuneConfig, world: World, stop: StopSignal) -> Job:
    """Gets the model and the data to this node, and builds the model on all ranks."""
    report("phase", phase="Downloading")
    prepared = broadcast_object(prepare(config, report=report) if world.is_first else None)
    if not world.is_first_of_node:
        barrier()  # the first rank of the node downloads for all of them
    local = fetch(prepared, config)
    if world.is_first_of_node:
        barrier()

    report("phase", phase="Loading")
    training = config.training
    model = build(config, local.model_dir, world)
    return Job(
        config=config,
        world=world,
        stop=stop,
        prepared=prepared,
        local=local,
        model=model,
        optimizer=build_optimizer(model, training),
        checkpointer=Checkpointer(
            open_store(f"{config.run.directory}/{CHECKPOINTS_DIR}", s3=config.storage.s3),
            settings=config.checkpoint,
            world=world,
            scratch=scratch_dir() / f"rank-{world.rank}",
            record={"seed": training.seed, "configDigest": config.training_digest(), "worldSize": world.size},
        ),
        pad_id=load_tokenizer(local.model_dir).pad_id,
        total_steps=total_steps(
            len(local.train_data),
            global_batch_size=training.global_batch_size,
            epochs=training.epochs,
            max_steps=training.max_steps,
        ),
    )


def build(config: FineTuneConfig, model_dir: Path, world: World) -> Decoder:
    """The model, sharded over all ranks; every rank reads only its own rows of the weights."""
    model = build_model(read_config(model_dir))
    if config.lora is not None:
        apply_lora(model, **config.lora.model_dump())
    parallelize(
        model,
        precision=config.training.precision,
        activation_checkpointing=config.training.activation_checkpointing,
        mesh=init_device_mesh(world.device.type, (world.size,)),
    )
    model.to_empty(device=world.device)
    load_weights(model, model_dir)
    init_lora(model, seed=config.training.seed)
    return model


def resume(job: Job) -> int:
    """Loads the newest complete checkpoint, of this run or else of the run to begin with; returns its step."""
    config, scratch = job.config, scratch_dir() / f"rank-{job.world.rank}"
    first = config.checkpoint.resume_from
    for place in [f"{config.run.directory}/{CHECKPOINTS_DIR}", *([first.uri] if first else [])]:
        store = open_store(place, s3=config.storage.s3)
        folder = broadcast_object(find_checkpoint(store) if job.world.is_first else None)
        if folder is not None:
            resumed = load_checkpoint(store, folder, model=job.model, optimizer=job.optimizer, scratch=scratch)
            if resumed.record["configDigest"] != config.training_digest():
                report("warning", message=f"{resumed.uri} was saved under another config; the loss may jump")
            report("resume", step=resumed.step, uri=resumed.uri)
            job.checkpointer.start_from(resumed)
            return resumed.step
    if first is not None:
        raise ConfigError(
            f"{config.title}: checkpoint.resume_from.uri must hold a complete checkpoint, got {first.uri}"
        )
    return 0


def train(job: Job, first_step: int) -> None:
    """The training loop: micro batches, one exchange between the ranks, one optimizer step, then whatever is due."""
    training, model, optimizer, checkpointer = job.config.training, job.model, job.optimizer, job.checkpointer
    progress = Progress(job, first_step)
    report("phase", phase="Training")
    for step in range(first_step + 1, job.total_steps + 1):
        set_learning_rate(job, step)
        model.train()
        loss_sum = torch.zeros((), dtype=torch.float64)
        batches = micro_batches(job, step)
        for number, batch in enumerate(batches):
            # With adapters the gradients are small enough to be kept whole until the last micro batch.
            model.set_requires_gradient_sync(number == len(batches) - 1 or job.config.tuning == "Full")
            seed_dropout(training.seed, step, number, job.world.rank)
            loss = summed_loss(job, batch)
            loss.backward()
            loss_sum += loss.detach().cpu()

        totals = exchange(
            loss_sum=loss_sum.item(),
            trained_tokens=sum(batch.trained_tokens for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            stop=job.stop.requested,
            save=checkpointer.due(step),
            uploaded_step=checkpointer.uploaded_step,
        )
        for weight in job.weights:
            weight.grad.to_local().div_(max(1, totals.trained_tokens))
        grad_norm = clip_grad_norm(job.weights, training.max_grad_norm).item()
        if not (math.isfinite(totals.loss) and math.isfinite(grad_norm)):
            raise NonFiniteLossError(
                f"{job.config.title}: step {step} has loss {totals.loss} and gradient norm {grad_norm}",
                hint="Lower training.learning_rate or look for broken samples; the last checkpoint is sound.",
            )
        optimizer.step()
        optimizer.zero_grad()

        progress.report_step(step, totals, grad_norm)
        checkpointer.advance(totals.uploaded_step)
        if step == job.total_steps or step % (training.validate_every_steps or job.total_steps) == 0:
            validate(job, step)
        if totals.stop or totals.save or step == job.total_steps:
            checkpointer.save(step, model, optimizer)
        if totals.stop:
            checkpointer.finish()
            raise PreemptedError(f"{job.config.title}: stopped after step {step}, which is saved")
    checkpointer.finish()


def micro_batches(job: Job, step: int) -> list[Batch]:
    """This rank's rows of a step. Which rows a step has does not depend on the number of ranks."""
    training, world = job.config.training, job.world
    rows = rows_for_step(
        step - 1, num_rows=len(job.local.train_data), global_batch_size=training.global_batch_size, seed=training.seed
    )
    mine = rows[world.rank :: world.size]
    size = training.micro_batch_size
    return [
        collate([job.local.train_data[row] for row in mine[start : start + size]], pad_id=job.pad_id)
        for start in range(0, len(mine), size)
    ]


def summed_loss(job: Job, batch: Batch) -> torch.Tensor:
    """The cross entropy of a micro batch, summed over its trained tokens."""
    batch = batch.to(job.world.device)
    return job.model(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents, labels_BT=batch.labels)


def seed_dropout(*what: int) -> None:
    """Makes dropout a function of (seed, step, micro batch, rank), so that resuming needs no generator's state."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def set_learning_rate(job: Job, step: int) -> None:
    """A function of the step alone, so that resuming needs no scheduler's state."""
    training = job.config.training
    factor = learning_rate_factor(
        step - 1, scheduler=training.scheduler, warmup_steps=training.warmup_steps, total_steps=job.total_steps
    )
    for group in job.optimizer.param_groups:
        group["lr"] = training.learning_rate * factor


@torch.no_grad()
def validate(job: Job, step: int) -> None:
    """Reports the mean loss over the held-out tokens; every rank takes part in every forward pass."""
    data, world, size = job.local.validation_data, job.world, job.config.training.micro_batch_size
    if data is None:
        return
    job.model.eval()
    loss_sum = trained_tokens = 0
    for start in range(0, len(data), world.size * size):
        rows = range(start + world.rank, min(start + world.size * size, len(data)), world.size)
        # A rank with nothing left computes a row again, for FSDP's sake, and counts none of it.
        batch = collate([data[row] for row in rows or [0]], pad_id=job.pad_id)
        loss = summed_loss(job, batch)
        if rows:
            loss_sum += loss.item()
            trained_tokens += batch.trained_tokens
    total, tokens = gather_vector([loss_sum, trained_tokens]).sum(dim=0).tolist()
    report("validation", step=step, validation_loss=total / max(1, tokens))


def export(job: Job) -> list[dict[str, Any]]:
    """Writes the outputs: all ranks gather the weights, rank 0 stores them; returns what it stored."""
    report("phase", phase="Exporting")
    stored: list[StoredOutput] = []
    complete = scratch_dir() / "complete"
    if any(output.type not in {"HuggingFace", "PEFT"} for output in job.config.outputs):
        gather_model(job, complete)
    for output in job.config.outputs:
        folder = scratch_dir() / OUTPUTS_DIR / output.name
        if output.type == "PEFT":
            gather_adapters(job, folder)
        elif output.type == "HuggingFace":
            gather_model(job, folder, dtype=output.dtype)
        elif job.world.is_first:
            convert(output, complete, folder)
        if job.world.is_first:
            stored.append(store_output(output, folder, config=job.config))
            report("output", **stored[-1].told())
            shutil.rmtree(folder)
    if job.world.is_first:
        local = job.local
        record_lineage(
            job.config,
            model=job.prepared.model,
            model_dir=local.base_dir,
            adapter=job.prepared.adapter,
            adapter_dir=local.adapter_dir,
            sources=lineage_sources(job.config.dataset.sources, job.prepared.sources),
            outputs=stored,
        )
    barrier()  # no rank is done before the outputs are stored
    return [output.told() for output in stored]


def gather_model(job: Job, folder: Path, *, dtype: OutputDtype = "Source") -> None:
    """Puts the complete model, with adapters merged, into a folder of rank 0; the other ranks only give their parts."""
    source_dir, weights = job.local.model_dir, trained_weights(job.model)
    if job.world.is_first:
        scale = lora_scale(job.model) if job.config.lora is not None else None
        complete = complete_weights(weights, source_dir=source_dir, lora_scale=scale)
        save_huggingface(complete, source_dir=source_dir, target_dir=folder, dtype=dtype)
    for _ in weights:
        pass


def gather_adapters(job: Job, folder: Path) -> None:
    """Puts the adapters into a folder of rank 0; the other ranks only give their parts."""
    adapters, model, lora = lora_state_dict(job.model), job.config.model, job.config.lora
    if job.world.is_first and lora is not None:
        base = model.hub.repo if model.hub else model.uri.location
        save_peft(adapters, target_dir=folder, lora=lora, base_model=base)


class Progress:
    """Turns what a step found into its report."""

    def __init__(self, job: Job, first_step: int) -> None:
        self._job, self._first_step = job, first_step
        self._began = self._step_began = time.monotonic()

    def report_step(self, step: int, totals: StepTotals, grad_norm: float) -> None:
        """Reports a step; the time that is left follows from the steps of this attempt."""
        job, now = self._job, time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        per_step = (now - self._began) / (step - self._first_step)
        report(
            "step",
            attempt=attempt(),
            step=step,
            total_steps=job.total_steps,
            epoch=round(step * job.config.training.global_batch_size / len(job.local.train_data), 4),
            loss=totals.loss,
            learning_rate=job.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens_per_second=round(totals.tokens / seconds, 1),
            peak_memory_bytes=peak_memory_bytes(job.world.device),
            eta_seconds=round(per_step * (job.total_steps - step)),
        )


if __name__ == "__main__":
    run(main)
