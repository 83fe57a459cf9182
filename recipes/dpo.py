"""Teach a language model which of two answers is the better one: DPO, ORPO or SimPO.

    torchrun --nproc-per-node 2 recipes/dpo.py --config recipes/configs/smollm2_dpo.yaml training.max_steps=10
    kubetune run FILE     # a FineTuneJob with recipe DPO, ORPO or SimPO

Features: sigmoid, IPO and hinge losses; smoothed labels; a reference of one's own; rewards beside the loss; and those
of `finetune.py`, but for QAT and packed rows.

The script reads as `finetune.py` does: `main` is the run, `train` is the loop, and what follows are its parts. All
three methods raise the probability of the chosen answer over that of the rejected one. DPO measures both against a
reference model: the one before training, or another that `dpo.reference` names. ORPO has the cross entropy of the
chosen conversation beside it, and SimPO asks for a margin, both of them without a reference. The losses are in
`kubetune_trainer.preference`.

Shapes: P pairs of a micro batch, B = 2 P answers of which the first half is chosen, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kubetune_trainer.data.preference import split_pair
from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.data.store import DataStore
from kubetune_trainer.distributed import exchange, gather_vector
from kubetune_trainer.errors import PreemptedError
from kubetune_trainer.log_probabilities import label_log_probabilities
from kubetune_trainer.names import IGNORE_LABEL, PADDING_DOCUMENT
from kubetune_trainer.preference import Preferred, dpo, orpo, simpo
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
    with begin(arguments, description=__doc__, recipes=["DPO", "ORPO", "SimPO"]) as job:
        reference = build_reference(job, "dpo.reference") if job.config.dpo is not None else None
        first_step = resume(job)
        with job.stop.deferred():
            train(job, reference, first_step)
        finish(job, export(job))


def train(job: Job, reference: Reference | None, first_step: int) -> None:
    """The training loop: micro batches, one exchange between the ranks, one optimizer step, then whatever is due."""
    training, model, optimizer, checkpointer = job.config.training, job.model, job.optimizer, job.checkpointer
    report("phase", phase="Training")
    if validation_left(job, first_step) and not validate(job, reference, first_step):
        raise PreemptedError(f"{job.config.title}: stopped after step {first_step}, which is saved")
    progress = Progress(job, first_step)
    for step in steps_left(job, first_step):
        set_learning_rate(job, step)
        model.train()
        batches = micro_batches(job, step)
        told_tokens = sum(num_told_tokens(job.local.train_data, row) for row in global_rows(job, step))
        loss_sum = torch.zeros((), dtype=torch.float64, device=job.world.device)
        measures = torch.zeros(NUM_MEASURES, dtype=torch.float64, device=job.world.device)
        for number, batch in enumerate(batches):
            share_gradients(job, is_last=number == len(batches) - 1)
            by_reference = reference_log_probabilities(reference, batch)
            seed_dropout(training.seed, step, number, job.world.data_rank)
            preferred, cross_entropy = judge(job, batch, by_reference)
            # Both are means over the whole step, so that they do not depend on how it is divided.
            loss = preferred.losses.sum() / training.global_batch_size + cross_entropy / told_tokens
            loss.backward()
            loss_sum += loss.detach()
            measures += measured(preferred)

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

        told = rewards(totals.measures, num_pairs=training.global_batch_size)
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


def micro_batches(job: Job, step: int) -> list[Batch]:
    """This rank's pairs of a step."""
    return [collate_pairs(job, job.local.train_data, rows) for rows in micro_batch_rows(job, step)]


def collate_pairs(job: Job, data: DataStore, rows: Sequence[int]) -> Batch:
    """Puts pairs side by side: first the chosen answers, then the rejected ones in the same order."""
    chosen, rejected = zip(*(split_pair(data[row]) for row in rows), strict=True)
    return collate([*chosen, *rejected], pad_id=job.pad_id).to(job.world.device)


def reference_log_probabilities(reference: Reference | None, batch: Batch) -> Tensor | None:
    """What the reference makes of each answer, (B); None for methods that ask no reference."""
    if reference is None:
        return None
    with reference.asked() as model:
        return label_log_probabilities(model, batch, batch.labels).sum(dim=1)


