"""Continue prompts with a model: greedy or sampled, several at once, with a cache of keys and values.

Shapes: B prompts, T tokens, V vocab_size.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kubetune_trainer.model.decoder import Decoder, KVCache
from kubetune_trainer.names import PADDING_DOCUMENT


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Return what the model adds to each prompt.

    Args:
        model: In evaluation mode, not sharded.
        prompts: Token ids; they may differ in length, and none may be empty.
        max_new_tokens: At most so many tokens are added to each.
        stop_ids: Tokens that end an answer; they are not part of it.
        temperature: 0 takes the likeliest token; above it tokens are drawn, the more evenly the higher it is.
        top_k: Only so many likeliest tokens are drawn from; unset means all.
        top_p: Only the likeliest tokens that together have this probability are drawn from; unset means all.
        seed: Makes drawing repeatable; unset draws anew each time.

    Returns:
        The added token ids of each prompt, without the token that ended it.
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    tokens_BT, documents_BT, positions_BT = _left_padded(prompts, device=device)
    cache = KVCache(
        model.config,
        batch_size=len(prompts),
        max_length=tokens_BT.shape[1] + max_new_tokens,
        dtype=model.model.embed_tokens.weight.dtype,
        device=device,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits_BV = model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache, last_only=True)[
            :, -1
        ]
        chosen_B = _choose(logits_BV.float(), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        for row, token in enumerate(chosen_B.tolist()):
            if row in running and token in stop_ids:
                running.discard(row)
            elif row in running:
                answers[row].append(token)
        if not running:
            break
        tokens_BT, positions_BT = chosen_B[:, None], positions_BT[:, -1:] + 1
        documents_BT = torch.zeros_like(tokens_BT)
    return answers


def _left_padded(prompts: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Put prompts into one tensor so that all end at its last column; return tokens, documents and positions."""
    if not all(prompts):
        raise ValueError("A prompt must have at least one token")
    length = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.zeros(len(prompts), length, dtype=torch.long)
    documents_BT = torch.full((len(prompts), length), PADDING_DOCUMENT, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        documents_BT[row, length - len(prompt) :] = 0
    positions_BT = ((documents_BT == 0).cumsum(dim=1) - 1).clamp(min=0)
    return tokens_BT.to(device), documents_BT.to(device), positions_BT.to(device)


def _choose(
    logits_BV: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Choose the next token of each prompt."""
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
