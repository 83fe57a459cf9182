"""Evaluate a language model with lm_eval's tasks: multiple choice, perplexity, generated answers; judge the results.

    torchrun --nproc-per-node 2 recipes/eval_model.py --config recipes/configs/smollm2_eval.yaml tasks.0.limit=20
    kubetune run FILE     # an EvalJob, as in examples/evaluate.yaml

Features: lm_eval's tasks and groups, and tasks of one's own; solved examples; chat templates; an adapter beside the
model; several ranks; answers kept over restarts; gates on a metric or against another job's results.

The script reads from top to bottom: `main` meets the other ranks, `evaluate` is the run (get the model and the tasks,
answer, judge, store), and what follows are its parts. Clone it and change it:
`kubetune recipes cp eval_model my_eval.py`.

Rank 0 runs lm_eval: it turns tasks into requests and answers into metrics. All ranks answer the requests. A run can be
killed at any moment and started again with the same command: requests that are answered stay answered, and the results
are the same as if nothing had happened.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kubetune_trainer.config import EvalConfig, load_config
from kubetune_trainer.distributed import StopSignal, World, brought_to_node, join_world, made_by_first, waiting_for_all
from kubetune_trainer.errors import PreemptedError
from kubetune_trainer.evaluate.answers import Answers
from kubetune_trainer.evaluate.gates import Verdict
from kubetune_trainer.evaluate.origin import compared_lineages, data_of, judged_by
from kubetune_trainer.evaluate.prepare import PreparedEval, dataset_finder, fetch, prepare
from kubetune_trainer.evaluate.results import (
    RESULTS_FILE,
    SAMPLES_DIR,
    Result,
    clear_results,
    judge,
    result_rows,
    save_evaluation,
)
from kubetune_trainer.evaluate.run import ask
from kubetune_trainer.evaluate.tasks import load_tasks
from kubetune_trainer.evaluate.work import Crew
from kubetune_trainer.generation import read_repetition_penalty
from kubetune_trainer.lineage import record_lineage
from kubetune_trainer.logs import keep_log
from kubetune_trainer.model.weights import load_model
from kubetune_trainer.names import TERMINATION_MESSAGE_BYTES
from kubetune_trainer.report import (
    attempt,
    end_with,
    open_log,
    report,
    run,
    serve_metrics,
    write_termination_message,
)
from kubetune_trainer.storage import Store, open_store, scratch_dir
from kubetune_trainer.tokenizer import load_tokenizer

MESSAGE_FRAME_BYTES = 1024
"""What a termination message may need beside results and gates."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """What is evaluated, on this machine."""

    prepared: PreparedEval
    """What the run evaluates."""
    model_dir: Path
    """Folder of the model."""
    adapter_dir: Path | None
    """Folder of the adapter, if any."""


def main(arguments: Sequence[str]) -> None:
    """Reads the config and joins the other ranks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file, as those in recipes/configs")
    parser.add_argument("overrides", nargs="*", help="field=value each, as in tasks.0.limit=20")
    options = parser.parse_args(arguments)
    config = load_config(options.config, expect=EvalConfig, overrides=options.overrides)
    stop = StopSignal(leave=lambda: end_with(PreemptedError("stopped; what is answered is stored")))
    with join_world() as world:
        evaluate(config, world, stop)


def evaluate(config: EvalConfig, world: World, stop: StopSignal) -> None:
    """The whole run, from nothing or from where the last attempt stopped, to its results."""
    serve_metrics()
    log = scratch_dir() / f"attempt-{attempt()}.jsonl"
    open_log(log)
    try:
        local, crew = set_up(config, world, stop)
        with waiting_for_all():  # no rank is done before the results are stored
            if world.is_first:
                finish(config, local, crew)
            else:
                crew.work()
    finally:
        if world.is_first:
            keep_log(config, log)


def set_up(config: EvalConfig, world: World, stop: StopSignal) -> tuple[Local, Crew]:
    """Gets the model to this node and loads it, whole, on every rank."""
    report("phase", phase="Downloading")
    prepared = made_by_first(world, lambda: prepare(config, report=report))
    base_dir, adapter_dir, model_dir = brought_to_node(world, lambda: fetch(prepared, config))

    report("phase", phase="Loading")
    # On a CPU fp32 is the faster type and the one that lm_eval's numbers are compared in.
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    model = load_model(model_dir, dtype=dtype, device=world.device, adapter=adapter_dir)
    fingerprint = [prepared.model.digest, prepared.adapter and prepared.adapter.digest, str(dtype)]
    crew = Crew(
        model,
        load_tokenizer(model_dir),
        batch_size=config.batch_size,
        answers=Answers(open_store(config.run.directory, s3=config.storage.s3), fingerprint=str(fingerprint)),
        world=world,
        stop=stop,
        repetition_penalty=read_repetition_penalty(model_dir),
    )
    return Local(prepared=prepared, model_dir=base_dir, adapter_dir=adapter_dir), crew


def finish(config: EvalConfig, local: Local, crew: Crew) -> None:
    """Rank 0's part: tasks to requests, answers to metrics, metrics to verdicts, and all of it to the workspace."""
    store = open_store(config.run.directory, s3=config.storage.s3)
    clear_results(store)
    loaded = load_tasks(config, find_dataset=dataset_finder(local.prepared, config), report=report)
    report("start", attempt=attempt(), answered=crew.answers.load(), world_size=crew.world.size)
    report("phase", phase="Evaluating")
    found = ask(config, crew, loaded, name=local.prepared.model.location)
    crew.release()
    report("phase", phase="Judging")
    results = result_rows(found.record)
    verdicts = [judge(gate, found, config=config) for gate in config.gates]
    record_lineage(
        config,
        model=local.prepared.model,
        model_dir=local.model_dir,
        adapter=local.prepared.adapter,
        adapter_dir=local.adapter_dir,
        sources=data_of(config, local.prepared, loaded),
        parents=compared_lineages(config),
        judged=judged_by(found, verdicts),
    )
    save_evaluation(store, found, verdicts=verdicts)
    for result in results:
        report("result", **result.model_dump())
    for verdict in verdicts:
        report("gate", **verdict.model_dump())
    report("done")
    write_termination_message("Complete", exit_code=0, **final_message(store, results, verdicts))


def final_message(store: Store, results: Sequence[Result], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the status gets; where a termination message has no room for it, the operator reads the log's events."""
    artifacts = {"results": store.uri(RESULTS_FILE), "samples": store.uri(SAMPLES_DIR)}
    lists = {"results": [result.told() for result in results], "gates": [verdict.told() for verdict in verdicts]}
    if len(json.dumps(lists)) > TERMINATION_MESSAGE_BYTES - MESSAGE_FRAME_BYTES:
        return {"artifacts": artifacts, "see_log": True}
    return {"artifacts": artifacts, **lists}


if __name__ == "__main__":
    run(main)
