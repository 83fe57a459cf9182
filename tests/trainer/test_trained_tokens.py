"""Tokens that are added and trained: the same folders as transformers makes, the same numbers as peft's."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from kubetune_trainer.config import Lora
from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.errors import DataError
from kubetune_trainer.export import complete_weights, save_huggingface, save_peft, trained_weights
from kubetune_trainer.export.check import MergeCheck
from kubetune_trainer.export.gguf import save_gguf
from kubetune_trainer.lora import apply_lora, lora_scale, lora_state_dict, without_adapters
from kubetune_trainer.model import Decoder, load_model
from kubetune_trainer.model.adapter import read_adapter, save_merged
from kubetune_trainer.model.config import read_config, read_json
from kubetune_trainer.tokenizer import load_tokenizer
from kubetune_trainer.vocabulary import grown, growth_by_adapter, growth_by_tokens, ids_of
from tests.llama import open_llama
from tests.recipes.tiny import write_model
from tests.trainer.test_export import same, stored

TOKENS = ["<|sort|>", "cat", "<|reverse|>"]
"""The one in the middle is a token already."""
TEXT = "the <|sort|>cat runs<|reverse|> fast<|sort|> and slow cat"
SPARE = 16
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "padded": {"vocab_size": 319 + SPARE},
    "scaled": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
peft_asks_by_an_old_name = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", **KINDS[request.param])


def with_tokens(base: Path, *, below: Path) -> Path:
    return grown(base, growth_by_tokens(base, TOKENS), below=below)


def trained(folder: Path, **settings: bool) -> Decoder:
    """A model whose adapters and rows have random values, as if trained."""
    model = load_model(folder, dtype=torch.float32)
    apply_lora(model, rank=4, alpha=8, trained_ids=ids_of(folder, TOKENS), **settings)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def sample(folder: Path) -> torch.Tensor:
    ids = load_tokenizer(folder).encode(TEXT)
    assert set(ids_of(folder, TOKENS)) <= set(ids)
    return torch.tensor([ids, ids[::-1]])


@pytest.mark.parametrize("kind", ["tied", "untied", "padded"])
def test_a_folder_grows_as_transformers_would_make_it(tmp_path: Path, kind: str) -> None:
    base = write_model(tmp_path / "base", **KINDS[kind])
    folder = with_tokens(base, below=tmp_path)
    theirs, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    before = model.get_input_embeddings().weight.detach().clone()
    assert theirs.add_tokens([AddedToken(token, normalized=False) for token in TOKENS if token != "cat"]) == 2
    if len(theirs) > model.config.vocab_size:
        model.resize_token_embeddings(len(theirs))
    ours = AutoTokenizer.from_pretrained(folder)
    text = "x<|sort|> a cat <|reverse|><|sort|>."
    assert ours.encode(text) == theirs.encode(text) == load_tokenizer(folder).encode(text)
    assert len(ours) == len(theirs)
    config = read_config(folder)
    assert config.vocab_size == model.config.vocab_size
    weights = stored(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            table = stored(base)[name]
            new = [
                number for number in ids_of(folder, TOKENS) if number >= len(load_tokenizer(base).backend.get_vocab())
            ]
            mean = table.mean(dim=0).expand(2, -1)
            torch.testing.assert_close(weights[name][new], mean, atol=1e-6, rtol=1e-5)
            kept = [number for number in range(len(table)) if number not in new]
            assert torch.equal(weights[name][kept], table[kept])
    if len(before) < config.vocab_size:  # transformers draws them around the mean
        resized = model.get_input_embeddings().weight.detach()[-2:]
        torch.testing.assert_close(weights["model.embed_tokens.weight"][-2:], resized, atol=1e-3, rtol=0)


def test_a_folder_that_has_all_tokens_stays_where_it_is(base: Path, tmp_path: Path) -> None:
    assert grown(base, growth_by_tokens(base, ["cat", "<|end|>"]), below=tmp_path / "none") == base
    assert not (tmp_path / "none").exists()


def test_a_token_without_a_row_gets_one(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    last = read_config(base).vocab_size - 1
    with_row = load_file(base / "model.safetensors")
    with_row["model.embed_tokens.weight"] = with_row["model.embed_tokens.weight"][:last].contiguous()
    save_file(with_row, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(read_json(base / "config.json") | {"vocab_size": last}))
    token = load_tokenizer(base).backend.id_to_token(last)
    folder = grown(base, growth_by_tokens(base, [token]), below=tmp_path)
    assert stored(folder)["model.embed_tokens.weight"].shape == (last + 1, 64)
    assert load_tokenizer(folder).backend.get_vocab() == load_tokenizer(base).backend.get_vocab()


def test_other_lists_of_added_tokens_name_the_new_ones(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    (base / "added_tokens.json").write_text('{"<|end|>": 0}')
    told = read_json(base / "tokenizer_config.json")
    listed = {"0": {"content": "<|end|>", "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps(told | {"added_tokens_decoder": listed}))
    folder = with_tokens(base, below=tmp_path)
    sort, _, reverse = ids_of(folder, TOKENS)
    assert read_json(folder / "added_tokens.json") == {"<|end|>": 0, "<|sort|>": sort, "<|reverse|>": reverse}
    decoder = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    assert {number: entry["content"] for number, entry in decoder.items()} == {
        "0": "<|end|>", str(sort): "<|sort|>", str(reverse): "<|reverse|>",
    }  # fmt: skip
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer) + 2


def test_rows_begin_as_the_models_own_and_only_they_get_gradients(base: Path, tmp_path: Path) -> None:
    folder = with_tokens(base, below=tmp_path)
    model, tokens = load_model(folder, dtype=torch.float32), sample(folder)
    with torch.no_grad():
        before = model(tokens)
    layers = apply_lora(model, rank=4, alpha=8, trained_ids=ids_of(folder, TOKENS))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before, atol=1e-6, rtol=0)
    model(tokens, labels_BT=tokens.roll(-1, 1)).backward()
    tables = ["model.embed_tokens", *([] if read_config(folder).tied_embeddings else ["lm_head"])]
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        *(f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"),
        *(f"{table}.token_adapter.trainable_tokens_delta" for table in tables),
    }


def test_without_adapters_the_rows_are_the_bases(base: Path, tmp_path: Path) -> None:
    folder = with_tokens(base, below=tmp_path)
    model, tokens = trained(folder), sample(folder)
    with torch.no_grad(), without_adapters(model):
        assert torch.equal(model(tokens), load_model(folder, dtype=torch.float32)(tokens))


@peft_asks_by_an_old_name
@pytest.mark.parametrize("settings", [{}, {"has_magnitude": True}], ids=["lora", "dora"])
def test_peft_loads_our_adapters_and_gives_our_logits_and_gradients(
    base: Path, tmp_path: Path, settings: dict[str, bool]
) -> None:
    folder = with_tokens(base, below=tmp_path)
    model, tokens = trained(folder, **settings), sample(folder)
    save_peft(
        lora_state_dict(model), target_dir=tmp_path / "adapter", lora=Lora(rank=4, alpha=8), base_model=str(base),
        model_dir=folder,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    if len(tokenizer) > theirs.config.vocab_size:
        theirs.resize_token_embeddings(len(tokenizer))
    peft = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    logits, their_logits = model(tokens), peft(tokens).logits
    torch.testing.assert_close(their_logits, logits, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    their_logits.square().mean().backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): weight.grad
        for name, weight in peft.named_parameters()
        if "trainable_tokens" in name
    }
    ours = {name: weight.grad for name, weight in model.named_parameters() if "trainable_tokens" in name}
    assert gradients.keys() == ours.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("kind", ["tied", "untied", "padded"])
def test_a_base_with_its_adapter_is_the_merged_output_bit_for_bit(tmp_path: Path, kind: str, packed: bool) -> None:
    base = write_model(tmp_path / "base", intermediate_size=128, **KINDS[kind])
    folder = with_tokens(base, below=tmp_path)
    model, tokens = trained(folder, packs_base=packed), sample(folder)
    complete = complete_weights(trained_weights(model), source_dir=folder, lora_scale=lora_scale(model), packed=packed)
    save_huggingface(complete, source_dir=folder, target_dir=tmp_path / "output")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)

    adapter = tmp_path / "adapter"
    adapters = lora_state_dict(model)
    save_peft(
        adapters, target_dir=adapter, lora=Lora(rank=4, alpha=8), base_model=str(base), packed=packed, model_dir=folder
    )
    again = grown(base, growth_by_adapter(base, adapter), below=tmp_path / "again")
    save_merged(again, adapter, tmp_path / "merged")
    assert same(stored(tmp_path / "output"), stored(tmp_path / "merged"))
    assert (tmp_path / "merged" / "config.json").read_bytes() == (tmp_path / "output" / "config.json").read_bytes()
    with torch.no_grad():
        in_memory = load_model(again, dtype=torch.float32, adapter=adapter)(tokens)
        assert torch.equal(in_memory, load_model(tmp_path / "output", dtype=torch.float32)(tokens))


def test_llama_cpp_reads_each_token_as_one_and_computes_with_its_row(tmp_path: Path) -> None:
    folder = with_tokens(write_model(tmp_path / "base"), below=tmp_path)
    model, tokens = trained(folder), sample(folder)[0].tolist()
    complete = complete_weights(trained_weights(model), source_dir=folder, lora_scale=lora_scale(model))
    save_huggingface(complete, source_dir=folder, target_dir=tmp_path / "merged")
    save_gguf(tmp_path / "merged", tmp_path / "edge", type="F16", name="edge")
    with contextlib.closing(open_llama(tmp_path / "edge" / "model.gguf", n_ctx=64)) as loaded:
        assert loaded.tokenize(TEXT.encode(), add_bos=False, special=True) == tokens
        loaded.eval(tokens)
        found = torch.tensor(loaded.scores[: len(tokens)])
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]))[0]
    torch.testing.assert_close(found, wanted, atol=0.02 * wanted.std().item(), rtol=0)


def test_the_check_of_a_merged_model_sees_its_rows(base: Path, tmp_path: Path) -> None:
    folder = with_tokens(base, below=tmp_path)
    model, tokens = trained(folder), sample(folder)
    documents = torch.zeros_like(tokens)
    batch = Batch(
        tokens=tokens, labels=tokens, positions=torch.arange(tokens.shape[1]).expand_as(tokens), documents=documents,
        num_tokens=tokens.numel(), trained_tokens=tokens.numel(),
    )  # fmt: skip
    check = MergeCheck(folder, lora_state_dict(model), scale=lora_scale(model), packed=False, batches=[batch])
    complete = dict(complete_weights(trained_weights(model), source_dir=folder, lora_scale=lora_scale(model)))
    save_huggingface(complete.items(), source_dir=folder, target_dir=tmp_path / "right")
    assert check.difference(tmp_path / "right").relative < 1e-5
    complete["model.embed_tokens.weight"][ids_of(folder, TOKENS)[0]] *= 2
    save_huggingface(complete.items(), source_dir=folder, target_dir=tmp_path / "wrong")
    with pytest.raises(DataError, match="merged weights must compute what the adapters do"):
        check.difference(tmp_path / "wrong")


@peft_asks_by_an_old_name
@pytest.mark.parametrize("tables", ["list", "one by one"])
def test_pefts_own_adapters_with_trained_tokens_are_merged(base: Path, tmp_path: Path, tables: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tied = read_config(base).tied_embeddings
    ids: Any = [7, 20] if tables == "list" else {"embed_tokens": [7, 20], **({} if tied else {"lm_head": [20, 9]})}
    peft = get_peft_model(theirs, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=ids))
    torch.manual_seed(4)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.eval().save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor([[7, 20, 9, 5, 7, 20, 30]])
    with torch.no_grad():
        ours = load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter")(tokens)
        torch.testing.assert_close(ours, peft(tokens).logits, atol=1e-5, rtol=1e-5)


def test_adapters_whose_tokens_are_not_there_are_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    folder = with_tokens(base, below=tmp_path)
    adapter, lora = tmp_path / "adapter", Lora(rank=4, alpha=8)
    save_peft(lora_state_dict(trained(folder)), target_dir=adapter, lora=lora, base_model="a/b", model_dir=folder)
    with pytest.raises(DataError, match=r"must fit 3 of the model's 319 rows of 64, got \(3, 64\) up to row 320"):
        read_adapter(adapter, config=read_config(base))
    other = write_model(tmp_path / "other")
    shutil.copytree(adapter, tmp_path / "changed")
    text = (tmp_path / "changed" / "tokenizer.json").read_text()
    (tmp_path / "changed" / "tokenizer.json").write_text(text.replace("<|pad|>", "<|fill|>"))
    with pytest.raises(DataError, match=r"must have all tokens of the model, got '<\|pad\|>' as id None in place of 1"):
        growth_by_adapter(other, tmp_path / "changed")
    config = read_json(adapter / "adapter_config.json")
    del config["trainable_token_indices"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"trainable_token_indices must tell whose the trained rows are .*, got None"):
        read_adapter(adapter, config=read_config(folder))
    assert load_file(adapter / "adapter_model.safetensors").keys() == {
        f"base_model.model.{name}" for name in lora_state_dict(trained(folder)) if not name.endswith("indices")
    }
