"""Our evaluation against lm_eval's backend for transformers: the same tasks, model, threads and batch size, in turn.

    python examples/fetch_smollm2.py models/smollm2
    python benchmarks/eval_vs_lm_eval.py --model models/smollm2

Both run in this process, in fp32, on all cores, one after the other, several times; the best time of each counts. A
task's tokens are those of its requests as the task asks them, the same for both, so that tokens per second compare
time alone. The tasks are made of the tickets in examples/data and of pages of Python's reference, without a network.
The last line is one JSON object.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # before anything imports tqdm

import torch
import yaml
from harness import ROOT, reference_pages
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from kubetune_trainer.config import EvalConfig, load_config
from kubetune_trainer.distributed import StopSignal, World, join_world
from kubetune_trainer.evaluate.answers import Answers
from kubetune_trainer.evaluate.run import ask
from kubetune_trainer.evaluate.tasks import LoadedTasks, load_tasks
from kubetune_trainer.evaluate.work import Crew
from kubetune_trainer.model.weights import load_model
from kubetune_trainer.report import report
from kubetune_trainer.storage import open_store
from kubetune_trainer.tokenizer import load_tokenizer

TOPICS = ["billing", "delivery", "defect", "return", "question"]
REMEDIES = [
    " send the money back to the customer's card",
    " find the parcel and deliver it again",
    " repair the device or replace it with a new one",
    " take the goods back and refund them",
    " answer by e-mail within one working day",
]
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "remedies": {  # five answers of several tokens to each question
        "output_type": "multiple_choice",
        "doc_to_text": "A customer writes: {{message}}\nThe right thing to do is to",
        "doc_to_choice": REMEDIES,
        "doc_to_target": "topic",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "topics": {  # five solved examples, and an answer of one token, as MMLU
        "output_type": "multiple_choice",
        "num_fewshot": 5,
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "Message: {{message}}\nTopic (A billing, B delivery, C defect, D return, E question):",
        "doc_to_choice": ["A", "B", "C", "D", "E"],
        "doc_to_target": "topic",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": "pages.jsonl"}},
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in (("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
        ],
    },
    "replies": {  # three solved examples, and an answer of up to 32 tokens, as GSM8K
        "output_type": "generate_until",
        "num_fewshot": 3,
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "Message: {{message}}\nRecord:",
        "doc_to_target": "{{record}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}
PAGES = ("debugger", "execmodel", "formatstrings")
LIMITS = {"remedies": 24, "topics": 16, "pages": len(PAGES), "replies": 8}


def main() -> int:
    """Measures both and compares what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder in Hugging Face format")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024, help="longest context")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, join_world() as world:
        config = write_tasks(Path(folder), options)
        loaded = {name: load_task(config, name) for name in TASKS}
        sides = {"ours": ours(config, options, world), "lm_eval": theirs(options)}
        best, found = measure(sides, loaded, rounds=options.rounds)
    summary = compare(best, found, tokens=asked_tokens(loaded, options.model))
    sys.stdout.write(json.dumps(summary) + "\n")
    return 0 if summary["sameNumbers"] else 1


def write_tasks(folder: Path, options: argparse.Namespace) -> EvalConfig:
    """Writes the tasks with their data, and a config that names them."""
    (folder / "tasks").mkdir()
    for source, target in (("tickets-heldout", "questions"), ("tickets-train", "solved")):
        lines = (ROOT / "examples" / "data" / f"{source}.jsonl").read_text().splitlines()[: max(LIMITS.values())]
        (folder / "tasks" / f"{target}.jsonl").write_text("".join(json.dumps(ticket(line)) + "\n" for line in lines))
    reference = reference_pages()
    pages = [reference[name][:2500] for name in PAGES]
    (folder / "tasks" / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    tickets = {
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl", "train": "solved.jsonl"}},
        "fewshot_split": "train",
    }
    for name, task in TASKS.items():
        data = {} if "dataset_kwargs" in task else tickets
        whole = {"task": name, "dataset_path": "json", "test_split": "test", **data, **task}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    config = {
        "kind": "EvalJob",
        "model": {"uri": {"location": f"file://{options.model.resolve()}"}},
        "tasks": [{"name": name, "limit": LIMITS[name]} for name in TASKS],
        "task_files": [{"name": "benchmark", "uri": {"location": f"file://{folder}/tasks"}}],
        "batch_size": options.batch_size,
        "max_sequence_length": options.max_length,
        "workspace": {"uri": f"file://{folder}/runs"},
    }
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(config))
    return load_config(folder / "benchmark.yaml", expect=EvalConfig)


def ticket(line: str) -> dict[str, Any]:
    """A ticket as the tasks ask for it."""
    messages = {message["role"]: message["content"] for message in json.loads(line)["messages"]}
    record = json.loads(messages["assistant"])
    return {
        "message": messages["user"],
        "topic": TOPICS.index(record["topic"]),
        "record": f"{record['topic']}, {record['product']}, {'urgent' if record['urgent'] else 'not urgent'}",
    }


def load_task(config: EvalConfig, name: str) -> LoadedTasks:
    """One task, so that each is timed alone."""
    alone = config.model_copy(update={"tasks": tuple(task for task in config.tasks if task.name == name)})

    def no_dataset(path: str, _: str | None) -> Path:
        raise AssertionError(f"no task here comes from the Hub, {path} neither")

    return load_tasks(alone, find_dataset=no_dataset, report=report)


Side = Callable[[LoadedTasks], dict[str, Any]]


