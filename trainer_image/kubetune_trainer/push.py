"""An output's way to the Hugging Face Hub: after it is stored, as one commit of all its files.

The output is safe by then. An attempt that only failed to push leaves the next one nothing but the push: the lineage in
the run's folder is written when all outputs are whole, and says so. Files that have arrived are not sent again: large
ones lie at the Hub under their hash, and a commit that would change nothing is not made. The commit also deletes what
another output has left of its model; whatever else lies in the repository stays.
"""

import glob
import json
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo

from kubetune_trainer.checkpoint import complete_steps
from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.data.prepare import Prepared
from kubetune_trainer.errors import ConfigError, StorageError
from kubetune_trainer.export.output_files import is_output_file
from kubetune_trainer.hub import UNREACHABLE, ask_hub, endpoint, token_of
from kubetune_trainer.lineage import stored_lineage
from kubetune_trainer.names import ABOUT_FILES, CHECKPOINTS_DIR, LINEAGE_FILE
from kubetune_trainer.prepared import read_prepared
from kubetune_trainer.report import attempt, report, write_termination_message
from kubetune_trainer.storage import open_store, scratch_dir


def push_output(config: FineTuneConfig, outputs: list[dict[str, Any]]) -> dict[str, str] | None:
    """Push the output that the config names; call it on one rank, when all outputs are stored.

    Args:
        config: The run.
        outputs: What it has stored.

    Returns:
        The repository and the commit; None where nothing is to be pushed.

    Raises:
        ConfigError: The Hub refuses.
        StorageError: The Hub does not answer; a later attempt may succeed.
    """
    asked = config.push_to_hub
    if asked is None:
        return None
    report("phase", phase="Pushing")
    [uri] = [output["uri"] for output in outputs if output["name"] == asked.output]
    store = open_store(uri, s3=config.storage.s3)
    # Its folder may hold what is none of the output's.
    names = list(json.loads(store.read_bytes(LINEAGE_FILE))["files"])
    names += [name for name in ABOUT_FILES if store.exists(name)]
    folder = store.local_path()
    if folder is None:
        folder = scratch_dir() / "push"
        for name in names:
            store.download(name, folder / name)
    api = huggingface_hub.HfApi(endpoint=endpoint(), token=token_of(asked.token_secret) or False)
    what = f"{config.title}: pushToHub.repo {asked.repo} on the Hub"
    ask_hub(lambda: api.create_repo(asked.repo, private=asked.private, exist_ok=True), what=what)

    def upload() -> CommitInfo:
        try:
            return api.upload_folder(
                repo_id=asked.repo,
                folder_path=folder,
                commit_message=f"{config.title}: output {asked.output}",
                allow_patterns=[glob.escape(name) for name in names],
                delete_patterns=[glob.escape(path) for path in _model_files(api, asked.repo)] or None,
            )
        except RuntimeError as error:  # what befell one of the files is its cause
            if isinstance(error.__cause__, UNREACHABLE):
                raise error.__cause__ from error
            raise StorageError(f"{what}: {error}") from error
        except ValueError as error:  # the library's own check of the card, or of the files
            raise ConfigError(f"{what}: {error}") from error

    pushed = {"repo": asked.repo, "commit": ask_hub(upload, what=what).oid}
    report("push", **pushed)
    return pushed


def _model_files(api: huggingface_hub.HfApi, repo: str) -> list[str]:
    """Return the files of a repository that an output may have; those that it does not have are another model's."""
    return [file.path for file in api.list_repo_tree(repo) if is_output_file(file.path)]


def outputs_to_push(config: FineTuneConfig) -> list[dict[str, Any]] | None:
    """Return the outputs of a run that has nothing left to do but to push one of them; None for any other run."""
    if config.push_to_hub is None:
        return None
    lineage = stored_lineage(config.run.directory, config=config) or {}
    outputs: list[dict[str, Any]] = lineage.get("outputs", [])
    stored, asked = {output["name"] for output in outputs}, {output.name for output in config.outputs}
    is_done = lineage.get("configDigest") == f"sha256:{config.digest()}" and stored == asked
    return outputs if is_done else None


def push_again(config: FineTuneConfig, outputs: list[dict[str, Any]]) -> None:
    """Do what an earlier attempt has left: push, and say that the run is done."""
    found = open_store(f"{config.run.directory}/{CHECKPOINTS_DIR}", s3=config.storage.s3).list()
    step = max(complete_steps({info.path for info in found}), default=0)
    prepared = read_prepared(open_store(config.run.directory, s3=config.storage.s3), Prepared)
    report("start", attempt=attempt(), step=step, total_steps=prepared.total_steps if prepared else step)
    pushed = push_output(config, outputs)
    report("done", step=step)
    write_termination_message("Complete", exit_code=0, outputs=outputs, pushed_to_hub=pushed)
