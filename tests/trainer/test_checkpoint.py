"""A checkpoint is complete or it does not exist, whatever the store does meanwhile."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kubetune_trainer import checkpoint as module
from kubetune_trainer.checkpoint import Checkpointer, complete_steps, find_checkpoint, load_checkpoint, prune
from kubetune_trainer.config import Checkpoint
from kubetune_trainer.distributed import World
from kubetune_trainer.errors import ConfigError, DataError, StorageError

RECORD = {"seed": 1, "configDigest": "d", "worldSize": 1}


class Entry(NamedTuple):
    path: str
    size: int


class FolderStore:
    """A folder as a store, with an object store's faults on demand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fault: Callable[[str], None] = lambda _path: None
        """Called with the path before each write; raises what should go wrong."""

    def uri(self, path: str = "") -> str:
        return f"file://{self.root}/{path}"

    def list(self, prefix: str = "") -> list[Entry]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        entries = (Entry(str(path.relative_to(self.root)), path.stat().st_size) for path in files)
        return [entry for entry in entries if entry.path.startswith(prefix)]

    def read_bytes(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write_bytes(self, path: str, data: bytes) -> None:
        self.fault(path)
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def upload(self, local: Path, path: str) -> None:
        self.write_bytes(path, local.read_bytes())

    def download(self, path: str, local: Path) -> None:
        local.write_bytes(self.read_bytes(path))

    def delete_tree(self, prefix: str) -> None:
        for entry in self.list(prefix):
            if entry.path == prefix or entry.path.startswith(f"{prefix}/"):
                (self.root / entry.path).unlink()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "checkpoints")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_PAUSE_SECONDS", 0.01)


