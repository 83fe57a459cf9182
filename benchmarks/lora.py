"""LoRA fine-tuning: a training step beside transformers with PEFT, torchtune and litgpt."""

from harness import Ratio, Row, Table, run_table, smollm2
from training import SIDES

FIXED = {"model": smollm2(), "rows": 2, "length": 256, "share": 0.375, "tuning": "LoRA", "steps": 2}
TABLE = Table(
    name="lora",
    file=__file__,
    title="LoRA on SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "fp32, no activation checkpointing, no packing, 2 rows of 256 tokens, all real; the last 37.5 % of each row "
        "are trained. Fused AdamW and clipping to 1.0 on every side. Memory is the peak above what the imports took."
    ),
    sides=SIDES,
    rows=[
        Row(
            name="rank 16 on all linear layers",
            settings={**FIXED, "rank": 16, "targets": "all"},
            sides=("ours", "transformers", "torchtune", "litgpt"),
        ),
        Row(
            name="PEFT's default adapters: rank 8 on q and v",
            settings={**FIXED, "rank": 8, "targets": "attention"},
            sides=("ours", "transformers"),
        ),
    ],
    ratios=[
        Ratio(name="tokens/s ÷ PEFT", row=0, measure="tokensPerSecond", peer="transformers", target=">= 1.3"),
        Ratio(name="tokens/s ÷ torchtune", row=0, measure="tokensPerSecond", peer="torchtune", target=">= 1.5"),
        Ratio(name="tokens/s ÷ litgpt", row=0, measure="tokensPerSecond", peer="litgpt", target=">= 1.5"),
        Ratio(name="memory ÷ PEFT", row=0, measure="peakBytes", peer="transformers", target="<= 0.70"),
        Ratio(
            name="tokens/s ÷ PEFT, default adapters",
            row=1,
            measure="tokensPerSecond",
            peer="transformers",
            target=">= 1.3",
        ),
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
