"""A split of a Hub dataset is found as the `datasets` library finds it, and slices cut it."""

from typing import Any

import pytest

from kubetune_trainer.data.splits import Split, split_files
from kubetune_trainer.errors import ConfigError, DataError

ENGLISH = [{"split": "train", "path": "en/*.jsonl"}, {"split": "test", "path": ["x.jsonl"]}]
CARD = {
    "configs": [
        {"config_name": "en", "data_files": ENGLISH},
        {"config_name": "de", "default": True, "data_files": "de/all.jsonl"},
    ]
}
FILES = ["README.md", "de/all.jsonl", "en/a.jsonl", "en/b.jsonl", "x.jsonl"]


@pytest.mark.parametrize(
    ("paths", "card", "config", "split", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], {}, None, "test",
         ["data/test-00000-of-00001.parquet"]),
        (["train.jsonl", "valid.jsonl"], {}, None, "train", ["train.jsonl"]),
        (["a.jsonl", "b.jsonl", "test.jsonl"], {}, None, "train", ["a.jsonl", "b.jsonl"]),
        (["en/train.jsonl", "de/train.jsonl"], {}, "de", "train", ["de/train.jsonl"]),
        (FILES, CARD, None, "train", ["de/all.jsonl"]),
        (FILES, CARD, "en", "train", ["en/a.jsonl", "en/b.jsonl"]),
        (FILES, CARD, "en", "test", ["x.jsonl"]),
        (["data.jsonl", "dataset_infos.json", "config.json", ".hidden/a.jsonl"], {}, None, "train", ["data.jsonl"]),
        (["a.jsonl", "b.jsonl"], {}, "default", "train", ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "train2.jsonl", "dev.jsonl"], {}, None, "train", ["train.jsonl", "train2.jsonl"]),
        (["train.jsonl", "dev.jsonl"], {}, None, "validation", ["dev.jsonl"]),
        (["train.jsonl", "evaluation.jsonl"], {}, None, "test", ["evaluation.jsonl"]),
        (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], {}, None, "train_gen",
         ["data/train_gen-00000-of-00001.parquet"]),
        (["data/train-00000-of-00001-a1b2.parquet", "data/train_gen-00000-of-00001.parquet"], {}, None, "train",
         ["data/train-00000-of-00001-a1b2.parquet"]),
        (["helpful/train.jsonl.gz", "helpful/test.jsonl.gz"], {}, None, "train", ["helpful/train.jsonl.gz"]),
    ],
)  # fmt: skip
def test_a_split_is_found(paths: list[str], card: Any, config: str | None, split: str, expected: list[str]) -> None:
    assert split_files(paths, card=card, config=config, split=split, repo="team/data") == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("data/**/train-*.parquet", ["data/en/old/train-1.parquet", "data/train-0.parquet"]),
        ("**/*.parquet", ["data/en/old/train-1.parquet", "data/train-0.parquet"]),
        ("data/**", ["data/a.json", "data/en/old/train-1.parquet", "data/train-0.parquet"]),
        ("data/*", ["data/a.json", "data/train-0.parquet"]),
        ("./data/train-*", ["data/train-0.parquet"]),
        ("data/", ["data/a.json", "data/en/old/train-1.parquet", "data/train-0.parquet"]),
        ("*.json*", ["b.jsonl"]),
        ("config.json", ["config.json"]),
        (["b.jsonl", "data/train-[0-9].parquet"], ["b.jsonl", "data/train-0.parquet"]),
    ],
)
def test_a_pattern_of_the_card_means_what_it_means_to_datasets(pattern: Any, expected: list[str]) -> None:
    files = [
        "b.jsonl", "config.json", "dataset_infos.json", "data/train-0.parquet", "data/en/old/train-1.parquet",
        "data/a.json", "data/.old/train-2.parquet",
    ]  # fmt: skip
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}]}
    assert split_files(files, card=card, config=None, split="train", repo="team/data") == expected


FOLDERS = {
    "configs": [
        {"config_name": "en", "data_dir": "english"},
        {"config_name": "dev", "data_dir": "./dev/*/"},
        {"config_name": "fr", "data_dir": "french", "data_files": [{"split": "train", "path": "a*.jsonl"}]},
    ]
}
IN_FOLDERS = [
    "english/a.jsonl", "english/test.jsonl", "dev/1/a.jsonl", "dev/2/a.jsonl", "french/a.jsonl", "french/b.jsonl",
    "a.jsonl",
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "split", "expected"),
    [
        ("en", "train", ["english/a.jsonl"]),
        ("en", "test", ["english/test.jsonl"]),
        ("dev", "train", ["dev/1/a.jsonl", "dev/2/a.jsonl"]),
        ("fr", "train", ["french/a.jsonl"]),
    ],
)
def test_a_config_may_be_a_folder(config: str, split: str, expected: list[str]) -> None:
    assert split_files(IN_FOLDERS, card=FOLDERS, config=config, split=split, repo="team/data") == expected


def test_of_several_folders_one_must_be_chosen() -> None:
    with pytest.raises(DataError, match=r"has the configs en, dev, fr; hub\.config must be one of them"):
        split_files(IN_FOLDERS, card=FOLDERS, config=None, split="train", repo="team/data")


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [
        ("fr", "train", "dataset team/data on the Hub has the configs en, de; hub.config must be one of them"),
        ("de", "test", "has no files for split test of config de; its data files: de/all.jsonl, en/a.jsonl"),
    ],
)
def test_a_split_that_is_not_there_is_refused(config: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_files(FILES, card=CARD, config=config, split=split, repo="team/data")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", "abcdefghij"),
        ("train[:3]", "abc"),
        ("train[8:]", "ij"),
        ("train[2:4]", "cd"),
        ("train[:20%]", "ab"),
        ("train[95%:]", ""),
        ("train[90%:]", "j"),
        ("train[-2:]", "ij"),
        ("train[:-10%]", "abcdefghi"),
        ("train[-20:2]", "ab"),
    ],
)
def test_a_slice_cuts_the_split(text: str, expected: str) -> None:
    assert "".join(Split.parse(text).cut(lambda: iter("abcdefghij"))) == expected


@pytest.mark.parametrize("text", ["", "train[", "train[a:b]", "train[1]", "train + test"])
def test_what_is_no_split_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"hub\.split must be a name with an optional slice"):
        Split.parse(text)
