"""Manifests of the Jobs, the Service and the ConfigMap of a run. Pure: the same input gives the same output.

Everything that a pod mounts follows from the rendered config, so an attempt needs only the job and its ConfigMap.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from kubetune_operator.api.common import Compute, Lifecycle, Toleration
from kubetune_operator.api.finetunejob import FineTuneJob, TrainingLifecycle
from kubetune_operator.api.jobs import Job
from kubetune_operator.names import (
    ANNOTATION_COMPLETION_INDEX,
    COMPONENT_PREPARE,
    CONFIG_DIR,
    CONFIG_FILE,
    CONFIGMAPS_DIR,
    ENV_ATTEMPT,
    ENV_CONFIGMAPS_DIR,
    ENV_CPUS,
    ENV_HANG_SECONDS,
    ENV_IMAGE,
    ENV_MASTER_ADDRESS,
    ENV_MASTER_PORT,
    ENV_METRICS_PORT,
    ENV_NODE_RANK,
    ENV_NUM_NODES,
    ENV_PROCESSES_PER_NODE,
    ENV_PVC_DIR,
    ENV_SCRATCH,
    ENV_SECRETS_DIR,
    GROUP_VERSION,
    KINDS,
    LABEL_ATTEMPT,
    LABEL_BATCH_JOB_NAME,
    LABEL_COMPONENT,
    LABEL_JOB_KIND,
    LABEL_JOB_NAME,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    METRICS_PORT,
    PERMANENT_EXIT_CODES,
    PVC_DIR,
    RENDEZVOUS_PORT,
    S3_ACCESS_KEY,
    S3_SECRET_KEY,
    S3_SESSION_TOKEN,
    SCRATCH_DIR,
    SECRETS_DIR,
    TRAINER_CONTAINER,
    ExitCode,
    config_name,
    prepare_name,
    recipe_of,
    work_name,
)
from kubetune_operator.render.config import dump_config
from kubetune_operator.settings import Settings

Json = dict[str, Any]

USER_ID: Final = 65532
PREPARE_RETRIES: Final = 3
LOST_NODE_TAINTS: Final = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
"""What Kubernetes puts on a node that is out of touch, or that says that it cannot run pods."""
UNLIMITED_RETRIES: Final = 2_147_483_647
"""Back-off limit of a gang's Job: the operator counts its restarts, the Job controller must not give up before."""


def processes_per_node(job: Job, *, cpu_processes: int) -> int:
    """Number of ranks on each node: one per device, or as many CPU processes as the installation allows."""
    accelerator = compute_of(job).accelerator
    if accelerator is None:
        return 1
    return min(accelerator.per_node, cpu_processes) if cpu_processes else accelerator.per_node


def compute_of(job: Job) -> Compute:
    """The compute block, with its defaults where the spec has none."""
    return job.spec.compute or Compute()


def lifecycle_of(job: Job) -> Lifecycle:
    """The lifecycle block, with its defaults where the spec has none."""
    return job.spec.lifecycle or Lifecycle()


def hang_seconds(job: Job) -> int:
    """How long training may stand still; 0 for a job that does not train."""
    if not isinstance(job, FineTuneJob):
        return 0
    return (job.spec.lifecycle or TrainingLifecycle()).hang_timeout_seconds


def backoff_limit(job: Job, *, counted: int) -> int:
    """How many pod failures the Job controller may answer by itself.

    A single pod it restarts alone, even without an operator. The pods of a gang end together; the operator counts.

    Args:
        job: The custom resource.
        counted: Restarts so far that count against `lifecycle.maxRestarts`.
    """
    if compute_of(job).nodes > 1:
        return UNLIMITED_RETRIES
    return max(0, lifecycle_of(job).max_restarts - counted)


def work_command(job: Job, *, configmaps_dir: str = CONFIGMAPS_DIR) -> tuple[str, tuple[str, ...]]:
    """What the launcher starts for the work of a job: the script, and its arguments beside the config.

    Args:
        job: The custom resource.
        configmaps_dir: Where ConfigMaps are mounted.
    """
    custom = job.spec.custom if isinstance(job, FineTuneJob) else None
    if custom is None:
        return recipe_of(job.kind, recipe=getattr(job.spec, "recipe", None)), ()
    where = custom.script.config_map
    script = f"{configmaps_dir}/{where.name}/{where.key}" if where is not None else custom.script.path or ""
    return script, tuple(custom.args or ())