def ours(config: EvalConfig, options: argparse.Namespace, world: World) -> Side:
    """Our decoder under lm_eval."""
    model, tokenizer = load_model(options.model, dtype=torch.float32), load_tokenizer(options.model)
    stop = StopSignal(leave=lambda: sys.exit(1))

    def run(loaded: LoadedTasks) -> dict[str, Any]:
        # A folder of its own each time, so that nothing is answered already.
        place = open_store(f"file://{tempfile.mkdtemp()}")
        answers = Answers(place, fingerprint="benchmark")
        crew = Crew(model, tokenizer, batch_size=options.batch_size, answers=answers, world=world, stop=stop)
        found = ask(config, crew, loaded, name="ours")
        place.delete_tree("")
        return {**found.record, "samples": found.samples}

    return run


def theirs(options: argparse.Namespace) -> Side:
    """lm_eval's backend for transformers."""
    model = HFLM(
        pretrained=str(options.model),
        device="cpu",
        dtype="float32",
        batch_size=options.batch_size,
        max_length=options.max_length,
    )

    def run(loaded: LoadedTasks) -> dict[str, Any]:
        return dict(evaluate(model, loaded.for_lm_eval(), samples=dict(loaded.samples), bootstrap_iters=1000) or {})

    return run


def measure(
    sides: Mapping[str, Side], loaded: Mapping[str, LoadedTasks], *, rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """Each side's best seconds for each task, and what it found; the sides take turns."""
    best: dict[str, dict[str, float]] = {side: {} for side in sides}
    found: dict[str, dict[str, Any]] = {side: {} for side in sides}
    for _ in range(rounds):
        for name, tasks in loaded.items():
            for side, run in sides.items():
                tasks.tasks[name].set_fewshot_seed(seed=1234)
                began = time.perf_counter()
                found[side][name] = run(tasks)
                seconds = time.perf_counter() - began
                best[side][name] = min(seconds, best[side].get(name, seconds))
    return best, found


def asked_tokens(loaded: Mapping[str, LoadedTasks], folder: Path) -> dict[str, int]:
    """Tokens of all requests of each task, context and continuation, as they are asked."""
    tokenizer = load_tokenizer(folder)

    def count(texts: tuple[Any, ...]) -> int:
        return len(tokenizer.encode("".join(text for text in texts if isinstance(text, str)), add_special_tokens=True))

    return {name: sum(count(request.args) for request in tasks.tasks[name].instances) for name, tasks in loaded.items()}


def compare(
    best: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, Any]], *, tokens: Mapping[str, int]
) -> dict[str, Any]:
    """Prints a table and returns the summary."""
    print(f"{'task':10} {'tokens':>7} {'ours tok/s':>11} {'lm_eval tok/s':>14} {'ratio':>6}  metrics")
    tasks: dict[str, Any] = {}
    for name in TASKS:
        seconds = [best[side][name] for side in ("ours", "lm_eval")]
        pairs = metric_pairs(found["ours"][name], found["lm_eval"][name], name)
        row = {
            "tokens": tokens[name],
            "tokensPerSecond": round(tokens[name] / seconds[0], 1),
            "lmEvalTokensPerSecond": round(tokens[name] / seconds[1], 1),
            "ratio": round(seconds[1] / seconds[0], 2),
            "metrics": {metric: {"ours": mine, "lmEval": other} for metric, (mine, other) in pairs.items()},
            "sameNumbers": same(pairs) and same_answers(found["ours"][name], found["lm_eval"][name], name),
        }
        tasks[name] = row
        shown = ", ".join(f"{metric} {mine:.6g} = {other:.6g}" for metric, (mine, other) in pairs.items())
        print(
            f"{name:10} {row['tokens']:7} {row['tokensPerSecond']:11} {row['lmEvalTokensPerSecond']:14}"
            f" {row['ratio']:6}  {shown}"
        )
    total = {side: sum(best[side].values()) for side in best}
    return {
        "benchmark": "eval_vs_lm_eval",
        "threads": torch.get_num_threads(),
        "ratio": round(total["lm_eval"] / total["ours"], 2),
        "tokensPerSecond": round(sum(tokens.values()) / total["ours"], 1),
        "lmEvalTokensPerSecond": round(sum(tokens.values()) / total["lm_eval"], 1),
        "sameNumbers": all(row["sameNumbers"] for row in tasks.values()),
        "tasks": tasks,
    }


def metric_pairs(mine: Mapping[str, Any], other: Mapping[str, Any], task: str) -> dict[str, tuple[float, float]]:
    """Each metric of a task as both found it."""
    return {
        name: (float(value), float(mine["results"][task][name]))[::-1]
        for name, value in other["results"][task].items()
        if "," in name and "stderr" not in name
    }


def same(pairs: Mapping[str, tuple[float, float]]) -> bool:
    """Whether metrics agree to 1e-4 of their value."""
    return all(abs(mine - other) <= 1e-4 * abs(other) for mine, other in pairs.values())


def same_answers(mine: Mapping[str, Any], other: Mapping[str, Any], task: str) -> bool:
    """Whether the same choices are the likeliest for each question, and the same texts are written."""

    def answers(found: Mapping[str, Any]) -> list[Any]:
        kind = TASKS[task]["output_type"]
        resps = [[answer[0] for answer in sample["resps"]] for sample in found["samples"][task]]
        if kind == "multiple_choice":
            return [max(range(len(scores)), key=lambda number: scores[number][0]) for scores in resps]
        return resps if kind == "generate_until" else []

    return answers(mine) == answers(other)


if __name__ == "__main__":
    sys.exit(main())
