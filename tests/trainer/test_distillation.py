"""The chunked loss of distillation is the plain one, TRL's and torchtune's, at a fraction of the memory."""

import warnings
from itertools import product

import pytest
import torch
from torch.nn import functional
from trl.import_utils import TRLExperimentalWarning

from kubetune_trainer.distillation import CHUNK_COPIES, Distilling, Divergence, Scored, distill

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.gkd import GKDTrainer

DIVERGENCES: tuple[Divergence, ...] = ("Forward", "Reverse", "Symmetric")


def inputs(*, rows: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Scored, Scored, torch.Tensor]:
    """A student and a wider teacher that have seen the same tokens; half of the positions are trained."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    student = Scored(random(3, 20, 8).requires_grad_(), random(50, 8).requires_grad_(), 20.0)
    teacher = Scored(random(3, 20, 12), random(rows, 12), None)
    labels = torch.randint(0, 50, (3, 20), generator=generator, dtype=torch.int32)
    labels[torch.rand(3, 20, generator=generator) >= 0.5] = -100
    return student, teacher, labels


def plain(student: Scored, teacher: Scored, labels: torch.Tensor, how: Distilling) -> torch.Tensor:
    """The same with all logits at once, as torch's own functions give it."""
    trained = labels != -100
    told, taught = (
        (torch.tanh(logits / side.softcap) * side.softcap if side.softcap else logits)[trained]
        for side in (student, teacher)
        for logits in [side.hidden @ side.head.T]
    )
    mine, other = ((logits / how.temperature).log_softmax(-1) for logits in (told, taught))
    forward = functional.kl_div(mine, other, reduction="sum", log_target=True)
    reverse = functional.kl_div(other, mine, reduction="sum", log_target=True)
    divergence = {"Forward": forward, "Reverse": reverse, "Symmetric": (forward + reverse) / 2}[how.divergence]
    cross_entropy = functional.cross_entropy(told, labels[trained].long(), reduction="sum")
    return how.weight * how.temperature**2 * divergence + (1 - how.weight) * cross_entropy


@pytest.mark.parametrize(("divergence", "temperature"), [*product(DIVERGENCES, (1.0, 2.5))])
@pytest.mark.parametrize(("weight", "chunk_tokens"), [(1.0, 7), (0.3, 1), (0.3, 1000)])
def test_loss_and_gradients_equal_those_of_plain_torch(
    divergence: Divergence, temperature: float, weight: float, chunk_tokens: int
) -> None:
    how = Distilling(divergence=divergence, temperature=temperature, weight=weight)
    student, teacher, labels = inputs()
    found = distill(student, teacher, labels, how=how, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(found.loss * 0.25, [student.hidden, student.head])
    wanted = plain(student, teacher, labels, how)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(wanted * 0.25, [student.hidden, student.head]), rtol=1e-5, atol=1e-5
    )
    mixed = weight * found.divergence + (1 - weight) * found.cross_entropy
    torch.testing.assert_close(mixed, found.loss.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergences_are_those_of_gkd_and_of_torchtune(temperature: float) -> None:
    """GKD's beta 0 is Forward, 1 is Reverse. torchtune's forward loss lacks the teacher's entropy, a constant."""
    student, teacher, labels = inputs()
    trained = labels != -100
    student = student._replace(softcap=None)
    found = {
        divergence: distill(
            student, teacher, labels, how=Distilling(divergence=divergence, temperature=temperature, weight=1.0)
        ).divergence
        for divergence in DIVERGENCES
    }
    told, taught = (side.hidden.detach() @ side.head.detach().T for side in (student, teacher))
    count = int(trained.sum())
    for divergence, beta in (("Forward", 0), ("Reverse", 1)):
        gkd = GKDTrainer.generalized_jsd_loss(
            told, taught, labels=labels, beta=beta, temperature=temperature, num_items_in_batch=count
        )
        torch.testing.assert_close(found[divergence] / count / temperature**2, gkd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["Symmetric"], (found["Forward"] + found["Reverse"]) / 2, rtol=1e-5, atol=1e-5)
    mine, other = ((logits[trained] / temperature).log_softmax(-1) for logits in (told, taught))
    crossed, entropy = -(other.exp() * mine).sum(), -(other.exp() * other).sum()
    torch.testing.assert_close(found["Forward"] / temperature**2, crossed - entropy, rtol=1e-5, atol=1e-5)


def test_rows_of_padding_that_one_head_has_more_change_nothing() -> None:
    how = Distilling(divergence="Symmetric", temperature=2.0, weight=1.0)
    student, teacher, labels = inputs(rows=64)
    cut = teacher._replace(head=teacher.head[:50])
    assert distill(student, teacher, labels, how=how).loss == distill(student, cut, labels, how=how).loss
    wide = student._replace(head=torch.cat([student.head, torch.randn(14, 8)]))
    found, known = (distill(side, cut, labels, how=how) for side in (wide, student))
    assert found.divergence == known.divergence
    assert found.cross_entropy > known.cross_entropy


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient() -> None:
    student, _, labels = inputs()
    teacher = Scored(student.hidden.detach(), student.head.detach(), student.softcap)
    for divergence in DIVERGENCES:
        found = distill(student, teacher, labels, how=Distilling(divergence=divergence, temperature=1.0, weight=1.0))
        assert found.loss.abs() < 1e-5
        assert all(
            gradient.abs().max() < 1e-5 for gradient in torch.autograd.grad(found.loss, [student.hidden, student.head])
        )


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient_and_without_gradients_the_loss_is_the_same(frozen: str) -> None:
    how = Distilling(divergence="Forward", temperature=1.0, weight=0.5)
    student, teacher, labels = inputs()
    getattr(student, frozen).requires_grad_(requires_grad=False)
    found = distill(student, teacher, labels, how=how)
    found.loss.backward()
    assert getattr(student, frozen).grad is None
    with torch.no_grad():
        assert torch.equal(distill(student, teacher, labels, how=how).loss, found.loss.detach())
    again = distill(student, teacher, labels, how=how).loss
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        again.backward()


def test_memory_follows_the_chunk_and_not_the_number_of_positions() -> None:
    tokens, vocabulary, width, chunk = 1024, 4096, 16, 64
    student = Scored(torch.randn(1, tokens, width, requires_grad=True), torch.randn(vocabulary, width), None)
    teacher = Scored(torch.randn(1, tokens, width), torch.randn(vocabulary, width), None)
    labels = torch.randint(0, vocabulary, (1, tokens))
    how = Distilling(divergence="Symmetric", temperature=2.0, weight=0.5)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        distill(student, teacher, labels, how=how, chunk_tokens=chunk).loss.backward()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    logits = tokens * vocabulary * 4
    assert CHUNK_COPIES * chunk * vocabulary * 4 / 2 < peak < CHUNK_COPIES * chunk * vocabulary * 4 < logits, (
        f"{peak / (chunk * vocabulary * 4):.1f} chunks of logits"
    )
