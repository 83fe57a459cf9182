"""Everything that happens once per run, before an accelerator is used: look at the model, tokenize the data, estimate.

`prepare` leaves `prepared.json` in the run's folder, written last; every attempt trains what it names, or refuses.
`fetch` brings that to a node.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from kubetune_trainer.config import FineTuneConfig, JobConfig
from kubetune_trainer.data.encode import (
    NOTHING_HELD,
    SampleEncoder,
    all_samples,
    epoch_of,
    held_samples,
    hold_out,
    write_rows,
)
from kubetune_trainer.data.page import Preview, preview, render_page
from kubetune_trainer.data.sampler import total_steps
from kubetune_trainer.data.sources import FoundSource, OpenSource, open_source
from kubetune_trainer.data.store import DataStore, DataWriter
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.estimate import Estimate, count_parameters, estimate_memory
from kubetune_trainer.export.convert import check_outputs
from kubetune_trainer.export.store import check_places
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.model.adapter import read_first_adapters, trained_beside_nf4
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model_files import (
    FoundModel,
    FoundOther,
    LocalModel,
    fetch_merged,
    fetch_model,
    fetch_others,
    fetch_small,
    first_adapters_s3,
    is_small,
    locate_adapter,
    locate_first_adapters,
    locate_model,
    locate_others,
)
from kubetune_trainer.names import COMPLETE_MARKER, REPORT_FILE, TERMINATION_MESSAGE_BYTES
from kubetune_trainer.prepared import read_prepared, write_prepared
from kubetune_trainer.report import Report
from kubetune_trainer.storage import Store, download_tree, open_store, scratch_dir, upload_tree
from kubetune_trainer.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from kubetune_trainer.vocabulary import grown, growth_by_adapter, growth_by_tokens, ids_of

TRAIN_DIR = "train"
VALIDATION_DIR = "validation"
DATA_FILE = "data.json"
MESSAGE_BYTES = TERMINATION_MESSAGE_BYTES - 256
"""What `Prepared.message` may take; the rest is for what every message has."""
ROWS_FORMAT = 3
"""Part of the key of tokenized data; a change to how rows are made or what is kept beside them makes it another."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class StoredRows(_Record):
    """One store of rows."""

    location: str
    """URI of its folder."""
    rows: int
    """Rows in it."""
    tokens: int
    """Tokens of all rows."""


class DataStatistics(_Record):
    """What the data turned out to be."""

    samples: int
    """Read."""
    rows: int
    """Rows of an epoch."""
    tokens: int
    """Tokens of these rows."""
    trainable_token_percent: float
    """Part of these tokens that carries loss."""
    dropped_samples: int
    """Left out: longer than allowed, or with nothing in them that is trained."""
    truncated_samples: int
    """Cut at the limit."""


class PreparedData(_Record):
    """Tokenized data as the cache keeps it."""

    train: StoredRows
    """What is trained on."""
    validation: StoredRows | None
    """What is held out."""
    data: DataStatistics
    """What the data turned out to be."""
    preview: Preview | None = None
    """What the report shows of it."""


class Prepared(PreparedData):
    """What a run trains on; the content of prepared.json."""

    asked: str
    """Digest of the configuration's model, dataset and seed: a folder that was prepared for others is refused."""
    model: FoundModel
    """The model."""
    adapter: FoundModel | None = None
    """The adapter that is merged into it before the run begins."""
    first_adapters: FoundModel | None = None
    """The adapters that are trained on."""
    others: Mapping[str, FoundOther] = {}
    """The models that are used beside it, by field."""
    sources: tuple[FoundSource, ...]
    """The datasets."""
    held_out: tuple[FoundSource, ...] = ()
    """The datasets that are held out whole."""
    estimate: Estimate
    """What training needs."""
    parameters: int
    """Parameters of the model, adapters not counted."""
    total_steps: int
    """Optimizer steps of the run."""
    report: str | None = None
    """URI of the page that shows the data."""

    def message(self) -> dict[str, Any]:
        """Returns the fields of the termination message; datasets too many for its size are left out of it."""
        inner = {"asked", "model", "adapter", "first_adapters", "others", "held_out"}
        inner |= {"train", "validation", "preview", "report"}
        told = self.model_dump(mode="json", by_alias=True, exclude=inner, exclude_none=True)
        message = {"model": self.model.told(), **told}
        others = [other.told(field) for field, other in self.others.items()]
        if self.first_adapters is not None:
            others.append({"field": "lora.adapter", **self.first_adapters.told()})
        if others:
            message["otherModels"] = others
        if self.report is not None:
            message["artifacts"] = {"report": self.report}
        if len(json.dumps(message).encode()) > MESSAGE_BYTES:
            del message["sources"]
        return message


