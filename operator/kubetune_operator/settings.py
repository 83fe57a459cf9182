"""The operator's settings, read from environment variables that the chart writes from its values.

Each field is read from `KUBETUNE_OPERATOR_<FIELD>`, for example `KUBETUNE_OPERATOR_TRAINER_IMAGE`.
"""

import re
import socket
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kubetune_operator.errors import SpecError

PREFIX: Final = "KUBETUNE_OPERATOR_"
SERVICE_LINK: Final = re.compile(r"(SERVICE_(HOST|PORT)|PORT)(_|$)")
"""What Kubernetes puts into pods of a namespace that has a Service named kubetune-operator."""


def _split(value: Any) -> Any:
    """Turn `a, b` into a tuple; what is no string stays as it is."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


def _identity() -> str:
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


class Settings(BaseModel):
    """Everything that is decided when the operator is installed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trainer_image: str = "localhost/kubetune-trainer:dev"
    """Image of prepare and training pods."""
    trainer_image_pull_policy: str = "IfNotPresent"
    """Pull policy of that image: Always, IfNotPresent or Never."""
    image_pull_secrets: Names = ()
    """Names of Secrets with registry credentials, comma-separated; each must exist in the namespace of the job."""
    cpu_processes: int = Field(default=0, ge=0)
    """0: accelerators are requested as written. Above 0: `compute.accelerator` is mapped to at most this many CPU
    processes per node, for clusters without accelerators; the Accepted condition says so."""
    prepare_cpu: str = "1"
    """CPU request of prepare pods of jobs with an accelerator; other jobs use `compute.resources`."""
    prepare_memory: str = "4Gi"
    """Memory request of prepare pods of jobs with an accelerator; other jobs use `compute.resources`."""
    memory_per_device_bytes: int = Field(default=0, ge=0)
    """Memory of one accelerator, where node labels do not tell it. 0 means unknown: nothing is refused."""
    kueue: bool = False
    """Whether jobs may stand in queues of Kueue (`spec.queue`); needs rights on its Workloads."""
    namespaces: Names = ()
    """Namespaces to serve, comma-separated; none means all, which needs cluster-wide rights."""
    namespace: str = "default"
    """The operator's own namespace, where its Lease lives."""
    lease_name: str = "kubetune-operator"
    """Name of the Lease that makes one of several operators the active one."""
    lease_seconds: float = Field(default=15.0, ge=1)
    """How long a Lease that is not renewed stays valid; renewed three times as often."""
    identity: str = Field(default_factory=_identity)
    """Who holds the Lease; unique per process."""
    workers: int = Field(default=8, ge=1)
    """How many jobs are reconciled at the same time."""
    resync_seconds: float = Field(default=300.0, gt=0)
    """How often every unfinished job is reconciled without an event."""
    freshness_seconds: float = Field(default=60.0, gt=0)
    """How often the watches are compared with a list; changes missed for twice as long make the operator not live."""
    progress_interval_seconds: float = Field(default=10.0, gt=0)
    """How often the log of a running job is read, at most; also the shortest time between its progress writes."""
    stuck_seconds: float = Field(default=5.0, ge=0)
    """How long a pod may be pending before its Events are read for the reason."""
    lost_node_seconds: int = Field(default=60, ge=0)
    """How long a node may be out of touch before its pods are given up and their jobs restart elsewhere. It begins when
    Kubernetes calls the node unreachable, 40 to 50 seconds after its last word."""
    api_qps: float = Field(default=50.0, gt=0)
    """Requests per second to the API server, on average, without watches."""
    api_burst: int = Field(default=100, ge=1)
    """Requests that may go out at once."""
    metrics_port: int = Field(default=8080, ge=0, le=65535)
    """Port of /metrics."""
    health_port: int = Field(default=8081, ge=0, le=65535)
    """Port of /healthz (liveness) and /readyz."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""


def load_settings(environment: Mapping[str, str]) -> Settings:
    """Read the settings.

    Raises:
        SpecError: A variable has an unknown name or a wrong value; each is named.
    """
    found = {name.removeprefix(PREFIX): value for name, value in environment.items() if name.startswith(PREFIX)}
    values = {name.lower(): value for name, value in found.items() if value and not SERVICE_LINK.match(name)}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{PREFIX}{'.'.join(map(str, item['loc'])).upper()}: {item['msg']}, got {item['input']!r}"
            for item in error.errors()
        ]
        raise SpecError("environment", problems=problems) from error
