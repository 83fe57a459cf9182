"""What quantization costs: each scheme and format on one model, by size, perplexity and divergence; GPTQ and without.

    python examples/fetch_smollm2.py models/smollm2
    python benchmarks/quantize_quality.py --model models/smollm2

That model comes from a 4-bit file (GGUF Q4_1), so its weights sit on a grid that this type hits for nothing. All of
them are trained first, in fp32, until they are off it; `offGrid` is how much the type changes them before and after
(weights that were never on a grid: 0.078). Text: the tickets in examples/data and Python's reference; perplexity is
over every token of tickets and a page that neither training nor calibration saw. Each output is loaded from its files,
by us for the numbers, and by the engine that it is for, whose likeliest tokens are compared with ours; ExecuTorch
programs run in their engine alone, so that the numbers are its own. The last line is one JSON object.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from harness import ROOT, reference_pages
from torch import Tensor
from transformers import AutoModelForCausalLM

from kubetune_trainer.config import QuantizedOutput
from kubetune_trainer.config.outputs import GROUP_SIZE
from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.data.store import Row
from kubetune_trainer.export.convert import convert
from kubetune_trainer.export.executorch import QUANTIZED
from kubetune_trainer.export.gguf import GGUF_FILE
from kubetune_trainer.export.huggingface import save_huggingface
from kubetune_trainer.model.config import quantization_method
from kubetune_trainer.model.weights import load_model
from kubetune_trainer.quantize.artifact import logits_of, logits_of_model
from kubetune_trainer.quantize.calibrate import calibrate
from kubetune_trainer.quantize.rounding import Rounded
from kubetune_trainer.quantize.verify import Logits, compare
from kubetune_trainer.tokenizer import load_tokenizer
from tests.llama import open_llama

HELD_OUT_PAGE = "debugger"
"""No other page repeats a line of it."""
ROW_TOKENS = 256
LEARNING_RATE = 1e-3
WARMUP_STEPS = 4
GRID_PROBE = "model.layers.15.mlp.down_proj.weight"
WITH_GPTQ = " + GPTQ"
WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".pte"}

COMPRESSED = [
    ("CompressedTensors", "Int8WeightOnly"),
    ("CompressedTensors", "Int8DynamicActivation"),
    ("CompressedTensors", "Int4WeightOnly"),
    ("CompressedTensors", f"Int4WeightOnly{WITH_GPTQ}"),
]
TORCHAO = [("TorchAO", scheme) for scheme in ("Int8WeightOnly", "Int8DynamicActivationInt4Weight", "NF4")]
GGUF = [("GGUF", kind) for kind in ("F16", "Q8_0", "Q4_0", "Q4_1")]
EXECUTORCH = [("ExecuTorch", scheme) for scheme in ("FP32", QUANTIZED)]


def main() -> int:
    """Trains the base, makes and measures each output, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder in Hugging Face format")
    parser.add_argument("--steps", type=int, default=16, help="of training, a row each; 0 takes the model as it is")
    parser.add_argument("--calibration-rows", type=int, default=16)
    parser.add_argument("--verify-rows", type=int, default=6)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training, verify = read_rows(options.model, verify_rows=options.verify_rows)
        base = train(options.model, folder / "base", training, steps=options.steps)
        off_grid = [grid_error(each) for each in (options.model, base)]
        print(f"off the 4-bit grid: {off_grid[0]:.3f} before training, {off_grid[1]:.3f} after")
        calibration = training[-options.calibration_rows :]
        tick = time.perf_counter()
        rounded = calibrate(base, calibration, bits=4, group_size=GROUP_SIZE, folder=folder / "rounded")
        gptq_seconds = time.perf_counter() - tick
        rows = list(measure(base, folder, verify, rounded=rounded))
    summary = {
        "benchmark": "quantize_quality",
        "steps": options.steps,
        "offGrid": {"before": off_grid[0], "after": off_grid[1]},
        "verifyTokens": sum(batch.trained_tokens for batch in verify),
        "calibrationTokens": sum(batch.num_tokens for batch in calibration),
        "gptqSeconds": round(gptq_seconds, 1),
        "gptqGain": gain(rows),
        "seconds": round(time.perf_counter() - began),
        "outputs": rows,
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    return 0


def read_rows(model: Path, *, verify_rows: int) -> tuple[list[Batch], list[Batch]]:
    """Rows of text to train and calibrate on, in an order that mixes both kinds, and rows of text held out of them."""
    tokenizer = load_tokenizer(model)
    pages = reference_pages()
    held_page = pages.pop(HELD_OUT_PAGE)

    def cut(texts: Sequence[str]) -> list[Batch]:
        tokens = [token for text in texts for token in tokenizer.encode(text + "\n")]
        parts = [tokens[at : at + ROW_TOKENS] for at in range(0, len(tokens) - ROW_TOKENS, ROW_TOKENS)]
        return [collate([Row.of(part, [True] * ROW_TOKENS)], pad_id=tokenizer.pad_id) for part in parts]

    seen = cut(tickets("train")) + cut(list(pages.values()))
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0)).tolist()
    half = verify_rows // 2
    held = cut(tickets("heldout"))[:half] + cut([held_page])[: verify_rows - half]
    return [seen[at] for at in order], held


