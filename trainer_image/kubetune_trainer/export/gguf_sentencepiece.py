"""A SentencePiece tokenizer as GGUF files carry it: pieces with scores, where others have merges.

Llama 2, TinyLlama, Mistral, Mixtral, Phi-3 and Gemma have such tokenizers, which `tokenizer.json` holds as BPE with
bytes to fall back on.
llama.cpp joins two neighbours wherever that makes a piece, the one with the highest score first, and knows no list of
merges. Both do the same if the merges are all pairs that make a piece, ordered by what they make. That is what a
conversion from SentencePiece leaves; a file of which it is not true is refused.

Phi-3's special tokens take the spaces behind them away. A file has no word for that: llama.cpp does it if the model's
name has phi-3 in it, so the name is made to have it, or not to have it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import gguf

SPACE: Final = "▁"
"""What stands for a space in pieces, U+2581."""
BYTES: Final = tuple(f"<0x{value:02X}>" for value in range(256))
REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND: Final = {"type": "Prepend", "prepend": SPACE}
WITHOUT_EFFECT: Final = (
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
)
"""Pre-tokenizers; Gemma's looks for spaces, of which the normalizer has left none."""
TAB, TAB_BYTE = "\t", BYTES[ord("\t")]
"""Gemma has the sign itself in the place of its byte."""
PHI3_KEEPS: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Of a model whose name has phi-3 in it, llama.cpp strips what is behind all special tokens but these. It ends if one
of them, or `</s>`, is missing."""
PHI3_NAME: Final = re.compile(r"(phi)-?(3)", re.IGNORECASE)

Written = Mapping[str, Any]


def is_sentencepiece(written: Written) -> bool:
    """Whether a `tokenizer.json` is of this kind."""
    model = written.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def problem_of(written: Written) -> str | None:
    """Return why llama.cpp would make other tokens of some text, or None if it makes the same."""
    return next(_problems(written), None)


def model_name(written: Written, *, name: str) -> str:
    """Return the name that a file may give a model, with which llama.cpp treats spaces as its tokenizer does."""
    if is_sentencepiece(written) and strips_behind(written):
        return name if PHI3_NAME.search(name) else f"{name} (phi-3)"
    return PHI3_NAME.sub(r"\1 \2", name)


def sentencepiece_metadata(written: Written, *, pieces: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """Return what a GGUF file says of the pieces.

    Args:
        written: A `tokenizer.json` that has no problem.
        pieces: Every piece by its number.
        kinds: What each is, as far as any tokenizer has such.
    """
    unknown, scores = written["model"].get("unk_token"), _scores(written)
    pieces = [TAB_BYTE if piece == TAB and _has_tab(written["model"]) else piece for piece in pieces]
    kinds = [_kind(piece, kind, unknown=unknown) for piece, kind in zip(pieces, kinds, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": [scores.get(piece, 0.0) for piece in pieces],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": PREPEND in _normalizers(written),
    }


def _kind(piece: str, kind: int, *, unknown: str | None) -> int:
    if piece in BYTES:
        return int(gguf.TokenType.BYTE)
    if piece == unknown:
        return int(gguf.TokenType.UNKNOWN)
    # Gemma has runs of spaces among its added tokens. llama.cpp would write those out as they are spelled.
    is_spaces = kind == gguf.TokenType.USER_DEFINED and not piece.strip(SPACE)
    return int(gguf.TokenType.NORMAL) if is_spaces else kind


def _has_tab(model: Written) -> bool:
    return TAB in model["vocab"] and TAB_BYTE not in model["vocab"]


def strips_behind(written: Written) -> bool:
    """Whether special tokens take the spaces behind them away just as llama.cpp has it for Phi-3."""
    added = {token["content"]: token.get("rstrip") for token in written.get("added_tokens") or ()}
    expected = {token: token not in PHI3_KEEPS for token in added}
    return added == expected and {*PHI3_KEEPS, "</s>"} <= added.keys()


def _problems(written: Written) -> Iterator[str]:
    if _normalizers(written) not in ([PREPEND, REPLACE], [REPLACE]) or (
        written.get("pre_tokenizer") not in WITHOUT_EFFECT
    ):
        told = f"{written.get('normalizer')} and {written.get('pre_tokenizer')}"
        yield (
            "with byte_fallback, normalizer must be that of Llama 2 or Gemma and pre_tokenizer must be null or Gemma's,"
            f" got {told}"
        )
    as_phi3 = strips_behind(written)
    for token in written.get("added_tokens") or ():
        strips = token.get("lstrip") or (token.get("rstrip") and not as_phi3)
        if token.get("normalized") or token.get("single_word") or strips:
            yield f"added token {token['content']!r} must not be normalized, and take no spaces beside it"
    if written["model"].get("ignore_merges"):
        yield "model.ignore_merges must be false, got True"
    found_before = {token["content"] for token in written.get("added_tokens") or () if token["content"].strip(SPACE)}
    yield from _problems_of_pieces(written["model"], found_before=found_before)


def _problems_of_pieces(model: Written, *, found_before: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with pieces and merges; pieces that are found in text before any merge need none."""
    vocab, merges = model["vocab"], _merges(model)
    for missing in (piece for piece in BYTES if piece not in vocab):
        if missing != TAB_BYTE or not _has_tab(model):
            yield f"model.byte_fallback needs a piece for each byte, and {missing} is none"
    made = ["".join(pair) for pair in merges]
    if len(set(made)) != 1 + sum(first != second for first, second in pairwise(made)) and made:
        yield "model.merges must be ordered by the piece that they make, as those of SentencePiece are"
    known = set(merges)
    for piece in vocab:
        if piece in BYTES or piece in found_before:
            continue
        for place in range(1, len(piece)):
            pair = piece[:place], piece[place:]
            if pair not in known and all(part in vocab for part in pair):
                yield f"model.merges must have every pair that makes a piece, as those of SentencePiece, got no {pair}"
    for piece in set(made):
        for sign in (sign for sign in piece if sign not in vocab):
            yield f"model.vocab must have the signs of its pieces, got no {sign!r} of {piece!r}"


def _scores(written: Written) -> dict[str, float]:
    """Give pieces that are made earlier higher scores; those that are signs are never made."""
    order = dict.fromkeys("".join(pair) for pair in _merges(written["model"]))
    scores = {piece: -float(place) for place, piece in enumerate(order)}
    return {piece: scores.get(piece, -float(len(scores))) for piece in written["model"]["vocab"] if piece not in BYTES}


def _merges(model: Written) -> list[tuple[str, str]]:
    """Older files have "a b" where newer ones have ["a", "b"]."""
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


def _normalizers(written: Written) -> list[Any]:
    given = written.get("normalizer") or {}
    return list(given.get("normalizers", [])) if given.get("type") == "Sequence" else [given]
