"""While a model writes, its layers take quicker ways; what they return, and the model afterwards, are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kubetune_trainer import load_model
from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.lora import apply_lora
from kubetune_trainer.model.decoding import FEW_TOKENS, _lay_side_by_side, decoding, linear
from kubetune_trainer.quantize.linear import IntegerLinear
from tests.trainer.tiny import make_folder, random_tokens

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = 64 * 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    make_folder(folder, dtype=torch.bfloat16, attention_bias=True, mlp_bias=True)
    return folder


@pytest.mark.parametrize("num_tokens", [1, 2, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("width", [40, 42], ids=["in pieces", "whole"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
def test_a_product_of_few_tokens_is_that_of_any_others_within_rounding(
    num_tokens: int, dtype: torch.dtype, tolerance: float, width: int, *, has_bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, width, bias=has_bias, dtype=dtype)
    x = torch.randn(num_tokens, 1, 96, dtype=dtype)
    with torch.no_grad():
        found = linear(x, layer.weight, layer.bias)
        wanted = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if has_bias else None)
    assert found.is_contiguous()
    # The sum is rounded before the bias too.
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 9), (2, 12)])
def test_logits_while_writing_are_those_of_other_times(
    folder: Path, dtype: torch.dtype, tolerance: float, shape: tuple[int, int]
) -> None:
    model, tokens = load_model(folder, dtype=dtype), random_tokens(*shape)
    with torch.no_grad():
        wanted = model(tokens)
        with decoding(model):
            assert model.model.layers[0].self_attn.fused is not None
            found = model(tokens)
    assert not torch.isnan(wanted).any()
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_a_model_that_has_written_is_what_it_was_and_lies_side_by_side(folder: Path) -> None:
    model, untouched = load_model(folder), load_model(folder)
    parameters = dict(model.named_parameters())
    with torch.inference_mode(), decoding(model):
        pass
    places = [weight.data_ptr() for weight in parameters.values()]
    with torch.inference_mode(), decoding(model):
        pass
    assert [weight.data_ptr() for weight in parameters.values()] == places, "it is moved once"
    layers = model.model.layers
    assert all(len({weight.untyped_storage().data_ptr() for weight in block.parameters()}) == 1 for block in layers)
    assert not any({"forward", "fused"} & vars(module).keys() for module in model.modules())
    assert dict(model.named_parameters()).keys() == untouched.state_dict().keys()
    for name, weight in untouched.named_parameters():
        assert model.get_parameter(name) is parameters[name]
        assert torch.equal(parameters[name], weight), name
    model(random_tokens(1, 4), labels_BT=random_tokens(1, 4)).backward()
    assert all(weight.grad is not None for weight in model.parameters()), "it can be trained"


def test_layers_with_adapters_are_left_as_they_are(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    apply_lora(model, rank=2, alpha=4, target_modules=["q_proj"])
    tokens = random_tokens(1, 3)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.weight.fill_(0.1)
        wanted = model(tokens)
        with decoding(model):
            assert model.model.layers[0].self_attn.fused is None
            torch.testing.assert_close(model(tokens), wanted, rtol=1e-5, atol=1e-5)


WIDE = {"hidden_size": 256, "intermediate_size": 192, "attention_bias": True}
"""All layers have a multiple of 64 rows, which the kernel for 4 bits wants."""


@pytest.mark.parametrize("changes", [WIDE, {}], ids=["wide", "odd"])
@pytest.mark.parametrize("scheme", ["Int8WeightOnly", "Int8DynamicActivation", "Int4WeightOnly"])
def test_integer_weights_are_read_side_by_side_and_say_the_same(
    tmp_path: Path, scheme: str, changes: dict[str, Any]
) -> None:
    make_folder(tmp_path / "source", dtype=torch.bfloat16, **changes)
    save_compressed_tensors(tmp_path / "source", tmp_path / "small", scheme=scheme, group_size=32 if changes else 16)
    model = load_model(tmp_path / "small", dtype=torch.bfloat16)
    exact = load_model(tmp_path / "small", dtype=torch.float32)
    integers = [layer for layer in model.modules() if isinstance(layer, IntegerLinear)]
    values = [layer.weight.clone() for layer in integers]
    places = []
    for shape in ((1, 1), (3, 1), (1, 9), (2, 12)):
        tokens = random_tokens(*shape)
        with torch.inference_mode():
            wanted, rounded = exact(tokens), model(tokens)
            with decoding(model):
                assert model.model.layers[0].self_attn.fused is not None
                found = model(tokens)
        # As near to the same integers computed in fp32 as bf16 comes without any of this.
        assert (found - wanted).norm() <= max(1.5 * (rounded - wanted).norm(), 2**-6 * wanted.norm())
        places.append([layer.weight.data_ptr() for layer in integers])
    assert places[0] == places[-1], "they are moved once"
    has_kernel = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
    is_packed = has_kernel and scheme == "Int4WeightOnly" and bool(changes)
    assert all((layer.packed is not None) == is_packed for layer in integers)
    assert all(torch.equal(layer.weight, value) for layer, value in zip(integers, values, strict=True))
    assert model.state_dict().keys() == load_model(tmp_path / "small").state_dict().keys()


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="needs a kernel that gives huge pages"
)
def test_huge_pages_are_asked_for_where_weights_are_written_from() -> None:
    weights = [nn.Parameter(torch.ones(LARGE // 4, dtype=torch.bfloat16)) for _ in range(2)]
    _lay_side_by_side(list(weights))
    # Whether there are any then is the kernel's affair: its memory may be in pieces.
    assert "hg" in flags_of_memory(weights[0].data_ptr())
    assert all(bool((weight == 1).all()) for weight in weights)


def flags_of_memory(address: int) -> list[str]:
    """Those of the mapping that the address is in."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(each, 16) for each in name.split("-"))
            is_there = begin <= address < end
        elif is_there and name == "VmFlags:":
            return rest.split()
    raise AssertionError("no mapping has this address")
