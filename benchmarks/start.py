"""From the start of the process to the end of the first step: the recipe beside `trl sft`."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import CLOCK_VARIABLE, ROOT, Measures, Ratio, Row, Settings, Side, Table, precision, run_table, smollm2
from sft import tickets, write_config


def seconds_until(command: Sequence[str | Path], sign: str) -> Measures:
    """Starts a program, waits for a line with a sign in it, and ends the program."""
    began = time.perf_counter()
    before = children_seconds()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if sign in line:
                seconds = time.perf_counter() - began
                process.kill()
                process.wait()
                on_cpu = os.environ.get(CLOCK_VARIABLE) == "cpu"
                return {"seconds": children_seconds() - before if on_cpu else seconds}
    raise RuntimeError(f"{command[0]} ended without {sign!r}:\n{''.join(lines[-20:])}")


def children_seconds() -> float:
    """Returns the CPU time of all programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(settings: Settings) -> Measures:
    """The recipe, its data prepared within the time."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), settings)
        recipe = ROOT / "recipes" / "finetune.py"
        return seconds_until([sys.executable, recipe, "--config", config], '"event": "step"')


def trl(settings: Settings) -> Measures:
    """The command line of TRL."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in tickets(settings)]
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {
            "model_name_or_path": settings["model"],
            "dataset_name": data,
            "output_dir": Path(folder) / "out",
            "per_device_train_batch_size": settings["batch"],
            "max_steps": 2,
            "max_length": 256,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": str(settings["precision"] != "FP32").lower(),
            "use_cpu": "true",
            "dtype": "float32" if settings["precision"] == "FP32" else "bfloat16",
            "lora_r": 16,
            "gradient_checkpointing": "false",
        }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        command = [Path(sys.executable).parent / "trl", "sft", *arguments, "--use_peft"]
        return seconds_until([*command, "--lora_target_modules", "all-linear"], "'loss':")


TABLE = Table(
    name="start",
    file=__file__,
    title="Seconds from the start of the process to the end of the first step, beside `trl sft`.",
    notes=(
        "LoRA of rank 16 on SmolLM2-135M-Instruct (base weights in bf16, adapters in fp32, computed in bf16), no "
        "activation checkpointing, a batch of 2 tickets, 0.28 of their tokens trained; imports, preparation of 8 "
        "samples, loading and one step are "
        "in it on both sides, with files in the page cache."
    ),
    sides={"ours": Side(run=ours), "trl": Side(run=trl)},
    rows=[
        Row(
            name="cold process",
            settings={
                "model": smollm2(),
                "batch": 2,
                "steps": 4,
                "defaults": False,
                "precision": precision("BF16Mixed"),
            },
            sides=("ours", "trl"),
        )
    ],
    ratios=[Ratio(name="seconds ÷ trl sft", row=0, measure="seconds", peer="trl", target="<= 0.4")],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
