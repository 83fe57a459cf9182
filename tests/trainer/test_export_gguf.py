"""GGUF files are loaded by llama.cpp itself, which then computes, splits text and stops as we do."""

import ctypes
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from kubetune_trainer import generate, load_model, load_tokenizer
from kubetune_trainer.chat import ChatTemplate
from kubetune_trainer.errors import ConfigError, DataError, TrainerError
from kubetune_trainer.export.gguf import GGUF_FILE, load_gguf, save_gguf
from tests.llama import open_llama
from tests.recipes.tiny import TEMPLATE, write_tokenizer
from tests.trainer.smollm2 import smollm2_folder
from tests.trainer.tiny import make_folder

SHAPE: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
DIFFICULT = [
    "Hello  world", " leading", "trailing ", "1234567 and 3.14", "don't I'LL we've", "\n\n\tx  \n y", "日本語テキスト",
    "🙂👩‍👩‍👧 emoji", "x²+½=Ⅷ ٣", "a\u00a0b\u2003c", "<|im_start|>user\nhi<|im_end|>", "naïve café", "e\u0301",
    "def f(x):\n    return x**2  # ok", "\r\n windows\r\n", "\u200b zero", "", "    ",
]  # fmt: skip


def tiny_folder(folder: Path, **changes: Any) -> Path:
    make_folder(folder, **(SHAPE | changes))
    write_tokenizer(folder)
    return folder


@contextmanager
def llama(folder: Path, *, context: int = 256, **settings: Any) -> Iterator[llama_cpp.Llama]:
    loaded = open_llama(folder / GGUF_FILE, n_ctx=context, n_threads=1, **settings)
    try:
        yield loaded
    finally:
        loaded.close()


