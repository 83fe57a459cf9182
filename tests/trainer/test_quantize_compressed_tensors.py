"""Models in the compressed-tensors format: what the format's own package makes of them, and what ours does."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from transformers import AutoModelForCausalLM

from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.compressed_tensors import SCHEMES, pack, save_compressed_tensors, unpack
from kubetune_trainer.model.weights import WeightFiles, load_model
from kubetune_trainer.quantize.layers import linear_layers
from kubetune_trainer.quantize.rounding import round_to_nearest
from tests.trainer.tiny import make_folder, random_tokens

SHAPE = {"hidden_size": 64, "intermediate_size": 96}


def write(folder: Path, scheme: str, *, dtype: torch.dtype = torch.float32, **more: object) -> Path:
    make_folder(folder / "model", dtype=dtype, **SHAPE)
    save_compressed_tensors(folder / "model", folder / scheme, scheme=scheme, group_size=32, **more)
    return folder / scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_and_our_own_loader_compute_the_same_with_it(
    tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    folder = write(tmp_path, scheme, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder, dtype=torch.float32)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        wanted, found = theirs(tokens).logits, ours(tokens)
        source = load_model(tmp_path / "model", dtype=torch.float32)(tokens)
    # An activation that lies on the edge between two integers may fall to either side.
    assert (found - wanted).norm() / wanted.norm() < (2e-2 if scheme == "Int8DynamicActivation" else 1e-5)
    assert 1e-4 < (found - source).norm() / source.norm() < (0.8 if scheme == "Int4WeightOnly" else 0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_in_shards_says_the_same(tmp_path: Path, scheme: str) -> None:
    whole = write(tmp_path, scheme)
    save_compressed_tensors(
        tmp_path / "model", tmp_path / "shards", scheme=scheme, group_size=32, max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    with (
        WeightFiles(whole, tied_embeddings=False) as one,
        WeightFiles(tmp_path / "shards", tied_embeddings=False) as many,
    ):
        assert sorted(one.names) == sorted(many.names)
        for name, tensor in one.items():
            assert torch.equal(tensor, many.read(name, rows=slice(None)))


def test_four_bits_take_four_bits(tmp_path: Path) -> None:
    folder = write(tmp_path, "Int4WeightOnly", dtype=torch.bfloat16)
    with WeightFiles(folder, tied_embeddings=False) as files:
        stored = {name: files.read(name, rows=slice(None)).nbytes for name in files.names}
    linear = sum(layer.weight.numel() for layer in linear_layers(load_model(tmp_path / "model").config).values())
    assert sum(size for name, size in stored.items() if name.endswith("weight_packed")) == linear // 2
    assert sum(size for name, size in stored.items() if name.endswith("weight_scale")) == linear // 32 * 2


def test_weights_that_are_rounded_already_are_taken_as_they_are(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", **SHAPE)
    name = "model.layers.1.mlp.up_proj"
    given = round_to_nearest(torch.ones(96, 64), bits=4, group_size=32)
    save_compressed_tensors(
        tmp_path / "model", tmp_path / "given", scheme="Int4WeightOnly", group_size=32, rounded={name: given}
    )
    model = load_model(tmp_path / "given", dtype=torch.float32)
    assert torch.equal(model.get_submodule(name).weight, given.values)
    assert not torch.equal(model.get_submodule(name.replace(".1.", ".0.")).weight, given.values)


@pytest.mark.parametrize(("bits", "columns", "words"), [(4, 64, 8), (4, 60, 8), (8, 64, 16), (8, 63, 16)])
def test_packing_is_undone_by_unpacking(bits: int, columns: int, words: int) -> None:
    half = 2 ** (bits - 1)
    drawn = torch.randint(-half, half, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack(drawn, bits=bits)
    assert packed.shape == (5, words)
    assert torch.equal(packed, pack_to_int32(drawn, bits))
    assert torch.equal(unpack(packed, bits=bits, columns=columns), drawn)


def test_rows_that_groups_do_not_divide_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", hidden_size=64, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj has 80, got 32"):
        save_compressed_tensors(tmp_path / "model", tmp_path / "out", scheme="Int4WeightOnly", group_size=32)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_quantized_in_another_way_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "Int8WeightOnly")
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="none of those that can be loaded"):
        load_model(folder)
