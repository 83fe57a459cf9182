"""A model folder of a few kilobytes: random weights, a tokenizer of single bytes, ChatML as its template."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.weights import build_model

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are bytes and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, *, template: str | None = CHATML, **config: Any) -> Path:
    """Writes the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in values.items() if value}))
    return folder


def model_config(**values: Any) -> dict[str, Any]:
    """The content of a tiny config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 260,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **values,
    }


def write_model(folder: Path, **tokenizer: Any) -> Path:
    """Writes a whole model folder."""
    write_tokenizer(folder, **tokenizer)
    (folder / "config.json").write_text(json.dumps(model_config()))
    torch.manual_seed(0)
    shapes = build_model(ModelConfig.from_hf(model_config())).named_parameters()
    save_file({name: torch.randn(weight.shape) for name, weight in shapes}, folder / "model.safetensors")
    return folder
