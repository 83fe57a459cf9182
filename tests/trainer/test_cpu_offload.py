"""With cpu_offload every weight is FSDP's to keep in host memory, and so is what is made of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from kubetune_trainer.lora import apply_lora, init_lora
from kubetune_trainer.model import Decoder, build_model, load_weights, read_config
from kubetune_trainer.optim import build_optimizer
from kubetune_trainer.parallel import build_mesh, offload_policy, parallelize
from tests.trainer.parallel_ranks import NUM_ROWS, train
from tests.trainer.tiny import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    make_folder(folder)
    return folder


def made(folder: Path, *, cpu_offload: bool) -> Decoder:
    """A small model with adapters, which would be whole on each rank."""
    model = build_model(read_config(folder))
    apply_lora(model, rank=2, alpha=4)
    parallelize(model, precision="FP32", cpu_offload=cpu_offload, mesh=build_mesh("cpu", num_ranks=1))
    model.to_empty(device="cpu")
    load_weights(model, folder)
    init_lora(model, seed=5)
    return model


def policies(model: Decoder) -> list[OffloadPolicy]:
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [group.offload_policy for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]


@pytest.mark.usefixtures("world")
def test_every_group_of_weights_has_the_policy_frozen_ones_too(folder: Path) -> None:
    plain, offloaded = made(folder, cpu_offload=False), made(folder, cpu_offload=True)
    assert not policies(plain), "one rank alone goes without"
    assert {type(policy) for policy in policies(offloaded)} == {CPUOffloadPolicy}
    assert all(isinstance(weight, DTensor) for weight in offloaded.parameters())


def test_memory_is_pinned_for_cuda_alone() -> None:
    assert offload_policy("cuda") == CPUOffloadPolicy(pin_memory=True)
    assert offload_policy("cpu") == CPUOffloadPolicy(pin_memory=False)


@pytest.mark.usefixtures("world")
def test_losses_and_norms_are_those_of_a_model_that_is_whole_bit_for_bit(folder: Path) -> None:
    rows = slice(0, NUM_ROWS)
    model = made(folder, cpu_offload=True)
    assert train(model, rows=rows) == train(made(folder, cpu_offload=False), rows=rows)


@pytest.mark.usefixtures("world")
def test_gradients_and_the_optimizers_state_lie_where_the_weights_lie(folder: Path) -> None:
    model = made(folder, cpu_offload=True)
    optimizer = build_optimizer(model, SimpleNamespace(learning_rate=0.01, weight_decay=0.0))
    tokens = torch.arange(12)[None]
    model(tokens, labels_BT=tokens).backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.grad.to_local().device for weight in trained} == {torch.device("cpu")}
    optimizer.step()
    assert {optimizer.state[weight]["exp_avg"].to_local().device for weight in trained} == {torch.device("cpu")}
