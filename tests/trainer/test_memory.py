"""Peaks of memory are told of each part of the work, not of all that was before it."""

import torch

from kubetune_trainer.memory import forget_peak_memory, peak_memory_bytes

CPU = torch.device("cpu")
MANY = 200_000_000


def test_a_peak_that_is_forgotten_does_not_count_any_more() -> None:
    before = peak_memory_bytes(CPU)
    large = torch.ones(MANY, dtype=torch.uint8)
    with_it = peak_memory_bytes(CPU)
    assert with_it >= before
    del large
    assert peak_memory_bytes(CPU) == with_it
    assert forget_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < with_it - MANY / 2
