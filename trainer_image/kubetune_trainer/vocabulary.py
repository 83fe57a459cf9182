"""Model folders with more tokens than they came with, or another chat template.

A run that trains tokens (`lora.train_tokens`) adds those that its model lacks; adapters that were trained so bring the
tokenizer with them. Either way a new folder is made beside the old one: its tokenizer has the tokens, its embedding and
output head a row for each, and all that loads, trains and exports models finds a model like any other. Adapters also
bring the chat template that their data was written with; where that is all, the new folder links to the old one's
weights.

Rows that a padded embedding has to spare are used first; only what does not fit makes it longer, as transformers'
`add_tokens` and `resize_token_embeddings` do. Rows of new tokens begin as the mean of all rows that were there.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from torch import Tensor

from kubetune_trainer.errors import DataError
from kubetune_trainer.export.huggingface import copy_companions, save_huggingface
from kubetune_trainer.export.peft import ADAPTER_CONFIG_FILE, TRAINED_IDS
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.model.config import CONFIG_FILE, read_config
from kubetune_trainer.model.weights import WeightFiles
from kubetune_trainer.model_json import read_json
from kubetune_trainer.names import COMPLETE_MARKER
from kubetune_trainer.tokenizer import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    read_backend,
    read_chat_template,
)
from kubetune_trainer.trained_tokens import TABLES

CHUNK_ROWS: Final = 8192
"""Rows that are summed at a time."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What makes a model folder one with more tokens or another chat template."""

    size: int
    """Rows of its embedding."""
    new_ids: tuple[int, ...]
    """Tokens that it did not have; where there are none its weights stay."""
    files: Mapping[str, str] = field(repr=False)
    """Text of the files of its tokenizer that are others, by name."""


