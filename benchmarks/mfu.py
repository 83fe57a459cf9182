"""How much of the machine's best matrix multiplication a training step reaches."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from harness import Measures, Ratio, Row, Settings, Side, Table, now, precision, run_table, smollm2, stored_dtype
from training import SIDES as TRAINING


def flops_per_token(settings: Settings) -> float:
    """Returns the multiplications and additions of matrices that a trained token needs, forward and backward.

    Nothing is counted twice or in vain: no recomputation, and the causal half of attention alone.
    """
    config = json.loads(Path(settings["model"], "config.json").read_text())
    width, kv = config["hidden_size"], config["num_key_value_heads"] / config["num_attention_heads"]
    layer = width * width * (2 + 2 * kv) + 3 * width * config["intermediate_size"]
    attention = 2 * settings["length"] / 2 * width
    weights = config["num_hidden_layers"] * (layer + attention) + width * config["vocab_size"]
    return 3 * 2 * weights


def best_gemm(settings: Settings) -> Measures:
    """The fastest of the step's own shapes."""
    import torch

    config = json.loads(Path(settings["model"], "config.json").read_text())
    width, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    rows, best, dtype = settings["rows"] * settings["length"], 0.0, stored_dtype(settings)
    for inner, columns in ((width, width), (width, wide), (wide, width), (width, vocabulary)):
        left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        for _ in range(8):
            began = now()
            torch.nn.functional.linear(left, right)
            best = max(best, 2 * rows * inner * columns / (now() - began))
    return {"flopsPerSecond": best}


def utilization(row: Row, best: Mapping[str, Measures]) -> dict[str, Measures]:
    """Adds each side's share of the best matmul."""
    peak = best["matmul"]["flopsPerSecond"]
    derived = {}
    for name, measures in best.items():
        if name != "matmul":
            share = measures["tokensPerSecond"] * flops_per_token(row.settings) / peak
            derived[name] = {**measures, "utilization": share}
    highest = max(measures["utilization"] for name, measures in derived.items() if name != "ours")
    whole = {"utilization": 1.0, "spread": {}}
    return {**derived, "best matmul": {**best["matmul"], **whole}, "best peer": {"utilization": highest, "spread": {}}}


TABLE = Table(
    name="mfu",
    file=__file__,
    title="Matmul utilization of full fine-tuning, SmolLM2-135M-Instruct, 4 rows of 256 tokens, all trained.",
    notes=(
        "The matmul FLOPs that the work needs (no recomputation, causal half of attention) per second, divided by the "
        "best matmul of the same type in the same round. All in bf16; no activation checkpointing, no padding, nothing "
        "compiled. Of our step, of 1.7 s in a quieter run, the profiler gives 0.81 s to matmuls alone, for which the "
        "best rate would "
        "need 0.28 s: with weights that are not in the cache, and for the gradients of weights, torch's bf16 matmul is "
        "that much slower than its best. So matmuls and nothing else would reach 0.35 here. Attention's backward pass "
        "takes 0.2 s (made of bf16 matmuls instead, it was measured to take as long), AdamW over 135 million weights "
        "0.09 s, the loss over 49,152 words and the small operators of 30 blocks the rest."
    ),
    sides={**{name: replace(side) for name, side in TRAINING.items()}, "matmul": Side(run=best_gemm)},
    rows=[
        Row(
            name="full fine-tuning",
            settings={
                "model": smollm2(),
                "rows": 4,
                "length": 256,
                "share": 1.0,
                "tuning": "Full",
                "precision": precision("BF16"),
                "steps": 2,
            },
            sides=("ours", "transformers", "torchtune", "litgpt", "matmul"),
        ),
    ],
    ratios=[
        Ratio(name="ours ÷ best matmul", row=0, measure="utilization", peer="best matmul", target=">= 0.45"),
        Ratio(name="ours ÷ best peer", row=0, measure="utilization", peer="best peer", target=">= 1.0"),
    ],
    rounds=3,
    derive=utilization,
)

if __name__ == "__main__":
    run_table(TABLE)
