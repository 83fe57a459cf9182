"""`kubetune validate --live`: what only the cluster and the storage know."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubetune_operator.api.references import models_of, resumed_from
from kubetune_operator.cli.bundle import Bundle, Objects, Reference, references
from kubetune_operator.cli.cluster import Connection, asking, connect, message_of
from kubetune_operator.cli.local import local_config, local_environment, require_trainer
from kubetune_operator.cli.script import script_problem
from kubetune_operator.errors import SpecError
from kubetune_operator.names import API_GROUP, API_VERSION, KINDS
from kubetune_operator.render.config import dump_config

Say = Callable[[str], None]
_PROBE_SECONDS = 120.0
_DRY_RUN = {"dry_run": "All", "field_validation": "Strict"}


def check(bundle: Bundle, *, say: Say) -> None:
    """Ask the API server for its verdict, look for what the job names, then reach for model, data and workspace.

    Args:
        bundle: The manifest file.
        say: Prints one line per thing that was found right.

    Raises:
        SpecError: Something is wrong; everything that is gets named.
        ClusterError: The API server does not answer.
    """
    require_trainer("kubetune validate --live")
    cluster = connect("kubetune validate --live")
    problems = list(_verdict(cluster, bundle))
    if not problems:
        say("the API server accepts it")
    found: dict[str, Objects] = {"Secret": dict(bundle.secrets), "ConfigMap": dict(bundle.config_maps)}
    for reference in references(bundle.job):
        problem = _look_up(cluster, reference, bundle=bundle, found=found[reference.kind])
        if problem:
            problems.append(problem)
        else:
            say(f"{reference.path}: {reference.kind} {reference.name} has what is needed")
    if (problem := script_problem(bundle.job, config_maps=found["ConfigMap"])) and problem not in problems:
        problems.append(problem)
    problems += _named_elsewhere(cluster, bundle)
    if not problems:
        problems += _probe(bundle, found=found, say=say)
    if problems:
        raise SpecError(bundle.title, problems=problems)


def _verdict(cluster: Connection, bundle: Bundle) -> Iterator[str]:
    """What the API server says to the manifest, without storing it."""
    from kubernetes.client import ApiException  # noqa: PLC0415 (see cluster.connect)

    where = (API_GROUP, API_VERSION, bundle.job.metadata.namespace, KINDS[bundle.job.kind].plural)
    with asking("the API server's verdict"):
        try:
            cluster.custom.create_namespaced_custom_object(*where, bundle.manifest, **_DRY_RUN)
        except ApiException as error:
            if error.status != 409:
                yield message_of(error)
                return
        else:
            return
        current = cluster.custom.get_namespaced_custom_object(*where, bundle.job.metadata.name)
        metadata = bundle.manifest["metadata"] | {"resourceVersion": current["metadata"]["resourceVersion"]}
        try:
            cluster.custom.replace_namespaced_custom_object(
                *where, bundle.job.metadata.name, bundle.manifest | {"metadata": metadata}, **_DRY_RUN
            )
        except ApiException as error:
            yield message_of(error)


def _look_up(cluster: Connection, reference: Reference, *, bundle: Bundle, found: Objects) -> str | None:
    """Fetch a Secret or ConfigMap that the file does not hold, and look for the keys; None if all is well."""
    namespace = bundle.job.metadata.namespace
    if reference.name not in found:
        read = (
            cluster.core.read_namespaced_secret
            if reference.kind == "Secret"
            else cluster.core.read_namespaced_config_map
        )
        answer = _read(read, reference.name, namespace)
        if isinstance(answer, str):
            return f"{reference.path}: {reference.kind} {namespace}/{reference.name}: {answer}"
        found[reference.name] = _data(answer, kind=reference.kind)
    missing = [key for key in reference.keys if key not in found[reference.name]]
    if missing:
        return f"{reference.path}: {reference.kind} {namespace}/{reference.name} has no key {', '.join(missing)}"
    return None


def _named_elsewhere(cluster: Connection, bundle: Bundle) -> list[str]:
    """Problems with claims, service accounts, priority classes and jobs that the manifest names."""
    namespace, spec = bundle.job.metadata.namespace, bundle.job.spec
    wanted: list[tuple[str, str, Callable[[], Any]]] = []
    for index, volume in enumerate((spec.compute.volumes if spec.compute else None) or []):
        if claim := volume.persistent_volume_claim:
            path = f"spec.compute.volumes[{index}].persistentVolumeClaim: {namespace}/{claim.claim_name}"
            wanted.append((path, claim.claim_name, cluster.core.read_namespaced_persistent_volume_claim))
    if spec.compute and (account := spec.compute.service_account_name):
        path = f"spec.compute.serviceAccountName: {namespace}/{account}"
        wanted.append((path, account, cluster.core.read_namespaced_service_account))
    problems = [
        f"{path}: {answer}" for path, name, read in wanted if isinstance(answer := _read(read, name, namespace), str)
    ]
    if spec.compute and (priority := spec.compute.priority_class_name):
        answer = _read(cluster.scheduling.read_priority_class, priority)
        problems += [f"spec.compute.priorityClassName: {priority}: {answer}"] if isinstance(answer, str) else []
    return problems


def _read(read: Callable[..., Any], *arguments: str) -> Any:
    """An object, or the words in which the API server refused it."""
    from kubernetes.client import ApiException  # noqa: PLC0415 (see cluster.connect)

    with asking(" ".join(arguments)):
        try:
            return read(*arguments)
        except ApiException as error:
            return message_of(error)


def _data(answer: Any, *, kind: str) -> dict[str, bytes]:
    if kind == "Secret":
        return {key: base64.b64decode(value) for key, value in (answer.data or {}).items()}
    binary = {key: base64.b64decode(value) for key, value in (answer.binary_data or {}).items()}
    return binary | {key: value.encode() for key, value in (answer.data or {}).items()}


def _probe(bundle: Bundle, *, found: dict[str, Objects], say: Say) -> list[str]:
    """Reach for model, data and workspace with the trainer's own code; returns the problems.

    What cannot be reached from here (a server inside the cluster) is said and no problem: pods may reach it.
    """
    held = Bundle(
        job=bundle.job,
        manifest=bundle.manifest,
        secrets=found["Secret"],
        config_maps=found["ConfigMap"],
        others=bundle.others,
    )
    if others := models_of(bundle.job):
        named = ", ".join(f"spec.{path}.jobRef" for path in others)
        say(f"{named}: the storage is not looked at; the operator waits for the other job")
        return []
    with tempfile.TemporaryDirectory(prefix="kubetune-probe-") as folder:
        config, rendered = Path(folder) / "config.yaml", local_config(held, processes=1)
        if resumed_from(bundle.job):
            del rendered["checkpoint"]["resume_from"]  # of another job, in whose folder nothing has to be yet
        config.write_text(dump_config(rendered), encoding="utf-8")
        environment = os.environ | local_environment(held, os.environ, folder=Path(folder))
        command = [sys.executable, "-P", "-m", "kubetune_trainer.probe", "--config", str(config)]
        try:
            ran = subprocess.run(
                command, env=environment, check=False, capture_output=True, text=True, timeout=_PROBE_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            found_so_far = error.stdout.decode() if isinstance(error.stdout, bytes) else ""
            problems = list(_findings(found_so_far, say=say))
            say(f"note: what is not told above did not answer this machine within {_PROBE_SECONDS:.0f} s")
            return problems
    problems = list(_findings(ran.stdout, say=say))
    if ran.returncode or not ran.stdout:
        last = (ran.stderr.strip().splitlines() or ["no answer"])[-1]
        problems.append(f"the storage could not be looked at: {last}")
    return problems


def _findings(said: str, *, say: Say) -> Iterator[str]:
    """Say what the probe found right and yield what it found wrong."""
    for place in map(json.loads, said.splitlines()):
        if place["problem"] is None:
            say(f"{place['field']}: {place['uri']} is there")
        elif place["unreachable"]:
            say(f"note: {place['field']}: not reachable from this machine, perhaps from the pods: {place['problem']}")
        else:
            yield f"{place['field']}: {place['problem']}"
