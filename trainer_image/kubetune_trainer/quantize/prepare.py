"""What happens once per quantization, before an accelerator is used: find the model, tokenize the few rows it needs.

`prepare` leaves `prepared.json` in the run's folder; every attempt quantizes the model that it names, or refuses.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from kubetune_trainer.config import Calibration, Dataset, ExecuTorch, QuantizeConfig, Verification
from kubetune_trainer.data.encode import NOTHING_HELD, SampleEncoder, epoch_of, write_rows
from kubetune_trainer.data.prepare import StoredRows, fetch_rows
from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.data.sources import FoundSource, open_source
from kubetune_trainer.data.store import DataStore, DataWriter
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.estimate import count_parameters
from kubetune_trainer.export.convert import check_outputs
from kubetune_trainer.export.store import check_places
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model.weights import build_model
from kubetune_trainer.model_files import (
    FoundModel,
    fetch_merged,
    fetch_small,
    locate_adapter,
    locate_model,
)
from kubetune_trainer.prepared import read_prepared, write_prepared
from kubetune_trainer.report import Report
from kubetune_trainer.storage import open_store, scratch_dir, upload_tree
from kubetune_trainer.tokenizer import Tokenizer, load_tokenizer

CALIBRATION: Final = "calibration"
VERIFY: Final = "verify"


class PreparedQuantization(BaseModel):
    """What a run quantizes; the content of prepared.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    asked: str
    """Digest of what the configuration asked for when it was prepared."""
    model: FoundModel
    """The model."""
    adapter: FoundModel | None
    """What is merged into it."""
    calibration: StoredRows | None
    """Rows by which weights are rounded."""
    verify: StoredRows | None
    """Rows on which outputs are compared with the model."""
    sources: tuple[FoundSource, ...]
    """The datasets of both."""
    parameters: int
    """Parameters of the model."""
    total: int
    """Tensors of the model, once for each output."""

    @property
    def digest(self) -> str:
        """A digest of all that decides an output: what was asked for, the model and the rows as they were found."""
        return fingerprint(self.model_dump(mode="json"), length=16)

    def message(self) -> dict[str, Any]:
        """Return the fields of the termination message."""
        told = self.model_dump(
            mode="json", by_alias=True, include={"sources", "parameters", "total"}, exclude_none=True
        )
        return {"model": self.model.told(), **told}


@dataclass(frozen=True, kw_only=True)
class LocalQuantization:
    """What a run quantizes, on this machine."""

    model_dir: Path
    """Folder of the model, with its adapter merged."""
    base_dir: Path
    """Folder of the model as it was found."""
    adapter_dir: Path | None
    """Folder of the adapter, if any."""
    calibration: Sequence[Batch]
    """Rows by which weights are rounded."""
    verify: Sequence[Batch]
    """Rows on which outputs are compared with the model."""


def prepare(config: QuantizeConfig, *, report: Report) -> PreparedQuantization:
    """Find and check what a quantization needs; one that was prepared before is only read again.

    Raises:
        ConfigError: There is no such model or dataset, or an output does not fit the model.
        DataError: The model or the data is not what it should be.
    """
    directory = open_store(config.run.directory, s3=config.storage.s3)
    known = read_prepared(directory, PreparedQuantization)
    if known is not None and known.asked == _asked(config):
        return known
    report("prepare", stage="Checking the model")
    check_places(config)
    model, adapter = locate_model(config, report=report), locate_adapter(config)
    folder = fetch_small(model, adapter, config=config)
    shape, tokenizer = read_config(folder), load_tokenizer(folder)
    for limit in check_outputs(config.outputs, folder, title=config.title):
        report("warning", message=limit)
    _check_lengths(config)
    blocks = ((CALIBRATION, config.calibration), (VERIFY, config.verify))
    rows, sources = {}, {}
    for name, block in blocks:
        rows[name], found = _store_rows(name, block, config=config, tokenizer=tokenizer, report=report)
        sources |= {source.name: source for source in found}
    prepared = PreparedQuantization(
        asked=_asked(config),
        model=model,
        adapter=adapter,
        **rows,
        sources=tuple(sources.values()),
        parameters=count_parameters(shape),
        total=sum(1 for _ in build_model(shape).parameters()) * len(config.outputs),
    )
    write_prepared(directory, prepared)
    report("prepare", stage="Prepared")
    return prepared


