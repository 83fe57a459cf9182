"""Take a run's folder for a config, so that a changed config never goes on with what another one began.

    python -m kubetune_trainer.claim --config FILE [--fresh]

In a cluster each job has a folder of its own and its spec cannot change; by hand the folder follows from the name.
"""

import argparse
import sys

from kubetune_trainer.config import FineTuneConfig, JobConfig, load_config
from kubetune_trainer.errors import ConfigError, TrainerError
from kubetune_trainer.storage import open_store

CLAIM_FILE = "config.digest"


def main() -> int:
    """Takes the folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file")
    parser.add_argument("--fresh", action="store_true", help="delete what the folder holds")
    options = parser.parse_args()
    try:
        claim(load_config(options.config, expect=JobConfig), fresh=options.fresh)
    except TrainerError as error:
        sys.stderr.write(f"{error}\n{error.hint}\n")
        return error.exit_code
    return 0


def claim(config: JobConfig, *, fresh: bool = False) -> None:
    """Takes the run's folder.

    Args:
        config: The run.
        fresh: Delete what the folder holds first.

    Raises:
        ConfigError: It holds a run of another config.
    """
    store = open_store(config.run.directory, s3=config.storage.s3)
    if fresh:
        store.delete_tree("")
    digest = config.training_digest() if isinstance(config, FineTuneConfig) else config.digest()
    if not store.exists(CLAIM_FILE):
        store.write_bytes(CLAIM_FILE, digest.encode())
    elif store.read_bytes(CLAIM_FILE).decode() != digest:
        raise ConfigError(
            f"{config.title}: {store.uri()} holds a run of another model, dataset, tuning or training",
            hint="Give the job another name, or start anew with --fresh.",
        )


if __name__ == "__main__":
    sys.exit(main())
