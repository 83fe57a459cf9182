"""The chunked loss is the plain one, at a fraction of its memory."""

import pytest
import torch
from torch.nn import functional

from kubetune_trainer.loss import sum_cross_entropy


def _inputs(*, trained: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 20, 8, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(50, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (3, 20), generator=generator, dtype=torch.int32)
    labels[torch.rand(3, 20, generator=generator) >= trained] = -100
    return hidden, head, labels


@pytest.mark.parametrize("trained", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 60, 1000])
def test_loss_and_gradients_equal_plain_cross_entropy(trained: float, chunk_tokens: int) -> None:
    hidden, head, labels = _inputs(trained=trained, dtype=torch.float32)
    loss = sum_cross_entropy(hidden, head, labels, chunk_tokens=chunk_tokens)
    (loss * 0.25).backward()
    gradients = hidden.grad, head.grad
    hidden.grad = head.grad = None
    plain = functional.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten().long(), reduction="sum")
    (plain * 0.25).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients, (hidden.grad, head.grad), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    inputs = _inputs(trained=0.5)
    inputs[frozen].requires_grad_(requires_grad=False)
    sum_cross_entropy(*inputs).backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_without_gradients_the_loss_is_the_same() -> None:
    inputs = _inputs(trained=0.5)
    with torch.no_grad():
        loss = sum_cross_entropy(*inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, sum_cross_entropy(*inputs).detach())


def test_no_tensor_is_as_large_as_all_logits() -> None:
    tokens, vocabulary, width, chunk = 1024, 4096, 16, 64
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    head = torch.randn(vocabulary, width)
    labels = torch.randint(0, vocabulary, (1, tokens))
    with torch.profiler.profile(profile_memory=True) as profile:
        sum_cross_entropy(hidden, head, labels, chunk_tokens=chunk).backward()
    largest = max(event.self_cpu_memory_usage / max(1, event.count) for event in profile.key_averages())
    assert largest <= chunk * vocabulary * 4 * 2 < tokens * vocabulary * 4 / 4


def test_gradients_are_scaled_in_place_and_so_only_once() -> None:
    hidden, head, labels = _inputs(trained=0.5)
    loss = sum_cross_entropy(hidden, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
