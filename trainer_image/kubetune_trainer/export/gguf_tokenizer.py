"""A tokenizer as GGUF files carry it: pieces, merges and kinds, and the name of the rule that splits text first.

llama.cpp does not read that rule from the file; it has a list of rules, by name. A `tokenizer.json` whose rule is none
of those that are known here is refused: with another one, text would silently become other tokens. Where llama.cpp is
known to do a little less than the file says, `tokenizer_limits` tells of which text. Tokenizers that were
SentencePiece's have no such rule; see gguf_sentencepiece.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import tokenizers

from kubetune_trainer.errors import DataError
from kubetune_trainer.export.gguf_sentencepiece import (
    is_sentencepiece,
    problem_of,
    sentencepiece_metadata,
    strips_behind,
)
from kubetune_trainer.model.config import read_json
from kubetune_trainer.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, read_backend

Metadata = Mapping[str, Any]

LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""GPT-4's, which Llama 3, OLMo 2 and Phi-4 have too."""
QWEN2_SPLIT: Final = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Mistral Nemo's."""
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_SPLIT: Final = (
    TEKKEN_SPLIT.replace(f"{_LOWER}+|", f"{_LOWER}+{_SUFFIX}|")
    .replace(f"{_LOWER}*|", f"{_LOWER}*{_SUFFIX}|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)
"""Phi-4-mini's."""
RULES: Final = {
    ("GPT-2", False): "gpt-2",
    ("SmolLM", False): "smollm",
    (LLAMA3_SPLIT, True): "llama-bpe",
    (LLAMA3_SPLIT, False): "dbrx",
    (QWEN2_SPLIT, False): "qwen2",
    (TEKKEN_SPLIT, True): "tekken",
    (GPT4O_SPLIT, False): "gpt-4o",
}
"""llama.cpp's names of rules, by how text is split (the last, by a regular expression) and `ignore_merges`: whether
text that is a piece as a whole becomes that one, even if no merges lead there."""
ASCII_CASE: Final = ("tekken", "gpt-4o")
"""Rules that look at the case of ASCII's letters only."""


def tokenizer_metadata(folder: Path, *, vocab_size: int) -> Metadata:
    """Return what a GGUF file says of a model folder's tokenizer.

    Args:
        folder: The model folder.
        vocab_size: Rows of the embedding; those that no token has get a name that no text contains. Added tokens that
            have none, as Gemma 3's of images in its models of text, are left out.

    Raises:
        DataError: llama.cpp has no such tokenizer.
    """
    tokenizer, written = load_tokenizer(folder), read_json(folder / TOKENIZER_FILE)
    if problem := problem_of(written) if is_sentencepiece(written) else next(_problems(written), None):
        raise _refused(folder, problem)
    pieces, kinds = _pieces(written, _added_ids(written, tokenizer.backend), vocab_size=vocab_size, folder=folder)
    if tokenizer.eos_id >= vocab_size:  # llama.cpp would end at a token of its own choice
        raise DataError(
            f"Model folder {folder}: the token that ends a text must have a row, got id {tokenizer.eos_id}, "
            f"and vocab_size in config.json is {vocab_size}"
        )
    if is_sentencepiece(written):
        stored = sentencepiece_metadata(written, pieces=pieces, kinds=kinds)
    else:
        stored = _byte_level_metadata(written, pieces=pieces, kinds=kinds, folder=folder)
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {**stored, **_special_ids(tokenizer, vocab_size=vocab_size), **template}


def tokenizer_limits(folder: Path, *, vocab_size: int) -> Sequence[str]:
    """Say of which text llama.cpp makes other tokens than a tokenizer that `tokenizer_metadata` accepts.

    Args:
        folder: The model folder.
        vocab_size: Rows of the embedding.
    """
    written = read_json(folder / TOKENIZER_FILE)
    limits = []
    added = _added_ids(written, read_backend(folder))
    if without_row := {piece: number for piece, number in added.items() if number >= vocab_size}:
        told = ", ".join(f"{piece} ({number})" for piece, number in without_row.items())
        limits.append(f"llama.cpp takes tokens past the model's {vocab_size} rows for ordinary text: {told}")
    if is_sentencepiece(written):
        if strips_behind(written):
            limits.append("llama.cpp takes ASCII's spaces away behind Phi-3's special tokens, not those of all Unicode")
        return limits
    if _is_nfc(written):
        limits.append("llama.cpp does not bring text into NFC: text that is in another form becomes other tokens there")
    rule = _rule(written, folder=folder)
    if rule in ASCII_CASE:
        limits.append(
            f"llama.cpp's rule {rule} takes letters beyond ASCII for small and capital at once, and no marks for parts "
            "of words: words in such capitals, and scripts with vowel signs as Hindi's, become other tokens there"
        )
    strips = [token["content"] for token in _added(written) if token.get("lstrip") or token.get("rstrip")]
    if strips:
        limits.append(f"llama.cpp keeps spaces beside special tokens, which {', '.join(strips)} take away")
    return limits


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
    if problem := next(_problems(written), None):
        raise _refused(folder, problem)
    split = _split(written)
    assert split is not None, "a way to split that is not known is a problem"
    return RULES[split, bool(written["model"].get("ignore_merges"))]


def _problems(written: Mapping[str, Any]) -> Iterator[str]:
    model, split = written.get("model") or {}, _split(written)
    if model.get("type") != "BPE":
        yield f"model must be BPE, got {model.get('type')!r}"
    if written.get("normalizer") is not None and not _is_nfc(written):
        yield f"normalizer must be null or NFC, got {written['normalizer']!r}"
    if all(split != known for known, _ in RULES):
        steps = _steps(written.get("pre_tokenizer"))
        told = ", ".join(f"{step.get('type')} {step.get('pattern', '')}".strip() for step in steps) or "none"
        yield (
            "pre_tokenizer must be that of GPT-2, SmolLM, Llama 3, Qwen2, Mistral Nemo, OLMo 2 or Phi-4, with "
            f"add_prefix_space false, got {told}"
        )
    elif (split, bool(model.get("ignore_merges"))) not in RULES:
        yield f"model.ignore_merges must be {not model.get('ignore_merges')} with this pre_tokenizer"
    for token in _added(written):
        if token.get("single_word"):
            yield f"added token {token['content']!r} must not be single_word"


def _split(written: Mapping[str, Any]) -> str | None:
    """Return how text is split, in the words of `RULES`; None for a way that is not known at all."""
    match _steps(written.get("pre_tokenizer")):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "GPT-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "SmolLM"
        # All that is no match would be removed in the second form, and all text is one.
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}
            | {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return regex
    return None


def _is_nfc(written: Mapping[str, Any]) -> bool:
    given = written.get("normalizer") or {}
    steps = given.get("normalizers", []) if given.get("type") == "Sequence" else [given]
    return [step.get("type") for step in steps] == ["NFC"]


def _steps(pre_tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    given = pre_tokenizer or {}
    steps = given.get("pretokenizers", []) if given.get("type") == "Sequence" else [given]
    # Fields that older files leave out, with the library's defaults for them.
    return [{"use_regex": True, "invert": False, **step} if step else {} for step in steps]


def _added(written: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return written.get("added_tokens") or ()


def _added_ids(written: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Return the id of each added token; the library numbers them itself, whatever the file says."""
    return {token["content"]: backend.token_to_id(token["content"]) for token in _added(written)}


def _pieces(
    written: Mapping[str, Any], added: Mapping[str, int], *, vocab_size: int, folder: Path
) -> tuple[list[str], list[int]]:
    pieces = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocab_size
    for piece, number in written["model"]["vocab"].items():
        if number < vocab_size:
            pieces[number], kinds[number] = piece, int(gguf.TokenType.NORMAL)
        elif piece not in added:  # which some files have among the pieces, too
            raise DataError(
                f"Model folder {folder}: {TOKENIZER_FILE} has the piece {piece!r} as id {number}, "
                f"and vocab_size in config.json is {vocab_size}"
            )
    for token in _added(written):
        number = added[token["content"]]
        if number < vocab_size:
            pieces[number] = token["content"]
            kinds[number] = int(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    return pieces, kinds


def _special_ids(tokenizer: Tokenizer, *, vocab_size: int) -> Metadata:
    """Return which tokens begin, end and fill a text, and whether the tokenizer itself puts them around it."""
    plain, framed = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    others = [stop for stop in tokenizer.stop_ids if stop != tokenizer.eos_id and stop < vocab_size]
    unknown = tokenizer.special_tokens.get("unk_token")
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.backend.token_to_id(unknown) if unknown else None,
    }
    ids = {name: number for name, number in ids.items() if number is not None and number < vocab_size}
    return {
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()},
        "tokenizer.ggml.add_bos_token": framed[0] == ids.get("bos") and plain[0] != tokenizer.bos_id,
        "tokenizer.ggml.add_eos_token": framed[-1] == ids.get("eos") and plain[-1] != tokenizer.eos_id,
    }
