"""Supervised fine-tuning from end to end: recipes/finetune.py itself beside TRL's SFTTrainer."""

import contextlib
import io
import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

from harness import (
    ROOT,
    Measures,
    Ratio,
    Row,
    Settings,
    Side,
    Table,
    now,
    peak_bytes,
    precision,
    resident_bytes,
    run_table,
    smollm2,
    stored_dtype,
)

RANK = 16


def tickets(settings: Settings) -> list[Any]:
    """Returns the conversations that both train on, once each."""
    lines = (ROOT / "examples" / "data" / "tickets-train.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[: settings["batch"] * settings["steps"]]]


def ours(settings: Settings) -> Measures:
    """The recipe, with a config as a user writes it."""
    with contextlib.redirect_stdout(Stamped()) as told, tempfile.TemporaryDirectory() as name:
        recipe = runpy.run_path(str(ROOT / "recipes" / "finetune.py"))
        baseline = resident_bytes()
        recipe["main"](["--config", str(write_config(Path(name), settings))])
    steps = [(event, when) for event, when in told.events if event["event"] == "step"]
    began = next(when for event, when in told.events if event.get("phase") == "Training")
    last, ended = steps[-1]
    return {
        "tokensPerSecond": num_tokens(settings) / (ended - began),
        "peakBytes": last["peakMemoryBytes"] - baseline,
    }


class Stamped(io.StringIO):
    """Takes the recipe's events and the time of each."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[dict[str, Any], float]] = []

    def write(self, text: str) -> int:
        """Takes a line, or the end of one."""
        if text.strip():
            self.events.append((json.loads(text), now()))
        return len(text)


def write_config(folder: Path, settings: Settings) -> Path:
    """Writes data and config of a run; JSON is YAML too."""
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in tickets(settings)))
    targets = settings.get("targets", ["all-linear"])
    dropout = settings.get("dropout", 0.0)
    config = {
        "model": {"uri": {"location": f"file://{settings['model']}"}},
        "dataset": {
            "sources": [{"name": "tickets", "uri": {"location": f"file://{data}"}}],
            "max_sequence_length": settings.get("length", 256),
            "packing": "None",
        },
        "tuning": "LoRA",
        "lora": {"rank": RANK, "alpha": 2 * RANK, "dropout": dropout, "target_modules": targets},
        "training": {
            "epochs": 1,
            "global_batch_size": settings["batch"],
            "micro_batch_size": settings["batch"],
            "learning_rate": 1e-4,
            "precision": settings["precision"],
            "activation_checkpointing": "Full" if settings["defaults"] else "None",
        },
        "workspace": {"uri": f"file://{folder}/runs"},
        "outputs": [{"name": "adapter", "type": "PEFT"}],
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def num_tokens(settings: Settings) -> int:
    """Returns the tokens of all conversations, for both sides alike."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{settings['model']}/tokenizer.json")
    texts = [
        "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
        for messages in tickets(settings)
    ]
    return sum(len(tokenizer.encode(text).ids) for text in texts)


def trl(settings: Settings) -> Measures:
    """SFTTrainer with PEFT."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    baseline = resident_bytes()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(now())

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        if not settings["defaults"]:
            options = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": stored_dtype(settings)}}
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings["batch"],
            learning_rate=1e-4,
            max_length=256,
            use_cpu=True,
            report_to="none",
            bf16=settings["precision"] != "FP32",  # its default, but for CPUs without bf16 arithmetic
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            **options,
        )
        trainer = SFTTrainer(
            model=settings["model"],
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in tickets(settings)]
            ),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer.train()
        peak = peak_bytes()
    return {"tokensPerSecond": num_tokens(settings) / (times[-1] - times[0]), "peakBytes": peak - baseline}


FIXED = {"model": smollm2(), "batch": 8, "steps": 5, "precision": precision("BF16Mixed")}
SIDES = ("ours", "trl")
TABLE = Table(
    name="sft",
    file=__file__,
    title="recipes/finetune.py beside TRL's SFTTrainer: LoRA of rank 16 on all linear layers of SmolLM2-135M-Instruct.",
    notes=(
        "40 tickets of examples/data, once each, in 5 steps of 8 rows, not packed, padded to the longest of a batch; "
        "answers are trained, 0.29 of the tokens. Base weights in bf16, adapters in fp32, computed in bf16. Time "
        "from the loop's beginning "
        "to the end of its last step, tokens without padding. Memory is the peak above what the imports took. With "
        "TRL's defaults it checkpoints activations, as ours does then too, and keeps the base weights in fp32."
    ),
    sides={"ours": Side(run=ours), "trl": Side(run=trl)},
    rows=[
        Row(name="the same settings", settings={**FIXED, "defaults": False}, sides=SIDES),
        Row(name="TRL's defaults, with activation checkpointing", settings={**FIXED, "defaults": True}, sides=SIDES),
    ],
    ratios=[
        Ratio(name="tokens/s ÷ TRL", row=0, measure="tokensPerSecond", peer="trl", target=">= 1.6"),
        Ratio(name="memory ÷ TRL", row=0, measure="peakBytes", peer="trl", target="<= 0.60"),
        Ratio(name="tokens/s ÷ TRL's default", row=1, measure="tokensPerSecond", peer="trl", target=">= 1.6"),
        Ratio(name="memory ÷ TRL's default", row=1, measure="peakBytes", peer="trl", target="<= 0.60"),
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