def fetch(prepared: PreparedQuantization, config: QuantizeConfig) -> LocalQuantization:
    """Bring the model and the rows to this machine.

    Raises:
        DataError: The model has changed since the run was prepared.
    """
    base_dir, adapter_dir, model_dir = fetch_merged(prepared.model, prepared.adapter, config=config)
    pad_id = load_tokenizer(model_dir).pad_id

    def batches(rows: StoredRows | None, block: Calibration | Verification | None) -> list[Batch]:
        if rows is None or block is None:
            return []
        return [collate([row], pad_id=pad_id) for row in islice(fetch_rows(rows, config), block.samples)]

    return LocalQuantization(
        model_dir=model_dir,
        base_dir=base_dir,
        adapter_dir=adapter_dir,
        calibration=batches(prepared.calibration, config.calibration),
        verify=batches(prepared.verify, config.verify),
    )


def _check_lengths(config: QuantizeConfig) -> None:
    """Refuse rows that an output could not be compared on."""
    for number, output in enumerate(config.outputs):
        if output.type != "ExecuTorch" or config.verify is None:
            continue
        longest = (output.execu_torch or ExecuTorch()).max_sequence_length
        if config.verify.dataset.max_sequence_length > longest:
            raise ConfigError(
                f"{config.title}: verify.dataset.max_sequence_length must be at most "
                f"outputs[{number}].execu_torch.max_sequence_length, {longest}, "
                f"got {config.verify.dataset.max_sequence_length}"
            )


def _store_rows(
    name: str,
    block: Calibration | Verification | None,
    *,
    config: QuantizeConfig,
    tokenizer: Tokenizer,
    report: Report,
) -> tuple[StoredRows | None, Sequence[FoundSource]]:
    """Tokenize what one block asks for, and put at least so many rows into the run's folder."""
    if block is None:
        return None, ()
    opened = [open_source(source, config=config) for source in block.dataset.sources]
    encoder = SampleEncoder(block.dataset, tokenizer=tokenizer, report=report)
    staging = scratch_dir() / "prepare" / name
    shutil.rmtree(staging, ignore_errors=True)
    with DataWriter(staging / "samples") as writer:
        tokenized = [encoder.write_samples(source, writer) for source in opened]
    samples = DataStore.open(staging / "samples")
    chosen = np.fromiter(_enough(epoch_of(tokenized, held=NOTHING_HELD, seed=0), samples, block=block), dtype=np.int64)
    if not len(chosen):
        raise DataError(f"{config.title}: {name}.dataset has no samples, by the weights of its sources")
    rows = write_rows(samples, chosen, staging / "rows", dataset=block.dataset)
    store = open_store(f"{config.run.directory}/{name}", s3=config.storage.s3)
    store.delete_tree("")
    upload_tree(store, staging / "rows", "")
    shutil.rmtree(staging, ignore_errors=True)
    stored = StoredRows(location=store.uri(), rows=len(rows), tokens=rows.num_tokens)
    return stored, [source.found for source in opened]


def _enough(epoch: np.ndarray, samples: DataStore, *, block: Calibration | Verification) -> Iterator[int]:
    """Yield the first samples of an epoch, as many as fill the rows that are asked for."""
    dataset: Dataset = block.dataset
    left = block.samples * (dataset.max_sequence_length if dataset.packing == "BestFit" else 1)
    for index in epoch:
        if left <= 0:
            return
        yield index
        left -= len(samples[index].tokens) if dataset.packing == "BestFit" else 1


def _asked(config: QuantizeConfig) -> str:
    asked = config.model_dump(mode="json", include={"model", "outputs", "calibration", "verify"})
    return fingerprint(asked, length=16)
