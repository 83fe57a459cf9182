"""A manifest file of the command line: one job that is meant, and the Secrets, ConfigMaps and jobs beside it."""

import base64
import binascii
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubetune_operator.api.common import S3
from kubetune_operator.api.evaljob import EvalJob
from kubetune_operator.api.finetunejob import FineTuneJob
from kubetune_operator.api.jobs import Job
from kubetune_operator.api.kinds import parse_job
from kubetune_operator.api.manifest import load_manifests
from kubetune_operator.api.quantizejob import QuantizeJob, ignored_calibration
from kubetune_operator.api.references import JobKey, key_of, model_sources
from kubetune_operator.errors import SpecError
from kubetune_operator.names import API_GROUP, S3_ACCESS_KEY, S3_SECRET_KEY

Objects = dict[str, dict[str, bytes]]
"""Data of Secrets or ConfigMaps: by the object's name, by key."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A Secret or ConfigMap that a job names.

    Attributes:
        kind: Secret or ConfigMap.
        name: The object's name.
        keys: Keys that it must have.
        path: The field that names it.
    """

    kind: str
    name: str
    keys: tuple[str, ...]
    path: str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a manifest file holds.

    Attributes:
        job: The job that is meant, checked, with defaults.
        manifest: The same as it stands in the file.
        secrets: Data of the file's Secrets.
        config_maps: Data of the file's ConfigMaps.
        others: The file's other jobs: a jobRef may mean one of them.
    """

    job: Job
    manifest: dict[str, Any]
    secrets: Objects = field(default_factory=dict)
    config_maps: Objects = field(default_factory=dict)
    others: dict[JobKey, Job] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The job as messages name it."""
        return f"{self.job.kind} {self.job.metadata.namespace}/{self.job.metadata.name}"

    def notes(self) -> Iterator[str]:
        """What is allowed and yet worth saying."""
        if local := [path for path, uri in uris(self.job) if uri.startswith("file://")]:
            yield f"{', '.join(local)}: file:// is for `kubetune run` on this machine; the operator refuses it"
        if isinstance(self.job, QuantizeJob):
            yield from ignored_calibration(self.job.spec)


def load_bundle(file: Path, *, name: str | None = None, s3_endpoint: str | None = None) -> Bundle:
    """Read and check a manifest file of which one job is meant.

    Args:
        file: Its path; `-` is standard input.
        name: Which job, where there are several: NAME or KIND/NAME.
        s3_endpoint: Replaces `spec.storage.s3.endpoint`, for a service that has another address from here.

    Raises:
        SpecError: The file cannot be read, is no YAML, has no such job, or an object breaks rules.
    """
    bundles = {key_of(bundle.job): bundle for bundle in load_bundles(file, s3_endpoint=s3_endpoint)}
    return bundles[_chosen(list(bundles), name=name, source=str(file))]


def load_bundles(file: Path, *, s3_endpoint: str | None = None) -> list[Bundle]:
    """Read and check a manifest file; returns it once for each of its jobs.

    Args:
        file: Its path; `-` is standard input.
        s3_endpoint: As for `load_bundle`.

    Raises:
        SpecError: The file cannot be read, is no YAML, has no job, or an object breaks rules.
    """
    manifests = load_manifests(_read(file), source=str(file))
    mine = [manifest for manifest in manifests if str(manifest.get("apiVersion", "")).partition("/")[0] == API_GROUP]
    jobs = {
        key_of(job): (job, manifest)
        for manifest in (_reached_at(each, s3_endpoint) for each in mine)
        for job in [parse_job(manifest)]
    }
    if not jobs:
        raise SpecError(str(file), problems=[f"holds no job of {API_GROUP}"])
    secrets = {_name(each): _secret(each) for each in manifests if each.get("kind") == "Secret"}
    config_maps = {_name(each): _config_map(each) for each in manifests if each.get("kind") == "ConfigMap"}
    return [
        Bundle(
            job=job,
            manifest=manifest,
            secrets=secrets,
            config_maps=config_maps,
            others={other: each for other, (each, _) in jobs.items() if other != key},
        )
        for key, (job, manifest) in jobs.items()
    ]


