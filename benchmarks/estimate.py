"""The estimate of a run's memory beside what the run needs: real training steps on the CPU, no accelerator.

    python benchmarks/estimate.py                       # every row
    python benchmarks/estimate.py --model SmolLM2-135M  # the rows of one model

Every row runs in a process of its own: the recipe's own parts build the model from random weights and train two steps
on one rank. Measured is the most memory that the process had resident while it trained, less what it had when
everything was imported. glibc keeps freed memory for later use, which would be counted as needed; with a threshold
that sends every tensor to mmap, and thus back to the kernel when it is freed, what is resident is what lives.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parent.parent
MIB: Final = 2**20
MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "1",
}
"""How glibc gives back what is freed."""
SMOLLM2: Final[dict[str, Any]] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "narrow": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    },
    "wide": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
    },
    "Gemma 2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192,
        "max_position_embeddings": 4096, "sliding_window": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh",
    },
    "SmolLM2-135M": SMOLLM2,
}  # fmt: skip
ROWS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("narrow", {"tuning": "Full", "micro": 4, "length": 512}),
    ("narrow", {"tuning": "Full", "micro": 4, "length": 512, "recompute": "Full"}),
    ("narrow", {"tuning": "LoRA", "micro": 2, "length": 1024, "packing": "BestFit"}),
    ("narrow", {"tuning": "LoRA", "micro": 4, "length": 1024, "precision": "BF16Mixed"}),
    ("wide", {"tuning": "Full", "micro": 1, "length": 512}),
    ("wide", {"tuning": "Full", "micro": 2, "length": 512, "accumulate": 2, "precision": "BF16Mixed"}),
    ("wide", {"tuning": "LoRA", "micro": 2, "length": 512}),
    ("wide", {"tuning": "LoRA", "micro": 4, "length": 512, "recompute": "Full", "precision": "BF16Mixed"}),
    ("narrow", {"tuning": "Full", "micro": 4, "length": 512, "optimizer": "AdamW8bit"}),
    ("wide", {"tuning": "Full", "micro": 1, "length": 512, "optimizer": "AdamW8bit"}),
    ("wide", {"tuning": "Full", "micro": 1, "length": 512, "optimizer": "AdamW4bit"}),
    ("wide", {"tuning": "Full", "micro": 1, "length": 512, "in backward": True}),
    ("wide", {"tuning": "Full", "micro": 1, "length": 512, "optimizer": "AdamW8bit", "in backward": True}),
    ("narrow", {"tuning": "Full", "micro": 4, "length": 512, "recompute": "Selective"}),
    ("narrow", {"tuning": "LoRA", "micro": 4, "length": 512, "recompute": "Selective"}),
    ("narrow", {"tuning": "LoRA", "micro": 4, "length": 512, "dropout": 0.1}),
    ("narrow", {"tuning": "DoRA", "micro": 4, "length": 512}),
    ("wide", {"tuning": "DoRA", "micro": 2, "length": 512, "recompute": "Selective"}),
    ("narrow", {"tuning": "Full", "micro": 4, "length": 512, "qat": "Int8DynamicActivationInt4Weight"}),
    ("narrow", {"tuning": "LoRA", "micro": 4, "length": 512, "qat": "Int8DynamicActivationInt4Weight"}),
    ("wide", {"tuning": "LoRA", "micro": 2, "length": 512, "qat": "Int4WeightOnly", "recompute": "Selective"}),
    ("wide", {"tuning": "LoRA", "micro": 1, "length": 256, "recipe": "DPO"}),
    ("wide", {"tuning": "LoRA", "micro": 2, "length": 256, "recipe": "KTO"}),
    ("wide", {"tuning": "Full", "micro": 1, "length": 256, "recipe": "SimPO"}),
    ("Gemma 2", {"tuning": "LoRA", "micro": 2, "length": 512}),
    ("Gemma 2", {"tuning": "LoRA", "micro": 2, "length": 512, "recompute": "Selective"}),
    ("SmolLM2-135M", {"tuning": "LoRA", "micro": 1, "length": 512}),
    ("SmolLM2-135M", {"tuning": "LoRA", "micro": 2, "length": 512, "precision": "BF16Mixed"}),
    ("SmolLM2-135M", {"tuning": "Full", "micro": 1, "length": 512, "recompute": "Full", "precision": "BF16Mixed"}),
    ("SmolLM2-135M", {"tuning": "Full", "micro": 2, "length": 256, "accumulate": 2}),
    ("SmolLM2-135M", {"tuning": "LoRA", "micro": 1, "length": 512, "recompute": "Full", "tokens": 2}),
)
"""A model and the settings of its run; what is not said is as in `settings_of`."""


def main() -> None:
    """Measures every row and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, help="only the rows of this model")
    options = parser.parse_args()
    print("| Model | Run | Estimated, MiB | Measured, MiB | Off by |\n|---|---|---|---|---|")
    for model, settings in ROWS:
        if options.model in {None, model}:
            found = measure(SHAPES[model], settings)
            estimated, measured = (found[name] / MIB for name in ("estimated", "measured"))
            off = 100 * (estimated / measured - 1)
            print(f"| {model} | {told(settings)} | {estimated:.0f} | {measured:.0f} | {off:+.1f} % |", flush=True)
            print(f"  {found['message']}", file=sys.stderr, flush=True)