def log_probabilities(loaded: llama_cpp.Llama, tokens: list[int]) -> torch.Tensor:
    loaded.reset()
    loaded.eval(tokens)
    return torch.tensor(np.array(loaded.scores[: len(tokens)])).log_softmax(dim=-1)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The mean KL divergence of two tables of log probabilities."""
    return (wanted.exp() * (wanted - found)).sum(dim=-1).mean().item()


@pytest.mark.parametrize(
    "changes",
    [
        *({"rope_parameters": rope} for rope in ROPES.values()),
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=[*ROPES, "tied", "wide heads", "no groups", "biases"],
)
@torch.no_grad()
def test_llama_cpp_computes_what_the_source_computes(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = tiny_folder(tmp_path / "source", **changes)
    tokens = torch.randint(5, 300, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    wanted = load_model(source, dtype=torch.float32)(torch.tensor([tokens]))[0].log_softmax(dim=-1)
    save_gguf(source, tmp_path / "target")
    with llama(tmp_path / "target") as loaded:
        found = log_probabilities(loaded, tokens)
    assert divergence(wanted, found) < 1e-5
    ours = load_gguf(tmp_path / "target")(torch.tensor([tokens]))[0].log_softmax(dim=-1)
    torch.testing.assert_close(ours, wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_weights_are_those_of_llama_cpps_own_quantizer(tmp_path: Path, kind: str, tied: bool) -> None:
    source = tiny_folder(tmp_path / "source", dtype=torch.float16, tie_word_embeddings=tied)
    save_gguf(source, tmp_path / "F16")
    save_gguf(source, tmp_path / kind, type=kind)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.pure = gguf.LlamaFileType[f"MOSTLY_{kind}"], 1, True
    theirs = tmp_path / "theirs.gguf"
    paths = (str(tmp_path / "F16" / GGUF_FILE).encode(), str(theirs).encode())
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)) == 0
    wanted = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / kind / GGUF_FILE).tensors}
    assert found.keys() == wanted.keys()
    head = "token_embd.weight" if tied else "output.weight"
    for name, tensor in found.items():
        if name == head:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        else:
            assert tensor.tensor_type == wanted[name].tensor_type, name
            assert np.array_equal(tensor.data, wanted[name].data), name


@pytest.mark.parametrize(("kind", "steps"), [("F16", 1024), ("BF16", 128), ("Q8_0", 127), ("Q4_0", 8), ("Q4_1", 7.5)])
def test_reading_a_file_back_gives_the_weights_within_half_a_step(tmp_path: Path, kind: str, steps: float) -> None:
    source = tiny_folder(tmp_path / "source")
    save_gguf(source, tmp_path / "target", type=kind)
    wanted = dict(load_model(source, dtype=torch.float32).named_parameters())
    for name, weight in load_gguf(tmp_path / "target").named_parameters():
        # Q4_0's scale gives one sign of a block eight steps and the other seven, so its last step may be a whole one.
        error = (weight - wanted[name]).abs().amax(dim=-1) / wanted[name].abs().amax(dim=-1)
        assert error.max() <= (1 if kind == "Q4_0" else 0.6) / steps, name


def test_smollm2_answers_in_llama_cpp_token_for_token_and_splits_text_alike(tmp_path: Path) -> None:
    source = smollm2_folder()
    tokenizer, model = load_tokenizer(source), load_model(source, dtype=torch.float32)
    template = ChatTemplate(tokenizer.chat_template or "", tokenizer.special_tokens)
    messages = [{"role": "user", "content": "Write two sentences about the sea."}]
    prompt = tokenizer.encode(template.render(messages, add_generation_prompt=True))
    answer = generate(model, [prompt], max_new_tokens=24, stop_ids=tokenizer.stop_ids)[0]
    wanted = {}
    with torch.no_grad():
        wanted["Q8_0"] = wanted["F16"] = model(torch.tensor([prompt + answer]))[0].log_softmax(dim=-1)
    for kind, limit in (("F16", 1e-4), ("Q8_0", 0.02)):
        save_gguf(source, tmp_path / kind, type=kind)
        with llama(tmp_path / kind) as loaded:
            found = log_probabilities(loaded, prompt + answer)
            assert divergence(wanted[kind], found) < limit
            if kind == "F16":
                assert found.argmax(dim=-1).equal(wanted[kind].argmax(dim=-1))
                told = loaded.create_chat_completion(messages, temperature=0.0, max_tokens=24)
                assert told["choices"][0]["message"]["content"] == tokenizer.decode(answer)
                for text in DIFFICULT:
                    assert loaded.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text


def edited(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"model_type": "gemma"}, "config.json: architectures must be .*'gemma'"),
        ("config.json", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type .*, got 'dynamic'"),
        ("tokenizer.json", {"normalizer": {"type": "NFKC"}}, "normalizer must be null or NFC, got .*NFKC"),
        (
            "tokenizer.json",
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True}},
            "pre_tokenizer must be that of GPT-2, .* with add_prefix_space false, got ByteLevel",
        ),
    ],
    ids=["architecture", "rope", "normalizer", "pre-tokenizer"],
)
def test_what_llama_cpp_cannot_load_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    source = tiny_folder(tmp_path / "source")
    edited(source, file, **changes)
    with pytest.raises(DataError, match=words):
        save_gguf(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_type_whose_blocks_do_not_fit_is_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", hidden_size=48, num_attention_heads=2)
    with pytest.raises(
        ConfigError, match=r"gguf.type Q4_0 .* multiple of 32 long, got 48 in model.embed_tokens.weight"
    ):
        save_gguf(source, tmp_path / "target", type="Q4_0")
    assert not (tmp_path / "target").exists()
    save_gguf(source, tmp_path / "target", type="F16")


def test_a_weight_that_is_not_finite_leaves_no_file(tmp_path: Path) -> None:
    reference = make_folder(tmp_path / "source", **SHAPE)
    write_tokenizer(tmp_path / "source")
    reference.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    reference.save_pretrained(tmp_path / "source")
    with pytest.raises(DataError, match=r"model.layers.1.mlp.up_proj.weight has values that are not finite"):
        save_gguf(tmp_path / "source", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("damage", ["cut", "other config", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    save_gguf(tiny_folder(tmp_path / "source"), tmp_path / "target")
    file = tmp_path / "target" / GGUF_FILE
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:20_000])
    elif damage == "missing":
        file.unlink()
    else:
        edited(tmp_path / "target", "config.json", rms_norm_eps=0.5)
    with pytest.raises(TrainerError, match=GGUF_FILE):
        load_gguf(tmp_path / "target")


def test_the_file_carries_the_chat_template_and_where_an_answer_stops(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1, 4]}))
    save_gguf(source, tmp_path / "target", name="mine")
    with llama(tmp_path / "target") as loaded:
        assert loaded.metadata["tokenizer.chat_template"] == TEMPLATE
        assert loaded.metadata["general.name"] == "mine"
        assert [loaded.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == ["0", "1", "4"]
