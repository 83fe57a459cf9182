"""Schedules, decay and clipping do what their names say."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kubetune_trainer import optim
from kubetune_trainer.distributed import join_world
from kubetune_trainer.lora import apply_lora
from kubetune_trainer.optim import build_optimizer, clip_grad_norm, learning_rate_factor, square_of


@pytest.mark.parametrize(
    ("scheduler", "wanted"),
    [
        ("Constant", [0.5, 1, 1, 1, 1, 1]),
        ("Linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("Cosine", [0.5, 1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
    ],
)
def test_the_learning_rate_warms_up_and_falls(scheduler: str, wanted: list[float]) -> None:
    factors = [learning_rate_factor(s, scheduler=scheduler, warmup_steps=2, total_steps=6) for s in range(6)]
    assert factors == pytest.approx(wanted)


@pytest.mark.parametrize("scheduler", ["Constant", "Linear", "Cosine"])
def test_a_run_that_is_all_warm_up_never_divides_by_zero(scheduler: str) -> None:
    factors = [learning_rate_factor(s, scheduler=scheduler, warmup_steps=9, total_steps=3) for s in range(3)]
    assert factors == pytest.approx([1 / 9, 2 / 9, 3 / 9])
    assert learning_rate_factor(0, scheduler=scheduler, warmup_steps=0, total_steps=1) == 1.0


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].requires_grad_(requires_grad=False)
    optimizer = build_optimizer(model, SimpleNamespace(learning_rate=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"0.weight"}
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"] * (1 - 0.1 * 0.5))


def test_the_second_matrices_of_adapters_learn_faster_by_the_ratio_and_nothing_else_does() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(model, rank=2, alpha=4, has_magnitude=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training = SimpleNamespace(learning_rate=0.01, weight_decay=0.0)
    optimizer = build_optimizer(model, training, learning_rate_ratio=16.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {name: (before[name] - weight).abs().max().item() for name, weight in model.named_parameters()}
    slow = pytest.approx(0.01, rel=1e-4)  # the first step of Adam is as long as its learning rate
    assert moved == {
        "0.weight": 0, "0.bias": 0, "0.lora_A.weight": slow, "0.lora_magnitude_vector": slow,
        "0.lora_B.weight": pytest.approx(0.16, rel=1e-4),
    }  # fmt: skip


@pytest.mark.parametrize(("max_norm", "wanted"), [(1.0, 1.0), (100.0, 5.0)])
def test_clipping_bounds_the_norm_and_returns_what_it_was(max_norm: float, wanted: float) -> None:
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    norm = clip_grad_norm(weights, max_norm)
    assert norm.dtype == torch.float64
    assert norm.item() == 5.0
    assert math.hypot(weights[0].grad.item(), weights[1].grad.item()) == pytest.approx(wanted, rel=1e-5)


def test_a_norm_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = torch.randn(7, 9, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(optim, "PIECE_NUMBERS", 10)
    assert square_of(gradient).item() == pytest.approx(gradient.double().square().sum().item(), rel=1e-12)
    assert square_of(gradient[:0]).item() == 0.0, "a rank without rows of a weight"


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, math.nan])
    assert math.isnan(clip_grad_norm([weight], 1.0).item())


def test_sharded_weights_are_updated_without_dtensors_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    updated: list[Tensor] = []
    kernel = torch._fused_adamw_

    def watched(weights: list[Tensor], *lists: list[Tensor], **settings: object) -> None:
        updated.extend(tensor for tensors in (weights, *lists) for tensor in tensors)
        kernel(weights, *lists, **settings)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    with join_world():
        model = nn.Linear(2, 4, bias=False)
        shard = DTensor.from_local(model.weight.detach().clone(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.weight = nn.Parameter(shard)
        before = model.weight.to_local().clone()
        optimizer = build_optimizer(model, SimpleNamespace(learning_rate=0.1, weight_decay=0.0))
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert not [tensor for tensor in updated if isinstance(tensor, DTensor)]
        torch.testing.assert_close(model.weight.to_local(), before - 0.1)
        assert isinstance(optimizer.state[model.weight]["exp_avg"], DTensor), "checkpoints know it as sharded"
