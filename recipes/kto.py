"""Teach a language model good answers and unteach it bad ones, each by itself: KTO.

    torchrun --nproc-per-node 2 recipes/kto.py --config recipes/configs/smollm2_kto.yaml training.max_steps=10
    kubetune run FILE     # a FineTuneJob with recipe KTO

Features: answers without a counterpart, or pairs taken apart; weights of good and bad answers; a reference of one's
own; rewards and divergence beside the loss; and those of `finetune.py`, but for QAT and packed rows.

The script reads as `dpo.py` does. An answer is worth what the model gives it over a reference model, and is measured
against how far the model is from the reference over all: the divergence. That is estimated once before each step, over
all of its rows, each with the answer of another row before it, which is hardly one to its prompt. The estimate has no
gradient and is the same on all ranks. The loss is in `kubetune_trainer.preference`.

Shapes: B answers of a micro batch, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kubetune_trainer.data.preference import is_good, prompt_of, with_answer_of
from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.data.store import DataStore
from kubetune_trainer.distributed import exchange, gather_vector
from kubetune_trainer.errors import DataError, PreemptedError
from kubetune_trainer.log_probabilities import label_log_probabilities
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.preference import Judged, kto
from kubetune_trainer.report import report, run
from kubetune_trainer.training.job import Job, begin, resume
from kubetune_trainer.training.outputs import export, finish
from kubetune_trainer.training.progress import Progress
from kubetune_trainer.training.reference import Reference, build_reference
from kubetune_trainer.training.step import (
    check_finite,
    check_weights,
    clipped_grad_norm,
    global_rows,
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
    with begin(arguments, description=__doc__, recipes=["KTO"]) as job:
        check_answers(job)
        reference = build_reference(job, "kto.reference")
        first_step = resume(job)
        with job.stop.deferred():
            train(job, reference, first_step)
        finish(job, export(job))


def check_answers(job: Job) -> None:
    """Refuses data of a single prompt: with it the divergence would be estimated from answers to their own prompt.

    Raises:
        DataError: The training data or the held-out data have one prompt.
    """
    for field, data in (("sources", job.local.train_data), ("validation", job.local.validation_data)):
        if data is not None and next(rows_of_others(data, 0), None) is None:
            raise DataError(
                f"{job.config.title}: dataset.{field} must give recipe KTO answers to at least 2 prompts, got 1",
                hint="The divergence is estimated from answers to the prompts of others.",
            )


def train(job: Job, reference: Reference, first_step: int) -> None:
    """The training loop: the divergence, micro batches, one exchange, one optimizer step, then whatever is due."""
    training, model, optimizer, checkpointer = job.config.training, job.model, job.optimizer, job.checkpointer
    data = job.local.train_data
    report("phase", phase="Training")
    if validation_left(job, first_step) and not validate(job, reference, first_step):
        raise PreemptedError(f"{job.config.title}: stopped after step {first_step}, which is saved")
    progress = Progress(job, first_step)
    for step in steps_left(job, first_step):
        set_learning_rate(job, step)
        mine, everyone = micro_batch_rows(job, step), global_rows(job, step)
        divergence = estimate_divergence(job, reference, data, mine, everyone)
        model.train()
        batches = [collate_answers(job, data, rows) for rows in mine]
        loss_sum = torch.zeros((), dtype=torch.float64, device=job.world.device)
        measures = torch.zeros(NUM_MEASURES, dtype=torch.float64, device=job.world.device)
        for number, (rows, batch) in enumerate(zip(mine, batches, strict=True)):
            share_gradients(job, is_last=number == len(batches) - 1)
            by_reference = reference_log_probabilities(reference, batch)
            seed_dropout(training.seed, step, number, job.world.data_rank)
            good = goodness(job, data, rows)
            judged = judge(job, batch, good, by_reference=by_reference, divergence=divergence)
            # The mean over the whole step, so that it does not depend on how it is divided.
            loss = judged.losses.sum() / training.global_batch_size
            loss.backward()
            loss_sum += loss.detach()
            measures += measured(judged, good)

        totals = exchange(
            loss_sum=loss_sum.item(),
            trained_tokens=sum(batch.trained_tokens for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            stop=job.stop.requested,
            save=checkpointer.due(step),
            uploaded_step=checkpointer.uploaded_step,
            measures=measures.tolist(),
        )
        grad_norm = clipped_grad_norm(job)
        check_finite(job, step, loss=totals.loss_sum, grad_norm=grad_norm)
        optimizer.step()  # with training.optimizer_in_backward no gradient is left, and nothing happens here
        optimizer.zero_grad()

        told = {"divergence": divergence, **rewards(totals.measures)}
        progress.report_step(step, loss=totals.loss_sum, tokens=totals.tokens, grad_norm=grad_norm, **told)
        checkpointer.advance(totals.uploaded_step)
        stops = totals.stop
        if validation_due(job, step) and not stops:
            stops = not validate(job, reference, step)
        if stops or totals.save or save_due(job, step):
            check_weights(job, step)
            checkpointer.save(step, model, optimizer, hurry=stops)
        if stops:
            checkpointer.finish()
            raise PreemptedError(f"{job.config.title}: stopped after step {step}, which is saved")
    checkpointer.finish()


@torch.no_grad()
def estimate_divergence(
    job: Job,
    reference: Reference,
    data: DataStore,
    mine: Iterable[Sequence[int]],
    everyone: Sequence[int],
) -> float:
    """How far the model is from the reference, at least 0: the mean log ratio of answers to prompts of other rows.

    Every rank takes part in every forward pass. Dropout is off, so that it does not depend on how rows are divided.

    Args:
        job: The run.
        reference: As for `train`.
        data: Where the rows are.
        mine: This rank's rows, a list for each round; empty where it has nothing left.
        everyone: All ranks' rows in order; each gets the answer of another, see `others_answers`.
    """
    job.model.eval()
    other = others_answers(everyone, data)
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in mine:
        mixed = [
            with_answer_of(data[row], data[other[row]], max_length=job.config.dataset.max_sequence_length)
            for row in rows or everyone[:1]
        ]
        batch = collate(mixed, pad_id=job.pad_id).to(job.world.device)
        ratios_B = log_probabilities(job.model, batch) - reference_log_probabilities(reference, batch)
        if rows:
            sums += torch.tensor([ratios_B.double().sum().item(), len(rows)], dtype=torch.float64)
    total, num_rows = gather_vector(sums.tolist()).sum(dim=0).tolist()
    return max(0.0, total / max(1, num_rows))


def others_answers(rows: Sequence[int], data: DataStore) -> dict[int, int]:
    """Whose answer each row gets: that of the closest one before it with another prompt, the first ones from the end.

    The two answers of a pair have one prompt, and a batch may have nothing else; the next row of the data with another
    prompt serves then, so that no answer is paired with its own prompt.
    """
    prompts, found = {row: prompt_of(data[row]) for row in rows}, {}
    for at, row in enumerate(rows):
        before = (rows[at - distance] for distance in range(1, len(rows)))
        others = (other for other in before if prompts[other] != prompts[row])
        chosen = next(others, None)
        found[row] = chosen if chosen is not None else next(rows_of_others(data, row))
    return found


def rows_of_others(data: DataStore, row: int) -> Iterator[int]:
    """The rows of other prompts, from the next one on and around the end."""
    prompt = prompt_of(data[row])
    following = ((row + distance) % len(data) for distance in range(1, len(data)))
    return (other for other in following if prompt_of(data[other]) != prompt)


def collate_answers(job: Job, data: DataStore, rows: Sequence[int]) -> Batch:
    """Puts answers side by side."""
    return collate([data[row] for row in rows], pad_id=job.pad_id).to(job.world.device)


def goodness(job: Job, data: DataStore, rows: Sequence[int]) -> Tensor:
    """Which of the answers are good ones, (B)."""
    return torch.tensor([is_good(data[row]) for row in rows], device=job.world.device)


def log_probabilities(model: Decoder, batch: Batch) -> Tensor:
    """What a model makes of each answer, summed over its tokens, (B)."""
    return label_log_probabilities(model, batch, batch.labels).sum(dim=1)


def reference_log_probabilities(reference: Reference, batch: Batch) -> Tensor:
    """What the reference makes of each answer, (B)."""
    with reference.asked() as model:
        return log_probabilities(model, batch)


def judge(job: Job, batch: Batch, good: Tensor, *, by_reference: Tensor, divergence: float) -> Judged:
    """What KTO says of a micro batch."""
    settings = job.config.kto
    assert settings is not None  # noqa: S101 (the recipe that this script has)
    return kto(
        log_probabilities(job.model, batch) - by_reference,
        good,
        divergence=divergence,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )


NUM_MEASURES = 4


def measured(judged: Judged, good: Tensor) -> Tensor:
    """Sums over the answers of a micro batch: rewards of the good ones and their number, and the same of the bad."""
    rewards_B = judged.rewards.double()
    parts = [(rewards_B[chosen].sum(), chosen.double().sum()) for chosen in (good, ~good)]
    return torch.stack([number for part in parts for number in part])


def rewards(measures: Sequence[float]) -> dict[str, float]:
    """What is reported of the rewards: their means, where there are answers of that sort."""
    good, num_good, bad, num_bad = measures
    told = {"rewards_chosen": (good, num_good), "rewards_rejected": (bad, num_bad)}
    means = {name: total / number for name, (total, number) in told.items() if number}
    if len(means) == len(told):
        means["rewards_margin"] = means["rewards_chosen"] - means["rewards_rejected"]
    return means


@torch.no_grad()
def validate(job: Job, reference: Reference, step: int) -> bool:
    """Reports the mean loss over the held-out answers, and tells whether it came to that before a stop.

    Every rank takes part in every forward pass.
    """
    data = job.local.validation_data
    if data is None:
        return True
    rounds = validation_rows(job, len(data))
    divergence = estimate_divergence(job, reference, data, until_stopped(job, rounds), range(len(data)))
    sums = torch.zeros(2 + NUM_MEASURES, dtype=torch.float64)
    for rows in until_stopped(job, rounds):
        # A rank with nothing left computes an answer again, for FSDP's sake, and counts none of it.
        batch, good = collate_answers(job, data, rows or [0]), goodness(job, data, rows or [0])
        by_reference = reference_log_probabilities(reference, batch)
        judged = judge(job, batch, good, by_reference=by_reference, divergence=divergence)
        if rows:
            sums[:2] += torch.tensor([judged.losses.sum(), len(rows)])
            sums[2:] += measured(judged, good).cpu()
    if stop_requested(job):
        return False
    loss, num_answers, *measures = gather_vector(sums.tolist()).sum(dim=0).tolist()
    report_validation(job, step, loss=loss / max(1, num_answers), divergence=divergence, **rewards(measures))
    return True


if __name__ == "__main__":
    run(main)