def job_labels(job: Job) -> dict[str, str]:
    """The labels by which everything of a job is found."""
    return {LABEL_JOB_NAME: job.metadata.name, LABEL_JOB_KIND: job.kind}


def render_configmap(job: Job, *, config: Json) -> Json:
    """The config file of a run; made once, never changed."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, name=config_name(job.kind, job.metadata.name), component=None),
        "immutable": True,
        "data": {CONFIG_FILE: dump_config(config)},
    }


def render_service(job: Job, *, attempt: int) -> Json:
    """The headless Service that gives the pods of an attempt their host names, ready or not."""
    name = work_name(job.kind, job.metadata.name, attempt=attempt)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, name=name, component=KINDS[job.kind].component, attempt=attempt),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_BATCH_JOB_NAME: name},
            "ports": [
                {"name": "rendezvous", "port": RENDEZVOUS_PORT},
                {"name": "metrics", "port": METRICS_PORT},
            ],
        },
    }


def render_prepare_job(job: Job, *, config: Json, settings: Settings) -> Json:
    """The Job that resolves revisions, fetches the model and the data, and estimates the memory."""
    name = prepare_name(job.kind, job.metadata.name)
    environment: list[Json] = [
        {"name": ENV_NUM_NODES, "value": "1"},
        {"name": ENV_PROCESSES_PER_NODE, "value": "1"},
        {"name": ENV_NODE_RANK, "value": "0"},
    ]
    spec = _pod_spec(job, config=config, settings=settings, command=("prepare", ()), environment=environment)
    compute = compute_of(job)
    if compute.accelerator is not None and not settings.cpu_processes:
        # The data is prepared on CPU nodes; the nodes that the spec selects are the ones with accelerators.
        spec.pop("nodeSelector", None)
        spec.pop("affinity", None)
        requests = {"cpu": settings.prepare_cpu, "memory": settings.prepare_memory}
        spec["containers"][0]["resources"] = {"requests": requests}
    labels = _labels(job, component=COMPONENT_PREPARE)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, name=name, component=COMPONENT_PREPARE),
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": PREPARE_RETRIES,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": _pod_failure_policy(),
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def render_work_job(
    job: Job,
    *,
    config: Json,
    attempt: int,
    backoff_limit: int,
    settings: Settings,
    micro_batch_size: int | None = None,
) -> Json:
    """The Indexed Job of one attempt.

    Args:
        job: The custom resource.
        config: Its rendered config.
        attempt: Number of the attempt, from 1.
        backoff_limit: How many pod failures the Job controller may answer by itself.
        settings: The operator's settings.
        micro_batch_size: Rows that one process computes at a time, where the attempt has another size than the config.
    """
    name = work_name(job.kind, job.metadata.name, attempt=attempt)
    nodes = compute_of(job).nodes
    environment: list[Json] = [
        {"name": ENV_ATTEMPT, "value": str(attempt)},
        {"name": ENV_NUM_NODES, "value": str(nodes)},
        {"name": ENV_PROCESSES_PER_NODE, "value": str(config["run"]["processes_per_node"])},
        {
            "name": ENV_NODE_RANK,
            "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{ANNOTATION_COMPLETION_INDEX}']"}},
        },
        {"name": ENV_MASTER_ADDRESS, "value": f"{name}-0.{name}" if nodes > 1 else "localhost"},
        {"name": ENV_MASTER_PORT, "value": str(RENDEZVOUS_PORT)},
    ]
    if limit := hang_seconds(job):
        environment.append({"name": ENV_HANG_SECONDS, "value": str(limit)})
    spec = _pod_spec(
        job,
        config=config,
        settings=settings,
        command=work_command(job),
        environment=environment,
    )
    if micro_batch_size is not None:
        spec["containers"][0]["command"].append(micro_batch_override(micro_batch_size))
    if nodes > 1:
        spec["subdomain"] = name
    labels = _labels(job, component=KINDS[job.kind].component, attempt=attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, name=name, component=KINDS[job.kind].component, attempt=attempt),
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": backoff_limit,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": _pod_failure_policy(),
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def micro_batch_override(size: int) -> str:
    """The recipe's argument that gives an attempt a micro batch of its own; the config stays as it is."""
    return f"training.micro_batch_size={size}"


def _labels(job: Job, *, component: str | None, attempt: int | None = None) -> dict[str, str]:
    labels = {LABEL_MANAGED_BY: MANAGED_BY} | job_labels(job)
    if component is not None:
        labels[LABEL_COMPONENT] = component
    if attempt is not None:
        labels[LABEL_ATTEMPT] = str(attempt)
    return labels


