"""What the lineage of an evaluation says beside its model: the data, the tasks by their samples, and the gates."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.utils import hash_string

from kubetune_trainer.config import EvalConfig
from kubetune_trainer.evaluate.gates import Verdict
from kubetune_trainer.evaluate.prepare import PreparedEval
from kubetune_trainer.evaluate.results import Evaluation
from kubetune_trainer.evaluate.tasks import LoadedTasks
from kubetune_trainer.export.digest import digest_of, file_digests
from kubetune_trainer.lineage import Lineage, stored_lineage


def data_of(config: EvalConfig, prepared: PreparedEval, loaded: LoadedTasks) -> list[Lineage]:
    """Return where the tasks' data came from: datasets, and folders of task files."""
    found = [dataset.model_dump(exclude_none=True) for dataset in prepared.datasets]
    for files in config.task_files:
        location = {"location": files.uri.location} if files.uri else {}
        found.append({"name": files.name, **location, "digest": digest_of(file_digests(loaded.files[files.name]))})
    return found


def judged_by(found: Evaluation, verdicts: Sequence[Verdict]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the tasks, each with lm_eval's hash of its samples and what they were asked, and the gates."""
    versions = found.record["versions"]
    tasks = [
        {"name": name, "version": versions[name], "samples": found.record["n-samples"][name]["effective"],
         "hash": _task_hash(samples)}
        for name, samples in found.samples.items()
    ]  # fmt: skip
    return {"tasks": tasks, "gates": [verdict.told() for verdict in verdicts]}


def compared_lineages(config: EvalConfig) -> list[Lineage]:
    """Return the lineages of the evaluations that gates compare with, where these have stored one."""
    directories = dict.fromkeys(gate.compared_to.directory for gate in config.gates if gate.compared_to)
    found = (stored_lineage(directory, config=config) for directory in directories)
    return [lineage for lineage in found if lineage is not None]


def _task_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """As lm_eval writes it into its own results, under task_hashes."""
    parts = (sample[key] for sample in samples for key in ("doc_hash", "prompt_hash", "target_hash"))
    return str(hash_string("".join(parts)))