def judge(job: Job, batch: Batch, by_reference: Tensor | None) -> tuple[Preferred, Tensor]:
    """What the method says of a micro batch, and for ORPO the cross entropy of the chosen conversations, summed."""
    config, num_pairs = job.config, len(batch.tokens) // 2
    scored = told_labels(batch) if config.orpo is not None else batch.labels
    found_BT = label_log_probabilities(job.model, batch, scored)
    answers_BT = batch.labels != IGNORE_LABEL
    num_tokens_B = answers_BT.sum(dim=1)
    summed_B = found_BT.where(answers_BT, 0.0).sum(dim=1)
    chosen_tokens, rejected_tokens = num_tokens_B.split(num_pairs)
    if config.orpo is not None:
        preferred = orpo(*(summed_B / num_tokens_B).split(num_pairs), beta=config.orpo.beta)
        return preferred, -found_BT[:num_pairs].sum()
    nothing = found_BT.new_zeros(())
    if config.simpo is not None:
        chosen, rejected = (summed_B / num_tokens_B).split(num_pairs)
        return simpo(chosen, rejected, beta=config.simpo.beta, gamma=config.simpo.gamma), nothing
    assert config.dpo is not None and by_reference is not None  # noqa: S101, PT018 (the recipes that this script has)
    chosen, rejected = (summed_B - by_reference).split(num_pairs)
    preferred = dpo(
        chosen,
        rejected,
        chosen_tokens_P=chosen_tokens,
        rejected_tokens_P=rejected_tokens,
        beta=config.dpo.beta,
        loss=config.dpo.loss,
        label_smoothing=config.dpo.label_smoothing,
    )
    return preferred, nothing


def told_labels(batch: Batch) -> Tensor:
    """The labels, and in the chosen half every other next token as well: ORPO learns the conversation whole."""
    labels_BT, num_pairs = batch.labels.clone(), len(batch.labels) // 2
    chosen = labels_BT[:num_pairs, :-1]
    is_told = (batch.documents[:num_pairs, 1:] != PADDING_DOCUMENT) & (chosen == IGNORE_LABEL)
    chosen[is_told] = batch.tokens[:num_pairs, 1:][is_told]
    return labels_BT


def num_told_tokens(data: DataStore, row: int) -> int:
    """How many next tokens the chosen conversation of a pair has."""
    chosen, _ = split_pair(data[row])
    return len(chosen.tokens) - 1 + int(chosen.labels[-1] != IGNORE_LABEL)


NUM_MEASURES = 3


def measured(preferred: Preferred) -> Tensor:
    """Sums over the pairs of a micro batch: both rewards, and how often the chosen one is greater."""
    chosen, rejected = preferred.chosen_rewards.double(), preferred.rejected_rewards.double()
    return torch.stack([chosen.sum(), rejected.sum(), (chosen > rejected).double().sum()])


def rewards(measures: Sequence[float], *, num_pairs: float) -> dict[str, float]:
    """What is reported of the rewards: their means over the pairs."""
    chosen, rejected, accuracy = (total / max(1, num_pairs) for total in measures)
    return {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "rewards_margin": chosen - rejected,
        "rewards_accuracy": accuracy,
    }


@torch.no_grad()
def validate(job: Job, reference: Reference | None, step: int) -> bool:
    """Reports the mean loss over the held-out pairs, and tells whether it came to that before a stop.

    Every rank takes part in every forward pass.
    """
    data = job.local.validation_data
    if data is None:
        return True
    job.model.eval()
    sums = torch.zeros(4 + NUM_MEASURES, dtype=torch.float64)
    for rows in until_stopped(job, validation_rows(job, len(data))):
        # A rank with nothing left computes a pair again, for FSDP's sake, and counts none of it.
        batch = collate_pairs(job, data, rows or [0])
        preferred, cross_entropy = judge(job, batch, reference_log_probabilities(reference, batch))
        if rows:
            told_tokens = sum(num_told_tokens(data, row) for row in rows)
            sums[:4] += torch.tensor([preferred.losses.sum(), len(rows), cross_entropy, told_tokens])
            sums[4:] += measured(preferred).cpu()
    if stop_requested(job):
        return False
    loss, num_pairs, cross_entropy, told_tokens, *measures = gather_vector(sums.tolist()).sum(dim=0).tolist()
    mean = loss / max(1, num_pairs) + cross_entropy / max(1, told_tokens)
    report_validation(job, step, loss=mean, **rewards(measures, num_pairs=num_pairs))
    return True


if __name__ == "__main__":
    run(main)
