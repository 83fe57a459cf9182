"""Prepares a run: looks at the model, gets its data ready, estimates the memory. Needs no accelerator.

    python recipes/prepare.py --config recipes/configs/smollm2_lora.yaml training.max_steps=10
    kubetune run FILE     # a job of any kind: prepares it first, and then runs its recipe

Features: revisions pinned to commits; models copied into the workspace; data read, written out by the chat template,
tokenized on several cores, packed and described on a page; memory estimated.

Runs once before the work, whatever kind of job it is. What it leaves in the run's folder makes every attempt work with
the same model on the same data.
"""

import argparse
from collections.abc import Sequence

from kubetune_trainer.config import EvalConfig, FineTuneConfig, JobConfig, QuantizeConfig, load_config
from kubetune_trainer.report import report, run, write_termination_message


def main(arguments: Sequence[str]) -> None:
    """Reads the config, prepares the run, and says what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file, as those in recipes/configs")
    parser.add_argument("overrides", nargs="*", help="field=value each, as in training.max_steps=10")
    options = parser.parse_args(arguments)
    config = load_config(options.config, expect=JobConfig, overrides=options.overrides)
    write_termination_message("Prepared", exit_code=0, **prepare(config))


def prepare(config: JobConfig) -> dict[str, object]:
    """Does what the job's kind needs; each imports its own libraries only. Returns what the status gets."""
    if isinstance(config, FineTuneConfig):
        from kubetune_trainer.data.prepare import prepare as prepare_finetune  # noqa: PLC0415

        return prepare_finetune(config, report=report).message()
    if isinstance(config, EvalConfig):
        from kubetune_trainer.evaluate.prepare import prepare as prepare_evaluation  # noqa: PLC0415

        return prepare_evaluation(config, report=report).message()
    if isinstance(config, QuantizeConfig):
        from kubetune_trainer.quantize.prepare import prepare as prepare_quantization  # noqa: PLC0415

        return prepare_quantization(config, report=report).message()
    raise AssertionError(f"{config.kind} has no step of its own before its work")


if __name__ == "__main__":
    run(main)
