"""What the end-to-end jobs read: a small model with random weights and SmolLM2's tokenizer, and two little datasets."""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.cluster.local import Cluster
from tests.cluster.paths import CACHE, ROOT

MODEL: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
SMOLLM2: Final = CACHE / "models" / "smollm2-135m-instruct"
CAPITALS: Final = {
    "France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Egypt": "Cairo",
    "Chile": "Santiago", "Cuba": "Havana", "Iraq": "Baghdad", "Ghana": "Accra", "Spain": "Madrid", "Italy": "Rome",
}  # fmt: skip


def put(cluster: Cluster) -> None:
    """Make the buckets, the model and the data in the cluster's object storage; the same bytes every time."""
    cluster.make_bucket("runs")
    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made) / "model")
        make_data(Path(made))
        make_tasks(Path(made))
        make_bad(Path(made))
        cluster.upload(Path(made), "s3://material")


def make_model(folder: Path) -> None:
    """Write the model as a Hugging Face folder."""
    import torch  # noqa: PLC0415 (slow, and needed only where material is made)
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    subprocess.run([sys.executable, ROOT / "examples" / "fetch_smollm2.py", SMOLLM2], check=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_dict(MODEL)).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (SMOLLM2 / name).exists():
            shutil.copy(SMOLLM2 / name, folder / name)


def make_data(folder: Path) -> None:
    """Write sums.jsonl (prompt, completion), capitals.jsonl (messages), pairs.jsonl, feedback.jsonl (preferences)."""
    sums = [
        {"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."}
        for a in range(1, 21)
        for b in range(1, 9)
    ]
    capitals = [
        {
            "messages": [
                {"role": "user", "content": f"What is the capital of {country}?"},
                {"role": "assistant", "content": f"The capital of {country} is {capital}."},
            ]
        }
        for country, capital in CAPITALS.items()
    ]
    pairs = [
        {"prompt": each["prompt"], "chosen": each["completion"], "rejected": "I do not know that."} for each in sums
    ]
    feedback = [
        {"prompt": each["prompt"], "completion": each["completion" if good else "prompt"], "label": good}
        for each, good in zip(sums, itertools.cycle([True, False]), strict=False)
    ]
    made = {"sums": sums, "capitals": capitals, "pairs": pairs, "feedback": feedback}
    for name, records in made.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def make_tasks(folder: Path) -> None:
    """Write below `tasks/` the task `sums`: how likely the model finds the texts of sums.jsonl."""
    tasks = folder / "tasks"
    tasks.mkdir()
    shutil.copy(folder / "sums.jsonl", tasks / "sums.jsonl")
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}} {{completion}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        "metadata": {"version": 1},
    }
    (tasks / "sums.yaml").write_text(json.dumps(task))


def make_bad(folder: Path) -> None:
    """Write below `bad/` what no job can use: two models and three datasets, made from good ones."""
    bad = folder / "bad"
    shutil.copytree(folder / "model", bad / "no-config")
    (bad / "no-config" / "config.json").unlink()
    shutil.copytree(folder / "model", bad / "truncated")
    weights = bad / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    lines = (folder / "sums.jsonl").read_text().splitlines(keepends=True)
    (bad / "malformed.jsonl").write_text("".join([*lines[:2], lines[2][:-9] + "\n", *lines[3:]]))
    (bad / "empty.jsonl").write_text("")
    (bad / "columns.jsonl").write_text(json.dumps({"question": "What is 1 plus 1?", "answer": "2"}) + "\n")
