"""What every kind of kubetune shares: numbers in strings, references, storage, compute, conditions."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from kubetune_operator.api.model import ApiModel, IntOrString, Rule, StatusModel, Unique, exactly_one_of
from kubetune_operator.names import (
    API_GROUP,
    API_VERSION,
    CONFIG_DIR,
    CONFIGMAPS_DIR,
    PVC_DIR,
    SCRATCH_DIR,
    SECRETS_DIR,
)

NAME_LENGTH = 40
"""The longest name of a custom resource: those of its Services and pods are made from it and must fit 63 characters."""

RESERVED_ENVIRONMENT = ("KUBETUNE_", "PET_")
RESERVED_MOUNTS = (CONFIG_DIR, SECRETS_DIR, CONFIGMAPS_DIR, PVC_DIR, SCRATCH_DIR, "/tmp", "/dev/shm")  # noqa: S108 (paths in the pod)
RESERVED_VOLUMES = "kubetune-"


def matches(pattern: str, *, message: str) -> Rule:
    """The rule that a whole string matches a regular expression that RE2 and Python read alike."""
    compiled = re.compile(pattern)
    escaped = pattern.replace("\\", "\\\\")
    return Rule(
        cel=f"self.matches('^(?:{escaped})$')",
        message=message,
        check=lambda value: compiled.fullmatch(value) is not None,
    )


# Numbers that are not integers stand in strings: a float does not survive every YAML and JSON library unchanged.
Number = Annotated[
    str,
    Field(max_length=24),
    matches(
        r"[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?", message='must be a number in quotes, 0 or more, for example "0.01"'
    ),
]
SignedNumber = Annotated[
    str,
    Field(max_length=24),
    matches(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?", message='must be a number in quotes, for example "0.40"'),
]
PositiveNumber = Annotated[
    str,
    Field(max_length=24),
    matches(
        r"([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)([eE][-+]?[0-9]{1,2})?",
        message='must be a number in quotes, above 0, for example "2e-4"',
    ),
]
Fraction = Annotated[
    str,
    Field(max_length=24),
    matches(r"0\.[0-9]*[1-9][0-9]*", message='must be a number in quotes between 0 and 1, for example "0.05"'),
]
Probability = Annotated[
    str,
    Field(max_length=24),
    matches(r"0(\.[0-9]+)?", message='must be a number in quotes, from 0 to below 1, for example "0.1"'),
]

DnsLabel = Annotated[
    str,
    Field(min_length=1, max_length=63),
    matches(
        r"[a-z0-9]([-a-z0-9]*[a-z0-9])?",
        message="must consist of lower-case letters, digits and '-', and start and end with a letter or digit",
    ),
]
ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    matches(
        r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?",
        message="must consist of lower-case letters, digits, '-' and '.', and start and end with a letter or digit",
    ),
]
DataKey = Annotated[
    str,
    Field(min_length=1, max_length=253),
    matches(r"[-._a-zA-Z0-9]+", message="must consist of letters, digits, '-', '_' and '.'"),
]
_URI = r"s3://[a-zA-Z0-9][-_.a-zA-Z0-9]{1,62}(/[^\n]*)?|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^\n]*)?|file:///[^\n]+"
Uri = Annotated[
    str,
    Field(max_length=1024),
    matches(_URI, message="must be s3://bucket/path, pvc://claim/path or, for local runs, file:///path"),
]
Endpoint = Annotated[
    str,
    Field(max_length=512),
    matches(r"https?://[^/\s]+(/[^\s]*)?", message="must be a URL that starts with http:// or https://"),
]
LabelKey = Annotated[
    str,
    Field(min_length=1, max_length=317),
    matches(
        r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[a-zA-Z0-9]([-._a-zA-Z0-9]*[a-zA-Z0-9])?",
        message="must be a label key, for example topology.kubernetes.io/zone",
    ),
]
LabelValue = Annotated[str, Field(max_length=63)]
Time = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]

_QUANTITY = r"\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]{1,2})?"
Quantity = Annotated[
    int | str,
    IntOrString(),
    Rule(
        cel="type(self) == int ? self >= 0 : isQuantity(self) && !self.startsWith('-')",
        message="must be a quantity, 0 or more, for example 500m, 2 or 8Gi",
        check=lambda value: value >= 0 if isinstance(value, int) else re.fullmatch(_QUANTITY, value) is not None,
        keyed=True,
    ),
]
Size = Annotated[str, Field(max_length=32), matches(_QUANTITY, message="must be a size, for example 8Gi")]
Resources = Annotated[dict[str, Quantity], Field(max_length=12)]


ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}


# ------------------------------------------------------------------------------------------------ references


class SecretRef(ApiModel):
    """A Secret of the job's namespace."""

    name: ObjectName
    """Name of the Secret."""


