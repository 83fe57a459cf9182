"""Rounding a whole model block by block, on data."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.data.store import Row
from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.model.blockwise import BlockwiseLogits
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import load_model
from kubetune_trainer.quantize.calibrate import calibrate, observe_inputs
from kubetune_trainer.quantize.layers import linear_layers
from kubetune_trainer.quantize.verify import Logits, compare
from tests.recipes.tiny import write_model
from tests.trainer.tiny import TINY


def batches(*lengths: int, seed: int = 0, multiple: int = 8) -> list[Batch]:
    """A row each, of two samples that must not see each other, of words that repeat."""
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        tokens = draw.choice(40, size=length).astype(np.int32)
        documents = (np.arange(length) >= length // 2).astype(np.int32)
        labels = np.append(tokens[1:], -100).astype(np.int32)
        row = Row(tokens=tokens, labels=labels, documents=documents)
        made.append(collate([row], pad_id=1, multiple=multiple))
    return made


def logits_of(model: Decoder) -> Logits:
    return lambda batch: model(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("calibrate") / "model", dtype=torch.bfloat16)


def test_block_by_block_the_logits_are_those_of_the_whole_model(folder: Path) -> None:
    rows = batches(24, 17, 40)
    blockwise, whole = BlockwiseLogits(folder, rows), logits_of(load_model(folder, dtype=torch.float32))
    for batch in rows:
        torch.testing.assert_close(blockwise(batch), whole(batch).detach(), rtol=1e-4, atol=1e-4)


def test_calibrated_weights_are_nearer_to_the_model_than_the_nearest_values(folder: Path, tmp_path: Path) -> None:
    rounded = calibrate(folder, batches(*[96] * 24), bits=4, group_size=32, folder=tmp_path / "rounded")
    assert set(rounded) == set(linear_layers(load_model(folder).config))
    assert len(rounded) == 14
    source = logits_of(load_model(folder, dtype=torch.float32))
    divergence = {}
    for name, given in (("nearest", None), ("gptq", rounded)):
        save_compressed_tensors(folder, tmp_path / name, scheme="Int4WeightOnly", group_size=32, rounded=given)
        artifact = logits_of(load_model(tmp_path / name, dtype=torch.float32))
        divergence[name] = compare(source, artifact, batches(*[96] * 8, seed=1)).mean_kl
    assert divergence["gptq"] < 0.8 * divergence["nearest"]


def test_what_is_rounded_is_what_is_loaded(folder: Path, tmp_path: Path) -> None:
    rounded = calibrate(folder, batches(32), bits=4, group_size=32, folder=tmp_path / "rounded")
    save_compressed_tensors(folder, tmp_path / "int4", scheme="Int4WeightOnly", group_size=32, rounded=rounded)
    loaded = load_model(tmp_path / "int4", dtype=torch.float32)
    for name in rounded:
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.weight, rounded[name].values)
        assert torch.equal(layer.weight_scale, rounded[name].scales)
    with pytest.raises(KeyError):
        rounded["lm_head"]


def test_padding_changes_nothing(folder: Path, tmp_path: Path) -> None:
    steps = [0, 0]
    found = []
    for number, multiple in enumerate((1, 64)):
        rows = batches(33, 21, multiple=multiple)
        place = tmp_path / str(multiple)
        found.append(
            calibrate(
                folder,
                rows,
                bits=8,
                group_size=None,
                folder=place,
                done=lambda n=number: steps.__setitem__(n, steps[n] + 1),
            )
        )
    for name in found[0]:
        same = (found[0][name].values == found[1][name].values).float().mean()
        assert same > 0.99, name  # sums in another order may tip a value over
    assert steps == [14, 14]


def test_experts_are_rounded_by_the_tokens_that_chose_them(tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = TINY | {"num_local_experts": 40, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    MixtralForCausalLM(MixtralConfig(**shape)).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    found = []
    for multiple in (1, 64):
        rows = batches(33, 21, multiple=multiple)
        folder = tmp_path / str(multiple)
        found.append(calibrate(tmp_path / "moe", rows, bits=8, group_size=None, folder=folder))
    layers = set(linear_layers(load_model(tmp_path / "moe").config))
    assert set(found[0]) == set(found[1])
    assert len(set(found[0])) < len(layers), "some expert is chosen by no token"
    assert not any(name.endswith(".gate") for name in layers)
    for name in found[0]:
        assert (found[0][name].values == found[1][name].values).float().mean() > 0.99, name
    save_compressed_tensors(
        tmp_path / "moe", tmp_path / "int8", scheme="Int8WeightOnly", group_size=32, rounded=found[0]
    )
    told = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert told["ignore"] == ["lm_head", r"re:.*\.gate$"]
    source, artifact = (logits_of(load_model(tmp_path / name, dtype=torch.float32)) for name in ("moe", "int8"))
    assert compare(source, artifact, batches(24)).mean_kl < 1e-2


def test_layers_with_one_input_share_one_matrix_of_its_products() -> None:
    first, second, third = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(3, 2)
    rows = batches(5, 8)
    inputs = {id(batch): torch.randn(1, 8, 4) for batch in rows}

    def passes() -> Iterator[Batch]:
        for batch in rows:
            x_BTI = inputs[id(batch)]
            second(x_BTI)
            third(first(x_BTI))
            yield batch

    found = observe_inputs({"first": first, "second": second, "third": third}, passes())
    x_NI = torch.cat([inputs[id(rows[0])][0, :5], inputs[id(rows[1])][0]])
    torch.testing.assert_close(found["first"], x_NI.T @ x_NI / 13)
    assert found["first"] is found["second"]
    torch.testing.assert_close(found["third"], first(x_NI).T @ first(x_NI) / 13)
    assert not first._forward_pre_hooks
