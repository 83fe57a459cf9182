"""Adapters over a base in NF4: the numbers of torchao and of peft, on any number of ranks, in half a byte a weight."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torchao.quantization import to_nf4
from transformers import AutoModelForCausalLM

from kubetune_trainer.config import Lora
from kubetune_trainer.errors import ConfigError
from kubetune_trainer.export import complete_weights, save_huggingface, trained_weights
from kubetune_trainer.export.peft import save_peft
from kubetune_trainer.lora import apply_lora, init_lora, lora_state_dict, packed_layers
from kubetune_trainer.model import Decoder, build_model, load_model, load_weights, read_config
from kubetune_trainer.model.adapter import save_merged
from kubetune_trainer.quantize import nf4
from tests.trainer.parallel_ranks import NUM_ROWS, train
from tests.trainer.qlora_ranks import RANK, run
from tests.trainer.tiny import make_folder, random_tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
SHAPES = [(192, 576), (576, 576), (64, 64), (3, 64), (1, 128), (100, 192)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    make_folder(folder / "model", **SHAPE)
    return folder


def adapted(folder: Path) -> Decoder:
    """The model on one device with adapters that already do something."""
    model = build_model(read_config(folder / "model"))
    apply_lora(model, rank=RANK, alpha=4, packs_base=True)
    model.to_empty(device="cpu")
    load_weights(model, folder / "model")
    init_lora(model, seed=5)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------ packed weights


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_are_those_of_torchao(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = nf4.Packed.of(weight)
    theirs = to_nf4(weight, 64, nf4.num_scalers(weight.numel()))
    assert torch.equal(packed.codes.flatten(), theirs.quantized_data)
    assert torch.equal(packed.dequantized(), theirs.get_original_weight())
    assert torch.equal(packed.dequantized(torch.bfloat16), theirs.get_original_weight().bfloat16())
    empty = nf4.Packed.empty(shape, device=torch.device("meta"))
    for name in ("codes", "scales", "factors", "mean"):
        mine, planned = getattr(packed, name), getattr(empty, name)
        assert (mine.shape, mine.dtype) == (planned.shape, planned.dtype), name


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 128)
    weight[2, 64:] = 0
    found = nf4.rounded_to_nf4(weight)
    assert found[2, 64:].abs().max() == 0
    assert found.isfinite().all()
    assert nf4.rounded_to_nf4(torch.zeros(2, 64)).abs().max() == 0


def test_backward_keeps_the_packed_weight_alone(folder: Path) -> None:
    layer = adapted(folder).model.layers[0].mlp.up_proj
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer.base(x).sum().backward()
    assert {tensor.dtype for tensor in kept if tensor.numel() >= 64 * 128 // 64} == {torch.uint8, torch.int8}
    weight = layer.packed.dequantized()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(3, 64), atol=1e-5, rtol=1e-5)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, hidden_size=64, intermediate_size=96)
    model = build_model(read_config(tmp_path))
    with pytest.raises(ConfigError, match=r"inputs are divisible by 64: model\.layers\.0\.mlp\.down_proj has 96"):
        apply_lora(model, rank=2, alpha=4, packs_base=True)
    assert "down_proj" not in str(apply_lora(model, rank=2, alpha=4, target_modules=["up_proj"], packs_base=True))


# ---------------------------------------------------------------------------------------------------- against peft


def test_logits_and_gradients_are_those_of_peft_on_the_dequantized_base(folder: Path) -> None:
    model = adapted(folder).train()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, layer in packed_layers(model).items():
            theirs.get_parameter(name).copy_(layer.packed.dequantized())
    config = peft.LoraConfig(r=RANK, lora_alpha=4, target_modules="all-linear")
    wrapped = peft.get_peft_model(theirs, config).train()
    mine = lora_state_dict(model)
    theirs_by_name = {
        name.removeprefix("base_model.model.").replace(".default.", "."): weight
        for name, weight in wrapped.named_parameters()
        if "lora_" in name
    }
    assert theirs_by_name.keys() == mine.keys()
    with torch.no_grad():
        for name, weight in theirs_by_name.items():
            weight.copy_(mine[name])
    tokens, labels = random_tokens(2, 20), random_tokens(2, 20, seed=3)
    torch.testing.assert_close(model(tokens), wrapped(tokens).logits, atol=1e-5, rtol=1e-5)
    (model(tokens, labels_BT=labels) / labels.numel()).backward()
    nn.functional.cross_entropy(wrapped(tokens).logits.flatten(0, 1), labels.flatten()).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, theirs_by_name[name].grad, atol=1e-5, rtol=1e-5)
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == mine.keys()


# ------------------------------------------------------------------------------------------------------- on ranks


@pytest.fixture(scope="module", params=[1, 2])
def results(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    multiprocessing.set_forkserver_preload(["torch._dynamo", "tests.trainer.qlora_ranks"])
    multiprocessing.start_processes(run, args=(request.param, folder), nprocs=request.param, start_method="forkserver")
    return torch.load(folder / f"qlora-{request.param}.pt")


@pytest.mark.parametrize("held", ["whole", "sharded"])
def test_training_does_not_depend_on_ranks_and_on_who_holds_the_base(
    folder: Path, results: dict[str, Any], held: str
) -> None:
    model = adapted(folder)
    losses, norms = train(model, rows=slice(0, NUM_ROWS))
    found = results[held]
    assert found["losses"] == pytest.approx(losses, rel=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    for name, tensor in trained_weights(model):
        torch.testing.assert_close(found["trained"][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("held", ["whole", "sharded"])
def test_a_rank_holds_its_rows_of_half_a_byte_a_weight(folder: Path, results: dict[str, Any], held: str) -> None:
    weights = sum(layer.in_features * layer.out_features for layer in packed_layers(adapted(folder)).values())
    share = results["ranks"] if held == "sharded" else 1
    assert results[held]["packed_bytes"] == weights * (1 / 2 + 1 / 64) / share


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("packed", [True, False])
def test_merged_weights_and_a_merged_adapter_are_the_same_model(folder: Path, tmp_path: Path, packed: bool) -> None:
    model, source = adapted(folder), folder / "model"
    complete = complete_weights(trained_weights(model), source_dir=source, lora_scale=4 / RANK, packed=packed)
    save_huggingface(complete, source_dir=source, target_dir=tmp_path / "merged")
    lora = Lora(rank=RANK, alpha=4)
    save_peft(lora_state_dict(model), target_dir=tmp_path / "adapter", lora=lora, base_model="base", packed=packed)
    save_merged(source, tmp_path / "adapter", tmp_path / "again")
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        wanted = model(tokens)
        merged, again = (load_model(tmp_path / name, dtype=torch.float32)(tokens) for name in ("merged", "again"))
    assert torch.equal(merged, again)
    difference = (merged - wanted).norm() / wanted.norm()
    assert (difference < 1e-5) if packed else (0.02 < difference < 0.5)
    peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tmp_path / "adapter"
    )
