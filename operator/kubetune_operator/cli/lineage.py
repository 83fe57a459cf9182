"""`kubetune lineage`: where a model comes from, job by job, to the first model and data.

A cluster knows it from the status of its jobs; a folder of a model, from the lineage.json that the job wrote into it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from kubetune_operator.cli.cluster import Connection, connect, find, read
from kubetune_operator.errors import SpecError
from kubetune_operator.names import ENV_PVC_DIR

Json = Mapping[str, Any]

LINEAGE_FILE: Final = "lineage.json"
ABOUT_FILES: Final = (LINEAGE_FILE, "README.md")
"""What tells about a model folder: no part of the model, nor of its digest."""


@dataclass
class Node:
    """A job in a lineage.

    Attributes:
        title: The job, and what became of it.
        facts: What it read and what it wrote, a line each.
        parents: The jobs whose results it used.
    """

    title: str
    facts: list[str] = field(default_factory=list)
    parents: list["Node"] = field(default_factory=list)


def show(target: str, *, namespace: str | None, s3_endpoint: str | None) -> None:
    """Print the lineage of a job, or of a folder or URI that a job wrote.

    Args:
        target: NAME or KIND/NAME of a job in the cluster, a folder here, or a URI.
        namespace: Where the job is; None is the kubeconfig's.
        s3_endpoint: Where S3 is reached from this machine.
    """
    if "://" in target:
        place = f"{target.rstrip('/')}/{LINEAGE_FILE}"
        node = read_recorded(_fetch(place, s3_endpoint=s3_endpoint), place=place)
    elif Path(target).is_dir():
        node = read_recorded(_read(Path(target)), place=str(Path(target) / LINEAGE_FILE))
    else:
        node = _of_cluster(target, namespace=namespace)
    # A line is a fact; a pipe has no width that it should be broken at.
    Console(soft_wrap=True).print(_tree(node), highlight=False)


def read_lineage(folder: Path) -> Json:
    """What the job wrote into its output about its origin.

    Raises:
        SpecError: It wrote nothing, or nothing that can be read.
    """
    return _parsed(_read(folder), place=str(folder / LINEAGE_FILE))


def _read(folder: Path) -> bytes:
    try:
        return (folder / LINEAGE_FILE).read_bytes()
    except FileNotFoundError as error:
        raise SpecError(str(folder), problems=[f"has no {LINEAGE_FILE}: no job of kubetune wrote it"]) from error
    except OSError as error:
        raise SpecError(str(folder / LINEAGE_FILE), problems=[f"cannot be read: {error}"]) from error


def _parsed(content: bytes, *, place: str) -> Json:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise SpecError(place, problems=[f"cannot be read: {error}"]) from error
    if not isinstance(found, dict):
        raise SpecError(place, problems=["is no JSON object"])
    return found


# ------------------------------------------------------------------------------------------------- from a file


def read_recorded(content: bytes, *, place: str) -> Node:
    """The lineage that a lineage.json tells.

    Raises:
        SpecError: It is broken, or was written by something else.
    """
    lineage = _parsed(content, place=place)
    try:
        return recorded(lineage)
    except (AttributeError, KeyError, TypeError) as error:
        raise SpecError(place, problems=[f"is not what a job of kubetune writes: {error}"]) from error


def recorded(lineage: Json) -> Node:
    """The lineage that a lineage.json tells. A parent is whole where its own was at hand, otherwise a name."""
    node = Node(_called(lineage))
    if "outputs" not in lineage:
        return node
    node.title += f", finished {lineage['finishedAt']}" if lineage.get("finishedAt") else ""
    node.facts += _inputs(lineage.get("model"), None)
    node.facts += [f"adapter {_place(lineage['adapter'])}"] if lineage.get("adapter") else []
    node.facts += _others(lineage.get("otherModels"))
    node.facts += _inputs(None, lineage.get("sources"))
    node.facts += _tasks(lineage.get("tasks"))
    if digest := lineage.get("configDigest"):
        node.facts.append(f"config {digest}")
    if digest := lineage.get("scriptDigest"):
        node.facts.append(f"script {digest}")
    if image := lineage.get("image"):
        node.facts.append(f"image {image}")
    if digest := lineage.get("softwareDigest"):
        node.facts.append(f"software {digest}")
    node.facts += _outputs(lineage.get("outputs"))
    node.facts += _gates(lineage.get("gates"))
    node.parents = [recorded(parent) for parent in lineage.get("parents") or []]
    return node


def _called(job: Json) -> str:
    namespace = f"{job['namespace']}/" if job.get("namespace") else ""
    return f"{job.get('kind')} {namespace}{job.get('name')}"


def _inputs(model: Json | None, sources: Any) -> Iterator[str]:
    if model:
        yield f"model {_place(model)}"
    for source in sources or []:
        used = f"{source['use']} " if source.get("use") else ""
        yield f"{used}data {source.get('name')}: {_place(source)}"


def _others(models: Any) -> Iterator[str]:
    for model in models or []:
        yield f"{model.get('field')} {_place(model)}"


def _place(thing: Json) -> str:
    """Where something was, and the mark by which it is the same again."""
    mark = next((f"{key} {thing[key]}" for key in ("commit", "digest", "etag") if thing.get(key)), "")
    return ", ".join(part for part in (str(thing.get("location") or ""), mark) if part) or "not told"


def _outputs(outputs: Any) -> Iterator[str]:
    for output in outputs or []:
        digest = f", {output['digest']}" if output.get("digest") else ""
        yield f"output {output.get('name')} ({output.get('type')}): {output.get('uri')}{digest}"


def _tasks(tasks: Any) -> Iterator[str]:
    for task in tasks or []:
        samples = f"{task.get('samples')} samples, hash {task.get('hash')}"
        yield f"task {task.get('name')}: version {task.get('version')}, {samples}"


def _gates(gates: Any) -> Iterator[str]:
    for gate in gates or []:
        yield f"gate {gate.get('name')}: {'passed' if gate.get('passed') else 'failed'}"


def _fetch(uri: str, *, s3_endpoint: str | None) -> bytes:
    """Read a file from where a URI says.

    Raises:
        SpecError: It is not there, or cannot be reached.
    """
    scheme, _, rest = uri.partition("://")
    place, _, below = rest.partition("/")
    if scheme == "s3" and place:
        return _fetch_s3(uri, bucket=place, key=below.lstrip("/"), endpoint=s3_endpoint)
    if scheme == "file":
        path = Path(rest)
    elif scheme == "pvc":
        claims = os.environ.get(ENV_PVC_DIR)
        if not claims:
            problem = f"pvc:// needs {ENV_PVC_DIR}, a folder that holds a folder for each claim"
            raise SpecError(uri, problems=[problem])
        path = Path(claims) / place / below.lstrip("/")
    else:
        raise SpecError(uri, problems=["must be s3://bucket/path, pvc://claim/path or file:///path"])
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(uri, problems=[f"cannot be read: {error.strerror}"]) from error


def _fetch_s3(uri: str, *, bucket: str, key: str, endpoint: str | None) -> bytes:
    try:
        import boto3  # type: ignore[import-untyped]  # noqa: PLC0415 (of the extra `trainer`)
        from botocore.exceptions import (  # type: ignore[import-untyped]  # noqa: PLC0415 (as above)
            BotoCoreError,
            ClientError,
        )
    except ImportError as error:
        raise SpecError(uri, problems=["s3:// needs boto3: pip install 'kubetune[trainer]'"]) from error
    try:
        answer = boto3.client("s3", endpoint_url=endpoint).get_object(Bucket=bucket, Key=key)
        return bytes(answer["Body"].read())
    except (BotoCoreError, ClientError) as error:
        raise SpecError(uri, problems=[f"cannot be read: {error}"]) from error


# ---------------------------------------------------------------------------------------------- from a cluster


def _of_cluster(target: str, *, namespace: str | None) -> Node:
    cluster = connect("kubetune lineage")
    namespace = namespace or cluster.namespace
    job = find(cluster, target, namespace=namespace, purpose="kubetune lineage")
    return _traced(cluster, job, seen=set())


def _traced(cluster: Connection, job: Json, *, seen: set[str]) -> Node:
    """A job and, by its status, the jobs before it."""
    metadata, status = job["metadata"], job.get("status") or {}
    seen = seen | {metadata["uid"]}
    resolved = status.get("resolved") or {}
    node = Node(f"{_called({'kind': job['kind'], **metadata})}: {status.get('state') or 'not seen by an operator yet'}")
    model = {"location": _asked_model(job["spec"]["model"]), **(resolved.get("model") or {})}
    if "jobRef" not in job["spec"]["model"] or resolved.get("model"):
        node.facts += _inputs(model, None)
    node.facts += _others(resolved.get("otherModels"))
    node.facts += _inputs(None, resolved.get("sources"))
    if config := resolved.get("config"):
        node.facts.append(f"config: ConfigMap {config}")
    if image := status.get("image"):
        node.facts.append(f"image {image}")
    node.facts += _outputs(status.get("outputs"))
    node.facts += _gates(status.get("gates"))
    for parent in resolved.get("parents") or []:
        found = read(cluster, parent["kind"], name=parent["name"], namespace=metadata["namespace"])
        node.parents.append(_parent(cluster, parent, found=found, seen=seen))
    return node


def _parent(cluster: Connection, parent: Json, *, found: Json | None, seen: set[str]) -> Node:
    title = f"{parent['kind']} {parent['name']}"
    if found is None:
        return Node(f"{title}: deleted; its outputs may still be there")
    if found["metadata"]["uid"] != parent["uid"]:
        return Node(f"{title}: deleted, and made anew since")
    return Node(title) if parent["uid"] in seen else _traced(cluster, found, seen=seen)


def _asked_model(model: Json) -> str:
    if hub := model.get("hub"):
        return f"{hub['repo']} on the Hub"
    return str((model.get("uri") or {}).get("location") or "")


def _tree(node: Node) -> Tree:
    tree = Tree(escape(node.title))
    for fact in node.facts:
        tree.add(escape(fact))
    for parent in node.parents:
        tree.children.append(_tree(parent))
    return tree
