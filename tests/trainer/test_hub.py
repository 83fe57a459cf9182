"""Models and datasets come from a server that speaks the Hub's API, fixed to the commit that a branch stood for."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import file_download

from kubetune_trainer import hub
from kubetune_trainer.config import HubModel, SecretKey, load_config
from kubetune_trainer.data.prepare import Prepared, fetch, prepare
from kubetune_trainer.errors import ConfigError, DataError, StorageError, TrainerError
from kubetune_trainer.hub import find_repo
from kubetune_trainer.storage import scratch_dir
from tests.trainer.hub_server import COMMIT, TOKEN, HubServer
from tests.trainer.tiny_model import write_model


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("KUBETUNE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    scratch_dir.cache_clear()
    running = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    folder = write_model(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    running.repos["models/team/tiny"] = {
        **files,
        "onnx/model.onnx": b"x",
        "pytorch_model.bin": b"x",
        ".gitattributes": b"",
    }
    lines = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(20)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    running.repos["datasets/team/questions"] = {
        "README.md": b"",
        "train.jsonl": content,
        "de/test.jsonl": content.splitlines(keepends=True)[0],
    }
    yield running
    running.stop()


def config(tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "run.yaml"
    values = {
        "model": {"hub": {"repo": "team/tiny"}},
        "dataset": {
            "sources": [{"name": "questions", "hub": {"repo": "team/questions"}}], "packing": "None",
            "max_sequence_length": 256,
        },
        "training": {"epochs": 1, "global_batch_size": 4},
        "workspace": {"uri": f"file://{tmp_path}/runs"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return load_config(path, overrides=overrides)


def prepare_run(tmp_path: Path, *overrides: str) -> Prepared:
    return prepare(config(tmp_path, *overrides), report=lambda *_, **__: None)


def test_a_run_takes_its_model_and_data_from_the_hub_at_a_commit(server: HubServer, tmp_path: Path) -> None:
    prepared = prepare_run(tmp_path)
    assert prepared.model.commit == prepared.sources[0].commit == COMMIT
    assert prepared.model.location == f"file://{tmp_path}/runs/cache/models/team--tiny-{COMMIT[:12]}"
    assert set(prepared.model.etags) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    local = fetch(prepared, config(tmp_path))
    weights = (local.model_dir / "model.safetensors").read_bytes()
    assert weights == server.repos["models/team/tiny"]["model.safetensors"]
    assert len(local.train_data) == 20


def test_the_model_is_downloaded_once_for_all_runs(server: HubServer, tmp_path: Path) -> None:
    first = prepare_run(tmp_path)
    second = prepare_run(tmp_path, "run.name=other")
    assert first.model == second.model
    assert server.downloads.count("model.safetensors") == 1
    assert not {"onnx/model.onnx", "pytorch_model.bin"} & set(server.downloads)


@pytest.mark.usefixtures("server")
def test_a_slice_of_a_split_is_taken(tmp_path: Path) -> None:
    assert prepare_run(tmp_path, "dataset.sources.0.hub.split='train[:25%]'").data.samples == 5


def test_the_readme_says_which_files_are_a_split(server: HubServer, tmp_path: Path) -> None:
    server.cards["datasets/team/questions"] = {
        "configs": [{"config_name": "de", "data_files": [{"split": "train", "path": "de/*.jsonl"}]}]
    }
    assert prepare_run(tmp_path, "dataset.sources.0.hub.config=de").data.samples == 1


def test_a_hub_that_stumbles_is_asked_again(server: HubServer, tmp_path: Path) -> None:
    server.failures = 3
    assert prepare_run(tmp_path).data.samples == 20


def test_a_private_repository_opens_with_the_secrets_token(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.private.add("models/team/tiny")
    monkeypatch.setenv("KUBETUNE_SECRETS_DIR", str(tmp_path / "secrets"))
    (tmp_path / "secrets/hub").mkdir(parents=True)
    (tmp_path / "secrets/hub/token").write_text(f"{TOKEN}\n")
    source = HubModel(repo="team/tiny", token_secret=SecretKey(name="hub", key="token"))
    assert find_repo(source, kind="model").commit == COMMIT


def test_a_private_repository_opens_with_the_environments_token(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.private.add("models/team/tiny")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_repo(HubModel(repo="team/tiny"), kind="model").commit == COMMIT


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("model.hub.repo=team/other", ConfigError,
         "model team/other at revision main on the Hub: there is no such repository, or this token may not see it"),
        ("model.hub.revision=v9", ConfigError,
         "model team/tiny at revision v9 on the Hub: there is no such branch, tag or commit"),
        ("model.hub.repo=not//valid", ConfigError, "model not//valid at revision main on the Hub: "),
        ("dataset.sources.0.hub.split=test2", DataError,
         "dataset team/questions on the Hub has no files for split test2; its data files: de/test.jsonl, train.jsonl"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_have_is_named(
    override: str, kind: type[TrainerError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        prepare_run(tmp_path, override)
    assert str(caught.value).startswith(message)


def test_a_hub_that_stays_away_is_tried_again_later(server: HubServer, tmp_path: Path) -> None:
    server.failures = 99
    with pytest.raises(StorageError, match="the Hub answered with status 503"):
        prepare_run(tmp_path)
    server.stop()
    with pytest.raises(StorageError, match="the Hub cannot be reached"):
        prepare_run(tmp_path)


@pytest.mark.usefixtures("server")
def test_a_hub_that_takes_a_connection_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"model team/tiny .* the Hub cannot be reached"):
            find_repo(HubModel(repo="team/tiny"), kind="model")


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_a_network_that_fails_below_xet_is_no_crash(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("Network error")

    repo = find_repo(HubModel(repo="team/tiny"), kind="model")
    monkeypatch.setattr(file_download, "http_get", fail)
    with pytest.raises(StorageError, match=r"model\.safetensors: the Hub cannot be reached: Network error"):
        repo.download("model.safetensors", tmp_path / "here")
    assert server.downloads == []
