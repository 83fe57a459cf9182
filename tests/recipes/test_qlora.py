"""A run with tuning QLoRA: what it leaves behind, and that it goes on where it was killed."""

import signal
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from kubetune_trainer import load_model
from kubetune_trainer.quantize.nf4 import rounded_to_nf4
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config, write_messages, write_model

OUTPUTS = [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}]


def test_a_killed_run_goes_on_with_the_same_numbers_and_keeps_only_what_it_trains(
    zygote: Zygote, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", intermediate_size=128)
    write_messages(tmp_path / "pairs.jsonl", samples=40, seed=1)
    told = {"tuning": "QLoRA", "checkpoint": {"every_steps": 3}, "outputs": OUTPUTS}
    whole = Gang.start(zygote, tmp_path / "whole", write_config(tmp_path / "a.yaml", **told), ranks=2).succeed()
    config = write_config(tmp_path / "b.yaml", **told)
    first = Gang.start(zygote, tmp_path / "first", config, ranks=2)
    first.wait_for(lambda event: event["event"] == "checkpoint")
    for rank in range(2):
        first.kill(rank, signal.SIGKILL)
    first.wait()
    second = Gang.start(zygote, tmp_path / "second", config, ranks=2).succeed()
    assert second.events("resume")
    found = first.losses() | second.losses()
    assert {step: found[step] for step in whole.losses()} == whole.losses()

    kept = FileSystemReader(tmp_path / "runs" / "b" / "checkpoints" / "step-12").read_metadata().state_dict_metadata
    assert kept
    assert not [name for name in kept if ".lora_A." not in name and ".lora_B." not in name]
    start = whole.events("start")[0]
    count = sum(weight.numel() for weight in load_file(tmp_path / "model" / "model.safetensors").values())
    assert start["parameters"] == count + start["trainableParameters"]


def test_outputs_are_merged_into_the_base_that_is_asked_for(zygote: Zygote, tmp_path: Path) -> None:
    write_model(tmp_path / "model", intermediate_size=128)
    write_messages(tmp_path / "pairs.jsonl", samples=40, seed=1)
    source = load_file(tmp_path / "model" / "model.safetensors")
    name, tokens = "model.layers.0.mlp.up_proj.weight", torch.tensor([[5, 6, 7, 8, 9]])
    for base in ("Quantized", "Original"):
        lora = {"rank": 4, "alpha": 8, "target_modules": ["down_proj", "up_proj"], "merge_base": base}
        config = write_config(tmp_path / f"{base}.yaml", tuning="QLoRA", lora=lora, outputs=OUTPUTS)
        gang = Gang.start(zygote, tmp_path / base, config, "training.max_steps=3").succeed()
        outputs = tmp_path / "runs" / base / "outputs"
        merge = gang.events("merge")[0]
        assert 0 < merge["difference"] < 1e-5, "of what was merged, whichever base that is"
        merged, adapters = (load_file(outputs / file) for file in (
            "merged/model.safetensors", "adapter/adapter_model.safetensors"
        ))  # fmt: skip
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        update = 2 * adapters[f"{prefix}.lora_B.weight"] @ adapters[f"{prefix}.lora_A.weight"]
        wanted = (rounded_to_nf4(source[name]) if base == "Quantized" else source[name]) + update
        torch.testing.assert_close(merged[name], wanted, atol=1e-6, rtol=1e-5)
        untouched = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(merged[untouched], source[untouched])
        with torch.no_grad():
            again = load_model(tmp_path / "model", dtype=torch.float32, adapter=outputs / "adapter")(tokens)
            assert torch.equal(again, load_model(outputs / "merged", dtype=torch.float32)(tokens))