class SecretKeyRef(ApiModel):
    """One key of a Secret of the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: DataKey
    """Key inside the Secret."""


class ConfigMapKeyRef(ApiModel):
    """One key of a ConfigMap of the job's namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: DataKey
    """Key inside the ConfigMap."""


class JobRef(ApiModel):
    """The result of another job of the same namespace. This job waits until that one is complete."""

    kind: Literal["FineTuneJob", "QuantizeJob"] = "FineTuneJob"
    """Kind of the other job."""
    name: DnsLabel
    """Name of the other job."""
    output: DnsLabel | None = None
    """Which of its outputs to take. Unset: its first output of type HuggingFace; otherwise the first one that this kind
    of job can load; otherwise its adapters together with the model that they were trained on."""


class RunRef(ApiModel):
    """Another job of the same namespace, whose checkpoints are meant."""

    kind: Literal["FineTuneJob"]
    """Kind of the other job."""
    name: DnsLabel
    """Name of the other job."""


# --------------------------------------------------------------------------------------------------- storage


class CaBundle(ApiModel):
    """Where certificates of private authorities are read from."""

    config_map: ConfigMapKeyRef
    """ConfigMap and key that hold certificates in PEM form."""


class S3(ApiModel):
    """How to reach an S3 server."""

    endpoint: Endpoint | None = None
    """URL of the server. Unset: Amazon S3."""
    region: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Region of the buckets. Unset: what the endpoint or the environment says."""
    credentials_secret: SecretRef | None = None
    """Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, optionally AWS_SESSION_TOKEN.
    Unset: the pod's own identity."""
    ca_bundle: CaBundle | None = None
    """Certificates to trust for this endpoint besides the public ones."""


class Storage(ApiModel):
    """Access to object storage, for every URI that does not bring its own."""

    s3: S3 | None = None
    """Used for s3:// URIs."""


class Workspace(ApiModel):
    """The durable place of a run."""

    uri: Uri
    """Folder under which runs, checkpoints, outputs and caches are kept: s3://bucket/path or pvc://claim/path."""


# ------------------------------------------------------------------------------------------------ model source


class HubModel(ApiModel):
    """A model on the Hugging Face Hub."""

    repo: Annotated[
        str,
        Field(min_length=1, max_length=193),
        matches(
            r"([-_.a-zA-Z0-9]+/)?[-_.a-zA-Z0-9]+",
            message="must be a repository of the Hub, for example HuggingFaceTB/SmolLM2-135M",
        ),
    ]
    """Repository, for example HuggingFaceTB/SmolLM2-135M-Instruct."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    """Branch, tag or commit. It is resolved to a commit once, when the job starts."""
    token_secret: SecretKeyRef | None = None
    """Access token for private or gated repositories. Unset: anonymous."""


class UriModel(ApiModel):
    """A model folder (config.json, tokenizer, safetensors) in storage."""

    location: Uri
    """The folder: s3://bucket/path, pvc://claim/path or, for local runs, file:///path."""
    s3: S3 | None = None
    """Access to this location where it differs from spec.storage.s3."""


class ModelSource(ApiModel):
    """Where a model comes from: exactly one of hub, uri, jobRef."""

    rules = (exactly_one_of("hub", "uri", "jobRef"),)

    hub: HubModel | None = None
    """A model on the Hugging Face Hub."""
    uri: UriModel | None = None
    """A model folder in storage."""
    job_ref: JobRef | None = None
    """An output of another job."""


# ---------------------------------------------------------------------------------------------------- compute


class Accelerator(ApiModel):
    """The devices of each node; one process runs per device."""

    resource: Annotated[
        str,
        Field(max_length=253),
        matches(
            r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+",
            message="must be an extended resource, for example nvidia.com/gpu",
        ),
    ] = "nvidia.com/gpu"
    """Extended resource that a node offers."""
    per_node: Annotated[int, Field(ge=1, le=16)] = 1
    """Devices of this kind on each node."""


class ResourceRequirements(ApiModel):
    """Requests and limits of each trainer container, beside the accelerator."""

    requests: Resources | None = None
    """What the scheduler reserves, for example cpu: "4"."""
    limits: Resources | None = None
    """What a container may use at most."""


