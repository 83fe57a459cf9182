"""`kubetune run`: a manifest on this machine, with the operator's rendered config and the recipes that pods run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from kubetune_operator.api.common import Compute, JobRef
from kubetune_operator.api.finetunejob import FineTuneJob, accumulates, batch_problem, smaller_micro_batch
from kubetune_operator.api.jobs import Job
from kubetune_operator.api.quantizejob import QuantizeJob
from kubetune_operator.api.references import JobKey, compared_with, model_sources, resumed_from
from kubetune_operator.cli.bundle import Bundle, Objects, Reference, references, uris
from kubetune_operator.cli.progress import Display
from kubetune_operator.cli.script import check_script, find_script
from kubetune_operator.errors import SpecError
from kubetune_operator.lifecycle.upstream import FIRST_ADAPTERS
from kubetune_operator.names import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    ENV_CONFIGMAPS_DIR,
    ENV_HANG_SECONDS,
    ENV_MASTER_ADDRESS,
    ENV_MASTER_PORT,
    ENV_NODE_RANK,
    ENV_NUM_NODES,
    ENV_PROCESSES_PER_NODE,
    ENV_PVC_DIR,
    ENV_SECRETS_DIR,
    ENV_TERMINATION_LOG,
    KIND_FINETUNEJOB,
    KINDS,
    ExitCode,
)
from kubetune_operator.render.config import Resolved, dump_config, render_config
from kubetune_operator.render.job import hang_seconds, micro_batch_override

_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended.

    Attributes:
        code: The launcher's exit code.
        record: Its termination message; empty if it wrote none.
        tail: The last lines of its log.
        measured: What it measured last, as in `Display`.
        is_stopped: Whether somebody asked it to stop, however it ended then.
    """

    code: int
    record: Mapping[str, Any]
    tail: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    is_stopped: bool = False


def run(bundle: Bundle, *, fresh: bool, verbose: bool) -> int:
    """Prepare and do the work, showing progress; returns the trainer's exit code.

    Raises:
        SpecError: The trainer is not installed, or the manifest needs what only a cluster has.
    """
    return outcome_of(bundle, fresh=fresh, verbose=verbose).code


def outcome_of(bundle: Bundle, *, fresh: bool = False, verbose: bool = False) -> Outcome:
    """Prepare and do the work, showing progress.

    Raises:
        SpecError: The trainer is not installed, or the manifest needs what only a cluster has.
    """
    require_trainer("kubetune run")
    check_batch(bundle)
    check_script(bundle)
    console = Console()
    processes = processes_for(bundle.job, limit=devices())
    with tempfile.TemporaryDirectory(prefix="kubetune-run-") as folder, Display(console) as display:
        for note in (_about_processes(bundle.job, processes), *_about_references(bundle, os.environ)):
            display.say(note)
        config = Path(folder) / CONFIG_FILE
        config.write_text(dump_config(local_config(bundle, processes=processes)), encoding="utf-8")
        environment = os.environ | local_environment(bundle, os.environ, folder=Path(folder))
        work = find_script(bundle, environment)
        outcome = _claim(config, environment, fresh=fresh)
        stage = partial(_stage, config=config, environment=environment, display=display, verbose=verbose)
        if not outcome.code:
            outcome = stage("prepare", (), ranks=1)
            if outcome.is_stopped and not outcome.code:  # it came too late for prepare to notice
                outcome = replace(outcome, code=ExitCode.PREEMPTED)
        if not outcome.code:
            outcome = _work(bundle.job, *work, stage=partial(stage, ranks=processes), display=display)
        if outcome.code:
            _report(outcome, bundle, display=display)
        else:
            display.say(f"{bundle.title} is complete")
    return replace(outcome, measured=display.measured)


