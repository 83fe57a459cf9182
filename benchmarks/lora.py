"""LoRA fine-tuning: a training step beside transformers with PEFT, torchtune and litgpt."""

from harness import Ratio, Row, Table, precision, run_table, smollm2
from training import SIDES

FIXED = {"model": smollm2(), "rows": 2, "length": 256, "share": 0.375, "tuning": "LoRA", "steps": 2}
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = {**FIXED, "rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]}
TABLE = Table(
    name="lora",
    file=__file__,
    title="LoRA on SmolLM2-135M-Instruct: tokens per second and peak memory of a training step.",
    notes=(
        "No activation checkpointing, no packing, 2 rows of 256 tokens, all real; the last 37.5 % of each row are "
        "trained. Fused AdamW and clipping to 1.0 on every side. Memory is the peak above what the imports took. "
        "`mixed`: base weights in bf16, adapters in fp32, computed in bf16 (PEFT by autocast). `bf16`: adapters in "
        "bf16 too, the only way of torchtune and litgpt. Nothing is compiled but where the row says so: each of our "
        "blocks and of torchtune's, as its recipes do, PEFT's whole model, as transformers' Trainer does, and "
        "litgpt's; compilation is not in the time, but in the "
        "peak. Beside PEFT both sides then run the same products and the same attention, 0.7 of our step by the "
        "profiler. Defaults of others, which ours has then too: PEFT's adapters of rank 8 on q and v; torchtune's "
        "llama3_2/1B_lora (rank 64 on q, v, o and the MLP, 4 rows, not clipped); litgpt's finetune_lora (rank 8 on q "
        "and v, dropout of 0.05, 1 row, not clipped)."
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
            settings={**FIXED, "rank": 8, "targets": ["q_proj", "v_proj"], "precision": precision("BF16Mixed")},
            sides=("ours", "transformers"),
        ),
        Row(
            name="rank 16 on all linear layers, mixed, compiled",
            settings={**ALL_LINEAR, "precision": precision("BF16Mixed"), "compiled": True},
            sides=("ours", "transformers"),
        ),
        Row(
            name="rank 16 on all linear layers, bf16, compiled",
            settings={**ALL_LINEAR, "precision": precision("BF16"), "compiled": True},
            sides=("ours", "torchtune", "litgpt"),
        ),
        Row(
            name="torchtune's defaults, bf16",
            settings={
                **FIXED,
                "rows": 4,
                "rank": 64,
                "targets": ["q_proj", "v_proj", "o_proj", *MLP],
                "precision": precision("BF16"),
                "clipped": False,
            },
            sides=("ours", "torchtune"),
        ),
        Row(
            name="litgpt's defaults, bf16",
            settings={
                **FIXED,
                "rows": 1,
                "rank": 8,
                "targets": ["q_proj", "v_proj"],
                "dropout": 0.05,
                "precision": precision("BF16"),
                "clipped": False,
            },
            sides=("ours", "litgpt"),
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
                (4, "torchtune", "torchtune", ", both compiled", ">= 1.5"),
                (4, "litgpt", "litgpt", ", both compiled", ">= 1.5"),
                (5, "torchtune", "torchtune", ", its defaults", ">= 1.5"),
                (6, "litgpt", "litgpt", ", its defaults", ">= 1.5"),
            )
        ),
        Ratio(name="memory ÷ PEFT", row=0, measure="peakBytes", peer="transformers", target="<= 0.70"),
    ],
    rounds=2,
)

if __name__ == "__main__":
    run_table(TABLE)
