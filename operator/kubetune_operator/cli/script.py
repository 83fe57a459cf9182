"""The script of `recipe: Custom`, as far as it can be judged without running it."""

import ast
from collections.abc import Mapping
from pathlib import Path

from kubetune_operator.api.finetunejob import FineTuneJob
from kubetune_operator.api.jobs import Job
from kubetune_operator.cli.bundle import Bundle, Objects
from kubetune_operator.errors import SpecError
from kubetune_operator.names import CONFIGMAPS_DIR, ENV_CONFIGMAPS_DIR
from kubetune_operator.render.job import work_command


def check_script(bundle: Bundle) -> None:
    """Make sure that a script which stands beside the job is there and is Python.

    Raises:
        SpecError: It is not.
    """
    if problem := script_problem(bundle.job, config_maps=bundle.config_maps):
        raise SpecError(bundle.title, problems=[problem])


def script_problem(job: Job, *, config_maps: Objects) -> str | None:
    """What is wrong with a job's script; None if nothing is, or if it is not among these ConfigMaps."""
    custom = job.spec.custom if isinstance(job, FineTuneJob) else None
    where = custom.script.config_map if custom is not None else None
    if where is None or where.name not in config_maps:
        return None
    held = config_maps[where.name]
    if where.key not in held:
        return f"spec.custom.script.configMap: ConfigMap {where.name} has no key {where.key}, only {', '.join(held)}"
    try:
        ast.parse(held[where.key])
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        return f"spec.custom.script.configMap: key {where.key} of ConfigMap {where.name} is not Python: {said}{line}"
    return None


def find_script(bundle: Bundle, environment: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """What the launcher starts on this machine: the script, and its arguments beside the config.

    Args:
        bundle: The manifest file.
        environment: That of the launcher, which says where ConfigMaps are.

    Raises:
        SpecError: A script of one's own is not on this machine.
    """
    folder = environment.get(ENV_CONFIGMAPS_DIR) or CONFIGMAPS_DIR
    script, arguments = work_command(bundle.job, configmaps_dir=folder)
    custom = bundle.job.spec.custom if isinstance(bundle.job, FineTuneJob) else None
    if custom is None or Path(script).is_file():
        return script, arguments
    if where := custom.script.config_map:
        problem = (
            f"spec.custom.script.configMap: `kubetune run` needs ConfigMap {where.name} with key {where.key} "
            f"in the same file, or as {where.name}/{where.key} below {ENV_CONFIGMAPS_DIR}"
        )
    else:
        problem = f"spec.custom.script.path: there is no {script} on this machine"
    raise SpecError(bundle.title, problems=[problem])
