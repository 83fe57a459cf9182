"""An output takes the place of the one that lies in its folder: nothing of that is left, nor anything else touched."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import save_file

from kubetune_trainer import storage
from kubetune_trainer.config import FineTuneConfig, S3Storage, load_config
from kubetune_trainer.errors import ConfigError, DataError, StorageError
from kubetune_trainer.export.digest import folder_digest
from kubetune_trainer.export.store import check_places, store_output
from kubetune_trainer.model import load_model
from kubetune_trainer.model_files import find_model
from kubetune_trainer.storage import LocalStore, Store, download_tree, open_store
from kubetune_trainer.verify import verify
from tests.recipes.tiny import write_config
from tests.s3 import endpoint_of, s3_server
from tests.trainer.tiny import make_folder

BUCKET = "team"
OWN = {
    "README.md", "LICENSE", "notes.txt", "my.safetensors", "eval.json", "deep/config.json", "deep/model.safetensors",
    "model.gguf/note",
}  # fmt: skip
"""What is nobody's but the user's, or a folder."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as server:
        yield endpoint_of(server)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """A folder's URI, and how it is reached."""
    if request.param == "file":
        return f"file://{tmp_path}/place", None
    url = request.getfixturevalue("endpoint")
    for name, value in {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "password"}.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    storage._client.cache_clear()
    return f"s3://{BUCKET}/{tmp_path.name}/place", S3Storage(endpoint=url, region="us-east-1")


def config_of(tmp_path: Path, *outputs: dict[str, Any], s3: Any = None, **changes: Any) -> FineTuneConfig:
    config = load_config(write_config(tmp_path / "run.yaml", outputs=list(outputs), **changes))
    assert isinstance(config, FineTuneConfig)
    return config.model_copy(update={"storage": config.storage.model_copy(update={"s3": s3})})


def store(tmp_path: Path, folder: Path, uri: str, *, s3: Any = None, type: str = "HuggingFace") -> None:  # noqa: A002
    config = config_of(tmp_path, {"name": "merged", "type": type, "uri": uri}, s3=s3)
    found = store_output(config.outputs[0], folder, config=config)
    lineage = {"outputs": [found.told()], "output": "merged", "files": dict(found.files)}
    open_store(uri, s3=s3).write_bytes("lineage.json", json.dumps(lineage).encode())


def names(target: Store) -> set[str]:
    return {info.path for info in target.list()}


def with_tokenizer(folder: Path, **changes: Any) -> Path:
    make_folder(folder, **changes)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def other_model(folder: Path) -> Path:
    """The same names and shapes as `with_tokenizer` has, other weights, in one file."""
    with_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32)
    save_file({name: tensor * 2 for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def assert_loads(target: Store, source: Path, local: Path) -> None:
    download_tree(target, "", local)
    found, wanted = (load_model(folder, dtype=torch.float32).state_dict() for folder in (local, source))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_a_model_in_one_file_is_not_read_by_the_index_of_an_earlier_one(tmp_path: Path, place: tuple[str, Any]) -> None:
    uri, s3 = place
    earlier, later = with_tokenizer(tmp_path / "earlier", shard="20KB"), other_model(tmp_path / "later")
    (earlier / "chat_template.jinja").write_text("earlier")
    store(tmp_path, earlier, uri, s3=s3)
    target = open_store(uri, s3=s3)
    for path in OWN:
        target.write_bytes(path, b"mine")
    assert "model.safetensors.index.json" in names(target)
    store(tmp_path, later, uri, s3=s3)
    assert names(target) == {path.name for path in later.iterdir()} | {"lineage.json"} | OWN
    assert {target.read_bytes(path) for path in OWN} == {b"mine"}
    assert_loads(target, later, tmp_path / "back")
    store(tmp_path, earlier, uri, s3=s3)
    assert names(target) == {path.name for path in earlier.iterdir()} | {"lineage.json"} | OWN
    assert_loads(target, earlier, tmp_path / "again")


def test_an_output_of_another_type_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/place"
    files = {
        "HuggingFace": {"config.json", "model.safetensors", "vocab.json", "merges.txt", "generation_config.json"},
        "PEFT": {"adapter_config.json", "adapter_model.safetensors"},
        "ExecuTorch": {"config.json", "tokenizer.json", "model.pte"},
        "CompressedTensors": {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"},
    }
    for type_ in (*files, *reversed(files)):
        folder = tmp_path / type_
        folder.mkdir(exist_ok=True)
        for name in files[type_]:
            (folder / name).write_text(type_)
        options = {"scheme": "Int4WeightOnly"} if type_ == "CompressedTensors" else {}
        config = config_of(tmp_path, {"name": "merged", "type": type_, "uri": uri, **options}, tuning="LoRA")
        stored = store_output(config.outputs[0], folder, config=config)
        assert names(open_store(uri)) == files[type_]
        assert folder_digest(tmp_path / "place")[0] == stored.digest


def broken_off(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Lets this many changes of stored files through, and no more."""
    left = [after]

    def counted(change: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if not left[0]:
                raise StorageError("broken off")
            left[0] -= 1
            return change(*arguments)

        return run

    for name in ("upload", "delete", "delete_tree", "write_bytes"):
        monkeypatch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))


@pytest.mark.parametrize("shards", [("20KB", "5GB"), ("5GB", "20KB"), ("20KB", "20KB")], ids=" to ".join)
def test_what_breaks_off_is_no_model_and_no_output(tmp_path: Path, shards: tuple[str, str]) -> None:
    uri = f"file://{tmp_path}/place"
    earlier, later = (with_tokenizer(tmp_path / f"as {number}", shard=shard) for number, shard in enumerate(shards))
    target = open_store(uri)
    for after in range(100):
        store(tmp_path, earlier, uri)
        with pytest.MonkeyPatch.context() as patch:
            broken_off(patch, after=after)
            try:
                store(tmp_path, later, uri)
            except StorageError:
                pass
            else:
                break
        if names(target) == {path.name for path in later.iterdir()}:
            continue  # whole, but for the lineage
        if after == 0:
            assert verify(target)[1] == [], "the earlier output is untouched"
            continue
        with pytest.raises(DataError, match=r"no lineage\.json that says its digest"):
            verify(target)
        if after > 1:
            with pytest.raises(DataError, match=r"config\.json is missing"):
                find_model(uri, s3=None)
    assert after > 5
    assert verify(target)[1] == []


def test_a_folder_is_of_one_output_and_not_one_that_the_run_reads(tmp_path: Path) -> None:
    merged, edge = {"name": "merged", "type": "HuggingFace"}, {"name": "edge", "type": "ExecuTorch"}
    check_places(config_of(tmp_path, merged, edge, {"name": "third", "type": "HuggingFace", "uri": "s3://team/third"}))
    with pytest.raises(ConfigError, match=r"run: output edge: uri must be a folder of its own, got s3://a/b of output"):
        check_places(config_of(tmp_path, {**merged, "uri": "s3://a/b"}, {**edge, "uri": "s3://a/b/"}))
    config = config_of(tmp_path, merged)
    assert config.model.uri is not None
    at_model = {**merged, "uri": config.model.uri.location}
    with pytest.raises(ConfigError, match=r"output merged: uri must be a folder of its own, got .* of model"):
        check_places(config_of(tmp_path, at_model))
    first = {"adapter": {"uri": {"location": "s3://team/adapter/"}}}
    with pytest.raises(ConfigError, match=r"got s3://team/adapter of lora\.adapter"):
        check_places(config_of(tmp_path, {**merged, "uri": "s3://team/adapter"}, tuning="LoRA", lora=first))