def tickets(part: str) -> list[str]:
    """The conversations of one file, as text."""
    lines = (ROOT / "examples" / "data" / f"tickets-{part}.jsonl").read_text().splitlines()
    return ["\n".join(message["content"] for message in json.loads(line)["messages"]) for line in lines]


def train(source: Path, target: Path, rows: Sequence[Batch], *, steps: int) -> Path:
    """Trains every weight in fp32, and writes the model in bf16."""
    model = load_model(source, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1 - step / steps)
        batch = rows[step % len(rows)]
        loss = model(batch.tokens, labels_BT=batch.labels) / batch.trained_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    save_huggingface(model.named_parameters(), source_dir=source, target_dir=target, dtype="BF16")
    return target


def grid_error(folder: Path) -> float:
    """How far a matrix is from the nearest one that a Q4_1 file can say, relative to its size."""
    weight = load_model(folder, dtype=torch.float32).get_parameter(GRID_PROBE).detach().numpy()
    kind = gguf.GGMLQuantizationType.Q4_1
    rounded = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    return round(float(np.linalg.norm(weight - rounded) / np.linalg.norm(weight)), 4)


def measure(
    base: Path, folder: Path, verify: Sequence[Batch], *, rounded: Mapping[str, Rounded]
) -> Iterator[dict[str, Any]]:
    """Makes each output, loads it twice and compares it with the base; prints a row of the table for each."""
    source = logits_of_model(load_model(base, dtype=torch.float32))
    with torch.inference_mode():
        known = {id(batch): source(batch) for batch in verify}
    print(f"{'format':18} {'scheme':32} {'MB':>6} {'perplexity':>10} {'increase':>8} {'KL':>8} {'top %':>6}  loaded by")
    row = {"format": "HuggingFace", "scheme": "BF16", "bytes": size_of(base)}
    perplexity = compare(lambda batch: known[id(batch)], lambda batch: known[id(batch)], verify).perplexity
    print(f"{row['format']:18} {row['scheme']:32} {row['bytes'] / 1e6:6.1f} {perplexity:10.3f}")
    yield {**row, "perplexity": perplexity}
    for kind, scheme in [*COMPRESSED, *TORCHAO, *GGUF, *EXECUTORCH]:
        target = folder / "output"
        output = output_of(kind, scheme)
        convert(output, base, target, rounded=rounded if scheme.endswith(WITH_GPTQ) else None)
        ours = logits_of(output, target, device=torch.device("cpu"))
        found = compare(lambda batch: known[id(batch)], ours, verify)
        with torch.inference_mode():
            engine, agreed = ENGINES[kind if scheme != "NF4" else scheme](target, verify[0], ours)
        row = {
            "format": kind,
            "scheme": scheme,
            "bytes": size_of(target),
            **{name: round(value, 6) for name, value in asdict(found).items()},
            "perplexityIncreasePercent": round(found.perplexity_increase_percent, 4),
            "engine": engine,
            "engineAgreementPercent": agreed,
        }
        print(
            f"{kind:18} {scheme:32} {row['bytes'] / 1e6:6.1f} {found.perplexity:10.3f}"
            f" {found.perplexity_increase_percent:+7.2f}% {found.mean_kl:8.5f}"
            f" {found.top_token_agreement_percent:6.1f}  {engine}{'' if agreed is None else f' ({agreed} % as we do)'}",
            flush=True,
        )
        yield row
        shutil.rmtree(target)


