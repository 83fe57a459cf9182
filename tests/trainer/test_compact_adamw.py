"""Moments in few bits and weights rounded by chance: against torch's and torchao's AdamW, in bytes and in the mean."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from kubetune_trainer.compact_adamw import MOMENTS, Codebook, CompactAdamW, decode, encode, round_by_chance
from kubetune_trainer.optim import StepInBackward
from tests.trainer import rounding_ranks

STEPS = 8


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix that is quantized, with blocks that do not fill its rows, and what is not."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((32, 320), (32, 256), (64,), (4, 6))]


def train(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], *, steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in trained:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in trained]


def compact(trained: list[nn.Parameter], **settings: int | None) -> CompactAdamW:
    return CompactAdamW([{"params": trained, "weight_decay": 0.1}], lr=0.01, **settings)


def test_without_bits_and_in_fp32_it_is_torchs_adamw_bit_for_bit() -> None:
    plain, ours = weights(), weights()
    wanted = train(torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1, fused=True), plain)
    assert all(torch.equal(a, b) for a, b in zip(wanted, train(compact(ours), ours), strict=True))


@pytest.mark.parametrize(("bits", "block"), [(8, 256), (4, 128)])
def test_codes_and_scales_are_those_of_torchao(bits: int, block: int) -> None:
    from torchao.optim.subclass_4bit import OptimState4bit  # noqa: PLC0415 (seconds, for this test alone)
    from torchao.optim.subclass_8bit import OptimState8bit  # noqa: PLC0415

    values = torch.randn(8, 512, generator=torch.Generator().manual_seed(2))
    for moment, signed in zip(MOMENTS, (True, False), strict=True):
        given = values if signed else values.square()
        kind = OptimState8bit if bits == 8 else OptimState4bit
        peer = kind.zeros(given.shape, signed, block, torch.device("cpu"), dtype=torch.float32)
        peer.copy_(given)
        codebook = compact(weights(), bits=bits)._codebook(moment, torch.device("cpu"))
        codes, scale = encode(given, codebook, block)
        assert torch.equal(scale.flatten(), peer.scale)
        torch.testing.assert_close(decode(codes, scale, codebook, block), peer.dequantize(), atol=0, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("moment", MOMENTS)
def test_codes_are_those_of_a_search_at_every_bound_and_beside_it(bits: int, moment: str) -> None:
    codebook = compact(weights(), bits=bits)._codebook(moment, torch.device("cpu"))
    between = (codebook.values[1:] + codebook.values[:-1]) / 2
    beside = [torch.nextafter(between, torch.full_like(between, end)) for end in (-1.0, 1.0)]
    small = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30])
    spread = torch.linspace(-1, 1, 100_003) ** 3
    values = torch.cat((torch.ones(1), between, *beside, codebook.values, small, spread)).clamp(-1, 1)[None]
    codes, _ = encode(values, codebook, block=values.numel())  # 1 is the largest, by which nothing is changed
    assert torch.equal(codes.int(), torch.bucketize(values, between, out_int32=True, right=True))


def test_codes_that_are_too_near_to_each_other_make_no_codebook() -> None:
    with pytest.raises(AssertionError, match="too near"):
        Codebook.of(torch.linspace(0.5, 1, 256))


@pytest.mark.parametrize(("bits", "share", "tolerance"), [(8, 0.27, 0.02), (4, 0.15, 0.2)])
def test_the_state_is_small_and_the_steps_are_near_those_of_adamw(bits: int, share: float, tolerance: float) -> None:
    plain, ours = weights(), weights()
    before = [weight.detach().clone() for weight in plain]
    wanted = train(torch.optim.AdamW(plain, lr=0.01, weight_decay=0.1, fused=True), plain)
    optimizer = compact(ours, bits=bits)
    found = train(optimizer, ours)
    for first, theirs, mine in zip(before, wanted, found, strict=True):
        assert (mine - theirs).norm() <= tolerance * (theirs - first).norm()
    state = optimizer.state[ours[0]]
    size = sum(state[name].numel() * state[name].itemsize for name in state if name != "step")
    assert size <= share * 2 * 4 * ours[0].numel()
    assert optimizer.state[ours[2]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_state_that_is_saved_goes_on_bit_for_bit(bits: int | None) -> None:
    whole, first = weights(torch.bfloat16), weights(torch.bfloat16)
    wanted = train(compact(whole, bits=bits, rounding_seed=7), whole)
    begun = compact(first, bits=bits, rounding_seed=7)
    generator = torch.Generator().manual_seed(1)
    optimizer = begun
    for step in range(STEPS):
        if step == 3:
            optimizer = compact(first, bits=bits, rounding_seed=7)
            optimizer.load_state_dict(begun.state_dict())
        for weight in first:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(wanted, first, strict=True))


def test_rounding_by_chance_is_right_in_the_mean_and_only_ever_a_neighbour() -> None:
    values = torch.tensor([1.0, 1.001, -1.003, 3e-5, -7.7e8, 0.0]).repeat(20_000, 1)
    rounded = round_by_chance(values, torch.Generator().manual_seed(0)).float()
    step = 2.0**-7 * values[0].abs()
    assert ((rounded.mean(dim=0) - values[0]).abs() <= 0.02 * step).all()
    assert ((rounded - values).abs() <= step).all()
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    kept = round_by_chance(odd, torch.Generator())
    assert torch.equal(kept[:2].float(), odd[:2])
    assert kept[2].isnan()


def test_small_steps_of_bf16_weights_are_lost_by_the_nearest_and_kept_by_chance() -> None:
    moved = {}
    for seed in (None, 3):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = CompactAdamW([{"params": [weight]}], lr=1e-4, bits=8, rounding_seed=seed)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[seed] = 1 - weight.float().mean().item()
    assert moved[None] == 0
    assert moved[3] == pytest.approx(20 * 1e-4, rel=0.1)


@pytest.mark.parametrize(("num_ranks", "replicate"), [(2, 2), (4, 2)])
def test_copies_of_a_shard_are_rounded_alike_and_shards_are_not(tmp_path: Path, num_ranks: int, replicate: int) -> None:
    multiprocessing.set_forkserver_preload(["torch._dynamo", "tests.trainer.rounding_ranks"])
    multiprocessing.start_processes(
        rounding_ranks.run, args=(tmp_path, num_ranks, replicate), nprocs=num_ranks, start_method="forkserver"
    )
    parts = [torch.load(tmp_path / f"part-{rank}.pt") for rank in range(num_ranks)]
    shards = num_ranks // replicate
    for rank, part in enumerate(parts):
        for other in range(rank):
            assert torch.equal(part, parts[other]) == (rank % shards == other % shards), (rank, other)


def test_steps_in_backward_are_the_same_and_leave_no_gradient() -> None:
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        stepper = StepInBackward(optimizer) if in_backward else None
        for _ in range(3):
            if stepper is not None:
                stepper.divisor = 5.0
            model(torch.ones(2, 8)).square().sum().backward()
            if stepper is not None:
                assert all(weight.grad is None for weight in model.parameters())
                norm = stepper.grad_norm()
                continue
            for weight in model.parameters():
                weight.grad.div_(5.0)
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()]).item()
            optimizer.step()
            optimizer.zero_grad()
        results.append((norm, [weight.detach().clone() for weight in model.parameters()]))
    (norm, plain), (stepped_norm, stepped) = results
    assert stepped_norm == pytest.approx(norm, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(plain, stepped, strict=True))