@dataclass(frozen=True, kw_only=True)
class Local:
    """What a run trains on, on this machine."""

    model_dir: Path
    """Folder of the model, with its adapter merged and the tokens that are trained."""
    base_dir: Path
    """Folder of the model as it was found."""
    adapter_dir: Path | None
    """Folder of the adapter, if any."""
    first_adapters_dir: Path | None
    """Folder of the adapters that are trained on, if any."""
    others: Mapping[str, LocalModel]
    """The models that are used beside it, by field."""
    train_data: DataStore
    """Rows to train on."""
    validation_data: DataStore | None
    """Rows that are held out."""


def prepare(config: FineTuneConfig, *, report: Report) -> Prepared:
    """Finds, checks and tokenizes what a run needs; a run that was prepared before is only reported again.

    Args:
        config: The run.
        report: Takes progress and warnings.

    Raises:
        DataError: The model or the data is not what it should be; names the folder, or the file and the line.
        ConfigError: The run's folder was prepared for another model or dataset.
    """
    directory = open_store(config.run.directory, s3=config.storage.s3)
    if (known := read_prepared(directory, Prepared)) is not None:
        return _checked(known, config, directory)
    report("prepare", stage="Checking the model")
    check_places(config)
    _check_resumable(config)
    model, adapter = locate_model(config, report=report), locate_adapter(config)
    first_adapters = _locate_first_adapters(config, report=report)
    folder = _grown(fetch_small(model, adapter, config=config), config, model, first_adapters, with_weights=False)
    shape, tokenizer = read_config(folder), load_tokenizer(folder)
    for limit in check_outputs(config.outputs, folder, title=config.title):
        report("warning", message=limit)
    _check_first_adapters(first_adapters, config, folder, report=report)
    others = locate_others(config, tokenizer=tokenizer, report=report)
    sources = [open_source(source, config=config) for source in config.dataset.sources]
    held_out = [open_source(source, config=config) for source in config.dataset.held_out]
    decide = (TOKENIZER_FILE, CHAT_TEMPLATE_FILE)
    bring = [found for found in (adapter, first_adapters) if found and any(file in found.etags for file in decide)]
    data = _prepare_data(config, sources, held_out, model=model, bring_tokens=bring, tokenizer=tokenizer, report=report)
    prepared = Prepared(
        **dict(data),
        report=directory.uri(REPORT_FILE),
        asked=_asked(config),
        model=model,
        adapter=adapter,
        first_adapters=first_adapters,
        others={field: found for field, (found, _) in others.items()},
        sources=tuple(opened.found for opened in sources),
        held_out=tuple(opened.found for opened in held_out),
        estimate=estimate_memory(
            config, shape, others={field: read_config(folder) for field, (_, folder) in others.items()}
        ),
        parameters=count_parameters(shape),
        total_steps=total_steps(
            data.train.rows,
            global_batch_size=config.training.global_batch_size,
            epochs=config.training.epochs,
            max_steps=config.training.max_steps,
        ),
    )
    _check_resumable(config, total_steps=prepared.total_steps)
    statistics = data.data.model_dump(by_alias=True) | {"totalSteps": prepared.total_steps}
    directory.write_bytes(REPORT_FILE, render_page(config.title, statistics, data.preview))
    write_prepared(directory, prepared)
    report("prepare", stage="Prepared", **dict(data.data), total_steps=prepared.total_steps, report=prepared.report)
    return prepared


def _check_resumable(config: FineTuneConfig, *, total_steps: int | None = None) -> None:
    """Looks for a checkpoint to begin with, before an accelerator is used."""
    if config.checkpoint.resume_from is not None:
        from kubetune_trainer.checkpoint import check_resumable  # noqa: PLC0415 (slow, and only where it is asked for)

        check_resumable(config, total_steps=total_steps)


def fetch(prepared: Prepared, config: FineTuneConfig) -> Local:
    """Brings the model and the rows to this machine; what is there already, or lies in a local folder, stays.

    Raises:
        DataError: The model has changed since the run was prepared.
    """
    base_dir, adapter_dir, model_dir = fetch_merged(prepared.model, prepared.adapter, config=config)
    return Local(
        model_dir=_grown(model_dir, config, prepared.model, prepared.first_adapters),
        base_dir=base_dir,
        adapter_dir=adapter_dir,
        first_adapters_dir=_fetch_first_adapters(prepared.first_adapters, config),
        others=fetch_others(prepared.others, config=config),
        train_data=fetch_rows(prepared.train, config),
        validation_data=fetch_rows(prepared.validation, config) if prepared.validation else None,
    )


