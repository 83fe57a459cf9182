"""Records from json, jsonl, csv and parquet files, one at a time; whatever is wrong names the file and the line."""

import csv
import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from kubetune_trainer.data.formats import json_complaint
from kubetune_trainer.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
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
    """
    if not name.endswith(SUFFIXES):
        raise DataError(f"{name} must be a file of type {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        records = _read_parquet(file, name)
    elif name.endswith(".csv"):
        records = _read_csv(file, name)
    elif name.endswith(".json") and _begins_with_a_list(file):
        records = _read_json_list(file, name)
    else:
        records = _read_lines(file, name)
    for place, record in records:
        if not isinstance(record, Mapping):
            raise DataError(f"{place} must be an object, got {type(record).__name__}")
        yield place, record


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
    return sorted(path for path in paths if path.startswith(prefix) and path.endswith(SUFFIXES))


def _begins_with_a_list(file: Path) -> bool:
    with file.open("rb") as stream:
        while block := stream.read(4096):
            if text := block.lstrip(b"\xef\xbb\xbf \t\r\n"):
                return text.startswith(b"[")
    return False


def _read_lines(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
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
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{name} line {error.lineno} is not JSON: {json_complaint(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    for number, record in enumerate(records, start=1):
        yield f"{name} item {number}", record


def _read_csv(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Reads a file whose first line names the columns; every cell is text, and an empty one is None."""
    csv.field_size_limit(CSV_FIELD_BYTES)
    with file.open(encoding="utf-8-sig", newline="") as stream:
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
            raise DataError(f"{name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def _read_parquet(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", {column: _without_empty(value) for column, value in record.items()}
    except pa.ArrowException as error:
        raise DataError(f"{name} is not a whole parquet file: {error}") from error


def _without_empty(value: Any) -> Any:
    """Leaves empty fields out of objects: parquet gives every message the fields of all, and templates ask for them."""
    if isinstance(value, dict):
        return {key: _without_empty(inner) for key, inner in value.items() if inner is not None or key in ALWAYS_THERE}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value
