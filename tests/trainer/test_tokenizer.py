"""A tokenizer knows its special tokens, wherever a model folder happens to write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from kubetune_trainer import load_tokenizer
from kubetune_trainer.errors import DataError

WORDS = ["<unk>", "<s>", "</s>", "<|eot|>", "<pad>", "hello", "world"]


def write_folder(folder: Path, **files: dict[str, Any]) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_text_goes_to_ids_and_back(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello world world world </s>") == [5, 6, 6, 6, 2]  # neither cut nor filled up
    assert tokenizer.encode("hello", add_special_tokens=True) == [1, 5]
    assert tokenizer.decode([1, 5, 6, 2]) == "hello world"
    assert tokenizer.decode([5, 2], skip_special_tokens=False) == "hello </s>"
    assert tokenizer.vocab_size == 7


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, (None, 2, 2, (2,))),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}}, (None, 2, 4, (2,))),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}}, (1, 2, 2, (2,))),
        ({"special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}}, (1, 2, 2, (2,))),
        ({"config": {"eos_token_id": 2}}, (None, 2, 2, (2,))),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [3, 2]}}, (None, 3, 3, (3, 2))),
        ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 3}}, (None, 2, 2, (3, 2))),
    ],
)
def test_special_tokens_are_found_in_every_file_that_may_name_them(
    tmp_path: Path, files: dict[str, Any], wanted: tuple[int | None, int, int, tuple[int, ...]]
) -> None:
    write_folder(tmp_path, **files)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == wanted


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": "config"})
    assert load_tokenizer(tmp_path).chat_template == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"


@pytest.mark.parametrize(
    ("names", "wanted"), [(["tool_use", "default"], "default template"), (["rag"], None), ([], None)]
)
def test_of_several_templates_the_default_one_is_taken(tmp_path: Path, names: list[str], wanted: str | None) -> None:
    templates = [{"name": name, "template": f"{name} template"} for name in names]
    write_folder(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": templates})
    assert load_tokenizer(tmp_path).chat_template == wanted


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_model_that_names_no_end_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"bos_token": "<s>"})
    with pytest.raises(DataError, match="no file says which token ends a text"):
        load_tokenizer(tmp_path)