def _chosen(keys: list[JobKey], *, name: str | None, source: str) -> JobKey:
    """The job that is meant.

    Raises:
        SpecError: There is no such job, or there are several.
    """
    kind, _, short = (name or "").rpartition("/")
    fitting = [key for key in keys if short in {"", key.name} and kind.lower() in {"", key.kind.lower()}]
    if not fitting:
        raise SpecError(source, problems=[f"holds no job {name}, only {_listed(keys)}"])
    if len(fitting) > 1:
        raise SpecError(source, problems=[f"holds {_listed(fitting)}; say which one with --name"])
    return fitting[0]


def _listed(keys: list[JobKey]) -> str:
    """Jobs by name, or where a name is not enough, by kind and name."""
    names = [key.name for key in keys]
    alike = len(set(names)) < len(names)
    return ", ".join(f"{key.kind.lower()}/{key.name}" if alike else key.name for key in keys)


def _reached_at(manifest: dict[str, Any], s3_endpoint: str | None) -> dict[str, Any]:
    """The manifest with another endpoint of its S3 service; one that breaks rules is left for them."""
    spec = manifest.get("spec")
    if s3_endpoint is None or not isinstance(spec, dict):
        return manifest
    storage = spec.get("storage") or {}
    if not isinstance(storage, dict) or not isinstance(storage.get("s3") or {}, dict):
        return manifest
    s3 = {**(storage.get("s3") or {}), "endpoint": s3_endpoint}
    return {**manifest, "spec": {**spec, "storage": {**storage, "s3": s3}}}


def uris(job: Job) -> Iterator[tuple[str, str]]:
    """Every URI of a job with the field that holds it."""
    spec = job.spec
    for path, source in [*_models(job), *_sources(job)]:
        if source.uri:
            yield f"{path}.uri.location", source.uri.location
    yield "spec.workspace.uri", spec.workspace.uri
    if isinstance(job, FineTuneJob):
        yield from _training_uris(job)
    if isinstance(job, EvalJob):
        for index, files in enumerate(job.spec.task_files or []):
            yield from [(f"spec.taskFiles[{index}].uri.location", files.uri.location)] if files.uri else []
    for index, output in enumerate(job.spec.outputs if isinstance(job, FineTuneJob | QuantizeJob) else []):
        yield from [(f"spec.outputs[{index}].uri", output.uri)] if output.uri else []


def _training_uris(job: FineTuneJob) -> Iterator[tuple[str, str]]:
    resume = job.spec.checkpoint and job.spec.checkpoint.resume_from
    if resume and resume.uri:
        yield "spec.checkpoint.resumeFrom.uri", resume.uri
    if job.spec.tracking and (mlflow := job.spec.tracking.mlflow):
        yield "spec.tracking.mlflow.trackingUri", mlflow.tracking_uri


def references(job: Job) -> Iterator[Reference]:
    """Every Secret and ConfigMap that a job names."""
    spec = job.spec
    for path, source in [*_models(job), *_sources(job)]:
        if source.hub and source.hub.token_secret:
            token = source.hub.token_secret
            yield Reference(kind="Secret", name=token.name, keys=(token.key,), path=f"{path}.hub.tokenSecret")
        if source.uri:
            yield from _s3_references(source.uri.s3, path=f"{path}.uri.s3")
    for path, source in _sources(job):
        if source.config_map:
            where = source.config_map
            yield Reference(kind="ConfigMap", name=where.name, keys=(where.key,), path=f"{path}.configMap")
    if isinstance(job, EvalJob):
        yield from _task_references(job)
    if isinstance(job, FineTuneJob):
        yield from _training_references(job)
    if spec.storage:
        yield from _s3_references(spec.storage.s3, path="spec.storage.s3")
    yield from _compute_references(job)


def _task_references(job: EvalJob) -> Iterator[Reference]:
    for index, files in enumerate(job.spec.task_files or []):
        path = f"spec.taskFiles[{index}]"
        if files.config_map:
            yield Reference(kind="ConfigMap", name=files.config_map.name, keys=(), path=f"{path}.configMap")
        if files.uri:
            yield from _s3_references(files.uri.s3, path=f"{path}.uri.s3")


def _training_references(job: FineTuneJob) -> Iterator[Reference]:
    if job.spec.push_to_hub and (key := job.spec.push_to_hub.token_secret):
        yield Reference(kind="Secret", name=key.name, keys=(key.key,), path="spec.pushToHub.tokenSecret")
    if job.spec.custom and (where := job.spec.custom.script.config_map):
        yield Reference(kind="ConfigMap", name=where.name, keys=(where.key,), path="spec.custom.script.configMap")
    wandb, mlflow = (job.spec.tracking.wandb, job.spec.tracking.mlflow) if job.spec.tracking else (None, None)
    if wandb and (key := wandb.api_key_secret):
        yield Reference(kind="Secret", name=key.name, keys=(key.key,), path="spec.tracking.wandb.apiKeySecret")
    if mlflow and (key := mlflow.token_secret):
        yield Reference(kind="Secret", name=key.name, keys=(key.key,), path="spec.tracking.mlflow.tokenSecret")


