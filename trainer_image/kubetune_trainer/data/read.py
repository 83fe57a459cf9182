"""Records from json, jsonl, csv and parquet files, one at a time; whatever is wrong names the file and the line.

All but parquet may be compressed with gzip. A file is never unpacked as a whole, except one that is a single list.
"""

import csv
import fnmatch
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow import parquet

from kubetune_trainer.data.formats import json_complaint
from kubetune_trainer.errors import DataError
from kubetune_trainer.storage import local_error

_GZIP = ".gz"
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", *(suffix + _GZIP for suffix in _TEXT_SUFFIXES))
NO_DATA = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"})
"""Files that describe a dataset; the `datasets` library leaves out the same."""
PARQUET_BATCH_ROWS = 1024
CSV_FIELD_BYTES = 2**27
"""The longest cell of a csv file; longer ones are broken quotes."""
ALWAYS_THERE = frozenset({"role", "content"})
"""Fields of a message that templates expect, empty or not."""

Record = Mapping[str, Any]


def read_records(file: Path, *, name: str) -> Iterator[tuple[str, Record]]:
    """Yields the records of a file with their places, as in `s3://data/train.jsonl line 17`.

    Args:
        file: A local file; its suffix says how it is read.
        name: How messages call it.

    Raises:
        DataError: The file is not what its suffix says, or one of its records is no object.
        ConfigError: It may not be read.
    """
    if not name.endswith(SUFFIXES):
        raise DataError(f"{name} must be a file of type {', '.join(SUFFIXES)}")
    try:
        for place, record in _read_parquet(file, name) if name.endswith(".parquet") else _read_text(file, name):
            if not isinstance(record, Mapping):
                raise DataError(f"{place} must be an object, got {type(record).__name__}")
            yield place, record
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{name} is not a whole gzip file: {error}") from error
    except PermissionError as error:
        raise local_error(error, name) from error


def is_table(name: str) -> bool:
    """Whether a file is of a kind in which every record has all columns."""
    return name.removesuffix(_GZIP).endswith((".csv", ".parquet"))


def is_data(path: str) -> bool:
    """Whether a file among others is data: of a known type, no description of the dataset, and not hidden."""
    parts = path.split("/")
    is_hidden = any(part.startswith((".", "__")) for part in parts)
    return path.endswith(SUFFIXES) and parts[-1] not in NO_DATA and not is_hidden


def choose_files(paths: list[str], pattern: str) -> list[str]:
    """Returns which paths a location means: the file itself, those that match its wildcards, or a folder's data files.

    Args:
        paths: What is there.
        pattern: A path, possibly with wildcards or of a folder; empty means everything.
    """
    if any(sign in pattern for sign in "*?["):
        return sorted(path for path in paths if fnmatch.fnmatchcase(path, pattern))
    if pattern in paths:
        return [pattern]
    prefix = f"{pattern.rstrip('/')}/" if pattern else ""
    return sorted(path for path in paths if path.startswith(prefix) and is_data(path))


def _open(file: Path, name: str) -> IO[bytes]:
    """Opens a file, unpacked if its name says that it is packed."""
    return gzip.open(file) if name.endswith(_GZIP) else file.open("rb")


def _read_text(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    kind = name.removesuffix(_GZIP)
    if kind.endswith(".csv"):
        return _read_csv(file, name)
    if kind.endswith(".json") and _begins_with_a_list(file, name):
        return _read_json_list(file, name)
    return _read_lines(file, name)


def _begins_with_a_list(file: Path, name: str) -> bool:
    with _open(file, name) as stream:
        while block := stream.read(4096):
            if text := block.lstrip(b"\xef\xbb\xbf \t\r\n"):
                return text.startswith(b"[")
    return False


def _read_lines(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    with _open(file, name) as stream:
        for number, line in enumerate(stream, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                place = f"{name} line {number}"
                yield place, _parse(text, place)


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} is not JSON: {json_complaint(error)}",
            hint="Every line of a jsonl file is one JSON object; correct or remove the line.",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: byte {error.start} is {text[error.start]:#04x}") from error


def _read_json_list(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Reads a file that is one list; JSON has no way to do that by halves, so it stands in memory."""
    try:
        with _open(file, name) as stream:
            records = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{name} line {error.lineno} is not JSON: {json_complaint(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    for number, record in enumerate(records, start=1):
        yield f"{name} item {number}", record


def _read_csv(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Reads a file whose first line names the columns; every cell is text, and an empty one is None."""
    csv.field_size_limit(CSV_FIELD_BYTES)
    with io.TextIOWrapper(_open(file, name), encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream, strict=True)
        try:
            for record in table:
                place = f"{name} line {table.line_num}"
                if None in record or None in record.values():
                    raise DataError(
                        f"{place} must have a cell for each of the columns {', '.join(table.fieldnames or ())}",
                        hint="Put cells with commas or line breaks into double quotes.",
                    )
                yield place, {column: cell or None for column, cell in record.items()}
        except csv.Error as error:
            raise DataError(f"{name} line {table.reader.line_num} is not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(file, name) from error


def _not_utf8(file: Path, name: str) -> DataError:
    """Says where a file is not UTF-8: it is decoded in blocks, of which none knows its line."""
    with _open(file, name) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"{name} line {number}"
                return DataError(f"{place} is not UTF-8: byte {error.start} is {line[error.start]:#04x}")
    return DataError(f"{name} is not UTF-8")


def _read_parquet(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", {column: _without_empty(value) for column, value in record.items()}
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk; what is wrong in a page has none
            raise
        raise DataError(f"{name} is not a whole parquet file: {error}") from error


def _without_empty(value: Any) -> Any:
    """Leaves empty fields out of objects: parquet gives every message the fields of all, and templates ask for them."""
    if isinstance(value, dict):
        return {key: _without_empty(inner) for key, inner in value.items() if inner is not None or key in ALWAYS_THERE}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