def _grown(
    folder: Path,
    config: FineTuneConfig,
    model: FoundModel,
    first_adapters: FoundModel | None,
    *,
    with_weights: bool = True,
) -> Path:
    """The model's folder with all tokens that are trained: first those of the adapters that are trained on."""
    place: dict[str, Any] = {"below": scratch_dir() / "models", "key": model.digest, "with_weights": with_weights}
    adapters_dir = _fetch_first_adapters(first_adapters, config)
    if adapters_dir is not None:
        folder = grown(folder, growth_by_adapter(folder, adapters_dir), **place)
    if config.lora is not None and config.lora.train_tokens:
        folder = grown(folder, growth_by_tokens(folder, config.lora.train_tokens), **place)
    return folder


def _locate_first_adapters(config: FineTuneConfig, *, report: Report) -> FoundModel | None:
    """Finds the adapters that are trained on."""
    if config.lora is None or config.lora.adapter is None:
        return None
    return locate_first_adapters(config.lora.adapter, config, report=report)


def _check_first_adapters(found: FoundModel | None, config: FineTuneConfig, folder: Path, *, report: Report) -> None:
    """Looks whether the adapters that are trained on are what the config says."""
    adapters_dir = _fetch_first_adapters(found, config)
    if adapters_dir is not None and config.lora is not None:
        ids = ids_of(folder, config.lora.train_tokens)
        read_first_adapters(adapters_dir, config=config, shape=read_config(folder), trained_ids=ids)
        if trained_beside_nf4(adapters_dir) and config.tuning != "QLoRA":
            message = (
                f"{config.title}: lora.adapter was trained beside weights in NF4 and makes up for their errors, which "
                f"tuning {config.tuning} does not have: the first losses may be higher than its last"
            )
            report("warning", message=message)


def _fetch_first_adapters(found: FoundModel | None, config: FineTuneConfig) -> Path | None:
    if found is None or config.lora is None or config.lora.adapter is None:
        return None
    return fetch_model(found, s3=first_adapters_s3(config.lora.adapter, config))


def _checked(prepared: Prepared, config: FineTuneConfig, directory: Store) -> Prepared:
    """What was prepared before, if it was for this run."""
    if prepared.asked != _asked(config):
        raise ConfigError(
            f"{config.title}: run.directory {directory.uri()} was prepared for another model, dataset or seed",
            hint="Remove the folder, or give the run another name or run.directory.",
        )
    return prepared


def _asked(config: FineTuneConfig) -> str:
    asked = [config.model.model_dump(mode="json"), config.dataset.model_dump(mode="json"), config.training.seed]
    if config.rows != "Samples":
        asked.append(config.rows)
    if config.lora is not None and config.lora.adapter is not None:
        asked.append({"lora.adapter": config.lora.adapter.model_dump(mode="json")})
    if config.lora is not None and config.lora.train_tokens:
        asked.append({"lora.train_tokens": config.lora.train_tokens})
    asked += [{field: model.model_dump(mode="json")} for field, model in config.other_models.items()]
    return fingerprint(asked, length=16)


def fetch_rows(rows: StoredRows, config: JobConfig) -> DataStore:
    """Brings a store of rows to this machine, unless it lies in a local folder."""
    store = open_store(rows.location, s3=config.storage.s3)
    local = store.local_path()
    if local is None:
        local = scratch_dir() / "rows" / hashlib.sha256(rows.location.encode()).hexdigest()[:16]
        fetched = local / f"{COMPLETE_MARKER}.fetched"
        if not fetched.exists():
            shutil.rmtree(local, ignore_errors=True)
            download_tree(store, "", local)
            fetched.touch()
    return DataStore.open(local)