def trained(seed: int = 0, *, steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model with a frozen part, and an optimizer that has stepped."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def checkpointer(store: Any, world: World, tmp_path: Path, **settings: Any) -> Checkpointer:
    return Checkpointer(
        store, settings=Checkpoint(**settings), world=world, scratch=tmp_path / "scratch", record=RECORD
    )


def unavailable(times: float = float("inf"), *, path: str = "") -> Callable[[str], None]:
    """A store that does not answer for a number of writes."""
    left = [times]

    def fault(written: str) -> None:
        if path in written and left[0] > 0:
            left[0] -= 1
            raise StorageError("connection refused")

    return fault


def test_a_checkpoint_brings_back_the_trained_weights_and_the_optimizer(
    store: FolderStore, world: World, tmp_path: Path
) -> None:
    model, optimizer = trained(steps=3)
    saver = checkpointer(store, world, tmp_path, every_steps=5)
    saver.save(5, model, optimizer)
    saved = model[1].weight.clone()
    for parameter in model.parameters():  # training goes on while it is written
        parameter.data.add_(1.0)
    saver.finish()

    other, other_optimizer = trained(seed=9)
    frozen = other[0].weight.clone()
    resumed = load_checkpoint(store, "step-5", model=other, optimizer=other_optimizer, scratch=tmp_path / "scratch")
    assert resumed.step == 5
    assert resumed.record["seed"] == 1
    assert torch.equal(other[1].weight, saved)
    assert torch.equal(other[0].weight, frozen), "frozen weights belong to the base model"
    mine, theirs = (o.state_dict()["state"][0] for o in (optimizer, other_optimizer))
    assert {key: value.tolist() for key, value in theirs.items()} == {
        key: value.tolist() for key, value in mine.items()
    }
    assert list((tmp_path / "scratch").iterdir()) == [], "scratch is left clean"


def test_a_checkpoint_with_another_shape_is_refused(store: FolderStore, world: World, tmp_path: Path) -> None:
    saver = checkpointer(store, world, tmp_path)
    saver.save(1, *trained())
    saver.finish()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(DataError, match="does not fit this run"):
        load_checkpoint(store, "step-1", model=model, optimizer=optimizer, scratch=tmp_path / "scratch")


def test_only_complete_checkpoints_are_found(store: FolderStore) -> None:
    assert find_checkpoint(store) is None
    for path in ("step-3/COMPLETE", "step-20/COMPLETE", "step-100/.metadata", "step-x/COMPLETE", "notes/COMPLETE"):
        store.write_bytes(path, b"{}")
    assert complete_steps({entry.path for entry in store.list()}) == [3, 20]
    assert find_checkpoint(store) == "step-20"


def test_a_checkpoint_itself_can_be_named_as_the_place_to_begin(store: FolderStore) -> None:
    store.write_bytes("COMPLETE", b"{}")
    assert find_checkpoint(store) == ""


def test_pruning_keeps_the_newest_and_never_touches_an_incomplete_newer_one(store: FolderStore) -> None:
    for step in (10, 20, 30, 40):
        store.write_bytes(f"step-{step}/COMPLETE", b"{}")
        store.write_bytes(f"step-{step}/__0_0.distcp", b"")
    store.write_bytes("step-15/__0_0.distcp", b"")
    store.write_bytes("step-50/__0_0.distcp", b"")
    prune(store, keep=2)
    assert {entry.path.split("/")[0] for entry in store.list()} == {"step-30", "step-40", "step-50"}


def test_pruning_removes_the_marker_first(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        store.write_bytes(f"step-{step}/COMPLETE", b"{}")
    removed: list[str] = []
    monkeypatch.setattr(store, "delete_tree", removed.append)
    prune(store, keep=1)
    assert removed == ["step-1/COMPLETE", "step-1"]


def test_keep_bounds_what_a_run_leaves(store: FolderStore, world: World, tmp_path: Path) -> None:
    saver = checkpointer(store, world, tmp_path, keep=2, mode="Sync")
    for step in (1, 2, 3, 4):
        saver.save(step, *trained())
    assert complete_steps({entry.path for entry in store.list()}) == [3, 4]


def test_a_store_that_is_away_for_a_while_is_tried_again(store: FolderStore, world: World, tmp_path: Path) -> None:
    store.fault = unavailable(3)
    saver = checkpointer(store, world, tmp_path)
    saver.save(7, *trained())
    saver.finish()
    assert find_checkpoint(store) == "step-7"


@pytest.mark.parametrize("part", ["distcp", ".metadata", "trainer.json", "COMPLETE"])
def test_a_checkpoint_whose_upload_is_cut_is_never_complete(
    store: FolderStore, world: World, tmp_path: Path, part: str
) -> None:
    saver = checkpointer(store, world, tmp_path)
    saver.save(1, *trained())
    saver.finish()
    store.fault = unavailable(path=part)
    saver.save(2, *trained())
    with pytest.raises(StorageError, match="step-2 could not be completed"):
        saver.finish()
    assert find_checkpoint(store) == "step-1"
    store.fault = unavailable(0)
    saver.save(3, *trained())
    saver.finish()
    assert find_checkpoint(store) == "step-3"


def test_a_truncated_file_keeps_a_checkpoint_from_being_completed(
    store: FolderStore, world: World, tmp_path: Path
) -> None:
    saver = checkpointer(store, world, tmp_path)
    saver.save(1, *trained())
    saver.finish()
    (store.root / "step-1" / "COMPLETE").unlink()
    shard = store.root / "step-1" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"lacks __0_0\.distcp"):
        module.complete(store, 1)


def test_a_permanent_refusal_is_not_tried_again(store: FolderStore, world: World, tmp_path: Path) -> None:
    tried = []

    def refuse(path: str) -> None:
        tried.append(path)
        raise ConfigError("no such bucket")

    store.fault = refuse
    saver = checkpointer(store, world, tmp_path)
    saver.save(1, *trained())
    with pytest.raises(StorageError):
        saver.finish()
    assert len(tried) == 1


def test_while_one_is_under_way_no_other_is_due_and_then_it_is(
    store: FolderStore, world: World, tmp_path: Path
) -> None:
    released = threading.Event()

    def hold(_path: str) -> None:
        released.wait(10)

    store.fault = hold
    saver = checkpointer(store, world, tmp_path, every_steps=2)
    assert [saver.due(step) for step in (1, 2, 3)] == [False, True, True]
    saver.save(2, *trained())
    saver.advance(saver.uploaded_step)
    assert [saver.due(step) for step in (3, 4, 5)] == [False, False, False]
    released.set()
    saver.wait()
    assert [saver.due(step) for step in (3, 5)] == [False, True], "the one of step 4 is taken late"


def test_a_stop_gives_up_the_one_under_way(store: FolderStore, world: World, tmp_path: Path) -> None:
    held, released = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        if path.startswith("step-2/"):
            held.set()
            released.wait(10)
            raise StorageError("connection refused")

    store.fault = hold
    saver = checkpointer(store, world, tmp_path)
    saver.save(2, *trained())
    held.wait(10)
    saver.save(3, *trained())
    released.set()
    saver.finish()
    assert find_checkpoint(store) == "step-3"


def test_seconds_make_a_checkpoint_due(
    store: FolderStore, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = checkpointer(store, world, tmp_path, every_seconds=600)
    assert not saver.due(3)
    later = module.time.monotonic() + 601
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    assert saver.due(3)


def test_trainer_json_tells_what_resuming_must_know(store: FolderStore, world: World, tmp_path: Path) -> None:
    saver = checkpointer(store, world, tmp_path)
    saver.save(4, *trained())
    saver.finish()
    record = json.loads(store.read_bytes("step-4/trainer.json"))
    assert {key: record[key] for key in ("step", *RECORD)} == {"step": 4, **RECORD}
    assert record["torchVersion"] == torch.__version__