class Toleration(ApiModel):
    """A taint that the pods tolerate, as in a pod."""

    key: LabelKey | None = None
    """Key of the taint. Unset with operator Exists: all taints."""
    operator: Literal["Exists", "Equal"] | None = None
    """How key and value are compared. Unset: Equal."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint. Unset: all effects."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = None
    """How long a NoExecute taint is tolerated. Unset: forever."""


class NodeLabelRequirement(ApiModel):
    """A condition on one label of a node."""

    key: LabelKey
    """Key of the node's label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the label is compared with the values."""
    values: Annotated[list[LabelValue], Field(max_length=32, json_schema_extra=ATOMIC)] | None = None
    """Values to compare with; none for Exists and DoesNotExist."""


class Affinity(ApiModel):
    """Which nodes the pods may run on, beyond nodeSelector."""

    required_node_labels: Annotated[
        list[NodeLabelRequirement], Field(min_length=1, max_length=16, json_schema_extra=ATOMIC)
    ]
    """Conditions that a node's labels must all meet."""


class EnvironmentVariable(ApiModel):
    """One variable of the trainer's environment."""

    rules = (exactly_one_of("value", "secretKeyRef"),)

    name: Annotated[
        str,
        Field(max_length=128),
        matches(
            r"[a-zA-Z_][a-zA-Z0-9_]*",
            message="must be a name of letters, digits and '_' that does not start with a digit",
        ),
        Rule(
            cel=" && ".join(f"!self.startsWith('{prefix}')" for prefix in RESERVED_ENVIRONMENT),
            message=f"must not start with {' or '.join(RESERVED_ENVIRONMENT)}: the operator sets these",
            check=lambda value: not value.startswith(RESERVED_ENVIRONMENT),
        ),
    ]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value."""
    secret_key_ref: SecretKeyRef | None = None
    """Secret and key to take the value from."""


class ClaimVolume(ApiModel):
    """A PersistentVolumeClaim."""

    claim_name: ObjectName
    """Name of the PersistentVolumeClaim."""
    read_only: bool = False
    """Mount it read-only."""


class ConfigMapVolume(ApiModel):
    """A ConfigMap as files."""

    name: ObjectName
    """Name of the ConfigMap."""


class SecretVolume(ApiModel):
    """A Secret as files."""

    secret_name: ObjectName
    """Name of the Secret."""


class EmptyDirVolume(ApiModel):
    """An empty folder that lives as long as the pod."""

    medium: Literal["Memory"] | None = None
    """Memory keeps it in RAM. Unset: on the node's disk."""
    size_limit: Size | None = None
    """Largest size. Unset: no limit."""


class Volume(ApiModel):
    """A volume that trainer pods may mount."""

    rules = (exactly_one_of("persistentVolumeClaim", "configMap", "secret", "emptyDir"),)

    name: Annotated[
        DnsLabel,
        Rule(
            cel=f"!self.startsWith('{RESERVED_VOLUMES}')",
            message=f"must not start with {RESERVED_VOLUMES}: the operator's own volumes do",
            check=lambda value: not value.startswith(RESERVED_VOLUMES),
        ),
    ]
    """Name that volumeMounts refer to."""
    persistent_volume_claim: ClaimVolume | None = None
    """A PersistentVolumeClaim."""
    config_map: ConfigMapVolume | None = None
    """A ConfigMap as files."""
    secret: SecretVolume | None = None
    """A Secret as files."""
    empty_dir: EmptyDirVolume | None = None
    """An empty folder."""


def _mount_is_free(path: str) -> bool:
    return not any(path == taken or path.startswith(f"{taken}/") for taken in RESERVED_MOUNTS)


class VolumeMount(ApiModel):
    """A volume's place in the trainer container."""

    name: DnsLabel
    """Name of the volume."""
    mount_path: Annotated[
        str,
        Field(max_length=512),
        matches(r"/[^:\n]+", message="must be an absolute path without ':'"),
        Rule(
            cel=f"!{list(RESERVED_MOUNTS)}.exists(p, self == p || self.startsWith(p + '/'))",
            message=f"must not be one of {', '.join(RESERVED_MOUNTS)} or lie below: the operator mounts these",
            check=_mount_is_free,
        ),
    ]
    """Absolute path in the container."""
    sub_path: Annotated[str, Field(max_length=512)] | None = None
    """Path inside the volume. Unset: its root."""
    read_only: bool = False
    """Mount it read-only."""


def _mounts_name_volumes(compute: "Compute") -> bool:
    volumes = {volume.name for volume in compute.volumes or []}
    return all(mount.name in volumes for mount in compute.volume_mounts or [])