def ids_of(folder: Path, tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of tokens that a folder has."""
    if not tokens:
        return ()
    backend = read_backend(folder)
    ids = tuple(backend.token_to_id(token) for token in tokens)
    assert None not in ids, f"{folder} has not all of {tokens}"
    return ids


def growth_by_tokens(folder: Path, tokens: Sequence[str]) -> Growth | None:
    """Return what adds tokens to a model folder, each recognised in any text as one; None if it has them all."""
    backend, num_rows = read_backend(folder), read_config(folder).vocab_size
    missing = [token for token in tokens if backend.token_to_id(token) is None]
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in missing])
    ids = {token: backend.token_to_id(token) for token in tokens}
    new_ids = tuple(number for token, number in ids.items() if token in missing or number >= num_rows)
    if not new_ids:
        return None
    listed = _other_lists(folder, {token: ids[token] for token in missing})
    return _growth(folder, {TOKENIZER_FILE: backend.to_str(pretty=True), **listed}, new_ids=new_ids)


def growth_by_adapter(folder: Path, adapter: Path) -> Growth | None:
    """Return what gives a model folder the tokens and the chat template of adapters; None if it has them.

    Args:
        folder: The model's.
        adapter: A PEFT folder; one that trained tokens has a tokenizer of its own, and one whose data was written by
            another template than the model's has that.

    Raises:
        DataError: The tokenizer has another id for a token of the model.
    """
    tokens, template = _tokens_of(folder, adapter), adapter / CHAT_TEMPLATE_FILE
    if not template.is_file():
        return tokens
    text = template.read_text(encoding="utf-8")
    if tokens is None and read_chat_template(folder) == text:
        return None
    files = {} if tokens is None else tokens.files
    return _growth(folder, {**files, template.name: text}, new_ids=() if tokens is None else tokens.new_ids)


def _tokens_of(folder: Path, adapter: Path) -> Growth | None:
    """Return what gives a model folder the tokens of adapters that trained some."""
    if not read_json(adapter / ADAPTER_CONFIG_FILE).get(TRAINED_IDS) or not (adapter / TOKENIZER_FILE).is_file():
        return None
    old, new = read_backend(folder).get_vocab(), read_backend(adapter).get_vocab()
    if changed := sorted(token for token, number in old.items() if new.get(token) != number):
        raise DataError(
            f"Adapter folder {adapter}: {TOKENIZER_FILE} must have all tokens of the model, got {changed[0]!r} as "
            f"id {new.get(changed[0])} in place of {old[changed[0]]}"
        )
    rows, trained = read_config(folder).vocab_size, _trained_ids(adapter)
    added = {new[token] for token in new.keys() - old.keys()} | {number for number in trained if number >= rows}
    if not added:
        return None
    given = [adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()]
    files = {file.name: file.read_text(encoding="utf-8") for file in given}
    return _growth(folder, files, new_ids=tuple(sorted(added)))


def _trained_ids(adapter: Path) -> set[int]:
    """Return the tokens that adapters have rows of their own for: one list, or one for each table."""
    told = read_json(adapter / ADAPTER_CONFIG_FILE)[TRAINED_IDS]
    return set(told) if isinstance(told, list) else {number for each in told.values() for number in each}


def grown(folder: Path, growth: Growth | None, *, below: Path, key: str = "", with_weights: bool = True) -> Path:
    """Return the folder that a growth makes of a model folder, made once.

    Args:
        folder: The model's, which stays as it is.
        growth: What is added; None makes nothing and returns the folder.
        below: Where it is made.
        key: What tells the model's folder from another that was at the same place.
        with_weights: Whether it gets weights; without them it is enough for the tokenizer and the shape.
    """
    if growth is None:
        return folder
    named = [str(folder), key, growth.size, growth.new_ids, dict(growth.files), with_weights]
    target = below / f"grown-{fingerprint(named, length=32)}"
    if not (target / COMPLETE_MARKER).exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        _write(folder, growth, target, with_weights=with_weights)
        (target / COMPLETE_MARKER).touch()
    return target


def _growth(folder: Path, files: Mapping[str, str], *, new_ids: tuple[int, ...]) -> Growth:
    return Growth(size=max(read_config(folder).vocab_size, max(new_ids, default=0) + 1), new_ids=new_ids, files=files)


def _write(folder: Path, growth: Growth, target: Path, *, with_weights: bool) -> None:
    config = read_config(folder)
    if with_weights and growth.new_ids:
        with WeightFiles(folder, tied_embeddings=config.tied_embeddings) as files:
            save_huggingface(_tensors(files, growth), source_dir=folder, target_dir=target)
    else:
        copy_companions(folder, target)
        if with_weights:
            _link_weights(folder, target)
    for name, text in growth.files.items():
        (target / name).write_text(text, encoding="utf-8")
    if growth.size != config.vocab_size:
        told = read_json(folder / CONFIG_FILE) | {"vocab_size": growth.size}
        (target / CONFIG_FILE).write_text(json.dumps(told, indent=2) + "\n")


def _link_weights(folder: Path, target: Path) -> None:
    """Let a folder have all files of another that it does not have itself."""
    for file in folder.iterdir():
        if file.is_file() and file.name != COMPLETE_MARKER and not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())


def _tensors(files: WeightFiles, growth: Growth) -> Iterator[tuple[str, Tensor]]:
    tables = {f"{name}.weight" for name in TABLES}
    for name, tensor in files.items():
        yield name, _with_new_rows(tensor, growth) if name in tables else tensor


def _with_new_rows(table: Tensor, growth: Growth) -> Tensor:
    # In fp64, so that nodes whose sums are taken in other orders round to the same.
    mean = sum(rows.double().sum(dim=0) for rows in table.split(CHUNK_ROWS)) / len(table)
    longer = torch.cat([table, mean.to(table.dtype).expand(growth.size - len(table), -1)])
    longer[list(growth.new_ids)] = mean.to(table.dtype)
    return longer


def _other_lists(folder: Path, added: Mapping[str, int]) -> dict[str, str]:
    """Name added tokens in the other files that list them, where a folder has such lists."""
    files: dict[str, Any] = {}
    config = read_json(folder / TOKENIZER_CONFIG_FILE) if (folder / TOKENIZER_CONFIG_FILE).is_file() else {}
    if listed := config.get("added_tokens_decoder"):
        plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
        ours = {str(number): {"content": token, **plain} for token, number in added.items()}
        files[TOKENIZER_CONFIG_FILE] = config | {"added_tokens_decoder": listed | ours}
    if (folder / ADDED_TOKENS_FILE).is_file():
        files[ADDED_TOKENS_FILE] = read_json(folder / ADDED_TOKENS_FILE) | dict(added)
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}
