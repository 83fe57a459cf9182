"""Files of every kind give the same records, and a broken one is named with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from kubetune_trainer.data.read import choose_files, read_records
from kubetune_trainer.errors import DataError

RECORDS = [{"text": "Grüße"}, {"text": "b"}, {"text": None}]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(write(folder, name.removesuffix(".gz")).read_bytes()))
        return path
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)
    elif name.endswith(".csv"):
        path.write_text('text,id\nGrüße,1\n"b",2\n,3\n', encoding="utf-8-sig")
    elif name == "list.json":
        path.write_text("\n " + json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8-sig")
    else:
        path.write_text("\n\n".join(map(json.dumps, RECORDS)), encoding="utf-8-sig" if "bom" in name else "utf-8")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl", "bom.jsonl", "a.ndjson", "lines.json", "list.json", "a.csv", "a.parquet",
        "a.jsonl.gz", "bom.jsonl.gz", "lines.json.gz", "list.json.gz", "a.csv.gz",
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_records(name: str, tmp_path: Path) -> None:
    records = [record for _, record in read_records(write(tmp_path, name), name=f"s3://data/{name}")]
    assert [{"text": record["text"]} for record in records] == RECORDS


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ["line 1", "line 3", "line 5"]),
        ("list.json", ["item 1", "item 2", "item 3"]),
        ("a.parquet", ["row 1", "row 2", "row 3"]),
    ],
)
def test_a_record_knows_its_place(name: str, places: list[str], tmp_path: Path) -> None:
    assert [place for place, _ in read_records(write(tmp_path, name), name=name)] == [f"{name} {p}" for p in places]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b"\n',
            r"s3://data/a\.jsonl line 2 is not JSON: Expecting ',' delimiter",
        ),
        ("a.jsonl", b'{"text": "a\n', r"line 1 is not JSON: Invalid control character at column 12$"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"s3://data/a\.jsonl line 2 must be an object, got list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"s3://data/a\.jsonl line 1 is not UTF-8: byte 10 is 0xff"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"s3://data/a\.json line 2 is not JSON: Expecting value"),
        ("a.json", b'["a"]', r"s3://data/a\.json item 1 must be an object, got str"),
        ("a.json", b'["\xff"]', r"s3://data/a\.json is not UTF-8: byte 2 is 0xff"),
        ("a.parquet", b"PAR1 cut off", r"s3://data/a\.parquet is not a whole parquet file: "),
        ("a.csv", b"a,b\n1,2\n3\n", r"s3://data/a\.csv line 3 must have a cell for each of the columns a, b"),
        ("a.csv", b"a,b\n1,2,3\n", r"s3://data/a\.csv line 2 must have a cell for each of the columns a, b"),
        ("a.csv", b'a,b\n"1"2,3\n', r"s3://data/a\.csv line 2 is not CSV: "),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"s3://data/a\.jsonl\.gz is not a whole gzip file: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9],
            r"s3://data/a\.jsonl\.gz is not a whole gzip file: Compressed file ended",
        ),
        ("a.json.gz", gzip.compress(b'["a"]', mtime=0), r"s3://data/a\.json\.gz item 1 must be an object, got str"),
        ("a.csv", b"a\nb\nc\xff\n", r"s3://data/a\.csv line 3 is not UTF-8: byte 1 is 0xff"),
        ("a.txt", b"a", r"s3://data/a\.txt must be a file of type \.jsonl, \.ndjson, \.json, \.csv, \.parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / name, name=f"s3://data/{name}"))


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [str(number) * 50 for number in range(2000)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396  # the footer, which is at the end, stays whole
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s3://data/a\.parquet is not a whole parquet file: "):
        list(read_records(path, name="s3://data/a.parquet"))


def test_a_csv_file_has_cells_of_text_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"1, 2\n3",""\n4,"say ""5"""\n')
    assert list(read_records(tmp_path / "a.csv", name="a.csv")) == [
        ("a.csv line 3", {"prompt": "1, 2\n3", "completion": None}),
        ("a.csv line 4", {"prompt": "4", "completion": 'say "5"'}),
    ]


def test_what_parquet_adds_to_messages_is_left_out(tmp_path: Path) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    other = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {"y": 2}}}]}
    records = [{"messages": [{"role": "user", "content": "Hi"}, calls]}, {"messages": [other]}]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert [record for _, record in read_records(tmp_path / "a.parquet", name="a.parquet")] == records


def test_records_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    assert next(read_records(tmp_path / "a.jsonl", name="a.jsonl")) == ("a.jsonl line 1", {"text": "a"})


def test_a_packed_file_is_unpacked_as_it_is_read(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(100_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    first = next(read_records(tmp_path / "a.jsonl.gz", name="a.jsonl.gz"))
    assert first == ("a.jsonl.gz line 1", {"text": "0"}), "its end, which is cut off, was not asked for"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a/1.jsonl", "a/2.parquet", "b.jsonl"]),
        ("b.jsonl", ["b.jsonl"]),
        ("a", ["a/1.jsonl", "a/2.parquet"]),
        ("a/", ["a/1.jsonl", "a/2.parquet"]),
        ("a/*.jsonl", ["a/1.jsonl"]),
        ("?.jsonl", ["b.jsonl"]),
        ("none", []),
    ],
)
def test_a_location_means_a_file_a_folder_or_what_matches(pattern: Any, expected: list[str]) -> None:
    assert choose_files(["b.jsonl", "a/1.jsonl", "a/2.parquet", "a/README.md"], pattern) == expected


def test_files_of_a_folder_that_describe_it_or_are_hidden_are_no_data() -> None:
    data = ["a.json", "b/train.jsonl.gz"]
    others = ["dataset_infos.json", "b/dataset_info.json", "config.json", ".cache/a.jsonl", "b/._train.jsonl", "a.gz"]
    assert choose_files([*data, *others], "") == data
    assert choose_files([*data, *others], "config.json") == ["config.json"]