def require_trainer(purpose: str) -> None:
    """Make sure that the trainer can be started.

    Raises:
        SpecError: It is not installed.
    """
    missing = [name for name in ("kubetune_trainer", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"needs the trainer ({', '.join(missing)} not found): pip install 'kubetune[trainer]'"
        raise SpecError(purpose, problems=[problem])


def devices() -> int:
    """How many processes this machine has room for: its NVIDIA GPUs, otherwise its CPUs."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(os.sched_getaffinity(0))


def check_batch(bundle: Bundle) -> None:
    """Make sure that the ranks of a manifest can share its batch.

    Raises:
        SpecError: They cannot.
    """
    job = bundle.job
    if isinstance(job, FineTuneJob) and (problem := batch_problem(job.spec, ranks=job.spec.ranks)):
        raise SpecError(bundle.title, problems=[problem])


def processes_for(job: Job, *, limit: int) -> int:
    """The most processes, up to the manifest's number and the limit, that can share the model and the global batch.

    Raises:
        SpecError: No number within the limit can.
    """
    most = max(1, min(job.spec.ranks, limit))
    if not isinstance(job, FineTuneJob):
        return most
    for number in range(most, 0, -1):
        if batch_problem(job.spec, ranks=number) is None:
            return number
    raise SpecError(f"FineTuneJob {job.metadata.name}", problems=[str(batch_problem(job.spec, ranks=most))])


def local_config(bundle: Bundle, *, processes: int) -> dict[str, Any]:
    """The config that the operator would render, for one node with these processes and jobRefs to earlier local runs.

    Raises:
        SpecError: A jobRef does not say which output it means.
    """
    job = bundle.job
    compute = (job.spec.compute or Compute()).model_copy(update={"nodes": 1})
    here = job.model_copy(
        update={
            "spec": job.spec.model_copy(update={"compute": compute}),
            "metadata": job.metadata.model_copy(update={"uid": _mark(job.kind)}),
        }
    )
    resumed = resumed_from(job)
    resolved = Resolved(
        processes_per_node=processes,
        models={
            path: {"uri": {"location": _referenced_output(bundle, path, model.job_ref)}}
            for path, model in model_sources(job).items()
            if model.job_ref is not None
        },
        resume_from=f"{_former_run(job, resumed)}/{CHECKPOINTS_DIR}" if resumed else None,
        compared={other.name: _former_run(job, other) for other in compared_with(job)},
    )
    return render_config(here, resolved=resolved)


def local_environment(bundle: Bundle, environment: Mapping[str, str], *, folder: Path) -> dict[str, str]:
    """What the operator would put into the pod: the file's Secrets and ConfigMaps as files, the job's own variables.

    Args:
        bundle: The manifest file.
        environment: This process's environment.
        folder: A private folder for the files.

    Raises:
        SpecError: A variable's Secret, or the folder of volume claims, is missing.
    """
    own = {ENV_NUM_NODES: "1", ENV_NODE_RANK: "0", ENV_MASTER_ADDRESS: "", ENV_MASTER_PORT: ""}
    own[ENV_HANG_SECONDS] = str(hang_seconds(bundle.job))
    if bundle.secrets:
        own[ENV_SECRETS_DIR] = str(_write(bundle.secrets, folder=folder / "secrets"))
    if bundle.config_maps:
        own[ENV_CONFIGMAPS_DIR] = str(_write(bundle.config_maps, folder=folder / "configmaps"))
    claims = [path for path, uri in uris(bundle.job) if uri.startswith("pvc://")]
    if claims and not environment.get(ENV_PVC_DIR):
        problem = f"{claims[0]}: pvc:// needs {ENV_PVC_DIR}, a folder that holds a folder for each claim"
        raise SpecError(bundle.title, problems=[problem])
    return _variables(bundle) | own


def _variables(bundle: Bundle) -> dict[str, str]:
    variables: dict[str, str] = {}
    for variable in (bundle.job.spec.compute.env if bundle.job.spec.compute else None) or []:
        if variable.secret_key_ref is None:
            variables[variable.name] = variable.value or ""
            continue
        key = variable.secret_key_ref
        if key.key not in bundle.secrets.get(key.name, {}):
            problem = f"spec.compute.env: {variable.name} needs key {key.key} of Secret {key.name} in the same file"
            raise SpecError(bundle.title, problems=[problem])
        variables[variable.name] = bundle.secrets[key.name][key.key].decode()
    return variables


def _write(objects: Objects, *, folder: Path) -> Path:
    """Write objects as a pod sees them mounted: a folder each, a file per key."""
    for name, data in objects.items():
        (folder / name).mkdir(parents=True, mode=0o700)
        for key, value in data.items():
            (folder / name / key).write_bytes(value)
    return folder


def _referenced_output(bundle: Bundle, path: str, reference: JobRef) -> str:
    """The output of an earlier local run that the jobRef of a model means."""
    parent = JobKey(reference.kind, reference.name)
    outputs = _outputs_of(bundle.others.get(parent), wanted="PEFT" if path == FIRST_ADAPTERS else "HuggingFace")
    name = reference.output or next(iter(outputs), None)
    if name is None:
        problem = (
            f"spec.{path}.jobRef.output: Required value: "
            f"`kubetune run` needs the name of the output of {reference.name}"
        )
        raise SpecError(bundle.title, problems=[problem])
    return outputs.get(name) or f"{_former_run(bundle.job, parent)}/outputs/{name}"


def _outputs_of(parent: Job | None, *, wanted: str) -> dict[str, str | None]:
    """The outputs of a job of the same file that can be meant, with the URIs that it gives them."""
    if isinstance(parent, FineTuneJob):
        return {output.name: output.uri for output in parent.spec.outputs if output.type == wanted}
    if isinstance(parent, QuantizeJob):
        return {output.name: output.uri for output in parent.spec.outputs}
    return {}


def _former_run(job: Job, key: JobKey) -> str:
    """The folder of an earlier run on this machine."""
    return f"{job.spec.workspace.uri.rstrip('/')}/{job.metadata.namespace}/{key.name}-{_mark(key.kind)}"


def _mark(kind: str) -> str:
    """What stands for a job's identity on this machine: jobs of two kinds may have one name."""
    return "local" if kind == KIND_FINETUNEJOB else KINDS[kind].component


def _about_processes(job: Job, processes: int) -> str:
    compute = job.spec.compute or Compute()
    asked = f"{compute.nodes} node{'s' if compute.nodes > 1 else ''}"
    if compute.accelerator:
        asked += f" x {compute.accelerator.per_node} {compute.accelerator.resource}"
    return f"{asked}: run as {processes} process{'es' if processes > 1 else ''} on this machine"


def _about_references(bundle: Bundle, environment: Mapping[str, str]) -> Iterator[str]:
    """What stands in for Secrets that the file does not hold."""
    told: set[tuple[str, str]] = set()
    for reference in references(bundle.job):
        if (reference.kind, reference.name) in told or _is_at_hand(reference, bundle, environment):
            continue
        told.add((reference.kind, reference.name))
        if reference.kind == "Secret":
            stand_in = _stand_in(reference.path)
            yield f"note: Secret {reference.name} is not in the file; taking {stand_in} of this environment"
        else:
            yield f"note: ConfigMap {reference.name} ({reference.path}) is not in the file"


def _stand_in(path: str) -> str:
    """What of this environment is taken where the Secret of a field is not at hand."""
    known = {
        "spec.tracking.wandb.apiKeySecret": "WANDB_API_KEY",
        "spec.tracking.mlflow.tokenSecret": "MLFLOW_TRACKING_TOKEN",
    }
    return known.get(path) or ("HF_TOKEN" if path.endswith("tokenSecret") else "the AWS_… variables or profile")


def _is_at_hand(reference: Reference, bundle: Bundle, environment: Mapping[str, str]) -> bool:
    held, variable = {
        "Secret": (bundle.secrets, ENV_SECRETS_DIR),
        "ConfigMap": (bundle.config_maps, ENV_CONFIGMAPS_DIR),
    }[reference.kind]
    return reference.name in held or (not held and (Path(environment.get(variable, "")) / reference.name).is_dir())


def _claim(config: Path, environment: Mapping[str, str], *, fresh: bool) -> Outcome:
    """Make sure that the run's folder holds nothing of another config; with `fresh`, nothing at all."""
    command = [sys.executable, "-P", "-m", "kubetune_trainer.claim", "--config", str(config), *["--fresh"] * fresh]
    ran = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if ran.returncode not in set(ExitCode) - {ExitCode.CRASHED}:
        return Outcome(code=ran.returncode, record={}, tail=ran.stderr)
    message, _, hint = ran.stderr.strip().partition("\n")
    return Outcome(code=ran.returncode, record={"message": message, "hint": hint}, tail="")


def _work(
    job: Job, script: str, arguments: Sequence[str], *, stage: Callable[..., Outcome], display: Display
) -> Outcome:
    """Run a job's recipe; where memory is short, again with smaller micro batches and the same global batch."""
    size = job.spec.training.micro_batch_size if isinstance(job, FineTuneJob) else 1
    overrides: list[str] = []
    while True:
        kills = _out_of_memory_kills()
        outcome: Outcome = stage(script, [*arguments, *overrides])
        killed = outcome.code == 128 + signal.SIGKILL and _out_of_memory_kills() > kills
        smaller = smaller_micro_batch(size, accumulates=accumulates(job))
        if outcome.is_stopped or smaller is None or not (killed or outcome.code == ExitCode.OUT_OF_MEMORY):
            return outcome
        said = outcome.record.get("message") or "the kernel killed a process for its memory"
        display.say(f"{said}; another attempt has microBatchSize {smaller} in place of {size}")
        size, overrides = smaller, [micro_batch_override(smaller)]


def _out_of_memory_kills() -> int:
    """How many processes this machine's kernel has killed for their memory since it started, as far as it counts."""
    with suppress(OSError):
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counts.get("oom_kill", 0))
    return 0


def _stage(
    script: str,
    arguments: Sequence[str],
    *,
    config: Path,
    environment: Mapping[str, str],
    ranks: int,
    display: Display,
    verbose: bool,
) -> Outcome:
    """Run one recipe under the launcher, to its end."""
    message = config.with_name("message.json")
    message.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "kubetune_trainer.launch", script, "--config", str(config), *arguments],
        env={**environment, ENV_PROCESSES_PER_NODE: str(ranks), ENV_TERMINATION_LOG: str(message)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        process_group=0,  # Ctrl-C reaches this process alone, which asks the launcher to stop
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with process, _stopping(process, display=display) as stop:
        assert process.stdout is not None  # noqa: S101 (PIPE)
        reader = threading.Thread(target=_drain, args=(process.stderr, tail, display if verbose else None))
        reader.start()
        display.show_lines(process.stdout)
        code = process.wait()
        reader.join()
    code = code if code >= 0 else 128 - code
    return Outcome(code=code, record=_record(message), tail="".join(tail), is_stopped=stop.is_asked)


def _drain(stream: IO[str], tail: deque[str], display: Display | None) -> None:
    for line in stream:
        tail.append(line)
        if display is not None:
            display.say(line.rstrip("\n"))


@dataclass
class _Stop:
    """Whether a run was asked to stop."""

    is_asked: bool = False


@contextmanager
def _stopping(process: "subprocess.Popen[str]", *, display: Display) -> Iterator[_Stop]:
    """Pass Ctrl-C and SIGTERM on: the first asks for a checkpoint, the second kills."""
    asked = _Stop()

    def stop(_number: int, _frame: Any) -> None:
        if asked.is_asked:
            process.kill()
        else:
            process.terminate()
            display.say("stopping: a checkpoint is written; once more to stop without")
        asked.is_asked = True

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _record(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _report(outcome: Outcome, bundle: Bundle, *, display: Display) -> None:
    """Say why it ended and what to do."""
    if outcome.code == ExitCode.PREEMPTED:
        where = f"checkpoint {display.last_checkpoint}" if display.last_checkpoint else "no checkpoint was needed yet"
        display.say(f"stopped after step {display.step}, {where}; the same command goes on from there")
        return
    record = outcome.record
    said = record.get("message") or f"the trainer ended with exit code {outcome.code}\n{outcome.tail}".rstrip()
    # The trainer's own messages name the job already.
    sys.stderr.write(f"error: {said if bundle.title in said else f'{bundle.title}: {said}'}\n")
    if hint := record.get("hint"):
        sys.stderr.write(f"hint: {hint}\n")
