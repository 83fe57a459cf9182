"""Continue prompts with a model: greedy or sampled, several at once, with a cache of keys and values.

Shapes: B prompts, T tokens, V vocab_size.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kubetune_trainer.errors import DataError
from kubetune_trainer.model.attention import KVCache
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.decoding import decoding
from kubetune_trainer.model_json import read_json
from kubetune_trainer.names import PADDING_DOCUMENT
from kubetune_trainer.tokenizer import GENERATION_CONFIG_FILE

Stop = Callable[[list[int]], bool]
"""Whether an answer, of which these tokens are there so far, is over."""

SHARED_TOKENS: Final = 64
"""A common beginning is computed apart only if that saves so many tokens: it costs a pass over the weights."""


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    stop: Stop | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> list[list[int]]:
    """Return what the model adds to each prompt.

    What all prompts begin with is computed once, and rows whose answers are over leave the batch. Where a text's length
    decides about the angles of its positions, rows of different lengths are not mixed, and a text that grows out of
    longrope's original context is computed anew with the long factors, as transformers does it for Phi-3.

    Args:
        model: In evaluation mode, not sharded.
        prompts: Token ids; they may differ in length, and none may be empty.
        max_new_tokens: At most so many tokens are added to each.
        stop_ids: Tokens that end an answer; they are not part of it.
        stop: Asked after each token; an answer ends with the token that makes it true.
        temperature: 0 takes the likeliest token; above it tokens are drawn, the more evenly the higher it is.
        top_k: Only so many likeliest tokens are drawn from; unset means all.
        top_p: Only the likeliest tokens that together have this probability are drawn from; unset means all.
        repetition_penalty: Above 1, tokens that prompt or answer have become less likely; 1 changes nothing.
        seed: Makes drawing repeatable; unset draws anew each time.

    Returns:
        The added token ids of each prompt, without the token of `stop_ids` that ended it.
    """
    if not all(prompts):
        raise ValueError("A prompt must have at least one token")
    choose = partial(
        choose_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        generator=seeded(seed, device=model.model.embed_tokens.weight.device),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    with decoding(model):
        for group in _of_like_angles(model.config, prompts, max_new_tokens=max_new_tokens):
            rows, left = group, max_new_tokens
            while rows and left:
                texts = [[*prompts[row], *answers[row]] for row in rows]
                num_new = min(left, _until_switch(model.config, max(map(len, texts))))
                running = _continue(
                    model,
                    texts,
                    [answers[row] for row in rows],
                    max_new_tokens=num_new,
                    stop_ids=stop_ids,
                    stop=stop,
                    choose=choose,
                    is_greedy=temperature == 0.0,
                )
                rows, left = [rows[number] for number in running], left - num_new
    return answers


def _continue(
    model: Decoder,
    texts: Sequence[Sequence[int]],
    answers: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    stop: Stop | None,
    choose: Callable[..., Tensor],
    is_greedy: bool,
) -> list[int]:
    """Add tokens to the answers that texts end with, from an empty cache; return which of them are not over."""
    device = model.model.embed_tokens.weight.device
    cache, shared = _begin(model, texts, max_new_tokens=max_new_tokens)
    tokens_BT, documents_BT, positions_BT = _left_padded([text[shared:] for text in texts], device=device)
    positions_BT = positions_BT + shared
    seen_BV = tokens_seen(texts, vocab_size=model.config.vocab_size, device=device)
    rows = list(range(len(texts)))  # which answer each row of the batch belongs to
    running = set(rows)
    for _ in range(max_new_tokens):
        logits_BV = model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache, last_only=True)[
            :, -1
        ]
        chosen_B = choose(logits_BV.float(), seen_BV=seen_BV)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            if row in running and not goes_on(answers[row], token, stop_ids, stop):
                running.discard(row)
        if not running:
            break
        tokens_BT, positions_BT = chosen_B[:, None], positions_BT[:, -1:] + 1
        seen_BV.scatter_(1, tokens_BT, value=True)
        if is_greedy and len(running) <= len(rows) // 2:  # drawing would give the others other tokens
            kept = [number for number, row in enumerate(rows) if row in running]
            cache.keep(kept)
            rows = [rows[number] for number in kept]
            tokens_BT, positions_BT, seen_BV = tokens_BT[kept], positions_BT[kept], seen_BV[kept]
        documents_BT = torch.zeros_like(tokens_BT)
    return sorted(running)


def _of_like_angles(
    config: ModelConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> Iterable[list[int]]:
    """Put rows together that may share a batch: its longest row decides about the angles of all."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        first = angles_by(config, len(prompt))
        is_settled = first == angles_by(config, len(prompt) + max_new_tokens - 1)
        groups.setdefault((first, None if is_settled else len(prompt)), []).append(row)
    return groups.values()


