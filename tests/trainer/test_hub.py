"""What is read from the Hub, held against huggingface_hub itself talking to a Hub in this process."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer import hub, storage
from kubetune_trainer.config import FineTuneConfig, HubModel, HubSource, SecretKey, Source
from kubetune_trainer.data.sources import open_source
from kubetune_trainer.errors import ConfigError, DataError, StorageError, TrainerError
from kubetune_trainer.hub import find_repo
from kubetune_trainer.model_files import fetch_model, locate_model
from kubetune_trainer.names import ENV_SCRATCH, ENV_SECRETS_DIR
from tests.recipes import tiny
from tests.trainer.hub_server import HubServer, Repo


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv(ENV_SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "PAUSES_SECONDS", (0.01, 0.01))
    storage.scratch_dir.cache_clear()
    with HubServer() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
    storage.scratch_dir.cache_clear()


def lines(first: int, last: int) -> bytes:
    return b"".join(json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(first, last))


def config(tmp_path: Path, **model: Any) -> FineTuneConfig:
    return FineTuneConfig.model_validate(
        {
            "run": {"name": "run", "directory": f"file://{tmp_path}/run", "cache": f"file://{tmp_path}/cache"},
            "model": model or {"hub": {"repo": "owner/tiny"}},
            "dataset": {"sources": [{"name": "data", "hub": {"repo": "owner/data"}}]},
            "training": {"max_steps": 1},
            "workspace": {"uri": f"file://{tmp_path}"},
        }
    )


def no_report(event: str, **fields: Any) -> None:
    pass


def test_a_branch_becomes_a_commit_and_files_come_from_that_commit(server: HubServer, tmp_path: Path) -> None:
    repo = Repo({"config.json": b"{}", "deep/file.txt": b"deep"})
    server.repos["models/owner/tiny"] = repo
    found = find_repo(HubModel(repo="owner/tiny"), kind="model")
    assert (found.commit, found.paths) == (repo.commit, ("config.json", "deep/file.txt"))
    assert found.download("deep/file.txt", tmp_path / "here").read_bytes() == b"deep"
    assert f"GET /owner/tiny/resolve/{repo.commit}/deep/file.txt" in server.requests


def test_a_model_is_brought_into_the_cache_once_and_without_what_is_not_needed(
    server: HubServer, tmp_path: Path
) -> None:
    folder = tiny.write_model(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.repos["models/owner/tiny"] = Repo({**files, "pytorch_model.bin": b"x", "onnx/model.onnx": b"x"})
    run = config(tmp_path)
    model = locate_model(run, report=no_report)
    assert model.commit == server.repos["models/owner/tiny"].commit
    local = fetch_model(model, s3=None)
    assert {path.name: path.read_bytes() for path in local.iterdir() if path.name != "COMPLETE"} == files
    server.requests.clear()
    assert locate_model(run, report=no_report) == model
    assert not [request for request in server.requests if "/resolve/" in request]


def test_a_copy_into_the_cache_that_broke_off_is_made_again(server: HubServer, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    server.repos["models/owner/tiny"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
    model = locate_model(config(tmp_path), report=no_report)
    (cached,) = (tmp_path / "cache" / "models").iterdir()
    (cached / "COMPLETE").unlink()
    (cached / "model.safetensors").write_bytes(b"half")
    again = locate_model(config(tmp_path), report=no_report)
    assert again.commit == model.commit
    assert (cached / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(40)),
        ("train[:95%]", range(38)),
        ("train[95%:]", range(38, 40)),
        ("train[5:7]", range(5, 7)),
        ("train[-3:]", range(37, 40)),
        ("validation", range(100, 103)),
        ("test", range(200, 204)),
    ],
)
def test_a_split_and_its_slice_are_read(server: HubServer, tmp_path: Path, split: str, expected: range) -> None:
    server.repos["datasets/owner/data"] = Repo(
        {
            "data/train-00000-of-00002.jsonl": lines(0, 25),
            "data/train-00001-of-00002.jsonl": lines(25, 40),
            "data/validation-00000-of-00001.jsonl": lines(100, 103),
            "data/test-00000-of-00001.jsonl": lines(200, 204),
        }
    )
    source = Source(name="data", hub=HubSource(repo="owner/data", split=split))
    opened = open_source(source, config=config(tmp_path))
    assert opened.found.commit == server.repos["datasets/owner/data"].commit
    assert [record["text"] for _, record in opened.records()] == [f"text {number}" for number in expected]


CARD = {
    "configs": [
        {"config_name": "small", "data_files": [{"split": "train", "path": "s/*.jsonl"}]},
        {"config_name": "large", "default": True, "data_files": [{"split": "train", "path": ["l/a.jsonl"]}]},
        {"config_name": "plain", "data_files": "s/only.jsonl"},
    ]
}


@pytest.mark.parametrize(
    ("files", "card", "chosen", "expected"),
    [
        (("train.jsonl", "test.jsonl"), {}, {}, {"train.jsonl"}),
        (("all.jsonl",), {}, {}, {"all.jsonl"}),
        (("a.jsonl", "b.jsonl", "notes.md"), {}, {}, {"a.jsonl", "b.jsonl"}),
        (("en/train.jsonl", "de/train.jsonl"), {}, {"config": "de"}, {"de/train.jsonl"}),
        (("s/only.jsonl", "l/a.jsonl"), CARD, {}, {"l/a.jsonl"}),
        (("s/only.jsonl", "l/a.jsonl"), CARD, {"config": "small"}, {"s/only.jsonl"}),
        (("s/only.jsonl", "l/a.jsonl"), CARD, {"config": "plain"}, {"s/only.jsonl"}),
    ],
)
def test_the_card_decides_on_a_splits_files_or_else_their_names(
    server: HubServer, files: tuple[str, ...], card: dict[str, Any], chosen: dict[str, str], expected: set[str]
) -> None:
    server.repos["datasets/owner/data"] = Repo(dict.fromkeys(files, lines(0, 1)), card=card)
    source = Source(name="data", hub=HubSource(repo="owner/data", **chosen))
    opened = open_source(source, config=config(Path("/nowhere")))
    assert {file.name for file in opened.files} == {f"owner/data/{path}" for path in expected}


def without_repo(server: HubServer) -> None:
    server.repos.clear()


def gated(server: HubServer) -> None:
    server.repos["models/owner/tiny"].gated = True


def private(server: HubServer) -> None:
    server.repos["models/owner/tiny"].token = "another"


def failing(server: HubServer) -> None:
    server.failures = 1000


@pytest.mark.parametrize(
    ("change", "source", "error", "message"),
    [
        (without_repo, {}, ConfigError, "model owner/tiny at revision main on the Hub: there is no such repository"),
        (private, {}, ConfigError, "there is no such repository, or this token may not see it"),
        (gated, {}, ConfigError, "gated"),
        (None, {"revision": "v9"}, ConfigError, "at revision v9 on the Hub: there is no such branch, tag or commit"),
        (None, {"repo": "no good name"}, ConfigError, "no good name"),
        (failing, {}, StorageError, "answered with status 503"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_says_whose_turn_it_is(
    server: HubServer, change: Callable[[HubServer], None] | None, source: dict[str, str],
    error: type[TrainerError], message: str,
) -> None:  # fmt: skip
    server.repos["models/owner/tiny"] = Repo({"config.json": b"{}"})
    if change is not None:
        change(server)
    with pytest.raises(error, match=message):
        find_repo(HubModel(**{"repo": "owner/tiny", **source}), kind="model")


def test_a_token_from_a_secret_opens_a_private_repository(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets" / "hf").mkdir(parents=True)
    (tmp_path / "secrets" / "hf" / "key").write_text("s3cret\n")
    monkeypatch.setenv(ENV_SECRETS_DIR, str(tmp_path / "secrets"))
    server.repos["models/owner/tiny"] = Repo({"config.json": b"{}"}, token="s3cret")
    found = find_repo(HubModel(repo="owner/tiny", token_secret=SecretKey(name="hf", key="key")), kind="model")
    assert found.download("config.json", tmp_path / "here").read_bytes() == b"{}"


def test_a_hub_that_recovers_is_asked_again(server: HubServer) -> None:
    server.repos["models/owner/tiny"] = Repo({"config.json": b"{}"})
    server.failures = 2
    assert find_repo(HubModel(repo="owner/tiny"), kind="model").paths == ("config.json",)


def test_a_file_that_is_not_there_is_named(server: HubServer, tmp_path: Path) -> None:
    server.repos["models/owner/tiny"] = Repo({"config.json": b"{}"})
    found = find_repo(HubModel(repo="owner/tiny"), kind="model")
    with pytest.raises(DataError, match=r"owner/tiny on the Hub: nothing\.json"):
        found.download("nothing.json", tmp_path)


def test_a_hub_that_nobody_serves_is_worth_another_attempt(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(StorageError, match="cannot be reached"):
            find_repo(HubModel(repo="owner/tiny"), kind="model")
    assert server.requests == []