def output_of(kind: str, scheme: str) -> QuantizedOutput:
    """What a job would ask for."""
    options: dict[str, Any] = {"scheme": scheme.removesuffix(WITH_GPTQ)}
    if kind == "GGUF":
        options = {"gguf": {"type": scheme}}
    elif kind == "ExecuTorch":
        options = {"scheme": None if scheme == "FP32" else scheme, "execu_torch": {"max_sequence_length": ROW_TOKENS}}
    return QuantizedOutput.model_validate({"name": "output", "type": kind, **options})


def size_of(folder: Path) -> int:
    """Size of the files with weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)


def in_transformers(folder: Path, batch: Batch, ours: Logits) -> tuple[str, float]:
    """Loads a folder with transformers; says at how many positions its likeliest token is ours."""
    # Its torchao weights compute in the type that they were stored in, and in no other.
    dtype = torch.bfloat16 if quantization_method(folder) == "torchao" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return "transformers", agreement(model(batch.tokens).logits[0], ours(batch)[0])


def in_kubetune_alone(_folder: Path, _batch: Batch, _ours: Logits) -> tuple[str, None]:
    """Nothing else loads it."""
    return "kubetune", None


def in_executorch_alone(_folder: Path, _batch: Batch, _ours: Logits) -> tuple[str, None]:
    """Nothing else runs it, and it did for the numbers."""
    return "executorch", None


def in_llama_cpp(folder: Path, batch: Batch, ours: Logits) -> tuple[str, float]:
    """Loads a file with llama.cpp; says at how many positions its likeliest token is ours."""
    threads = torch.get_num_threads()
    loaded = open_llama(folder / GGUF_FILE, n_ctx=512, n_threads=threads, n_threads_batch=threads)
    try:
        loaded.eval(batch.tokens[0].tolist())
        theirs = torch.from_numpy(np.array(loaded.scores[: batch.tokens.shape[1]]))
        return "llama.cpp", agreement(theirs, ours(batch)[0])
    finally:
        loaded.close()


def agreement(theirs: Tensor, ours: Tensor) -> float:
    """Part of the positions with the same likeliest token, in percent."""
    return round(100 * float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()), 1)


ENGINES: Mapping[str, Callable[[Path, Batch, Logits], tuple[str, float | None]]] = {
    "CompressedTensors": in_transformers,
    "TorchAO": in_transformers,
    "GGUF": in_llama_cpp,
    "NF4": in_kubetune_alone,
    "ExecuTorch": in_executorch_alone,
}


def gain(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What GPTQ takes off the cost of rounding to 4 bits: parts of its divergence and of its rise in perplexity."""
    by_scheme = {row["scheme"]: row for row in rows if row["format"] == "CompressedTensors"}
    nearest, ours = by_scheme["Int4WeightOnly"], by_scheme[f"Int4WeightOnly{WITH_GPTQ}"]
    names = {"meanKl": "mean_kl", "perplexityIncrease": "perplexityIncreasePercent"}
    return {name: round(1 - ours[field] / nearest[field], 3) for name, field in names.items()}


if __name__ == "__main__":
    sys.exit(main())
