"""Whether a run fits: what prepare estimated against what a device, or the container, has."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from kubetune_operator.api.common import Compute
from kubetune_operator.api.jobs import Estimate
from kubetune_operator.names import LABEL_NODE_GPU_MEMORY

Json = dict[str, Any]

SUFFIXES: Final = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10) ** 3, "M": Decimal(10) ** 6, "G": Decimal(10) ** 9, "T": Decimal(10) ** 12,
    "P": Decimal(10) ** 15, "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10, "Mi": Decimal(2) ** 20, "Gi": Decimal(2) ** 30, "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50, "Ei": Decimal(2) ** 60,
}  # fmt: skip
MEBIBYTE: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Memory that one process may use.

    Attributes:
        bytes: None where it is not known.
        source: Where the number comes from, as a person says it.
    """

    bytes: int | None
    source: str


def parse_quantity(quantity: int | str) -> int:
    """Read a quantity of Kubernetes (`8Gi`, `500M`, `1e9`) as a whole number, rounded down."""
    text = str(quantity)
    number = text.rstrip("numkMGTPEi")
    suffix = text[len(number) :]
    return int(Decimal(number) * SUFFIXES[suffix])


def capacity(
    compute: Compute,
    *,
    processes_per_node: int,
    on_cpu: bool,
    nodes: Sequence[Json] | None,
    memory_per_device_bytes: int,
) -> Capacity:
    """Find the memory that one process may use.

    Args:
        compute: The job's compute block.
        processes_per_node: Ranks on each node.
        on_cpu: Whether processes run on the CPU and share the node's memory.
        nodes: The cluster's nodes, None where they may not be read.
        memory_per_device_bytes: What the installation says about its accelerators, 0 for nothing.
    """
    matching = [node for node in nodes or [] if _matches(node, selector=compute.node_selector or {})]
    if not on_cpu:
        return _device_capacity(matching, memory_per_device_bytes=memory_per_device_bytes)
    limits = (compute.resources.limits if compute.resources else None) or {}
    if "memory" in limits:
        source = f"compute.resources.limits.memory {limits['memory']}"
        total = parse_quantity(limits["memory"])
    elif sizes := [parse_quantity(node["status"]["allocatable"]["memory"]) for node in matching if _allocatable(node)]:
        source, total = "the memory of the largest node", max(sizes)
    else:
        return Capacity(bytes=None, source="the memory of the nodes is not known")
    if processes_per_node > 1:
        source += f", shared by {processes_per_node} processes"
    return Capacity(bytes=total // processes_per_node, source=source)


def compare(*, memory_per_device_bytes: int | None, message: str, available: Capacity) -> Estimate:
    """Judge an estimate; where one side is not known, so is the answer."""
    if memory_per_device_bytes is None or available.bytes is None:
        said = [message] if message else []
        return Estimate(
            memory_per_device_bytes=memory_per_device_bytes, message="; ".join([*said, available.source])[:1024]
        )
    fits = memory_per_device_bytes <= available.bytes
    verdict = (
        f"needs {_readable(memory_per_device_bytes)} per process, {'has' if fits else 'but has only'} "
        f"{_readable(available.bytes)} ({available.source})"
    )
    said = [verdict, message] if message else [verdict]
    return Estimate(memory_per_device_bytes=memory_per_device_bytes, fits=fits, message="; ".join(said)[:1024])


def _device_capacity(nodes: Sequence[Json], *, memory_per_device_bytes: int) -> Capacity:
    labels = [node["metadata"].get("labels") or {} for node in nodes]
    sizes = [int(label[LABEL_NODE_GPU_MEMORY]) for label in labels if label.get(LABEL_NODE_GPU_MEMORY, "").isdigit()]
    if sizes:
        return Capacity(bytes=max(sizes) * MEBIBYTE, source=f"node label {LABEL_NODE_GPU_MEMORY}")
    if memory_per_device_bytes:
        return Capacity(bytes=memory_per_device_bytes, source="the operator's settings")
    return Capacity(bytes=None, source="the memory of the devices is not known")


def _matches(node: Json, *, selector: dict[str, str]) -> bool:
    labels = node["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in selector.items())


def _allocatable(node: Json) -> bool:
    return "memory" in (node.get("status", {}).get("allocatable") or {})


def _readable(size: int) -> str:
    gibibytes = size / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{size / MEBIBYTE:.0f} MiB"
