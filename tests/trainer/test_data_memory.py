"""What preparing keeps in memory is a few numbers per sample, however many there are."""

import tracemalloc
from pathlib import Path

import pytest

from kubetune_trainer.config import Dataset
from kubetune_trainer.data import encode, workers
from kubetune_trainer.data.encode import SampleEncoder, epoch_of, hold_out, write_rows
from kubetune_trainer.data.sources import DataFile, FoundSource, OpenSource
from kubetune_trainer.data.store import DataStore, DataWriter
from kubetune_trainer.tokenizer import load_tokenizer
from tests.trainer.tiny_model import write_tokenizer

MOST_BYTES_PER_SAMPLE = 120


def peak_bytes(folder: Path, *, num_samples: int) -> int:
    """The most that Python and numpy had at once while so many samples became rows."""
    (folder / "a.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(num_samples)))
    dataset = Dataset(sources=[{"name": "a", "uri": {"location": f"file://{folder}/a.jsonl"}}], max_sequence_length=64)
    file = DataFile(name="a.jsonl", fetch=lambda: folder / "a.jsonl", is_temporary=False)
    opened = OpenSource(source=dataset.sources[0], found=FoundSource(name="a"), files=[file])
    encoder = SampleEncoder(dataset, tokenizer=load_tokenizer(folder), report=lambda *_, **__: None)
    tracemalloc.start()
    with DataWriter(folder / "samples") as writer:
        source = encoder.write_samples(opened, writer)
    samples = DataStore.open(folder / "samples")
    epoch = epoch_of([source], held=hold_out([source], fraction=0.1), seed=0)
    rows = write_rows(samples, epoch, folder / "rows", dataset=dataset)
    assert rows.trained_tokens > num_samples
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_grows_by_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "num_workers", lambda: 1)
    monkeypatch.setattr(encode, "BLOCK_TOKENS", 1024)
    write_tokenizer(tmp_path)
    few, many = (peak_bytes(tmp_path, num_samples=number) for number in (1000, 4000))
    assert (many - few) / 3000 < MOST_BYTES_PER_SAMPLE