def _prepare_data(
    config: FineTuneConfig,
    sources: Sequence[OpenSource],
    held_out: Sequence[OpenSource],
    *,
    model: FoundModel,
    bring_tokens: Sequence[FoundModel],
    tokenizer: Tokenizer,
    report: Report,
) -> PreparedData:
    """Takes tokenized data from the cache, or makes it and puts it there."""
    key = _data_key(config, [*sources, *held_out], [model, *bring_tokens])
    cache = open_store(f"{config.run.cache}/data/{key}", s3=config.storage.s3)
    if cache.exists(COMPLETE_MARKER):
        report("prepare", stage="Using tokenized data of an earlier run")
        # Whoever put it there may have reached the cache by another URI.
        return _locate(PreparedData.model_validate_json(cache.read_bytes(DATA_FILE)), cache)
    staging = scratch_dir() / "prepare" / key
    shutil.rmtree(staging, ignore_errors=True)
    try:
        data = _tokenize(config, sources, held_out, tokenizer=tokenizer, staging=staging, report=report)
        stored = _locate(data, cache)
        if cache.exists(COMPLETE_MARKER):  # another run was faster, and may read its rows already
            return stored
        report("prepare", stage="Storing")
        for name in (TRAIN_DIR, VALIDATION_DIR):
            if (staging / name).is_dir():
                upload_tree(cache, staging / name, name)
        cache.write_bytes(DATA_FILE, stored.model_dump_json(by_alias=True, indent=2).encode())
        cache.write_bytes(COMPLETE_MARKER, b"")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return stored


def _data_key(config: FineTuneConfig, sources: Sequence[OpenSource], tokenizers: Sequence[FoundModel]) -> str:
    """Returns a name for all that decides the rows; the model comes first, then adapters that bring tokens."""
    etags = [{path: etag for path, etag in found.etags.items() if is_small(path)} for found in tokenizers]
    decides = {
        "format": ROWS_FORMAT,
        "dataset": config.dataset.model_dump(mode="json"),
        "seed": config.training.seed,
        "rows": config.rows,
        "sources": [opened.found.model_dump() for opened in sources],
        "tokenizer": etags[0],
    }
    if etags[1:]:
        decides["adapters"] = etags[1:]
    if config.lora is not None and config.lora.train_tokens:
        decides["train_tokens"] = config.lora.train_tokens
    return fingerprint(decides, length=16)


def _tokenize(
    config: FineTuneConfig,
    sources: Sequence[OpenSource],
    held_out: Sequence[OpenSource],
    *,
    tokenizer: Tokenizer,
    staging: Path,
    report: Report,
) -> PreparedData:
    """Writes both stores below the staging folder; their locations are those there."""
    dataset = config.dataset
    encoder = SampleEncoder(dataset, tokenizer=tokenizer, report=report, rows=config.rows)
    with DataWriter(staging / "samples") as writer:
        trained = [encoder.write_samples(opened, writer) for opened in sources]
        validated = [encoder.write_samples(opened, writer, count=False) for opened in held_out]
    samples = DataStore.open(staging / "samples")
    fraction = dataset.validation.fraction if dataset.validation else None
    held = hold_out(trained, fraction=fraction) if fraction else NOTHING_HELD
    epoch = epoch_of(trained, held=held, seed=config.training.seed)
    if not len(epoch):
        raise DataError(f"{config.title}: no samples are left to train on, by dataset.sources[].weight and validation")
    kept = all_samples(validated) if validated else held_samples(trained, held=held)
    if fraction and not len(kept):
        report("warning", message="dataset.validation.fraction holds nothing out: there is only one sample")
    shown = preview(samples, epoch, tokenizer)
    report("prepare", stage="Packing" if dataset.packing == "BestFit" else "Writing rows")
    train = write_rows(samples, epoch, staging / TRAIN_DIR, dataset=dataset)
    validation = write_rows(samples, kept, staging / VALIDATION_DIR, dataset=dataset) if len(kept) else None
    return PreparedData(
        train=_stored(train),
        validation=_stored(validation) if validation else None,
        preview=shown,
        data=DataStatistics(
            **vars(encoder.counts),
            rows=len(train),
            tokens=train.num_tokens,
            trainable_token_percent=round(100 * train.trained_tokens / train.num_tokens, 2),
        ),
    )


def _stored(store: DataStore) -> StoredRows:
    return StoredRows(location=f"file://{store.folder}", rows=len(store), tokens=store.num_tokens)


def _locate(data: PreparedData, cache: Store) -> PreparedData:
    """Returns the same data at the place where the cache keeps it."""
    places: dict[str, Mapping[str, Any]] = {"train": {"location": cache.uri(TRAIN_DIR)}}
    if data.validation is not None:
        places["validation"] = {"location": cache.uri(VALIDATION_DIR)}
    return data.model_copy(
        update={name: getattr(data, name).model_copy(update=place) for name, place in places.items()}
    )
