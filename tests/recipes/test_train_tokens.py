"""Runs that add tokens and train their rows: the data has them, the outputs have them, and whoever uses these too."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from kubetune_trainer import load_model, load_tokenizer
from kubetune_trainer.data.store import DataStore
from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote, steps
from tests.recipes.tiny import write_config, write_messages

TOKENS = ["<|sort|>", "<|reverse|>"]
OUTPUTS = [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}]
TRAINING = {
    "max_steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "precision": "FP32",
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8, "train_tokens": TOKENS}
peft_asks_by_an_old_name = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def marked(place: Path) -> Path:
    """Conversations whose questions begin with a token that the model does not have."""
    write_messages(place / "pairs.jsonl", samples=40, seed=1)
    lines = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["messages"][0]["content"] = TOKENS[number % 2] + line["messages"][0]["content"]
        line["messages"][1]["content"] += TOKENS[1 - number % 2]
    (place / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def config(folder: Path, name: str, **blocks: Any) -> Path:
    return write_config(folder / f"{name}.yaml", **{"training": TRAINING, "lora": LORA, "outputs": OUTPUTS} | blocks)


def outputs(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "outputs"


def untie(folder: Path) -> None:
    """Give the model an output head of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    told = json.loads((folder / "model" / "config.json").read_text()) | {"tie_word_embeddings": False}
    torch.manual_seed(1)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = 0.5 * torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(told))