def _metadata(job: Job, *, name: str, component: str | None, attempt: int | None = None) -> Json:
    metadata: Json = {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": _labels(job, component=component, attempt=attempt),
    }
    if job.metadata.uid:  # a manifest that was only rendered has no owner yet
        metadata["ownerReferences"] = [
            {
                "apiVersion": GROUP_VERSION,
                "kind": job.kind,
                "name": job.metadata.name,
                "uid": job.metadata.uid,
                "controller": True,
            }
        ]
    return metadata


def _pod_failure_policy() -> Json:
    """Fail at once on what another attempt would only repeat; do not count what was no fault of the pod."""
    permanent = {"containerName": TRAINER_CONTAINER, "operator": "In", "values": sorted(map(int, PERMANENT_EXIT_CODES))}
    preempted = {"containerName": TRAINER_CONTAINER, "operator": "In", "values": [int(ExitCode.PREEMPTED)]}
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": permanent},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": preempted},
        ]
    }


def _pod_spec(
    job: Job, *, config: Json, settings: Settings, command: tuple[str, tuple[str, ...]], environment: list[Json]
) -> Json:
    compute = compute_of(job)
    script, arguments = command
    volumes, mounts = _volumes(job, config=config)
    container = {
        "name": TRAINER_CONTAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy,
        "command": [
            *("python", "-m", "kubetune_trainer.launch", script, "--config", f"{CONFIG_DIR}/{CONFIG_FILE}"),
            *arguments,
        ],
        "env": _environment(compute, image=settings.trainer_image) + environment,
        "resources": _resources(compute, on_cpu=bool(settings.cpu_processes)),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "volumeMounts": mounts,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spec: Json = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": lifecycle_of(job).grace_period_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    return spec | _scheduling(compute, settings=settings)


def _scheduling(compute: Compute, *, settings: Settings) -> Json:
    """The parts of a pod's spec that say where it may run."""
    spec: Json = {}
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if compute.service_account_name:
        spec["serviceAccountName"] = compute.service_account_name
    if compute.priority_class_name:
        spec["priorityClassName"] = compute.priority_class_name
    if compute.node_selector:
        spec["nodeSelector"] = dict(compute.node_selector)
    spec["tolerations"] = [toleration.to_manifest() for toleration in compute.tolerations or ()]
    spec["tolerations"] += _patience(compute.tolerations or (), seconds=settings.lost_node_seconds)
    if compute.affinity:
        expressions = [item.to_manifest() for item in compute.affinity.required_node_labels]
        terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return spec


def _patience(tolerations: Sequence[Toleration], *, seconds: int) -> list[Json]:
    """How long pods stay on a node that is out of touch; Kubernetes would wait five minutes. What a user says goes."""
    said = {toleration.key for toleration in tolerations if toleration.effect in {None, "NoExecute"}}
    return [
        {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
        for taint in LOST_NODE_TAINTS
        if not said & {None, taint}
    ]


def _resources(compute: Compute, *, on_cpu: bool) -> Json:
    """Requests and limits, with the accelerator on both sides unless it is mapped to the CPU."""
    resources: Json = {}
    if compute.resources:
        resources = {
            side: {name: str(quantity) for name, quantity in amounts.items()}
            for side, amounts in compute.resources.to_manifest().items()
        }
    if compute.accelerator and not on_cpu:
        for side in ("requests", "limits"):
            resources.setdefault(side, {})[compute.accelerator.resource] = str(compute.accelerator.per_node)
    return resources


def _environment(compute: Compute, *, image: str) -> list[Json]:
    """The variables of every pod; the user's own come last, names of ours are refused at admission."""
    environment: list[Json] = [
        {"name": ENV_SECRETS_DIR, "value": SECRETS_DIR},
        {"name": ENV_CONFIGMAPS_DIR, "value": CONFIGMAPS_DIR},
        {"name": ENV_PVC_DIR, "value": PVC_DIR},
        {"name": ENV_SCRATCH, "value": SCRATCH_DIR},
        {"name": ENV_METRICS_PORT, "value": str(METRICS_PORT)},
        {"name": ENV_IMAGE, "value": image},
        {
            "name": ENV_CPUS,
            "valueFrom": {"resourceFieldRef": {"containerName": TRAINER_CONTAINER, "resource": "limits.cpu"}},
        },
        {"name": "HOME", "value": SCRATCH_DIR},
    ]
    for variable in compute.env or []:
        if variable.secret_key_ref is not None:
            source = {"secretKeyRef": variable.secret_key_ref.to_manifest()}
            environment.append({"name": variable.name, "valueFrom": source})
        else:
            environment.append({"name": variable.name, "value": variable.value})
    return environment


def _volumes(job: Job, *, config: Json) -> tuple[list[Json], list[Json]]:
    """The volumes of a pod and where they are mounted: ours, those that the config names, and the user's."""
    compute = compute_of(job)
    shared_memory: Json = {"medium": "Memory"}
    if compute.shared_memory_bytes:
        shared_memory["sizeLimit"] = str(compute.shared_memory_bytes)
    volumes: list[Json] = [
        {"name": "kubetune-config", "configMap": {"name": config_name(job.kind, job.metadata.name)}},
        {"name": "kubetune-scratch", "emptyDir": {}},
        {"name": "kubetune-tmp", "emptyDir": {}},
        {"name": "kubetune-shm", "emptyDir": shared_memory},
    ]
    mounts: list[Json] = [
        {"name": "kubetune-config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "kubetune-scratch", "mountPath": SCRATCH_DIR},
        {"name": "kubetune-tmp", "mountPath": "/tmp"},  # noqa: S108 (the pod's own)
        {"name": "kubetune-shm", "mountPath": "/dev/shm"},  # noqa: S108 (the pod's own)
    ]
    if secrets := _secret_sources(config):
        volumes.append({"name": "kubetune-secrets", "projected": {"defaultMode": 0o440, "sources": secrets}})
        mounts.append({"name": "kubetune-secrets", "mountPath": SECRETS_DIR, "readOnly": True})
    for number, (name, keys) in enumerate(sorted(configmap_keys_of(config).items())):
        source = {"name": name} | ({"items": [{"key": key, "path": key} for key in sorted(keys)]} if keys else {})
        volumes.append({"name": f"kubetune-configmap-{number}", "configMap": source})
        mounts.append(
            {"name": f"kubetune-configmap-{number}", "mountPath": f"{CONFIGMAPS_DIR}/{name}", "readOnly": True}
        )
    for number, claim in enumerate(sorted(claims_of(config))):
        volumes.append({"name": f"kubetune-pvc-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"kubetune-pvc-{number}", "mountPath": f"{PVC_DIR}/{claim}"})
    volumes += [volume.to_manifest() for volume in compute.volumes or []]
    mounts += [mount.to_manifest() for mount in compute.volume_mounts or []]
    return volumes, mounts


def _walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a nested config."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from _walk(item)


def secret_keys_of(config: Json) -> dict[str, set[str]]:
    """The Secrets that a config names, with the keys that must be there."""
    keys: dict[str, set[str]] = {}
    for name, value in _walk(config):
        if name in {"token_secret", "api_key_secret"}:
            keys.setdefault(value["name"], set()).add(value["key"])
        elif name == "credentials_secret":
            keys.setdefault(value["name"], set()).update({S3_ACCESS_KEY, S3_SECRET_KEY})
    return keys


def configmap_keys_of(config: Json) -> dict[str, set[str]]:
    """The ConfigMaps that a config names, with the keys that must be there; no keys: all of them are meant."""
    keys: dict[str, set[str]] = {}
    for name, value in _walk(config):
        if name == "config_map":
            keys.setdefault(value["name"], set()).add(value.get("key", ""))
    return {name: set() if "" in named else named for name, named in keys.items()}


def claims_of(config: Json) -> set[str]:
    """The PersistentVolumeClaims that the URIs of a config name."""
    uris = (value for _, value in _walk(config) if isinstance(value, str) and value.startswith("pvc://"))
    return {uri.removeprefix("pvc://").split("/")[0] for uri in uris}


def _secret_sources(config: Json) -> list[Json]:
    """Sources of the projected volume: the keys that are named and no others, each in the folder of its Secret."""
    sources: list[Json] = []
    for name, keys in sorted(secret_keys_of(config).items()):
        items = [{"key": key, "path": f"{name}/{key}"} for key in sorted(keys)]
        sources.append({"secret": {"name": name, "items": items}})
        if S3_ACCESS_KEY in keys:
            token = [{"key": S3_SESSION_TOKEN, "path": f"{name}/{S3_SESSION_TOKEN}"}]
            sources.append({"secret": {"name": name, "items": token, "optional": True}})
    return sources
