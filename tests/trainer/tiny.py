"""Tiny random Llama models in Hugging Face folders, made by transformers, and its own copy of each to compare with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCAB_SIZE = 97

TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> "LlamaForCausalLM":
    """Save a random model; every weight is random, norms and biases too, so that a mix-up of any two shows."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (slow, and ranks need only the tokens)

    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    reference.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return reference


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Token ids that any tiny model knows."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
