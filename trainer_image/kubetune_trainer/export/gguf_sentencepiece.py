"""A SentencePiece tokenizer as GGUF files carry it: pieces with scores, where the ones above have merges.

Llama 2, TinyLlama and Mistral have such tokenizers, which `tokenizer.json` holds as BPE with bytes to fall back on.
llama.cpp joins two neighbours wherever that makes a piece, the one with the highest score first, and knows no list of
merges. Both do the same if the merges are all pairs that make a piece, ordered by what they make. That is what a
conversion from SentencePiece leaves; a file of which it is not true is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import gguf

SPACE: Final = "▁"
"""What stands for a space in pieces, U+2581."""
BYTES: Final = tuple(f"<0x{value:02X}>" for value in range(256))
REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND: Final = {"type": "Prepend", "prepend": SPACE}

Written = Mapping[str, Any]


def is_sentencepiece(written: Written) -> bool:
    """Whether a `tokenizer.json` is of this kind."""
    model = written.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def problem_of(written: Written) -> str | None:
    """Return why llama.cpp would make other tokens of some text, or None if it makes the same."""
    return next(_problems(written), None)


def sentencepiece_metadata(written: Written, *, pieces: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """Return what a GGUF file says of the pieces.

    Args:
        written: A `tokenizer.json` that has no problem.
        pieces: Every piece by its number.
        kinds: What each is, as far as any tokenizer has such.
    """
    unknown, scores = written["model"].get("unk_token"), _scores(written)
    kinds = [
        int(gguf.TokenType.BYTE if piece in BYTES else gguf.TokenType.UNKNOWN if piece == unknown else kind)
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": [scores.get(piece, 0.0) for piece in pieces],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": PREPEND in _normalizers(written),
    }


def _problems(written: Written) -> Iterator[str]:
    if _normalizers(written) not in ([PREPEND, REPLACE], [REPLACE]) or written.get("pre_tokenizer") is not None:
        told = f"{written.get('normalizer')} and {written.get('pre_tokenizer')}"
        yield f"with byte_fallback, normalizer must be that of Llama 2 and pre_tokenizer must be null, got {told}"
    for token in written.get("added_tokens") or ():
        if token.get("normalized") or token.get("lstrip") or token.get("rstrip"):
            yield f"added token {token['content']!r} must not be normalized, and take no spaces beside it"
    yield from _problems_of_pieces(written["model"])


def _problems_of_pieces(model: Written) -> Iterator[str]:
    vocab, merges = model["vocab"], _merges(model)
    for missing in (piece for piece in BYTES if piece not in vocab):
        yield f"model.byte_fallback needs a piece for each byte, and {missing} is none"
    made = ["".join(pair) for pair in merges]
    if len(set(made)) != 1 + sum(first != second for first, second in pairwise(made)) and made:
        yield "model.merges must be ordered by the piece that they make, as those of SentencePiece are"
    known = set(merges)
    for piece in vocab:
        if piece in BYTES:
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
