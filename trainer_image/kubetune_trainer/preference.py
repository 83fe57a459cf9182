"""What a model loses on preferences: which of two answers is the better one, or whether one is good.

All functions take log-probabilities and return one number per pair or answer; the mean over a global batch is the
recipe's. A reward is what a method's loss sees in an answer, times beta.

Shapes: P pairs, B answers. `chosen` and `rejected` are log-probabilities of the answers of pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Preferred:
    """What became of some pairs."""

    losses: Tensor
    """The loss of each pair, (P)."""
    chosen_rewards: Tensor
    """Reward of the better answer, without gradient."""
    rejected_rewards: Tensor
    """Reward of the other one, without gradient."""


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    chosen_tokens_P: Tensor,
    rejected_tokens_P: Tensor,
    beta: float,
    loss: Literal["Sigmoid", "IPO", "Hinge"] = "Sigmoid",
    label_smoothing: float = 0.0,
) -> Preferred:
    """Direct preference optimization (arXiv 2305.18290), its hinge form (2309.06657) and IPO (2310.12036).

    Args:
        chosen_P: Log-probability of the better answer less the reference model's, summed over its tokens.
        rejected_P: The same of the other answer.
        chosen_tokens_P: Tokens of the better answer; IPO counts per token, as its authors say they meant it.
        rejected_tokens_P: Tokens of the other answer.
        beta: How much it costs to leave the reference.
        loss: Which form.
        label_smoothing: How often labels are taken to be wrong; with Sigmoid alone, as in TRL.

    Raises:
        ValueError: Another loss has a label_smoothing.
    """
    if label_smoothing and loss != "Sigmoid":
        raise ValueError(f"label_smoothing must be 0 with loss {loss}, got {label_smoothing}")
    margin = beta * (chosen_P - rejected_P)
    match loss:
        case "Sigmoid":
            right, wrong = -functional.logsigmoid(margin), -functional.logsigmoid(-margin)
            losses = right * (1 - label_smoothing) + wrong * label_smoothing
        case "Hinge":
            losses = torch.relu(1 - margin)
        case "IPO":
            losses = (chosen_P / chosen_tokens_P - rejected_P / rejected_tokens_P - 1 / (2 * beta)).square()
    return Preferred(
        losses=losses, chosen_rewards=beta * chosen_P.detach(), rejected_rewards=beta * rejected_P.detach()
    )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What became of some answers."""

    losses: Tensor
    """The loss of each, (B)."""
    rewards: Tensor
    """The reward of each, without gradient."""


def kto(
    answers_B: Tensor,
    is_good_B: Tensor,
    *,
    divergence: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Judged:
    """Kahneman-Tversky optimization (arXiv 2402.01306, equation 7).

    Args:
        answers_B: Log-probability of each answer less the reference model's, summed over its tokens.
        is_good_B: Whether an answer is a good one.
        divergence: How far the model is from the reference over all, at least 0; see `recipes/kto.py`.
        beta: How much it costs to leave the reference.
        desirable_weight: What the losses of good answers are multiplied with.
        undesirable_weight: What the losses of bad answers are multiplied with.
    """
    sign_B = torch.where(is_good_B, 1.0, -1.0)
    weight_B = torch.where(is_good_B, desirable_weight, undesirable_weight)
    losses = weight_B * (1 - torch.sigmoid(beta * sign_B * (answers_B - divergence)))
    return Judged(losses=losses, rewards=beta * answers_B.detach())


def orpo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float) -> Preferred:
    """Odds ratio preference optimization (arXiv 2403.07691), without the cross entropy that its loss has beside it.

    Args:
        chosen_P: Log-probability of the better answer, the mean over its tokens.
        rejected_P: The same of the other answer.
        beta: Weight of the odds ratio beside the cross entropy.
    """
    log_odds = (chosen_P - rejected_P) - (_log_of_rest(chosen_P) - _log_of_rest(rejected_P))
    return Preferred(
        losses=-beta * functional.logsigmoid(log_odds),
        chosen_rewards=beta * chosen_P.detach(),
        rejected_rewards=beta * rejected_P.detach(),
    )


def simpo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float, gamma: float) -> Preferred:
    """Simple preference optimization (arXiv 2405.14734).

    Args:
        chosen_P: Log-probability of the better answer, the mean over its tokens.
        rejected_P: The same of the other answer.
        beta: Scale of the rewards.
        gamma: By how much the better reward has to be greater.
    """
    return Preferred(
        losses=-functional.logsigmoid(beta * (chosen_P - rejected_P) - gamma),
        chosen_rewards=beta * chosen_P.detach(),
        rejected_rewards=beta * rejected_P.detach(),
    )


def _log_of_rest(log_probabilities: Tensor) -> Tensor:
    """Return log(1 - p) from log p without cancellation (Mächler 2012); where p is rounded to 1, of the next below."""
    log_probabilities = log_probabilities.clamp(max=-torch.finfo(log_probabilities.dtype).eps)
    near_one = log_probabilities > -0.6931471805599453
    # Each branch gets only arguments that it is finite for, so that gradients of the other are no NaN.
    small = torch.where(near_one, log_probabilities, torch.full_like(log_probabilities, -0.5))
    large = torch.where(near_one, torch.full_like(log_probabilities, -1.0), log_probabilities)
    return torch.where(near_one, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
