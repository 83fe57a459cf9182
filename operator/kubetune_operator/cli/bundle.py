"""A manifest file of the command line: one FineTuneJob, and the Secrets and ConfigMaps that stand beside it."""

import base64
import binascii
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubetune_operator.api.common import S3
from kubetune_operator.api.finetunejob import FineTuneJob, parse_finetunejob
from kubetune_operator.api.manifest import load_manifests
from kubetune_operator.errors import SpecError
from kubetune_operator.names import API_GROUP, KIND_FINETUNEJOB, S3_ACCESS_KEY, S3_SECRET_KEY

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
        job: The FineTuneJob, checked, with defaults.
        manifest: The same as it stands in the file.
        secrets: Data of the file's Secrets.
        config_maps: Data of the file's ConfigMaps.
        others: The file's other FineTuneJobs, by name: a jobRef may mean one of them.
    """

    job: FineTuneJob
    manifest: dict[str, Any]
    secrets: Objects = field(default_factory=dict)
    config_maps: Objects = field(default_factory=dict)
    others: dict[str, FineTuneJob] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The job as messages name it."""
        return f"{KIND_FINETUNEJOB} {self.job.metadata.namespace}/{self.job.metadata.name}"

    def notes(self) -> Iterator[str]:
        """What is allowed and yet worth saying."""
        if local := [path for path, uri in uris(self.job) if uri.startswith("file://")]:
            yield f"{', '.join(local)}: file:// is for `kubetune run` on this machine; the operator refuses it"


def load_bundle(file: Path, *, name: str | None = None, s3_endpoint: str | None = None) -> Bundle:
    """Read and check a manifest file.

    Args:
        file: Its path; `-` is standard input.
        name: Which FineTuneJob, where there are several.
        s3_endpoint: Replaces `spec.storage.s3.endpoint`, for a service that has another address from here.

    Raises:
        SpecError: The file cannot be read, is no YAML, has no such job, or an object breaks rules.
    """
    manifests = load_manifests(_read(file), source=str(file))
    mine = [manifest for manifest in manifests if str(manifest.get("apiVersion", "")).partition("/")[0] == API_GROUP]
    jobs = {
        job.metadata.name: (job, manifest)
        for manifest in (_reached_at(each, s3_endpoint) for each in mine)
        for job in [parse_finetunejob(manifest)]
    }
    if not jobs:
        raise SpecError(str(file), problems=[f"holds no {KIND_FINETUNEJOB} of {API_GROUP}"])
    if name is None and len(jobs) > 1:
        raise SpecError(str(file), problems=[f"holds {', '.join(jobs)}; say which one with --name"])
    if name is not None and name not in jobs:
        raise SpecError(str(file), problems=[f"holds no {KIND_FINETUNEJOB} {name}, only {', '.join(jobs)}"])
    job, manifest = jobs.pop(name or next(iter(jobs)))
    return Bundle(
        job=job,
        manifest=manifest,
        secrets={_name(each): _secret(each) for each in manifests if each.get("kind") == "Secret"},
        config_maps={_name(each): _config_map(each) for each in manifests if each.get("kind") == "ConfigMap"},
        others={other: each for other, (each, _) in jobs.items()},
    )


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


def uris(job: FineTuneJob) -> Iterator[tuple[str, str]]:
    """Every URI of a job with the field that holds it."""
    spec = job.spec
    if spec.model.uri:
        yield "spec.model.uri.location", spec.model.uri.location
    for path, source in _sources(job):
        if source.uri:
            yield f"{path}.uri.location", source.uri.location
    yield "spec.workspace.uri", spec.workspace.uri
    if spec.checkpoint and spec.checkpoint.resume_from and spec.checkpoint.resume_from.uri:
        yield "spec.checkpoint.resumeFrom.uri", spec.checkpoint.resume_from.uri
    for index, output in enumerate(spec.outputs):
        if output.uri:
            yield f"spec.outputs[{index}].uri", output.uri


def references(job: FineTuneJob) -> Iterator[Reference]:
    """Every Secret and ConfigMap that a job names."""
    spec = job.spec
    if spec.model.hub and spec.model.hub.token_secret:
        token = spec.model.hub.token_secret
        yield Reference(kind="Secret", name=token.name, keys=(token.key,), path="spec.model.hub.tokenSecret")
    if spec.model.uri:
        yield from _s3_references(spec.model.uri.s3, path="spec.model.uri.s3")
    for path, source in _sources(job):
        if source.hub and source.hub.token_secret:
            token = source.hub.token_secret
            yield Reference(kind="Secret", name=token.name, keys=(token.key,), path=f"{path}.hub.tokenSecret")
        if source.uri:
            yield from _s3_references(source.uri.s3, path=f"{path}.uri.s3")
        if source.config_map:
            where = source.config_map
            yield Reference(kind="ConfigMap", name=where.name, keys=(where.key,), path=f"{path}.configMap")
    if spec.storage:
        yield from _s3_references(spec.storage.s3, path="spec.storage.s3")
    yield from _compute_references(job)


def _compute_references(job: FineTuneJob) -> Iterator[Reference]:
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


def _sources(job: FineTuneJob) -> Iterator[tuple[str, Any]]:
    dataset = job.spec.dataset
    for index, source in enumerate(dataset.sources):
        yield f"spec.dataset.sources[{index}]", source
    for index, source in enumerate((dataset.validation.sources if dataset.validation else None) or []):
        yield f"spec.dataset.validation.sources[{index}]", source


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
