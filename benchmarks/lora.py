"""LoRA fine-tuning: a training step beside transformers with PEFT, torchtune and litgpt."""

from harness import Ratio, Row, Table, precision, run_table, smollm2
from training import SIDES

FIXED = {"model": smollm2(), "rows": 2, "length": 256, "share": 0.375, "tuning": "LoRA", "steps": 2}
ALL_LINEAR = {**FIXED, "rank": 16, "targets": "all"}
TABLE = Table(
    name="lora",
    file=__file__,
    title="LoRA on SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "No activation checkpointing, no packing, 2 rows of 256 tokens, all real; the last 37.5 % of each row are "
        "trained. Fused AdamW and clipping to 1.0 on every side. Memory is the peak above what the imports took. "
        "`mixed`: base weights in bf16, adapters in fp32, computed in bf16 (PEFT by autocast). `bf16`: adapters in "
        "bf16 too, the only way of torchtune and litgpt. Nothing is compiled but where the row says so: each of our "
        "blocks, and PEFT's whole model, as transformers' Trainer does; compilation is not in the time, but in the "
        "peak. Then both sides run the same products and the same attention, 0.7 of our step by the profiler."
    ),
    sides=SIDES,
    rows=[
        Row(
            name="rank 16 on all linear layers, mixed",
            settings={**ALL_LINEAR, "precision": precision("BF16Mixed")},
            sides=("ours", "transformers"),
        ),
        Row(
            name="rank 16 on all linear layers, bf16",
            settings={**ALL_LINEAR, "precision": precision("BF16")},
            sides=("ours", "torchtune", "litgpt"),
        ),
        Row(
            name="PEFT's default adapters: rank 8 on q and v, mixed",
            settings={**FIXED, "rank": 8, "targets": "attention", "precision": precision("BF16Mixed")},
            sides=("ours", "transformers"),
        ),
        Row(
            name="rank 16 on all linear layers, mixed, compiled",
            settings={**ALL_LINEAR, "precision": precision("BF16Mixed"), "compiled": True},
            sides=("ours", "transformers"),
        ),
    ],
    ratios=[
        *(
            Ratio(name=f"tokens/s ÷ {peer}{form}", row=row, measure="tokensPerSecond", peer=side, target=target)
            for row, peer, side, form, target in (
                (0, "PEFT", "transformers", "", ">= 1.3"),
                (1, "torchtune", "torchtune", "", ">= 1.5"),
                (1, "litgpt", "litgpt", "", ">= 1.5"),
                (2, "PEFT", "transformers", ", default adapters", ">= 1.3"),
                (3, "PEFT", "transformers", ", both compiled", ">= 1.3"),
            )
        ),
        Ratio(name="memory ÷ PEFT", row=0, measure="peakBytes", peer="transformers", target="<= 0.70"),
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