def angles_by(config: ModelConfig, length: int) -> tuple[int, ...]:
    """Return what a text's length decides about angles; texts for which it is the same may share a batch.

    Args:
        config: The model's.
        length: Of the text, in tokens that the model reads.
    """
    ropes = [rope for rope in dict.fromkeys(config.ropes) if rope is not None]
    stretched = (max(length, rope.original_max_positions) for rope in ropes if rope.kind == "dynamic")
    return *stretched, *(length > rope.original_max_positions for rope in ropes if rope.kind == "longrope")


def _until_switch(config: ModelConfig, length: int) -> int:
    """Return after how many more tokens a text must be computed anew, because its first tokens get other angles."""
    limits = [rope.original_max_positions for rope in config.ropes if rope is not None and rope.kind == "longrope"]
    return min((limit + 1 - length for limit in limits if limit >= length), default=sys.maxsize)


def read_repetition_penalty(folder: Path) -> float:
    """Return the penalty that a model folder asks for, as transformers takes it; 1 where it asks for none.

    Raises:
        DataError: It is not a number above 0.
    """
    file = folder / GENERATION_CONFIG_FILE
    penalty = read_json(file).get("repetition_penalty") if file.is_file() else None
    if penalty is None:
        return 1.0
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
        raise DataError(
            f"Model folder {folder}: {file.name}: repetition_penalty must be a number above 0, got {penalty!r}"
        )
    return float(penalty)


def seeded(seed: int | None, *, device: torch.device | str) -> torch.Generator:
    """Return what draws tokens: the same ones for the same seed, others each time without one."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _begin(model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> tuple[KVCache, int]:
    """Make the cache, with the prompts' common beginning in it where that pays; return how long that is."""
    shared, longest = common_length(prompts), max(map(len, prompts))
    is_worth_it = shared * (len(prompts) - 1) >= SHARED_TOKENS
    if not is_worth_it or angles_by(model.config, shared) != angles_by(model.config, longest):
        shared = 0
    embedding = model.model.embed_tokens.weight

    def cache(batch_size: int, max_length: int) -> KVCache:
        return KVCache(
            model.config,
            batch_size=batch_size,
            max_length=max_length,
            dtype=embedding.dtype,
            device=embedding.device,
        )

    whole = cache(len(prompts), longest + max_new_tokens)
    if shared:
        beginning = cache(1, shared)
        tokens_BT = torch.tensor([prompts[0][:shared]], device=embedding.device)
        model(tokens_BT, cache=beginning, last_only=True)
        whole.begin_with(beginning)
    return whole, shared


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, leaving each at least one of its own."""
    first, last = min(prompts), max(prompts)  # what these two share, those between them share as well
    longest = min(map(len, prompts)) - 1
    return next((place for place in range(longest) if first[place] != last[place]), longest)


def goes_on(answer: list[int], token: int, stop_ids: Collection[int], stop: Stop | None) -> bool:
    """Add a token to an answer, unless it ends it; return whether the answer goes on."""
    if token in stop_ids:
        return False
    answer.append(token)
    return stop is None or not stop(answer)


def _left_padded(prompts: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Put prompts into one tensor so that all end at its last column; return tokens, documents and positions."""
    length = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.zeros(len(prompts), length, dtype=torch.long)
    documents_BT = torch.full((len(prompts), length), PADDING_DOCUMENT, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        documents_BT[row, length - len(prompt) :] = 0
    positions_BT = ((documents_BT == 0).cumsum(dim=1) - 1).clamp(min=0)
    return tokens_BT.to(device), documents_BT.to(device), positions_BT.to(device)


def tokens_seen(texts: Sequence[Sequence[int]], *, vocab_size: int, device: torch.device | str) -> Tensor:
    """Return which tokens each text has, (B, V), for `choose_tokens`."""
    seen_BV = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen_BV[row, list(text)] = True
    return seen_BV.to(device)


def choose_tokens(
    logits_BV: Tensor,
    *,
    seen_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    generator: torch.Generator,
) -> Tensor:
    """Choose the next token of each prompt.

    Args:
        logits_BV: The model's.
        seen_BV: Which tokens prompt and answer have so far.
        temperature: As for `generate`, like all that follow.
        top_k: Of the likeliest tokens.
        top_p: Of the likeliest tokens, after `top_k`.
        repetition_penalty: Comes first, as in transformers (CTRL, arXiv 1909.05858), and counts each token once.
        generator: What draws.
    """
    if repetition_penalty != 1.0:
        less_likely_BV = torch.where(logits_BV < 0, logits_BV * repetition_penalty, logits_BV / repetition_penalty)
        logits_BV = torch.where(seen_BV, less_likely_BV, logits_BV)
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    temperature = max(temperature, torch.finfo(logits_BV.dtype).tiny)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature  # none becomes NaN
    if top_k is not None:
        smallest = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -torch.inf)
    if top_p is not None:
        probabilities, order = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True)
        surplus = probabilities.cumsum(dim=-1) - probabilities >= top_p
        surplus[:, 0] = False  # the likeliest token always stays, also where top_p is no number of fp32
        logits_BV = logits_BV.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1, generator=generator)[:, 0]
