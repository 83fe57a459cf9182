"""Losses, rewards and log-probabilities of preferences are those of TRL on the same batch, to 1e-5."""

import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.import_utils import TRLExperimentalWarning
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from kubetune_trainer import load_model
from kubetune_trainer.data.formats import Chat, RecordError, Text
from kubetune_trainer.data.preference import answer_of, is_good, join_pair, judged, pair_of, split_pair, with_answer_of
from kubetune_trainer.data.sampler import collate
from kubetune_trainer.data.store import Row
from kubetune_trainer.log_probabilities import label_log_probabilities, token_log_probabilities
from kubetune_trainer.preference import dpo, kto, orpo, simpo
from tests.trainer.tiny import make_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

TOLERANCE = 1e-5
CHOSEN, REJECTED = torch.tensor([-2.0, -0.3, -1.1, -0.02]), torch.tensor([-1.5, -0.9, -1.1, -4.0])
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
PAIRS = [
    join_pair(
        Row.of([5, 6, 7, *chosen], [False] * 3 + [True] * len(chosen)),
        Row.of([5, 6, 7, *rejected], [False] * 3 + [True] * len(rejected)),
    )
    for chosen, rejected in (([8, 9, 10, 11], [12, 13]), ([20, 21], [22, 23, 24]), ([40], [41, 42]))
]


def test_orpo_and_simpo_are_those_of_trl() -> None:
    theirs = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=ACCELERATOR), CHOSEN, REJECTED)
    ours = orpo(CHOSEN, REJECTED, beta=0.3)
    torch.testing.assert_close(ours.losses, -theirs[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close((ours.chosen_rewards, ours.rejected_rewards), theirs[1:3], atol=TOLERANCE, rtol=0)

    told = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0.0, accelerator=ACCELERATOR
    )
    theirs = CPOTrainer.cpo_loss(told, CHOSEN, REJECTED)
    mine = simpo(CHOSEN, REJECTED, beta=2.0, gamma=0.7)
    torch.testing.assert_close((mine.losses, mine.chosen_rewards, mine.rejected_rewards), theirs, atol=1e-5, rtol=0)


def test_orpo_of_answers_that_are_certain_stays_finite() -> None:
    chosen = torch.tensor([0.0, -1.0, 0.0, -1e-9], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, -1e-3], requires_grad=True)
    found = orpo(chosen, rejected, beta=0.3)
    found.losses.sum().backward()
    for told in (found.losses, chosen.grad, rejected.grad):
        assert told is not None
        assert told.isfinite().all()
    assert found.losses[0] < 1e-6 < found.losses[1]


