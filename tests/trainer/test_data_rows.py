"""The rows of a config never change: tokens, labels, order and packing are those that earlier versions wrote."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_trainer.config import Dataset, load_config
from kubetune_trainer.data import workers
from kubetune_trainer.data.chunks import ChunkEncoder
from kubetune_trainer.data.prepare import Local, fetch, prepare
from kubetune_trainer.data.store import DataStore
from kubetune_trainer.errors import DataError, DoesNotFitError
from kubetune_trainer.storage import scratch_dir
from kubetune_trainer.tokenizer import load_tokenizer
from tests.trainer.tiny_model import write_model


def write_data(folder: Path) -> None:
    """Conversations with copies among them, Alpaca samples and plain text, of very different lengths."""
    rng = random.Random(0)  # noqa: S311 (text, and no secret)
    words = ["one", "two", "three", "Grüße", "four\n", "😀", "five"]

    def text(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    def turns(number: int) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[turn % 2], "content": text(12)} for turn in range(2 * number)]

    chats = [{"messages": turns(rng.randint(1, 4))} for _ in range(120)]
    samples = {
        "chats": [*chats, *chats[:30], {"messages": chats[0]["messages"][:1]}],
        "alpaca": [{"instruction": text(8), "input": text(3), "output": text(20)} for _ in range(60)],
        "texts": [{"text": text(90)} for _ in range(50)],
    }
    for name, records in samples.items():
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_model(folder / "model")
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_SCRATCH", str(tmp_path / "scratch"))
    scratch_dir.cache_clear()


def digest(store: DataStore | None) -> str:
    if store is None:
        return ""
    hashed = hashlib.sha256()
    for name in ("offsets", "tokens", "labels", "documents"):
        hashed.update((store.folder / f"{name}.bin").read_bytes())
    return hashed.hexdigest()[:16]


def prepared_rows(folder: Path, tmp_path: Path, overrides: Sequence[str] = (), name: str = "run") -> tuple[Any, Local]:
    values = {
        "model": {"uri": {"location": f"file://{folder}/model"}},
        "dataset": {
            "sources": [
                {"name": name, "uri": {"location": f"file://{folder}/{name}.jsonl"}, "weight": weight}
                for name, weight in {"chats": 1.0, "alpaca": 2.5, "texts": 0.5}.items()
            ],
            "max_sequence_length": 256,
        },
        "training": {"epochs": 1, "seed": 7},
        "workspace": {"uri": f"file://{tmp_path}/{name}"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "run.yaml", overrides=overrides)
    prepared = prepare(config, report=lambda *_, **__: None)
    return prepared.data, fetch(prepared, config)


@pytest.mark.parametrize(
    ("overrides", "train", "validation", "statistics"),
    [
        ([],
         "4ff019de7c2ec51b", "", [261, 209, 51779, 48.53, 1, 92]),
        (["dataset.packing=None", "dataset.validation.fraction=0.2"],
         "740fb3c7b18da91e", "f2c332588b9c60dd", [261, 258, 41282, 48.48, 1, 92]),
        (["dataset.overlong=Split", "dataset.validation.fraction=0.1"],
         "45311b7915f796ed", "091f6c5db2b1cbe3", [261, 209, 52806, 50.2, 1, 0]),
        (["dataset.overlong=Drop", "dataset.train_on=LastAssistant"],
         "a4a0a4826406d766", "", [261, 133, 32156, 40.88, 93, 0]),
        (["dataset.train_on=All", "dataset.max_sequence_length=1024", "training.seed=8"],
         "9c8fe6577806ad5b", "", [261, 58, 58717, 99.44, 0, 0]),
    ],
)  # fmt: skip
def test_rows_are_those_of_earlier_versions(
    *, overrides: list[str], train: str, validation: str, statistics: list[float], folder: Path, tmp_path: Path
) -> None:
    data, local = prepared_rows(folder, tmp_path, overrides)
    assert (digest(local.train_data), digest(local.validation_data)) == (train, validation)
    assert statistics == [
        data.samples, data.rows, data.tokens, data.trainable_token_percent, data.dropped_samples,
        data.truncated_samples,
    ]  # fmt: skip


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that encode from the first record on."""
    monkeypatch.setattr(workers, "CHUNK_SAMPLES", 16)
    monkeypatch.setattr(workers, "ALONE_CHUNKS", 0)
    monkeypatch.setattr(workers, "num_workers", lambda: 2)


def test_rows_do_not_depend_on_how_many_processes_encode(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    alone_data, alone = prepared_rows(folder, tmp_path)
    request.getfixturevalue("processes")
    data, together = prepared_rows(folder, tmp_path, name="together")
    assert data == alone_data
    assert digest(together.train_data) == digest(alone.train_data)


@pytest.mark.usefixtures("processes")
def test_of_several_wrong_records_the_first_is_named(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a"})] * 100
    lines[20], lines[60], lines[70] = '{"text": 3}', '{"text": 4}', "{"
    (tmp_path / "wrong.jsonl").write_text("\n".join(lines))
    source = f"[{{name: wrong, uri: {{location: 'file://{tmp_path}/wrong.jsonl'}}}}]"
    with pytest.raises(DataError, match=r"dataset source wrong: .*wrong\.jsonl line 21: text must be text, got 3"):
        prepared_rows(folder, tmp_path, [f"dataset.sources={source}"])


@pytest.mark.usefixtures("processes")
def test_half_of_a_character_is_named_by_other_processes_too(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a"})] * 100
    lines[50] = r'{"text": "cut \ud83d off"}'
    (tmp_path / "cut.jsonl").write_text("\n".join(lines))
    source = f"[{{name: cut, uri: {{location: 'file://{tmp_path}/cut.jsonl'}}}}]"
    with pytest.raises(DataError, match=r"dataset source cut: .*cut\.jsonl line 51: text has half of a character"):
        prepared_rows(folder, tmp_path, [f"dataset.sources={source}"])


def test_a_killed_process_is_said_to_have_had_too_little_memory(folder: Path) -> None:
    encoder = ChunkEncoder(
        Dataset(sources=[{"name": "a", "uri": {"location": "file:///a"}}]), load_tokenizer(folder / "model")
    )
    with workers._Worker(encoder) as worker:
        worker._process.kill()
        with pytest.raises(DoesNotFitError, match="a process that tokenizes was killed"):
            worker.answer()
