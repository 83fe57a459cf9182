"""The model computes what transformers computes, whatever way the tokens come in."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kubetune_trainer.errors import DataError
from kubetune_trainer.model import KVCache, ModelConfig, load_model, read_config
from tests.trainer.tiny import TINY, make_folder, random_tokens

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "rope_theta": 10000.0,
}

SHAPES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "head_dim that is not hidden_size / heads": {"head_dim": 12},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    "rope dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "rope dynamic beyond its context": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 16,
    },
    "rope longrope": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 48}},
    "rope longrope beyond its context": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}},
    "rope yarn": {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    "rope yarn with every parameter": {
        "rope_parameters": YARN
        | {"rope_theta": 10000.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    },
    "rope yarn without rounding": {"rope_parameters": YARN | {"rope_theta": 10000.0, "truncate": False}},
    "rope yarn with attention_factor": {"rope_parameters": YARN | {"rope_theta": 10000.0, "attention_factor": 1.7}},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = make_folder(tmp_path, **changes)
    model = load_model(tmp_path, dtype=torch.float32)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rope", [LLAMA3, YARN, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 3.0}, None]
)
def test_both_spellings_of_rope_mean_the_same(rope: dict[str, Any] | None) -> None:
    old = TINY | {"model_type": "llama", "rope_scaling": rope, "rope_theta": 7000.0}
    new = TINY | {"model_type": "llama", "rope_parameters": (rope or {}) | {"rope_theta": 7000.0}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope.theta == 7000.0


def test_an_old_spelling_computes_what_transformers_computes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    old = config | {
        "rope_scaling": {k.replace("rope_type", "type"): v for k, v in LLAMA3.items()},
        "rope_theta": 9000.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens(1, 60)
    with torch.no_grad():
        logits = load_model(tmp_path, dtype=torch.float32)(tokens)
        torch.testing.assert_close(logits, reference(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [SHAPES["untied"], SHAPES["rope llama3"], SHAPES["rope yarn"]])
def test_packed_documents_equal_the_same_documents_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_folder(tmp_path, **changes)
    model = load_model(tmp_path, dtype=torch.float32)
    lengths = [(7, 20, 9), (30, 2)]
    rows = [[random_tokens(1, n, seed=n) for n in row] for row in lengths]
    tokens, documents, positions = (
        torch.zeros(2, 40, dtype=torch.long),
        torch.full((2, 40), -1),
        torch.zeros(2, 40).long(),
    )
    for row, samples in enumerate(rows):
        start = 0
        for document, sample in enumerate(samples):
            span = slice(start, start + sample.shape[1])
            tokens[row, span], documents[row, span] = sample, document
            positions[row, span] = torch.arange(sample.shape[1])
            start = span.stop
    with torch.no_grad():
        packed = model(tokens, documents_BT=documents, positions_BT=positions)
        for row, samples in enumerate(rows):
            start = 0
            for sample in samples:
                alone = model(sample)[0]
                torch.testing.assert_close(packed[row, start : start + len(alone)], alone, atol=1e-5, rtol=0)
                start += len(alone)


def test_a_packed_row_has_the_loss_and_the_gradients_of_its_samples(tmp_path: Path) -> None:
    make_folder(tmp_path)
    samples = [random_tokens(1, n, seed=n) for n in (7, 20, 9)]
    targets = [sample.roll(-1, dims=1) for sample in samples]
    for target in targets:
        target[:, :3] = target[:, -1] = -100
    packed, apart = (load_model(tmp_path, dtype=torch.float32).train() for _ in range(2))
    loss = packed(
        torch.cat(samples, dim=1),
        documents_BT=torch.cat([torch.full_like(sample, i) for i, sample in enumerate(samples)], dim=1),
        positions_BT=torch.cat([torch.arange(sample.shape[1])[None] for sample in samples], dim=1),
        labels_BT=torch.cat(targets, dim=1),
    )
    loss.backward()
    losses = [apart(sample, labels_BT=target) for sample, target in zip(samples, targets, strict=True)]
    for part in losses:
        part.backward()
    assert loss.item() == pytest.approx(sum(part.item() for part in losses), rel=1e-6)
    for one, other in zip(packed.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_padding_at_the_end_changes_nothing_and_is_finite(tmp_path: Path) -> None:
    make_folder(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    tokens = random_tokens(2, 16)
    documents = torch.zeros_like(tokens)
    documents[0, 9:] = -1
    with torch.no_grad():
        padded, plain = model(tokens, documents_BT=documents), model(tokens[:1, :9])
    torch.testing.assert_close(padded[:1, :9], plain, atol=1e-5, rtol=0)
    assert padded.isfinite().all()


@pytest.mark.parametrize("chunks", [(12,), (5, 7), (1,) * 12, (9, 1, 1, 1)])
def test_cached_logits_equal_those_of_the_whole_text(tmp_path: Path, chunks: tuple[int, ...]) -> None:
    make_folder(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    tokens = random_tokens(2, 12)
    cache = KVCache(model.config, batch_size=2, max_length=12, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=0)


def test_gradients_equal_those_of_transformers(tmp_path: Path) -> None:
    reference = make_folder(tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path, dtype=torch.float32).train()
    tokens = random_tokens(2, 20)
    labels = tokens.roll(-1, dims=1)
    labels[:, :5] = labels[:, -1] = -100
    model(tokens, labels_BT=labels).backward()
    logits = reference(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_recomputing_activations_changes_neither_loss_nor_gradients(tmp_path: Path) -> None:
    make_folder(tmp_path)
    tokens = random_tokens(2, 20)
    results = []
    for recompute in ("None", "Selective", "Full"):
        model = load_model(tmp_path, dtype=torch.float32).train()
        for block in model.model.layers:
            block.recompute = recompute
        loss = model(tokens, labels_BT=tokens.roll(-1, dims=1))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(
        torch.equal(plain, recomputed)
        for others in results[1:]
        for plain, recomputed in zip(results[0], others, strict=True)
    )


CONFIG = TINY | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
REFUSED = {
    "architectures must be ['LlamaForCausalLM'] with model_type 'llama', got ['LlamaForSequenceClassification']": {
        "architectures": ["LlamaForSequenceClassification"],
    },
    "hidden_act must be 'silu', got 'gelu'": {"hidden_act": "gelu"},
    "attention_dropout must be 0, got 0.1": {"attention_dropout": 0.1},
    "quantization_config must be None, got {'quant_method': 'gptq'}": {"quantization_config": {"quant_method": "gptq"}},
    "rope_interleaved must be False, got True": {"rope_interleaved": True},
    "hidden_size must be a positive integer, got None": {"hidden_size": None},
    "num_hidden_layers must be a positive integer, got '3'": {"num_hidden_layers": "3"},
    "vocab_size must be a positive integer, got 0": {"vocab_size": 0},
    "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3": {"num_key_value_heads": 3},
    "hidden_size must be a multiple of num_attention_heads where head_dim is not given, got 33 and 4": {
        "hidden_size": 33
    },
    "head_dim must be even, got 7": {"head_dim": 7},
    "rope_type must be one of default, linear, dynamic, yarn, llama3, longrope, got 'proportional'": {
        "rope_scaling": {"rope_type": "proportional"}
    },
    "rope parameter factor is missing": {"rope_scaling": {"type": "linear"}},
    "rope parameter low_freq_factor is missing": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope parameter factor must be a positive number, got '2'": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "partial_rotary_factor must be 1, got 0.5": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.items(), ids=REFUSED.keys())
def test_a_config_that_is_not_supported_is_refused_by_name(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        ModelConfig.from_hf(CONFIG | changes)
    assert message in str(caught.value)


def test_the_package_imports_no_torch_until_it_is_needed() -> None:
    code = """
import sys, kubetune_trainer
assert "torch" not in sys.modules
from kubetune_trainer import generate, load_model, load_tokenizer
import kubetune_trainer.generation, kubetune_trainer.model, kubetune_trainer.tokenizer
assert all(map(callable, (kubetune_trainer.generate, kubetune_trainer.load_model, kubetune_trainer.load_tokenizer)))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_those_of_transformers() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = ModelConfig.from_hf({key: TINY[key] for key in sizes} | {"model_type": "llama"})
    assert config.num_kv_heads == config.num_heads
    assert (config.max_positions, config.norm_eps, config.rope.theta) == (2048, 1e-6, 10000.0)
    assert not config.tied_embeddings


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "config.json is missing"), ("{", "is not JSON"), ("[]", "must hold an object, got list")],
)
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