def test_smoothed_dpo_is_that_of_trl() -> None:
    told = SimpleNamespace(alpha=0.0, beta=0.4, loss_type="sigmoid", label_smoothing=0.2, accelerator=ACCELERATOR)
    theirs, *_ = CPOTrainer.cpo_loss(told, CHOSEN, REJECTED)
    tokens = torch.ones(4)
    ours = dpo(
        CHOSEN, REJECTED, chosen_tokens_P=tokens, rejected_tokens_P=tokens, beta=0.4, label_smoothing=0.2
    )  # fmt: skip
    torch.testing.assert_close(ours.losses, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("loss", ["IPO", "Hinge"])
def test_losses_that_know_no_wrong_labels_refuse_smoothing(loss: Any) -> None:
    tokens = torch.ones(4)
    with pytest.raises(ValueError, match=f"label_smoothing must be 0 with loss {loss}, got 0.1"):
        dpo(
            CHOSEN, REJECTED, chosen_tokens_P=tokens, rejected_tokens_P=tokens, beta=0.4, loss=loss, label_smoothing=0.1
        )  # fmt: skip


@pytest.mark.parametrize("loss", ["Sigmoid", "IPO", "Hinge"])
def test_dpo_of_two_models_is_that_of_trl(tmp_path: Path, loss: Any) -> None:
    folders = (tmp_path / "policy", tmp_path / "reference")
    policy, reference = (make_folder(folder, initializer_range=0.1 + 0.1 * n) for n, folder in enumerate(folders))
    sides = [split_pair(pair) for pair in PAIRS]
    batch = collate([*(side[0] for side in sides), *(side[1] for side in sides)], pad_id=0)
    answers = batch.labels != -100
    theirs = trl_loss(policy, reference, batch.tokens, answers, documents=batch.documents, loss=loss)

    with torch.no_grad():
        logps = [
            label_log_probabilities(load_model(folder, dtype=torch.float32), batch, batch.labels).sum(1)
            for folder in folders
        ]
    chosen, rejected = (logps[0] - logps[1]).split(len(PAIRS))
    num_chosen, num_rejected = answers.sum(1).split(len(PAIRS))
    ours = dpo(chosen, rejected, chosen_tokens_P=num_chosen, rejected_tokens_P=num_rejected, beta=0.2, loss=loss)
    rewards = {"rewards/chosen": ours.chosen_rewards, "rewards/rejected": ours.rejected_rewards}
    told = {name: value.mean().item() for name, value in rewards.items()} | {
        "loss": ours.losses.mean().item(),
        "rewards/margins": (ours.chosen_rewards - ours.rejected_rewards).mean().item(),
        "rewards/accuracies": (ours.chosen_rewards > ours.rejected_rewards).float().mean().item(),
        "logps/chosen": logps[0][: len(PAIRS)].mean().item(),
    }
    assert told == {name: pytest.approx(theirs[name], abs=TOLERANCE) for name in told}


def asked(model: Any) -> Any:
    """A model of transformers with TRL's own output head, which says log-probabilities."""

    def forward(*, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        found = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
        scored = found * (labels[:, 1:] != -100)
        return SimpleNamespace(log_probs=scored, entropy=scored, mean_logits=scored, is_top1=scored > 0)

    return forward


def trl_loss(
    policy: Any, reference: Any, tokens: Tensor, answers: Tensor, *, documents: Tensor, loss: str
) -> dict[str, float]:
    """What TRL's own computation of a DPO step says, given the models' log-probabilities."""
    mask = torch.cat([torch.zeros(len(answers), 1, dtype=torch.bool), answers[:, :-1]], dim=1)
    metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    model = SimpleNamespace(training=True)
    told = SimpleNamespace(
        model=model, accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False,
        ref_model=asked(reference), args=SimpleNamespace(gradient_checkpointing_kwargs=None), beta=0.2,
        _metrics=metrics,
        f_divergence_type="reverse_kl", loss_types=[loss.lower()], loss_weights=[1.0], label_smoothing=0.0,
        use_weighting=False, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": tokens, "attention_mask": (documents >= 0).long(), "completion_mask": mask.long()}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("trl.trainer.dpo_trainer.is_peft_model", lambda _: False)
        patch.setattr("trl.trainer.dpo_trainer.disable_gradient_checkpointing", lambda *_: torch.no_grad())
        value = DPOTrainer._compute_loss(told, asked(policy), inputs, return_outputs=False)
    return {"loss": value.item(), **{name: values[-1] for name, values in metrics["train"].items()}}


def test_log_probabilities_and_their_gradients_do_not_depend_on_the_chunks() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[3, -100, 5], [1, 2, -100]])
    found = []
    for chunk in (1, 2, 64):
        torch.manual_seed(1)
        hidden, head = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        got = token_log_probabilities(hidden, head, 5.0, labels_BT=labels, chunk_tokens=chunk)
        (got * torch.arange(6.0).view(2, 3)).sum().backward()
        found.append((got.detach(), hidden.grad, head.grad))
    logits = 5 * torch.tanh(hidden @ head.T / 5)
    expected = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2) * (labels != -100)
    torch.testing.assert_close(found[0][0], expected.detach(), atol=1e-5, rtol=0)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


