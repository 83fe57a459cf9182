"""A model kept in fp32 computes in bf16 what it computes when it is kept in bf16, and keeps no copy for backward."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule

from kubetune_trainer.model import Decoder, build_model, load_model, read_config
from kubetune_trainer.model import linear as module
from kubetune_trainer.model.linear import Linear
from kubetune_trainer.model.offload import ActivationOffload
from kubetune_trainer.model.recompute import made_again, recomputed
from kubetune_trainer.parallel import CONVERTING, build_mesh, compute_dtype, needs_no_conversion, parallelize
from tests.trainer.families import FAMILIES, configs, make_folder
from tests.trainer.tiny import make_folder as make_tiny
from tests.trainer.tiny import random_tokens

ONCE: Any = {"derandomize": True, "database": None, "deadline": None, "phases": [Phase.generate]}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, suppress_health_check=list(HealthCheck), **ONCE)
@given(data=st.data())
def test_loss_and_gradients_are_those_of_weights_in_bf16(family: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name), family, data.draw(configs(family)), dtype=torch.bfloat16)
        kept, rounded = (load_model(Path(name), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert needs_no_conversion(kept, torch.bfloat16, by=CONVERTING)
    assert not needs_no_conversion(kept, torch.bfloat16, by=())
    kept.model.embed_tokens.computes_in = torch.bfloat16
    assert loss_of(kept) == loss_of(rounded)
    for (name, found), wanted in zip(kept.named_parameters(), rounded.parameters(), strict=True):
        assert found.grad is not None, name
        assert wanted.grad is not None, name
        assert found.grad.dtype == torch.float32
        # What a table is used for twice is added up in fp32 here, and what Gemma's norms sum is not rounded.
        difference = (found.grad - wanted.grad.float()).norm()
        assert difference <= 2**-7 * wanted.grad.float().norm() + 1e-6, name


def loss_of(model: Decoder) -> float:
    tokens = random_tokens(2, 24)
    loss = model(tokens, labels_BT=tokens.roll(-1, dims=1)) / tokens.numel()
    loss.backward()
    return loss.item()


def test_backward_converts_a_weight_again_and_keeps_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[torch.dtype] = []

    def watched(weight: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        def made() -> torch.Tensor:
            again.append(weight.dtype)
            return make()

        return made_again(weight, made)

    monkeypatch.setattr(module, "made_again", watched)
    torch.manual_seed(0)
    layer, x = Linear(8, 4), torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    out: Any = recomputed(layer, x, mode="None")
    assert not again
    out.sum().backward()
    assert again == [torch.bfloat16]
    wanted = x.detach().sum(dim=0).expand(4, 8).float()
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=2**-7, atol=0)
    assert layer.bias.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.detach().bfloat16().sum(dim=0).expand(3, 8), rtol=2**-7, atol=2**-7)


def test_a_layer_of_somebody_else_asks_for_conversion() -> None:
    model = torch.nn.Sequential(Linear(4, 4), torch.nn.Linear(4, 4))
    assert needs_no_conversion(model, torch.float32, by=())
    assert not needs_no_conversion(model, torch.bfloat16, by=CONVERTING)


@pytest.mark.usefixtures("world")
@pytest.mark.skipif(compute_dtype("cpu") != torch.bfloat16, reason="needs a CPU with bf16 arithmetic")
def test_one_rank_has_fsdp_only_where_copies_of_converted_weights_would_be_kept(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    kept: dict[str, dict[str, Any]] = {
        "compiled": {"is_compiled": True},
        "offloaded": {"activation_offload": ActivationOffload(torch.device("cpu"))},
    }
    for precision, name in [(p, n) for p in ("FP32", "BF16", "BF16Mixed") for n in ("plain", *kept)]:
        model = build_model(read_config(tmp_path))
        parallelize(model, precision=precision, mesh=build_mesh("cpu", num_ranks=1), **kept.get(name, {}))
        assert isinstance(model, FSDPModule) == (precision == "BF16Mixed" and name in kept), (precision, name)
