"""Full fine-tuning: a training step beside torchtune and transformers."""

from harness import Ratio, Row, Table, precision, run_table, smollm2
from training import SIDES

TABLE = Table(
    name="full",
    file=__file__,
    title="Full fine-tuning of SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "All in bf16, which is torchtune's way; no activation checkpointing, no packing, 2 rows of 256 tokens, all "
        "real; the last 37.5 % of each row are trained. Fused AdamW and clipping to 1.0 on every side. Memory is the "
        "peak above what the imports took."
    ),
    sides=SIDES,
    rows=[
        Row(
            name="all weights",
            settings={
                "model": smollm2(),
                "rows": 2,
                "length": 256,
                "share": 0.375,
                "tuning": "Full",
                "precision": precision("BF16"),
                "steps": 3,
            },
            sides=("ours", "torchtune"),
        ),
    ],
    ratios=[
        Ratio(name="tokens/s ÷ torchtune", row=0, measure="tokensPerSecond", peer="torchtune", target=">= 1.0"),
        Ratio(name="memory ÷ torchtune", row=0, measure="peakBytes", peer="torchtune", target="<= 1.0"),
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
