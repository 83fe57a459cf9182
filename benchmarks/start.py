"""From the start of the process to the end of the first step: the recipe beside `trl sft`."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness import CLOCK_VARIABLE, ROOT, Measures, Ratio, Row, Settings, Side, Table, precision, run_table, smollm2
from sft import tickets, write_config


def seconds_until(command: Sequence[str | Path], sign: str) -> Measures:
    """Starts a program, waits for a line with a sign in it, and ends the program with all that it started."""
    began = time.perf_counter()
    before = children_seconds()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **output) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if sign in line:
                seconds = time.perf_counter() - began
                os.killpg(process.pid, signal.SIGKILL)
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
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": str(settings["precision"] != "FP32").lower(),
            "use_cpu": "true",
        }
        if not settings["defaults"]:
            options |= {
                "per_device_train_batch_size": settings["batch"],
                "max_length": settings["length"],
                "dtype": "float32" if settings["precision"] == "FP32" else "bfloat16",
                "lora_target_modules": "all-linear",
                "lora_dropout": 0,
                "gradient_checkpointing": "false",
            }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        return seconds_until([Path(sys.executable).parent / "trl", "sft", *arguments, "--use_peft"], "'loss':")


FIXED = {"model": smollm2(), "precision": precision("BF16Mixed")}
SAME = {**FIXED, "batch": 2, "steps": 4, "length": 256, "defaults": False}
ADAPTERS = {"targets": ["q_proj", "v_proj"], "dropout": 0.05}
DEFAULTS = {**FIXED, **ADAPTERS, "batch": 8, "steps": 1, "length": 1024, "defaults": True}
TABLE = Table(
    name="start",
    file=__file__,
    title="Seconds from the start of the process to the end of the first step, beside `trl sft`.",
    notes=(
        "LoRA of rank 16 on SmolLM2-135M-Instruct (base weights in bf16, adapters in fp32, computed in bf16), no "
        "activation checkpointing, a batch of 2 tickets, 0.28 of their tokens trained; imports, preparation of 8 "
        "samples, loading and one step are "
        "in it on both sides, with files in the page cache. TRL's defaults, which ours has then too but for the base "
        "weights that TRL keeps in fp32: adapters on q and v, dropout of 0.05, activation checkpointing, a batch of 8."
    ),
    sides={"ours": Side(run=ours), "trl": Side(run=trl)},
    rows=[
        Row(name="the same settings", settings=SAME, sides=("ours", "trl")),
        Row(name="TRL's defaults", settings=DEFAULTS, sides=("ours", "trl")),
    ],
    ratios=[
        Ratio(name="seconds ÷ trl sft", row=0, measure="seconds", peer="trl", target="<= 0.4"),
        Ratio(name="seconds ÷ trl sft, its defaults", row=1, measure="seconds", peer="trl", target="<= 0.4"),
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
