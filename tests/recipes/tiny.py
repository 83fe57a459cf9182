"""A model of a few thousand parameters with a tokenizer of its own, and small data, for runs that take seconds."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import Decoder

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = (
    "the", "a", "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "fast", "slow", "here", "there",
    "now", "and", "or", "but", "with",
)  # fmt: skip
RECIPES = ("finetune", "distill", "dpo", "kto")
"""The scripts that train."""
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip


def write_model(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model in Hugging Face format; changes of its config.json make another family of it."""
    folder.mkdir(parents=True)
    vocab_size = write_tokenizer(folder)
    config = {**SHAPE, "vocab_size": vocab_size, "torch_dtype": str(dtype).removeprefix("torch."), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_hf(config))
    weights = {name: (p.detach() * 0.5).to(dtype).contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return tokenizer.get_vocab_size()


def write_messages(path: Path, *, samples: int, seed: int) -> Path:
    """Short conversations with answers that follow from the questions."""
    rng = random.Random(seed)  # noqa: S311 (data, not secrets)
    lines = []
    for _ in range(samples):
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 9))]
        messages = [
            {"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(reversed(words))},
        ]  # fmt: skip
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_preferences(path: Path, *, samples: int, seed: int) -> Path:
    """Questions with a better and a worse answer."""
    rng = random.Random(seed)  # noqa: S311 (data, not secrets)
    lines = []
    for _ in range(samples):
        words = [rng.choice(WORDS) for _ in range(rng.randint(3, 9))]
        asked = [{"role": "user", "content": " ".join(words)}]
        better, worse = (
            [{"role": "assistant", "content": " ".join(answer)}] for answer in (reversed(words), [*words, "now"])
        )
        lines.append({"prompt": asked, "chosen": better, "rejected": worse})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_answers(path: Path, *, pairs: Path) -> Path:
    """The answers of pairs, each by itself with what it is."""
    lines = []
    for pair in map(json.loads, pairs.read_text().splitlines()):
        for side, label in (("chosen", True), ("rejected", False)):
            lines.append({"prompt": pair["prompt"], "completion": pair[side], "label": label})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_config(path: Path, **blocks: Any) -> Path:
    """A config whose blocks replace those of a small LoRA run."""
    folder = path.parent
    config = {
        "model": {"uri": {"location": f"file://{folder}/model"}},
        "dataset": {
            "sources": [{"name": "pairs", "uri": {"location": f"file://{folder}/pairs.jsonl"}}],
            "max_sequence_length": 64,
        },
        "lora": {"rank": 4, "alpha": 8},
        "training": {"max_steps": 12, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2},
        "workspace": {"uri": f"file://{folder}/runs"},
    }
    path.write_text(yaml.safe_dump({**config, **blocks}))
    return path


def config_of(place: Path, recipe: str, *, run: str = "run", **training: Any) -> Path:
    """A short run of a training recipe, with adapters of which each rank has a part."""
    data = "preferences" if recipe in {"dpo", "kto"} else "pairs"
    named = {"finetune": "SFT", "distill": "Distillation", "dpo": "DPO", "kto": "KTO"}
    given: dict[str, Any] = {"recipe": named[recipe]}
    if recipe == "distill":
        given["distillation"] = {"teacher": {"uri": {"location": f"file://{place}/model"}}}
    return write_config(
        place / f"{run}.yaml",
        **given,
        dataset={
            "sources": [{"name": "data", "uri": {"location": f"file://{place}/{data}.jsonl"}}],
            "max_sequence_length": 64,
        },
        training={
            "max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "precision": "FP32",
            **training,
        },
        outputs=[{"name": "merged", "type": "HuggingFace"}],
    )  # fmt: skip
