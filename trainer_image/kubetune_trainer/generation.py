"""Continue prompts with a model: greedy or sampled, several at once, with a cache of keys and values.

Shapes: B prompts, T tokens, V vocab_size.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Final

import torch
from torch import Tensor

from kubetune_trainer.model.attention import KVCache
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.decoding import decoding
from kubetune_trainer.names import PADDING_DOCUMENT

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
    seed: int | None = None,
) -> list[list[int]]:
    """Return what the model adds to each prompt.

    What all prompts begin with is computed once, and rows whose answers are over leave the batch.

    Args:
        model: In evaluation mode, not sharded.
        prompts: Token ids; they may differ in length, and none may be empty.
        max_new_tokens: At most so many tokens are added to each.
        stop_ids: Tokens that end an answer; they are not part of it.
        stop: Asked after each token; an answer ends with the token that makes it true.
        temperature: 0 takes the likeliest token; above it tokens are drawn, the more evenly the higher it is.
        top_k: Only so many likeliest tokens are drawn from; unset means all.
        top_p: Only the likeliest tokens that together have this probability are drawn from; unset means all.
        seed: Makes drawing repeatable; unset draws anew each time.

    Returns:
        The added token ids of each prompt, without the token of `stop_ids` that ended it.
    """
    device = model.model.embed_tokens.weight.device
    generator = seeded(seed, device=device)
    with decoding(model):
        cache, shared = _begin(model, prompts, max_new_tokens=max_new_tokens)
        tokens_BT, documents_BT, positions_BT = _left_padded([prompt[shared:] for prompt in prompts], device=device)
        positions_BT = positions_BT + shared
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which answer each row of the batch belongs to
        running = set(rows)
        for _ in range(max_new_tokens):
            logits_BV = model(
                tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache, last_only=True
            )[:, -1]
            chosen_B = choose_tokens(
                logits_BV.float(), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            for row, token in zip(rows, chosen_B.tolist(), strict=True):
                if row in running and not goes_on(answers[row], token, stop_ids, stop):
                    running.discard(row)
            if not running:
                break
            tokens_BT, positions_BT = chosen_B[:, None], positions_BT[:, -1:] + 1
            if temperature == 0.0 and len(running) <= len(rows) // 2:  # drawing would give the others other tokens
                kept = [number for number, row in enumerate(rows) if row in running]
                cache.keep(kept)
                rows = [rows[number] for number in kept]
                tokens_BT, positions_BT = tokens_BT[kept], positions_BT[kept]
            documents_BT = torch.zeros_like(tokens_BT)
    return answers


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
    if not all(prompts):
        raise ValueError("A prompt must have at least one token")
    shared = common_length(prompts)
    if shared * (len(prompts) - 1) < SHARED_TOKENS:
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

    whole = cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
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


def choose_tokens(
    logits_BV: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Choose the next token of each prompt from its logits (B, V); the arguments are those of `generate`."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -torch.inf)
    if top_p is not None:
        probabilities, order = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True)
        surplus = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the likeliest token always stays
        logits_BV = logits_BV.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1, generator=generator)[:, 0]
