"""What a run leaves behind is loaded by transformers and peft, and computes what the trained model computed."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from kubetune_trainer.config import Lora
from kubetune_trainer.errors import DataError
from kubetune_trainer.export import complete_weights, folder_digest, save_huggingface, save_peft, trained_weights
from kubetune_trainer.lora import apply_lora, lora_scale, lora_state_dict
from kubetune_trainer.model import Decoder, load_model
from kubetune_trainer.model.adapter import save_merged
from tests.trainer.tiny import make_folder, random_tokens

TARGETS = [("all-linear",), ("q_proj", "v_proj"), ("layers.1.mlp.up_proj",)]
SETTINGS: list[dict[str, bool]] = [{}, {"rank_stabilized": True}, {"has_magnitude": True}]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def with_trained_adapters(folder: Path, *, targets: tuple[str, ...] = ("all-linear",), **settings: bool) -> Decoder:
    """A model whose adapters have random values, as if trained."""
    model = load_model(folder, dtype=torch.float32)
    apply_lora(model, rank=4, alpha=6, target_modules=targets, **settings)
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_survives_load_and_save(tmp_path: Path, dtype: torch.dtype, shard: str, tied: bool) -> None:
    make_folder(tmp_path / "a", dtype=dtype, shard=shard, tie_word_embeddings=tied)
    model = load_model(tmp_path / "a", dtype=dtype)
    save_huggingface(
        model.state_dict().items(), source_dir=tmp_path / "a", target_dir=tmp_path / "b", max_shard_bytes=20_000
    )
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    LlamaForCausalLM.from_pretrained(tmp_path / "b")


def test_shards_are_no_larger_than_asked_and_the_index_knows_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    model = load_model(tmp_path / "a", dtype=torch.float32)
    save_huggingface(
        model.state_dict().items(), source_dir=tmp_path / "a", target_dir=tmp_path / "b", max_shard_bytes=20_000
    )
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        assert file.stat().st_mode & 0o044 == 0o044
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "b").values())


@pytest.mark.parametrize(("dtype", "wanted"), [("BF16", torch.bfloat16), ("FP32", torch.float32)])
def test_another_type_is_written_and_told_in_the_config(tmp_path: Path, dtype: str, wanted: torch.dtype) -> None:
    make_folder(tmp_path / "a", dtype=torch.float16)
    model = load_model(tmp_path / "a", dtype=torch.float32)
    save_huggingface(model.state_dict().items(), source_dir=tmp_path / "a", target_dir=tmp_path / "b", dtype=dtype)
    assert {tensor.dtype for tensor in stored(tmp_path / "b").values()} == {wanted}
    assert LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").dtype == wanted


def test_companion_files_go_along_and_nothing_else_does(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / "a" / name).write_text(name)
    for name in ("pytorch_model.bin", "README.md", "training_args.json", "model.gguf"):
        (tmp_path / "a" / name).write_text(name)
    model = load_model(tmp_path / "a", dtype=torch.float32)
    save_huggingface(model.state_dict().items(), source_dir=tmp_path / "a", target_dir=tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"),
    }


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_computes_what_the_adapters_computed(
    tmp_path: Path, targets: tuple[str, ...], tied: bool, settings: dict[str, bool]
) -> None:
    make_folder(tmp_path / "a", tie_word_embeddings=tied)
    model = with_trained_adapters(tmp_path / "a", targets=targets, **settings)
    complete = complete_weights(trained_weights(model), source_dir=tmp_path / "a", lora_scale=lora_scale(model))
    save_huggingface(complete, source_dir=tmp_path / "a", target_dir=tmp_path / "b")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        wanted = model(tokens)
        torch.testing.assert_close(merged(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(load_model(tmp_path / "a", dtype=torch.float32)(tokens), wanted, atol=1e-3)


def test_weights_that_no_adapter_touches_stay_byte_for_byte(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", dtype=torch.float16)
    model = with_trained_adapters(tmp_path / "a", targets=("q_proj",))
    model.model.norm.weight.data.zero_()  # what a rank has in memory does not count: it may be rounded
    complete = complete_weights(trained_weights(model), source_dir=tmp_path / "a", lora_scale=lora_scale(model))
    save_huggingface(complete, source_dir=tmp_path / "a", target_dir=tmp_path / "b")
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("q_proj" not in name), name


def test_a_fully_tuned_model_is_written_as_it_was_trained(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", tie_word_embeddings=True)
    model = load_model(tmp_path / "a", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    complete = complete_weights(trained_weights(model), source_dir=tmp_path / "a")
    save_huggingface(complete, source_dir=tmp_path / "a", target_dir=tmp_path / "b")
    assert same({name: tensor.detach() for name, tensor in model.state_dict().items()}, stored(tmp_path / "b"))


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft 0.21 asks transformers 5 by an old name
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_loads_our_adapter_and_gives_our_logits_and_gradients(
    tmp_path: Path, targets: tuple[str, ...], settings: dict[str, bool]
) -> None:
    base = make_folder(tmp_path / "a", attention_bias=True)
    model = with_trained_adapters(tmp_path / "a", targets=targets, **settings)
    lora = Lora(rank=4, alpha=6, target_modules=targets, rank_stabilized="rank_stabilized" in settings)
    save_peft(lora_state_dict(model), target_dir=tmp_path / "adapter", lora=lora, base_model="owner/name")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    tokens = random_tokens(2, 20)
    logits, their_logits = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(their_logits, logits, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    their_logits.square().mean().backward()
    their_gradients = {
        name.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): weight.grad
        for name, weight in theirs.named_parameters()
        if "lora_" in name
    }
    assert their_gradients.keys() == lora_state_dict(model).keys()
    for name, weight in model.named_parameters():
        if name in their_gradients:
            torch.testing.assert_close(weight.grad, their_gradients[name], atol=1e-5, rtol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, "owner/name")
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).revision is None


def test_peft_reads_which_commit_of_its_base_an_adapter_belongs_to(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    adapters = lora_state_dict(with_trained_adapters(tmp_path / "a"))
    save_peft(adapters, target_dir=tmp_path / "adapter", lora=Lora(), base_model="owner/name", revision="0123abcd")
    found = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (found.base_model_name_or_path, found.revision) == ("owner/name", "0123abcd")


@pytest.mark.parametrize("settings", [{}, {"has_magnitude": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_with_its_adapter_is_the_merged_output_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, settings: dict[str, bool]
) -> None:
    base = tmp_path / "a"
    make_folder(base, dtype=dtype)
    model = with_trained_adapters(base, **settings)
    complete = complete_weights(trained_weights(model), source_dir=base, lora_scale=lora_scale(model))
    save_huggingface(complete, source_dir=base, target_dir=tmp_path / "output")
    save_peft(
        lora_state_dict(model), target_dir=tmp_path / "adapter", lora=Lora(rank=4, alpha=6), base_model="owner/name"
    )
    save_merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert same(stored(tmp_path / "output"), stored(tmp_path / "merged"))
    wanted = load_model(tmp_path / "output", dtype=torch.float32).state_dict()
    assert same(wanted, load_model(base, dtype=torch.float32, adapter=tmp_path / "adapter").state_dict())
    make_folder(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(DataError, match=r"layers\.1\..* belongs to no weight of the model"):
        save_merged(tmp_path / "other", tmp_path / "adapter", tmp_path / "none")


def trained_by_peft(folder: Path, **settings: Any) -> PeftModel:
    """A model with peft's adapters of some kind, as if trained; the untrained ones lie beside its base."""
    base = LlamaForCausalLM.from_pretrained(folder)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"], **settings)
    model = get_peft_model(base, lora)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "untrained")
    model.peft_config["default"].init_lora_weights = settings.get("init_lora_weights", True)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