def told(settings: dict[str, Any]) -> str:
    """A row's settings in a few words."""
    names = {"micro": "rows", "length": "tokens", "accumulate": "micro batches"}
    recompute = {"Full": "recomputing", "Selective": "recomputing some"}.get(settings.get("recompute", ""), "")
    packed = "packed" if settings.get("packing") == "BestFit" else ""
    optimizer = settings.get("optimizer", "")
    stepping = "steps in backward" if settings.get("in backward") else ""
    tokens = f"{settings['tokens']} trained tokens" if "tokens" in settings else ""
    sizes = [f"{settings[name]} {word}" for name, word in names.items() if name in settings]
    return ", ".join(
        part
        for part in (
            settings.get("recipe", ""),
            settings["tuning"],
            settings.get("precision", "FP32"),
            *sizes,
            recompute,
            packed,
            optimizer,
            stepping,
            tokens,
            settings.get("qat", ""),
            f"dropout {settings['dropout']}" if "dropout" in settings else "",
        )
        if part
    )


def measure(shape: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Trains in a process of its own; returns `estimated` and `measured` in bytes, and the estimate's `message`."""
    with tempfile.TemporaryDirectory(prefix="kubetune-estimate-") as name:
        folder = Path(name)
        write_run(folder, shape, settings)
        path = os.pathsep.join(str(ROOT / part) for part in ("", "trainer_image"))
        environment = {
            **os.environ, **MALLOC, "PYTHONPATH": path, "KUBETUNE_SCRATCH": str(folder / "scratch"),
            "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        }  # fmt: skip
        command = [sys.executable, __file__, str(folder / "config.yaml")]
        ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return json.loads(ran.stdout.splitlines()[-1])


def write_run(folder: Path, shape: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes a model with random weights, rows that are full, and the config."""
    from tests.recipes.tiny import WORDS, write_model

    write_model(folder / "model", **shape)
    packed = settings.get("packing") == "BestFit"
    words = settings["length"] // (2 if packed else 1)
    text = " ".join(WORDS[number % len(WORDS)] for number in range(words - 2 if packed else words + 8))
    micro, accumulate = settings["micro"], settings.get("accumulate", 1)
    lines = [json.dumps({"text": text})] * (2 * micro * accumulate * (2 if packed else 1))
    recipe, form = settings.get("recipe", "QAT" if "qat" in settings else "SFT"), "Text"
    if recipe in {"DPO", "SimPO", "KTO"}:  # answers that fill their rows
        form = "Preference"
        answers = {"chosen": text, "rejected": f"but {text}"}
        pair = {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}
        prompts = ([{"role": "user", "content": f"{WORDS[number % 20]} cat"}] for number in range(len(lines)))
        lines = [json.dumps({"prompt": prompt, **pair}) for prompt in prompts]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    tokens = [f"<|{number}|>" for number in range(settings.get("tokens", 0))]
    lora = {"train_tokens": tokens, "dropout": settings.get("dropout", 0.0)}
    config = {
        "recipe": recipe,
        "model": {"uri": {"location": f"file://{folder}/model"}},
        "dataset": {
            "sources": [{"name": "rows", "uri": {"location": f"file://{folder}/rows.jsonl"}, "format": form}],
            "max_sequence_length": settings["length"], "packing": settings.get("packing", "None"),
        },
        "tuning": settings["tuning"],
        "training": {
            "max_steps": 2, "global_batch_size": micro * accumulate, "micro_batch_size": micro,
            "precision": settings.get("precision", "FP32"),
            "activation_checkpointing": settings.get("recompute", "None"),
            "optimizer": settings.get("optimizer", "AdamW"),
            "optimizer_in_backward": settings.get("in backward", False),
        },
        "workspace": {"uri": f"file://{folder}/runs"},
        **({"lora": lora} if settings["tuning"] != "Full" else {}),
        **({"qat": {"scheme": settings["qat"]}} if "qat" in settings else {}),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def train(config_path: str) -> None:
    """Trains the two steps and prints what was estimated and measured."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import torch._dynamo  # what the optimizer's first step imports

    import dpo  # ours, as those that follow
    import finetune
    import kto
    from kubetune_trainer.estimate import RUNTIME_BYTES, estimate_memory
    from kubetune_trainer.memory import forget_peak_memory, resident_bytes
    from kubetune_trainer.training.job import begin, resume
    from kubetune_trainer.training.reference import build_reference

    cpu, recipes = torch.device("cpu"), {"DPO": dpo, "SimPO": dpo, "KTO": kto}
    before = resident_bytes()
    with begin(["--config", config_path], description="", recipes=["SFT", "QAT", *recipes]) as job:
        recipe = job.config.recipe
        asked = [build_reference(job, f"{recipe.lower()}.reference") if recipe in {"DPO", "KTO"} else None]
        first = resume(job)
        if not forget_peak_memory(cpu):
            raise RuntimeError("/proc/self/clear_refs cannot be written here, so that no peak can be measured")
        job.checkpointer.save = lambda *_, **__: None
        recipes.get(recipe, finetune).train(job, *(asked if recipe in recipes else ()), first)
        measured = resident_bytes("VmHWM") - before
        estimate = estimate_memory(job.config, job.model.config)
    needed = estimate.memory_per_device_bytes - RUNTIME_BYTES  # which is there before anything is measured
    told = {"estimated": needed, "measured": measured, "message": estimate.message}
    print(json.dumps(told))


if __name__ == "__main__":
    train(sys.argv[1]) if len(sys.argv) == 2 and sys.argv[1].endswith(".yaml") else main()
