"""A tokenizer as GGUF files carry it: pieces, merges and kinds, and the name of the rule that splits text first.

llama.cpp does not read that rule from the file; it has a list of rules, by name. A `tokenizer.json` whose rule is none
of those that are known here is refused: with another one, text would silently become other tokens. Tokenizers that were
SentencePiece's have no such rule; see gguf_sentencepiece.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from kubetune_trainer.errors import DataError
from kubetune_trainer.export.gguf_sentencepiece import is_sentencepiece, problem_of, sentencepiece_metadata
from kubetune_trainer.model.config import read_json
from kubetune_trainer.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

Metadata = Mapping[str, Any]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}
"""Regular expressions of `Split` pre-tokenizers, and llama.cpp's names for them."""


def tokenizer_metadata(folder: Path, *, vocab_size: int) -> Metadata:
    """Return what a GGUF file says of a model folder's tokenizer.

    Args:
        folder: The model folder.
        vocab_size: Rows of the embedding; those that no token has get a name that no text contains.

    Raises:
        DataError: llama.cpp has no such tokenizer.
    """
    tokenizer, written = load_tokenizer(folder), read_json(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"Model folder {folder}: {TOKENIZER_FILE} has {tokenizer.vocab_size} tokens, "
            f"and vocab_size in config.json is {vocab_size}"
        )
    pieces, kinds = _pieces(written, vocab_size=vocab_size)
    if is_sentencepiece(written):
        if problem := problem_of(written):
            raise _refused(folder, problem)
        stored = sentencepiece_metadata(written, pieces=pieces, kinds=kinds)
    else:
        stored = _byte_level_metadata(written, pieces=pieces, kinds=kinds, folder=folder)
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {**stored, **_special_ids(tokenizer), **template}


def _byte_level_metadata(
    written: Mapping[str, Any], *, pieces: Sequence[str], kinds: Sequence[int], folder: Path
) -> Metadata:
    rule = _rule(written, folder=folder)
    merges = written["model"]["merges"]  # older files have "a b" where newer ones have ["a", "b"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.token_type": list(kinds),
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
    }


def _refused(folder: Path, problem: str) -> DataError:
    return DataError(f"Model folder {folder}: GGUF cannot carry {TOKENIZER_FILE}: {problem}")


def _rule(written: Mapping[str, Any], *, folder: Path) -> str:
    """Return llama.cpp's name for how text is split before the merges."""
    model = written.get("model") or {}
    problem = next(
        (
            f"{what}, got {got!r}"
            for what, got, is_right in (
                ("model must be BPE", model.get("type"), model.get("type") == "BPE"),
                ("normalizer must be null", written.get("normalizer"), written.get("normalizer") is None),
            )
            if not is_right
        ),
        None,
    )
    if problem:
        raise _refused(folder, problem)
    steps = _steps(written.get("pre_tokenizer"))
    match steps:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if regex in SPLITS:
            return SPLITS[regex]
    told = ", ".join(f"{step.get('type')} {step.get('pattern', '')}".strip() for step in steps) or "none"
    raise _refused(folder, f"pre_tokenizer must be that of GPT-2, SmolLM, Llama 3 or Qwen2, got {told}")


def _steps(pre_tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    given = pre_tokenizer or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    # Fields that older files leave out, with the library's defaults for them.
    return [{"use_regex": True, "invert": False, **step} if step else {} for step in steps]


def _pieces(written: Mapping[str, Any], *, vocab_size: int) -> tuple[list[str], list[int]]:
    pieces = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocab_size
    for piece, number in written["model"]["vocab"].items():
        pieces[number], kinds[number] = piece, int(gguf.TokenType.NORMAL)
    for token in written.get("added_tokens") or ():
        pieces[token["id"]] = token["content"]
        kinds[token["id"]] = int(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    return pieces, kinds


def _special_ids(tokenizer: Tokenizer) -> Metadata:
    """Return which tokens begin, end and fill a text, and whether the tokenizer itself puts them around it."""
    plain, framed = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    others = [stop for stop in tokenizer.stop_ids if stop != tokenizer.eos_id]
    unknown = tokenizer.special_tokens.get("unk_token")
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.backend.token_to_id(unknown) if unknown else None,
    }
    return {
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None},
        "tokenizer.ggml.add_bos_token": framed[0] == tokenizer.bos_id and plain[0] != tokenizer.bos_id,
        "tokenizer.ggml.add_eos_token": framed[-1] == tokenizer.eos_id and plain[-1] != tokenizer.eos_id,
    }