@peft_asks_by_an_old_name
@pytest.mark.parametrize(("head", "ranks"), [("tied", 2), ("untied", 1)])
def test_new_tokens_are_trained_and_known_to_every_output(zygote: Zygote, marked: Path, head: str, ranks: int) -> None:
    if head == "untied":
        untie(marked)
    gguf = {"name": "edge", "type": "GGUF", "gguf": {"type": "F16"}}
    path = config(marked, "whole", outputs=[*OUTPUTS, gguf])
    whole = Gang.start(zygote, marked / "whole", path, ranks=ranks).succeed()
    assert whole.losses()[4] < whole.losses()[1]
    merged, adapter = outputs(marked, "whole") / "merged", outputs(marked, "whole") / "adapter"
    tokenizer, ours = load_tokenizer(merged), load_model(merged, dtype=torch.float32)
    ids = [tokenizer.backend.token_to_id(token) for token in TOKENS]
    text = "a<|sort|> red cat<|reverse|>"
    encoded = tokenizer.encode(text)
    assert set(ids) <= set(encoded)
    assert AutoTokenizer.from_pretrained(merged).encode(text) == encoded
    assert AutoTokenizer.from_pretrained(adapter).encode(text) == encoded
    tokens = torch.tensor([encoded])
    base = AutoModelForCausalLM.from_pretrained(marked / "model", dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer.backend.get_vocab()))
    peft = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        wanted = ours(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        torch.testing.assert_close(theirs(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(peft(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
        stored = load_model(outputs(marked, "whole") / "edge", dtype=torch.float32)
        assert (stored(tokens) - wanted).std() < 0.01 * wanted.std(), "F16 has 11 bits"
    assert whole.events("merge")[-1]["difference"] < 1e-5
    assert load_tokenizer(outputs(marked, "whole") / "edge").encode(text) == encoded


def test_rows_of_the_data_have_the_tokens_and_lie_apart_from_those_that_have_not(zygote: Zygote, marked: Path) -> None:
    one = Gang.start(zygote, marked / "with", config(marked, "with"), "training.max_steps=1").succeed()
    other = config(marked, "without", lora={"rank": 4, "alpha": 8})
    Gang.start(zygote, marked / "without", other, "training.max_steps=1").succeed()
    places = [
        json.loads((marked / "runs" / name / "prepared.json").read_text())["train"]["location"].removeprefix("file://")
        for name in ("with", "without")
    ]
    ids = [load_tokenizer(outputs(marked, "with") / "merged").backend.token_to_id(token) for token in TOKENS]
    found = [{int(token) for row in DataStore.open(Path(place)) for token in row.tokens} for place in places]
    assert set(ids) <= found[0]
    assert not set(ids) & found[1]
    trained = one.events("start")[0]["trainableParameters"]
    adapters = 4 * sum(
        weight.shape[0] + weight.shape[1]
        for name, weight in load_model(marked / "model").named_parameters()
        if "proj" in name
    )
    assert trained == adapters + 2 * 64


def test_a_killed_run_goes_on_with_the_same_numbers(zygote: Zygote, marked: Path) -> None:
    training = {**TRAINING, "precision": "BF16Mixed", "optimizer": "AdamW8bit"}
    told = {"tuning": "DoRA", "training": training, "checkpoint": {"every_steps": 2, "mode": "Sync"}}
    whole = Gang.start(zygote, marked / "whole", config(marked, "whole", **told), ranks=2).succeed()
    killed = Gang.start(zygote, marked / "killed", config(marked, "run", **told), ranks=2)
    killed.wait_for(lambda event: event["event"] == "checkpoint")
    killed.kill(1, signal.SIGKILL)
    killed.wait()
    on = Gang.start(zygote, marked / "on", config(marked, "run", **told), ranks=2).succeed()
    assert on.events("resume")
    assert steps([killed, on]) == {step: {loss} for step, loss in whole.losses().items()}
    digests = [[output["digest"] for output in gang.message()["outputs"]] for gang in (whole, on)]
    assert digests[0] == digests[1]
    kept = FileSystemReader(marked / "runs/whole/checkpoints/step-4").read_metadata().state_dict_metadata
    others = [name for name in kept if "lora_" not in name]
    assert others
    assert all(".token_adapter.trainable_tokens_delta" in name for name in others)


def test_rows_learn_where_steps_are_taken_in_backward(zygote: Zygote, marked: Path) -> None:
    training = {
        **TRAINING, "global_batch_size": 2, "optimizer_in_backward": True, "precision": "BF16",
        "stochastic_rounding": True, "activation_checkpointing": "Full",
    }  # fmt: skip
    gang = Gang.start(zygote, marked / "ranks", config(marked, "run", training=training), ranks=2).succeed()
    assert gang.losses()[4] < gang.losses()[1]
    merged = load_model(outputs(marked, "run") / "merged", dtype=torch.float32)
    assert not torch.allclose(*merged.head[-2:], atol=1e-3), "they began as the same mean"


def test_adapters_with_tokens_are_trained_on_and_used_beside_their_base(zygote: Zygote, marked: Path) -> None:
    first = Gang.start(zygote, marked / "first", config(marked, "first")).succeed()
    adapter = {"location": f"file://{outputs(marked, 'first')}/adapter"}
    begun = {**LORA, "train_tokens": TOKENS[::-1], "adapter": {"uri": adapter}}
    second = Gang.start(zygote, marked / "second", config(marked, "second", lora=begun)).succeed()
    model = {"uri": {"location": f"file://{outputs(marked, 'first')}/merged"}}
    from_merged = Gang.start(zygote, marked / "merged", config(marked, "merged", model=model)).succeed()
    assert second.losses()[1] == pytest.approx(from_merged.losses()[1], rel=1e-4), "it begins where the first ended"
    for tokens, says in (
        (["<|sort|>"], r"lora.train_tokens must be those of lora.adapter, <|sort|>, <|reverse|>, got <|sort|>"),
        ([], "lora.train_tokens must be those of lora.adapter, <|sort|>, <|reverse|>, got none"),
    ):
        other = config(marked, "other", lora={**begun, "train_tokens": tokens})
        gang = Gang.start(zygote, marked / f"other-{len(tokens)}", other)
        assert gang.wait() == [64], gang.stderr()
        assert says in gang.message()["message"]

    base = {"uri": {"location": f"file://{marked}/model"}, "adapter": adapter}
    plain = config(marked, "beside", model=base, lora={"rank": 4, "alpha": 8}, outputs=[OUTPUTS[0]])
    beside = Gang.start(zygote, marked / "beside", plain).succeed()
    assert beside.losses()[1] == pytest.approx(from_merged.losses()[1], rel=1e-6)
    lineage = json.loads((outputs(marked, "beside") / "merged" / "lineage.json").read_text())
    assert lineage["adapter"]["digest"] == first.message()["outputs"][1]["digest"]

    shared = {
        "kind": "QuantizeJob",
        "outputs": [{"name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly"}],
        "workspace": {"uri": f"file://{marked}/runs"},
    }
    digests = []
    for name, taken in (("q-merged", model), ("q-beside", base)):
        (marked / f"{name}.yaml").write_text(yaml.safe_dump({**shared, "model": taken}))
        gang = Gang.start(zygote, marked / name, marked / f"{name}.yaml", recipe="quantize").succeed()
        digests.append(gang.message()["outputs"][0]["digest"])
    assert digests[0] == digests[1]

    command = [sys.executable, ROOT / "recipes" / "generate.py", "--prompt", "<|sort|>red cat", "--max-new-tokens", "6"]
    answers = [
        subprocess.run([*map(str, command), *map(str, given)], capture_output=True, text=True, check=True).stdout
        for given in (
            ["--model", outputs(marked, "first") / "merged"],
            ["--model", marked / "model", "--adapter", outputs(marked, "first") / "adapter"],
        )
    ]
    assert answers[0] == answers[1] != ""
