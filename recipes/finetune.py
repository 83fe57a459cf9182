"""Fine-tune a language model on examples (SFT, or QAT with rounded weights): all of its weights, or LoRA adapters.

    torchrun --nproc-per-node 2 recipes/finetune.py --config recipes/configs/smollm2_lora.yaml training.max_steps=10
    kubetune run examples/local.yaml     # a FineTuneJob with recipe SFT, which is the default, or QAT

Features: all weights, LoRA, DoRA and QLoRA; packed rows; a validation every so many steps; fp32 and bf16; FSDP, copies
of the model (HSDP) and split layers; activations computed again or kept in the host's memory; compiled layers; moments
in 8 or 4 bits; checkpoints on disk or S3; outputs for Hugging Face, PEFT and other formats.

The script reads from top to bottom: `main` is the run (get the data and the model, resume, train, export), `train` is
the loop, and what follows are its parts. What every recipe has beside its loop is in `kubetune_trainer.training`. Clone
it and change it: `kubetune recipes cp finetune my_finetune.py`.

A run can be killed at any moment and started again with the same command: it goes on from its newest complete
checkpoint with the same numbers, bit for bit, as if nothing had happened.

Shapes: B rows of a micro batch, T tokens.
"""

from collections.abc import Sequence

import torch

from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.distributed import exchange, gather_vector
from kubetune_trainer.errors import PreemptedError
from kubetune_trainer.report import report, run
from kubetune_trainer.training.job import Job, begin, resume
from kubetune_trainer.training.outputs import export, finish
from kubetune_trainer.training.progress import Progress
from kubetune_trainer.training.step import (
    check_finite,
    check_weights,
    clipped_grad_norm,
    count_trained_tokens,
    divide_gradients,
    micro_batch_rows,
    report_validation,
    save_due,
    seed_dropout,
    set_learning_rate,
    share_gradients,
    steps_left,
    stop_requested,
    until_stopped,
    validation_due,
    validation_left,
    validation_rows,
)


def main(arguments: Sequence[str]) -> None:
    """The whole run, from nothing or from where the last attempt stopped, to its outputs."""
    with begin(arguments, description=__doc__, recipes=["SFT", "QAT"]) as job:
        first_step = resume(job)
        with job.stop.deferred():
            train(job, first_step)
        finish(job, export(job))


def train(job: Job, first_step: int) -> None:
    """The training loop: micro batches, one exchange between the ranks, one optimizer step, then whatever is due."""
    training, model, optimizer, checkpointer = job.config.training, job.model, job.optimizer, job.checkpointer
    report("phase", phase="Training")
    if validation_left(job, first_step) and not validate(job, first_step):
        raise PreemptedError(f"{job.config.title}: stopped after step {first_step}, which is saved")
    progress = Progress(job, first_step)
    for step in steps_left(job, first_step):
        set_learning_rate(job, step)
        model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=job.world.device)
        batches = micro_batches(job, step)
        count_trained_tokens(job, batches)
        for number, batch in enumerate(batches):
            share_gradients(job, is_last=number == len(batches) - 1)
            seed_dropout(training.seed, step, number, job.world.data_rank)
            loss = summed_loss(job, batch)
            loss.backward()
            loss_sum += loss.detach()

        totals = exchange(
            loss_sum=loss_sum.item(),
            trained_tokens=sum(batch.trained_tokens for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            stop=job.stop.requested,
            save=checkpointer.due(step),
            uploaded_step=checkpointer.uploaded_step,
        )
        divide_gradients(job, totals.trained_tokens)
        grad_norm = clipped_grad_norm(job)
        check_finite(job, step, loss=totals.loss, grad_norm=grad_norm)
        optimizer.step()  # with training.optimizer_in_backward no gradient is left, and nothing happens here
        optimizer.zero_grad()

        progress.report_step(step, loss=totals.loss, tokens=totals.tokens, grad_norm=grad_norm)
        checkpointer.advance(totals.uploaded_step)
        stops = totals.stop
        if validation_due(job, step) and not stops:
            stops = not validate(job, step)
        if stops or totals.save or save_due(job, step):
            check_weights(job, step)
            checkpointer.save(step, model, optimizer, hurry=stops)
        if stops:
            checkpointer.finish()
            raise PreemptedError(f"{job.config.title}: stopped after step {step}, which is saved")
    checkpointer.finish()


def micro_batches(job: Job, step: int) -> list[Batch]:
    """This rank's rows of a step, side by side."""
    data = job.local.train_data
    return [collate([data[row] for row in rows], pad_id=job.pad_id) for rows in micro_batch_rows(job, step)]


def summed_loss(job: Job, batch: Batch) -> torch.Tensor:
    """The cross entropy of a micro batch, summed over its trained tokens."""
    batch = batch.to(job.world.device)
    return job.model(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents, labels_BT=batch.labels)


@torch.no_grad()
def validate(job: Job, step: int) -> bool:
    """Reports the mean loss over the held-out tokens, and tells whether it came to that before a stop.

    Every rank takes part in every forward pass.
    """
    data = job.local.validation_data
    if data is None:
        return True
    job.model.eval()
    loss_sum = trained_tokens = 0
    for rows in until_stopped(job, validation_rows(job, len(data))):
        # A rank with nothing left computes a row again, for FSDP's sake, and counts none of it.
        batch = collate([data[row] for row in rows or [0]], pad_id=job.pad_id)
        loss = summed_loss(job, batch)
        if rows:
            loss_sum += loss.item()
            trained_tokens += batch.trained_tokens
    if stop_requested(job):
        return False
    total, tokens = gather_vector([loss_sum, trained_tokens]).sum(dim=0).tolist()
    report_validation(job, step, loss=total / max(1, tokens))
    return True


if __name__ == "__main__":
    run(main)
