"""Teach a language model to say what a larger one would say: distillation, with all weights or adapters.

    torchrun --nproc-per-node 2 recipes/distill.py --config recipes/configs/smollm2_distill.yaml training.max_steps=10
    kubetune run FILE     # a FineTuneJob with recipe Distillation, as in examples/distill.yaml

Features: forward, reverse and symmetric divergence; temperature; cross entropy beside it; a teacher that is sharded as
the student is; and those of `finetune.py`, but for QAT.

The script reads as `finetune.py` does: `main` is the run, `train` is the loop, and what follows are its parts. At every
trained token the student's distribution over the next token is drawn to that of a frozen teacher, which has seen the
same tokens; the cross entropy of the data stands beside it. The loss is in `kubetune_trainer.distillation`.

Shapes: B rows of a micro batch, T tokens, D and E hidden_size of student and teacher, V vocab_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.distillation import Distilled, Distilling, Scored, distill
from kubetune_trainer.distributed import exchange, gather_vector
from kubetune_trainer.errors import PreemptedError
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.report import report, run
from kubetune_trainer.training.job import Job, begin, build_frozen, resume
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
    with begin(arguments, description=__doc__, recipes=["Distillation"]) as job:
        teacher = build_frozen(job, job.local.others["distillation.teacher"].model_dir)
        first_step = resume(job)
        with job.stop.deferred():
            train(job, teacher, first_step)
        finish(job, export(job))


def train(job: Job, teacher: Decoder, first_step: int) -> None:
    """The training loop: micro batches, one exchange between the ranks, one optimizer step, then whatever is due."""
    training, model, optimizer, checkpointer = job.config.training, job.model, job.optimizer, job.checkpointer
    report("phase", phase="Training")
    if validation_left(job, first_step) and not validate(job, teacher, first_step):
        raise PreemptedError(f"{job.config.title}: stopped after step {first_step}, which is saved")
    progress = Progress(job, first_step)
    for step in steps_left(job, first_step):
        set_learning_rate(job, step)
        model.train()
        sums = torch.zeros(3, dtype=torch.float64, device=job.world.device)
        batches = micro_batches(job, step)
        count_trained_tokens(job, batches)
        for number, batch in enumerate(batches):
            share_gradients(job, is_last=number == len(batches) - 1)
            seed_dropout(training.seed, step, number, job.world.data_rank)
            distilled = compare(job, teacher, batch)
            distilled.loss.backward()
            sums += torch.stack(distilled).detach()

        totals = exchange(
            loss_sum=sums[0].item(),
            trained_tokens=sum(batch.trained_tokens for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            stop=job.stop.requested,
            save=checkpointer.due(step),
            uploaded_step=checkpointer.uploaded_step,
            measures=sums[1:].tolist(),
        )
        divide_gradients(job, totals.trained_tokens)
        grad_norm = clipped_grad_norm(job)
        check_finite(job, step, loss=totals.loss, grad_norm=grad_norm)
        optimizer.step()  # with training.optimizer_in_backward no gradient is left, and nothing happens here
        optimizer.zero_grad()

        told = means(totals.measures, num_tokens=totals.trained_tokens)
        progress.report_step(step, loss=totals.loss, tokens=totals.tokens, grad_norm=grad_norm, **told)
        checkpointer.advance(totals.uploaded_step)
        stops = totals.stop
        if validation_due(job, step) and not stops:
            stops = not validate(job, teacher, step)
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


def compare(job: Job, teacher: Decoder, batch: Batch) -> Distilled:
    """The loss of a micro batch and what it is made of, summed over its trained tokens."""
    batch, settings = batch.to(job.world.device), job.config.distillation
    assert settings is not None  # noqa: S101 (the recipe that this script has)
    how = Distilling(divergence=settings.divergence, temperature=settings.temperature, weight=settings.weight)
    grad = torch.is_grad_enabled()

    def ask_student(*taught: Tensor) -> Distilled:
        def score(*told: Tensor) -> Distilled:
            return distill(Scored(*told), Scored(*taught), batch.labels, how=how)

        with torch.set_grad_enabled(grad):
            return job.model(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents, score=score)

    # The student is asked inside of the teacher's forward pass: there FSDP has the output heads of both at hand.
    with torch.no_grad():
        return teacher(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents, score=ask_student)


def means(sums: Sequence[float], *, num_tokens: float) -> dict[str, float]:
    """What is reported of the loss's parts: their means over the trained tokens."""
    divergence, cross_entropy = (total / max(1, num_tokens) for total in sums)
    return {"divergence": divergence, "cross_entropy": cross_entropy}


@torch.no_grad()
def validate(job: Job, teacher: Decoder, step: int) -> bool:
    """Reports the mean loss over the held-out tokens, and tells whether it came to that before a stop.

    Every rank takes part in every forward pass.
    """
    data = job.local.validation_data
    if data is None:
        return True
    job.model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in until_stopped(job, validation_rows(job, len(data))):
        # A rank with nothing left computes a row again, for FSDP's sake, and counts none of it.
        batch = collate([data[row] for row in rows or [0]], pad_id=job.pad_id)
        distilled = compare(job, teacher, batch)
        if rows:
            sums[:3] += torch.stack(distilled).cpu()
            sums[3] += batch.trained_tokens
    if stop_requested(job):
        return False
    loss, *measures, num_tokens = gather_vector(sums.tolist()).sum(dim=0).tolist()
    report_validation(job, step, loss=loss / max(1, num_tokens), **means(measures, num_tokens=num_tokens))
    return True


if __name__ == "__main__":
    run(main)