USER = {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Ho"}, {"role": "assistant", "content": "No"}


@pytest.mark.parametrize(
    ("record", "chosen", "rejected"),
    [
        (
            {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
            Text(prompt="1+1=", completion="2"), Text(prompt="1+1=", completion="3"),
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            Chat(messages=[USER, GOOD], num_given=1), Chat(messages=[USER, BAD], num_given=1),
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            Chat(messages=[USER, GOOD], num_given=1), Chat(messages=[USER, BAD], num_given=1),
        ),
        (
            {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            Chat(messages=[USER, GOOD], num_given=1), Chat(messages=[USER, BAD], num_given=1),
        ),
        (
            {"chosen": "Sky is blue", "rejected": "Sky is green"},
            Text(prompt="Sky is", completion=" blue"), Text(prompt="Sky is", completion=" green"),
        ),
    ],
    ids=["texts", "messages", "implicit", "prompt of another sort", "implicit texts"],
)  # fmt: skip
def test_a_record_becomes_a_prompt_and_two_answers(record: dict[str, Any], chosen: Any, rejected: Any) -> None:
    pair = pair_of(record, mapping={})
    assert (pair.chosen, pair.rejected) == (chosen, rejected)


def test_answers_that_do_not_differ_are_refused() -> None:
    with pytest.raises(RecordError, match="better and worse must differ"):
        pair_of({"prompt": "a", "better": "b", "worse": "b"}, mapping={"chosen": "better", "rejected": "worse"})


PROMPTS = [[5, 6, 7], [9, 4], [30, 31, 32, 33], [8, 2]]
COMPLETIONS = [[8, 9, 10, 11], [20, 21], [40], [41, 42, 43]]
GOODNESS = [True, False, False, True]


@pytest.mark.parametrize(("spreads", "bounded"), [((0.1, 0.2), False), ((0.2, 0.1), True)])
def test_kto_of_two_models_is_that_of_trl(tmp_path: Path, spreads: tuple[float, float], bounded: bool) -> None:
    folders = (tmp_path / "policy", tmp_path / "reference")
    policy, reference = (
        make_folder(folder, initializer_range=spread) for folder, spread in zip(folders, spreads, strict=True)
    )
    rows = [
        judged(Row.of([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)), is_good=good)
        for prompt, answer, good in zip(PROMPTS, COMPLETIONS, GOODNESS, strict=True)
    ]
    assert [is_good(row) for row in rows] == GOODNESS
    mixed = [with_answer_of(row, rows[at - 1], max_length=64) for at, row in enumerate(rows)]
    examples = [
        {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": COMPLETIONS[at - 1], "label": good}
        for at, (prompt, answer, good) in enumerate(zip(PROMPTS, COMPLETIONS, GOODNESS, strict=True))
    ]
    metrics: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    told = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, calculate_KL=True, aux_loss_enabled=False,
        precompute_ref_logps=False, ref_model=asked(reference), beta=0.2,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5, _metrics=metrics,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    told._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(told, model, batch)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("trl.trainer.kto_trainer.is_peft_model", lambda _: False)
        patch.setattr("trl.trainer.kto_trainer.disable_gradient_checkpointing", lambda *_: torch.no_grad())
        inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
        loss = KTOTrainer._compute_loss(told, asked(policy), inputs, return_outputs=False)
    theirs = {name: values[-1] for name, values in metrics["train"].items()} | {"loss": loss.item()}

    batches = [collate(each, pad_id=0) for each in (rows, mixed)]
    with torch.no_grad():
        ratios = [
            torch.sub(*(label_log_probabilities(model, batch, batch.labels).sum(1) for model in ours))
            for ours in [[load_model(folder, dtype=torch.float32) for folder in folders]]
            for batch in batches
        ]
    divergence = max(0.0, ratios[1].mean().item())
    assert (divergence == 0) == bounded, "both sides of the bound are looked at"
    good = torch.tensor(GOODNESS)
    found = kto(ratios[0], good, divergence=divergence, beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    mine = {
        "loss": found.losses.mean().item(),
        "kl": divergence,
        "rewards/chosen": found.rewards[good].mean().item(),
        "rewards/rejected": found.rewards[~good].mean().item(),
    }
    assert mine == {name: pytest.approx(theirs[name], abs=TOLERANCE) for name in mine}


def test_an_answer_to_another_prompt_is_cut_at_the_limit() -> None:
    rows = [Row.of([1, 2, 3, 4], [False, False, True, True]), Row.of([5, 6, 7, 8], [False, True, True, True])]
    mixed = with_answer_of(rows[0], rows[1], max_length=4)
    assert mixed.tokens.tolist() == [1, 2, 6, 7]
    assert mixed.labels.tolist() == [-100, 6, 7, 8]


def test_a_record_becomes_an_answer_that_is_good_or_bad() -> None:
    record = {"prompt": [USER], "completion": [BAD], "label": False}
    assert answer_of(record, mapping={}) == (Chat(messages=[USER, BAD], num_given=1), False)
    record = {"question": "1+1=", "completion": "2", "label": 1}
    assert answer_of(record, mapping={"prompt": "question"}) == (Text(prompt="1+1=", completion="2"), True)
    for cell, label in {"True": True, "0": False, " false ": False}.items():  # as csv has them
        assert answer_of({"prompt": "a", "completion": "b", "label": cell}, mapping={})[1] == label
    with pytest.raises(RecordError, match="label must be true or false, got 'yes'"):
        answer_of({"prompt": "a", "completion": "b", "label": "yes"}, mapping={})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": "2", "rejected": "3"},
        {"prompt": "1+1?", "chosen": [GOOD], "rejected": [BAD]},
    ],
    ids=["messages and texts", "a text and messages"],
)
def test_a_prompt_that_its_answers_cannot_have_is_not_dropped(record: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="prompt must be of the sort of chosen and rejected"):
        pair_of(record, mapping={})
