"""Prepares a run: looks at the model, tokenizes the data, estimates the memory. Needs no accelerator.

    python recipes/prepare.py --config CONFIG.yaml [field=value ...]

Runs once before training. What it leaves in the run's folder makes every attempt train the same model on the same rows.
"""

import argparse
from collections.abc import Sequence

from kubetune_trainer.config import load_config
from kubetune_trainer.data.prepare import prepare
from kubetune_trainer.report import report, run, write_termination_message


def main(arguments: Sequence[str]) -> None:
    """Reads the config, prepares the run, and says what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file, as those in recipes/configs")
    parser.add_argument("overrides", nargs="*", help="field=value each, as in training.max_steps=10")
    options = parser.parse_args(arguments)
    prepared = prepare(load_config(options.config, overrides=options.overrides), report=report)
    write_termination_message("Prepared", exit_code=0, **prepared.message())


if __name__ == "__main__":
    run(main)
