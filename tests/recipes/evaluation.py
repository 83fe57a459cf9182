"""A small model with tasks of every kind, and what lm_eval's own backend for transformers finds of them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.tiny_model import write_tokenizer

WORDS = ("cat", "dog", "tree", "house", "river", "stone", "cloud", "apple", "king", "queen", "light", "walk", "book")
QUESTION = "Question: {{question}}\nAnswer:"
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl", "train": "solved.jsonl"}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": QUESTION,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_mutual_info"}],
    },
    "letters": {  # continuations of one token, and few-shot examples from the test split itself
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "doc_to_text": QUESTION,
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[gold]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": "pages.jsonl"}},
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl", "train": "solved.jsonl"}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": QUESTION,
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n", "~"], "max_gen_toks": 24, "do_sample": False},
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}]},
            {"name": "plain", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


def write_material(folder: Path) -> Path:
    """Writes a folder with `model` and `tasks`."""
    write_tokenizer(folder / "model", bos_token="<|im_start|>")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=260, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15, tie_word_embeddings=True,
        bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    draw = random.Random(0)  # noqa: S311 (test data)
    for name, number in (("questions", 40), ("solved", 12)):
        lines = [json.dumps(question(draw, place)) + "\n" for place in range(number)]
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(lines))
    pages = [" ".join(draw.choices(WORDS, k=length)) for length in (3, 40, 250, 90, 7, 120)]  # some fill more windows
    (folder / "tasks" / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "dataset_path": "json", "metadata": {"version": 1.0}, **task})
        )
    (folder / "tasks" / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["choice", "letters"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    return folder


def question(draw: random.Random, place: int) -> dict[str, Any]:
    text = " ".join(draw.choices(WORDS, k=draw.randint(2, 20)))
    return {"question": f"{place}: {text}?", "choices": draw.sample(WORDS, 4), "gold": draw.randrange(4)}


def write_eval_config(path: Path, **blocks: Any) -> Path:
    """A config over the material beside it, whose blocks replace those of a small evaluation."""
    folder = path.parent
    config = {
        "kind": "EvalJob",
        "model": {"uri": {"location": f"file://{folder}/model"}},
        "tasks": [{"name": name} for name in TASKS],
        "task_files": [{"name": "mine", "uri": {"location": f"file://{folder}/tasks"}}],
        "batch_size": 4,
        "workspace": {"uri": f"file://{folder}/runs"},
    }
    path.write_text(yaml.safe_dump({**config, **blocks}))
    return path


def by_lm_eval(
    folder: Path, tasks: list[str], *, num_fewshot: int | None = None, limit: int | None = None, **settings: Any
) -> dict[str, Any]:
    """What lm_eval finds with transformers underneath, in fp32."""
    from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415 (slow, and only where it is compared)
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    copy = folder / "absolute"
    copy.mkdir(exist_ok=True)
    for path in (folder / "tasks").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        files = config.get("dataset_kwargs", {}).get("data_files", {})
        files.update({split: str(folder / "tasks" / name) for split, name in files.items()})
        (copy / path.name).write_text(yaml.safe_dump(config))
    model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(copy), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit,
        bootstrap_iters=1000, **settings,
    )  # fmt: skip
    assert found is not None
    return dict(found)
