"""Full fine-tuning: a training step beside torchtune and transformers."""

from harness import Ratio, Row, Table, precision, run_table, smollm2
from training import SIDES

FIXED = {
    "model": smollm2(),
    "rows": 2,
    "length": 256,
    "share": 0.375,
    "tuning": "Full",
    "precision": precision("BF16"),
    "steps": 3,
}
SIDES_COMPARED = ("ours", "torchtune")
TABLE = Table(
    name="full",
    file=__file__,
    title="Full fine-tuning of SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "All in bf16, which is torchtune's way; no activation checkpointing, no packing, 2 rows of 256 tokens, all "
        "real; the last 37.5 % of each row are trained. Fused AdamW and clipping to 1.0 on every side. Memory is the "
        "peak above what the imports took. torchtune's defaults are those of its llama3_2/1B_full, which ours has then "
        "too: 4 rows, not clipped."
    ),
    sides=SIDES,
    rows=[
        Row(name="all weights", settings=FIXED, sides=SIDES_COMPARED),
        Row(name="torchtune's defaults", settings={**FIXED, "rows": 4, "clipped": False}, sides=SIDES_COMPARED),
    ],
    ratios=[
        Ratio(name=f"{name} ÷ torchtune{form}", row=row, measure=measure, peer="torchtune", target=target)
        for row, form in ((0, ""), (1, ", its defaults"))
        for name, measure, target in (("tokens/s", "tokensPerSecond", ">= 1.0"), ("memory", "peakBytes", "<= 1.0"))
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
