"""A checkpoint is complete or it does not exist, whatever the store does meanwhile."""

import json
import re
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


def saved(store: FolderStore, world: World, tmp_path: Path, *steps: int) -> Checkpointer:
    """A run that has saved checkpoints of some steps."""
    saver = checkpointer(store, world, tmp_path, keep=3, mode="Sync")
    for step in steps:
        saver.save(step, *trained(steps=step))
    return saver


def told(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings that were reported."""
    events = map(json.loads, capfd.readouterr().out.splitlines())
    return [event["message"] for event in events if event["event"] == "warning"]


@pytest.mark.parametrize(
    "damage",
    [
        ("__0_0.distcp", lambda whole: whole[:100], r"__0_0\.distcp has 100 bytes of \d+"),
        ("__0_0.distcp", lambda whole: whole + b"x", r"__0_0\.distcp has \d+ bytes of \d+"),
        (".metadata", lambda _: b"", r"\.metadata has 0 bytes of \d+"),
        ("trainer.json", lambda _: None, r"trainer\.json is missing"),
        ("COMPLETE", lambda whole: whole[:10], "COMPLETE is not what was written"),
    ],
    ids=["cut", "longer", "empty", "missing", "marker"],
)
def test_a_damaged_checkpoint_is_passed_over(
    store: FolderStore,
    world: World,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: tuple[str, Callable[[bytes], bytes | None], str],
) -> None:
    name, content, problem = damage
    saved(store, world, tmp_path, 1, 2)
    path = store.root / "step-2" / name
    if (damaged := content(path.read_bytes())) is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    told(capfd)
    assert find_checkpoint(store) == "step-1"
    [warning] = told(capfd)
    assert re.fullmatch(rf"checkpoint file://.*/step-2 is damaged and passed over: {problem}", warning)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_begin_anew(
    store: FolderStore, world: World, tmp_path: Path
) -> None:
    saved(store, world, tmp_path, 1, 2)
    for step in (1, 2):
        (store.root / f"step-{step}" / "trainer.json").unlink()
    with pytest.raises(DataError, match=r"can be used: all are damaged, the oldest because trainer\.json is missing"):
        find_checkpoint(store)


def test_one_that_was_passed_over_is_none_while_training_writes_it_again(
    store: FolderStore, world: World, tmp_path: Path
) -> None:
    saved(store, world, tmp_path, 1, 2)
    shard = store.root / "step-2" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    model, optimizer = trained(seed=9)
    resumed = load_checkpoint(store, "step-1", model=model, optimizer=optimizer, scratch=tmp_path / "scratch")
    saver = checkpointer(store, world, tmp_path, keep=1)
    saver.start_from(resumed)
    assert complete_steps({entry.path for entry in store.list()}) == [1]
    store.fault = unavailable(path="step-2/trainer.json")  # killed in the middle
    saver.save(2, *trained(steps=2))
    with pytest.raises(StorageError):
        saver.finish()
    assert find_checkpoint(store) == "step-1"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json"])
def test_a_file_that_cannot_be_read_is_named_with_its_checkpoint(
    store: FolderStore, world: World, tmp_path: Path, name: str
) -> None:
    saved(store, world, tmp_path, 1)
    path = store.root / "step-1" / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert find_checkpoint(store) == "step-1", "its size is what it was"
    model, optimizer = trained(seed=9)
    problem = rf"checkpoint file://.*/step-1 cannot be read: {re.escape(name)} is damaged \(\w+: "
    with pytest.raises(DataError, match=problem) as caught:
        load_checkpoint(store, "step-1", model=model, optimizer=optimizer, scratch=tmp_path / "scratch")
    assert "config" not in caught.value.hint


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_store_that_is_away_while_a_checkpoint_is_loaded_is_worth_another_attempt(
    store: FolderStore, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    saved(store, world, tmp_path, 1)
    download = store.download

    def away(path: str, local: Path) -> None:
        if path.endswith(name):
            raise StorageError("connection refused")
        download(path, local)

    monkeypatch.setattr(store, "download", away)
    model, optimizer = trained(seed=9)
    with pytest.raises(StorageError, match="connection refused"):
        load_checkpoint(store, "step-1", model=model, optimizer=optimizer, scratch=tmp_path / "scratch")


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