class Compute(ApiModel):
    """Where and with what a job runs."""

    rules = (
        Rule(
            cel=(
                "!has(self.volumeMounts) || "
                "self.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name))"
            ),
            message="each of volumeMounts must name one of volumes",
            check=_mounts_name_volumes,
        ),
    )

    nodes: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of pods that train together."""
    accelerator: Accelerator | None = None
    """Devices of each node. Unset: one process per node on the CPU."""
    resources: ResourceRequirements | None = None
    """CPU, memory and other resources of each pod, beside the accelerator."""
    node_selector: Annotated[dict[str, LabelValue], Field(max_length=32)] | None = None
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32, json_schema_extra=ATOMIC)] | None = None
    """Taints that the pods tolerate."""
    affinity: Affinity | None = None
    """Further conditions on nodes."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods. Unset: the cluster's default."""
    env: Annotated[list[EnvironmentVariable], Field(max_length=64), Unique(("name",))] | None = None
    """Further variables of the trainer's environment."""
    volumes: Annotated[list[Volume], Field(max_length=16), Unique(("name",))] | None = None
    """Further volumes of the trainer pods."""
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=16), Unique(("mountPath",))] | None = None
    """Where the volumes stand in the trainer container."""
    service_account_name: ObjectName | None = None
    """ServiceAccount of the pods. Unset: the namespace's default. A token of the API is mounted in neither case."""
    shared_memory_bytes: Annotated[int, Field(ge=1_048_576, le=4_398_046_511_104)] | None = None
    """Size of /dev/shm. Unset: as far as the memory limit goes."""

    @property
    def ranks(self) -> int:
        """Number of processes that train together."""
        return self.nodes * (self.accelerator.per_node if self.accelerator else 1)


class Lifecycle(ApiModel):
    """How long a job may live and how often it may start again."""

    max_restarts: Annotated[int, Field(ge=0, le=10_000)] = 3
    """How often the job starts again from its last checkpoint before it fails. May be changed while it runs."""
    grace_period_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    """Time that a pod has to write a checkpoint after it is told to stop."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=315_360_000)] | None = None
    """The job fails when it has been active this long; time in which it waits for other jobs or is suspended does not
    count. Unset: no limit. May be changed while it runs."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315_360_000)] | None = None
    """The job is deleted this long after it finished. Unset: never. May be changed at any time."""


class Queue(ApiModel):
    """A queue of Kueue, which lets the job's pods start when there is quota for them."""

    name: DnsLabel
    """Name of a LocalQueue in the job's namespace."""


# ------------------------------------------------------------------------------------------- metadata and status


_NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
NAME_RULE = Rule(
    cel=f"self.metadata.name.size() <= {NAME_LENGTH} && self.metadata.name.matches('^{_NAME}$')",
    message=(
        f"metadata.name must have at most {NAME_LENGTH} lower-case letters, digits and '-', "
        "start with a letter and end with a letter or digit"
    ),
    check=lambda value: (
        len(value.metadata.name) <= NAME_LENGTH and re.fullmatch(_NAME, value.metadata.name) is not None
    ),
)
"""Stands on the root of every kind: the only part of metadata that CEL may read there is the name."""


class Metadata(ApiModel):
    """The part of an object's metadata that kubetune reads."""

    name: str
    """Name of the object."""
    namespace: str = "default"
    """Namespace of the object."""
    uid: str = ""
    """Identity of the object; empty before it exists in a cluster."""
    generation: int = 1
    """Number of the spec's version."""
    resource_version: str = ""
    """Version of the whole object."""
    creation_timestamp: str | None = None
    """When the object was created."""
    deletion_timestamp: str | None = None
    """When its deletion was asked for."""
    deletion_grace_period_seconds: int | None = None
    """Time that the deletion may take."""
    generate_name: str | None = None
    """Prefix that the name was made from."""
    self_link: str | None = None
    """Of no use since Kubernetes 1.20."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the object."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the object."""
    finalizers: list[str] = Field(default_factory=list)
    """Who must agree to its deletion."""
    owner_references: list[dict[str, Any]] = Field(default_factory=list)
    """Objects that own this one."""
    managed_fields: list[dict[str, Any]] = Field(default_factory=list)
    """Who wrote which field."""


ApiVersion = Literal["kubetune.dev/v1alpha1"]
assert f"{API_GROUP}/{API_VERSION}" == "kubetune.dev/v1alpha1"  # noqa: S101 (Literal takes no expression)


class Condition(StatusModel):
    """One aspect of the object's state, as everywhere in Kubernetes."""

    type: Annotated[str, Field(max_length=64)]
    """Name of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """Generation of the spec that it was judged by."""
    last_transition_time: Time
    """When its status last changed."""
    reason: Annotated[str, Field(max_length=128)]
    """One word for programs that says why."""
    message: Annotated[str, Field(max_length=4096)]
    """A sentence for people that says why."""