PEFTS_OWN = "ignore:.*(is_gradient_checkpointing|PiSSA|OLoRA|CorDA|path_initial_model).*"


@pytest.mark.filterwarnings(PEFTS_OWN)
@pytest.mark.parametrize("first", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_of_a_changed_base_are_refused_until_peft_has_made_them_ordinary_ones(
    tmp_path: Path, first: str
) -> None:
    make_folder(tmp_path / "a")
    model, tokens = trained_by_peft(tmp_path / "a", init_lora_weights=first), random_tokens(2, 20)
    with torch.no_grad():
        wanted = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match=f"init_lora_weights must be true, false, null, .*got '{first}'") as caught:
        load_model(tmp_path / "a", dtype=torch.float32, adapter=tmp_path / "adapter")
    assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)
    untrained = str(tmp_path / "a" / "untrained")
    model.save_pretrained(tmp_path / "ordinary", path_initial_model_for_weight_conversion=untrained)
    found = load_model(tmp_path / "a", dtype=torch.float32, adapter=tmp_path / "ordinary")(tokens)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings(PEFTS_OWN)
@pytest.mark.parametrize("first", [True, False, "gaussian", "orthogonal", "mica"])
def test_adapters_of_the_base_itself_are_taken_however_they_began(tmp_path: Path, first: bool | str) -> None:
    make_folder(tmp_path / "a")
    model, tokens = trained_by_peft(tmp_path / "a", init_lora_weights=first), random_tokens(2, 20)
    model.save_pretrained(tmp_path / "adapter")
    found = load_model(tmp_path / "a", dtype=torch.float32, adapter=tmp_path / "adapter")(tokens)
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens).logits, atol=1e-4, rtol=1e-4)


KINDS: list[dict[str, Any]] = [
    {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"}, {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": "one of tomorrow"}, {"alora_invocation_tokens": [5, 6]}, {"layer_replication": [[0, 2]]},
    {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}}, {"modules_to_save": ["lm_head"]},
    {"kasa_config": {"beta": 1}}, {"arrow_config": {"top_k": 3}}, {"lora_bias": True},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapters_that_are_more_than_lora_are_refused_by_name_and_value(tmp_path: Path, kind: dict[str, Any]) -> None:
    make_folder(tmp_path / "a")
    model = with_trained_adapters(tmp_path / "a")
    save_peft(lora_state_dict(model), target_dir=tmp_path / "adapter", lora=Lora(rank=4), base_model="owner/name")
    file = tmp_path / "adapter" / "adapter_config.json"
    unset = {"init_lora_weights": None, "alora_invocation_tokens": None, "layer_replication": None, "rank_pattern": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | unset))
    load_model(tmp_path / "a", dtype=torch.float32, adapter=tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(file.read_text()) | kind))
    [(name, value)] = kind.items()
    with pytest.raises(DataError, match=f"{name} .*{re.escape(repr(value))}"):
        load_model(tmp_path / "a", dtype=torch.float32, adapter=tmp_path / "adapter")


def test_a_digest_changes_with_any_name_and_any_byte(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_text("one")
    (tmp_path / "sub" / "b").write_text("three")
    lines = [
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for content, name in ((b"one", "a"), (b"three", "sub/b"))
    ]
    digest = folder_digest(tmp_path)
    assert digest == (f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}", 8)
    (tmp_path / "a").rename(tmp_path / "c")
    renamed = folder_digest(tmp_path)
    (tmp_path / "c").write_text("two")
    assert len({digest[0], renamed[0], folder_digest(tmp_path)[0]}) == 3
