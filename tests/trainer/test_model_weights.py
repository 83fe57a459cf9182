"""Weights come out of a folder as they went in, and a damaged folder is named for what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kubetune_trainer.errors import DataError
from kubetune_trainer.model import load_model
from tests.trainer.tiny import make_folder, random_tokens


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_folder_is_loaded_whole_or_sharded(tmp_path: Path, shard: str) -> None:
    reference = make_folder(tmp_path, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard != "5GB")
    model = load_model(tmp_path, dtype=torch.float32)
    wanted = reference.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in wanted.items()
    }
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_weights_are_cast_to_the_type_that_is_asked_for(tmp_path: Path) -> None:
    reference = make_folder(tmp_path)
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.norm.weight, reference.model.norm.weight.bfloat16())


def test_training_a_model_leaves_the_file_that_its_weights_are_mapped_from_as_it_is(tmp_path: Path) -> None:
    make_folder(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_model(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert any(parameter.any() for parameter in load_model(tmp_path, dtype=torch.float32).parameters())


def test_leftovers_of_old_versions_are_passed_over(tmp_path: Path) -> None:
    reference = make_folder(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        logits = load_model(tmp_path, dtype=torch.float32)(tokens)
        torch.testing.assert_close(logits, reference(tokens).logits, atol=1e-5, rtol=0)


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_inside_the_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _change(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _index_of_a_missing_file(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _index_of_a_missing_tensor(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    weight_map["model.extra.weight"] = "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model.safetensors is not a whole safetensors file": _cut,
    "model.safetensors is not a safetensors file: its header cannot be read": _cut_inside_the_header,
    "model.safetensors is not a safetensors file": _empty,
    "neither model.safetensors nor model.safetensors.index.json is there": _remove,
    "is missing tensors: model.layers.1.mlp.up_proj.weight": _change(
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")
    ),
    "has unexpected tensors: model.layers.0.self_attn.q_norm.weight": _change(
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    ),
    "model.norm.weight in model.safetensors must have the shape (32,) that config.json asks for, got (31,)": _change(
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})
    ),
    "model-00002-of-00002.safetensors is missing": _index_of_a_missing_file,
    "puts model.extra.weight into model.safetensors, which does not have it": _index_of_a_missing_tensor,
    "model.safetensors.index.json has no weight_map": _index_without_map,
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_named_for_what_is_wrong(
    tmp_path: Path, message: str, damage: Callable[[Path], None]
) -> None:
    make_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