def _compute_references(job: Job) -> Iterator[Reference]:
    compute = job.spec.compute
    for index, variable in enumerate(compute.env or [] if compute else []):
        if variable.secret_key_ref:
            key, path = variable.secret_key_ref, f"spec.compute.env[{index}].secretKeyRef"
            yield Reference(kind="Secret", name=key.name, keys=(key.key,), path=path)
    for index, volume in enumerate(compute.volumes or [] if compute else []):
        if volume.secret:
            yield Reference(
                kind="Secret", name=volume.secret.secret_name, keys=(), path=f"spec.compute.volumes[{index}].secret"
            )
        if volume.config_map:
            path = f"spec.compute.volumes[{index}].configMap"
            yield Reference(kind="ConfigMap", name=volume.config_map.name, keys=(), path=path)


def _s3_references(s3: S3 | None, *, path: str) -> Iterator[Reference]:
    if s3 and s3.credentials_secret:
        keys = (S3_ACCESS_KEY, S3_SECRET_KEY)
        yield Reference(kind="Secret", name=s3.credentials_secret.name, keys=keys, path=f"{path}.credentialsSecret")
    if s3 and s3.ca_bundle:
        where = s3.ca_bundle.config_map
        yield Reference(kind="ConfigMap", name=where.name, keys=(where.key,), path=f"{path}.caBundle.configMap")


def _models(job: Job) -> Iterator[tuple[str, Any]]:
    """Every model with its field."""
    yield from ((f"spec.{field}", model) for field, model in model_sources(job).items())


def _sources(job: Job) -> Iterator[tuple[str, Any]]:
    """Every source of data with its field."""
    lists: list[tuple[str, Any]] = []
    if isinstance(job, FineTuneJob):
        validation = job.spec.dataset.validation
        lists = [("dataset", job.spec.dataset.sources)]
        lists += [("dataset.validation", validation.sources)] if validation and validation.sources else []
    elif isinstance(job, QuantizeJob):
        blocks = {"calibration": job.spec.calibration, "verify": job.spec.verify}
        lists = [(f"{name}.dataset", block.dataset.sources) for name, block in blocks.items() if block is not None]
    for path, sources in lists:
        yield from ((f"spec.{path}.sources[{index}]", source) for index, source in enumerate(sources))


def _read(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(str(file), problems=[f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise SpecError(str(file), problems=["is not UTF-8 text"]) from error


def _name(manifest: dict[str, Any]) -> str:
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise SpecError(str(manifest.get("kind")), problems=["metadata.name: Required value"])
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
        raise SpecError(str(manifest.get("kind")), problems=[f'metadata.name: Invalid value: "{name}"'])
    return name


def _secret(manifest: dict[str, Any]) -> dict[str, bytes]:
    title = f"Secret {_name(manifest)}"
    data: dict[str, bytes] = {}
    for key, value in _strings(manifest, "data", title=title).items():
        try:
            data[key] = base64.b64decode("".join(value.split()), validate=True)
        except binascii.Error as error:
            raise SpecError(title, problems=[f"data.{key} is not base64; plain text goes under stringData"]) from error
    return data | {key: value.encode() for key, value in _strings(manifest, "stringData", title=title).items()}


def _config_map(manifest: dict[str, Any]) -> dict[str, bytes]:
    title = f"ConfigMap {_name(manifest)}"
    return {key: value.encode() for key, value in _strings(manifest, "data", title=title).items()}


def _strings(manifest: dict[str, Any], block: str, *, title: str) -> dict[str, str]:
    values = manifest.get(block) or {}
    if not isinstance(values, dict):
        raise SpecError(title, problems=[f"{block} must be an object"])
    for key, value in values.items():
        if not isinstance(value, str):
            raise SpecError(title, problems=[f"{block}.{key} must be a string; quote it"])
        if key in {".", ".."} or "/" in key:
            raise SpecError(title, problems=[f"{block}: {key!r} is no valid key"])
    return values
