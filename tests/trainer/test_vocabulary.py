"""A model's folder gets the chat template of the adapters beside it, and stays as it was."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from kubetune_trainer import load_model, load_tokenizer
from kubetune_trainer.vocabulary import grown, growth_by_adapter
from tests.recipes.tiny import TEMPLATE, write_model

TEMPLATE_OF_ADAPTER = "{% for message in messages %}TRAINED {{ message.content }}{% endfor %}"


def write_adapter(folder: Path, *, template: str | None) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_template_of_an_adapter_comes_before_the_models_whose_weights_are_not_copied(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base"), write_adapter(tmp_path / "adapter", template=TEMPLATE_OF_ADAPTER)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    folder = grown(base, growth_by_adapter(base, adapter), below=tmp_path)
    assert load_tokenizer(folder).chat_template == TEMPLATE_OF_ADAPTER
    assert load_tokenizer(base).chat_template == TEMPLATE
    assert (folder / "model.safetensors").samefile(base / "model.safetensors")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(load_model(folder)(tokens), load_model(base)(tokens))
    small = grown(base, growth_by_adapter(base, adapter), below=tmp_path, with_weights=False)
    assert load_tokenizer(small).chat_template == TEMPLATE_OF_ADAPTER
    assert not (small / "model.safetensors").exists()
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_an_adapter_without_a_template_or_with_the_models_own_adds_nothing(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    assert growth_by_adapter(base, write_adapter(tmp_path / "none", template=None)) is None
    assert growth_by_adapter(base, write_adapter(tmp_path / "same", template=TEMPLATE)) is None


def test_an_adapter_brings_the_row_of_a_token_that_the_tokenizer_had_and_the_embedding_had_not(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = backend.get_vocab_size()
    backend.add_tokens(["<|image|>"])
    backend.save(str(base / "tokenizer.json"))
    adapter = write_adapter(tmp_path / "adapter", template=None)
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "trainable_token_indices": {"embed_tokens": [3, rows]}}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    backend.save(str(adapter / "tokenizer.json"))
    growth = growth_by_adapter(base, adapter)
    assert growth is not None
    assert (growth.new_ids, growth.size) == ((rows,), rows + 1)
    assert load_model(grown(base, growth, below=tmp_path)).config.vocab_size == rows + 1
