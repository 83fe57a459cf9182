"""Whether a run fits."""

from typing import Any

import pytest

from kubetune_operator.api.common import Compute
from kubetune_operator.estimate import Capacity, capacity, compare, parse_quantity

GIB = 2**30


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("8Gi", 8 * GIB),
        ("500M", 500_000_000),
        ("1.5k", 1500),
        ("2e3", 2000),
        ("1E", 10**18),
        (7, 7),
        ("1500m", 1),
        ("0", 0),
    ],
)
def test_quantities(quantity: int | str, value: int) -> None:
    assert parse_quantity(quantity) == value


def node(memory: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"labels": labels}, "status": {"allocatable": {"memory": memory}}}


NODES = [node("8Gi", pool="small"), node("64Gi", pool="big", **{"nvidia.com/gpu.memory": "24564"})]


@pytest.mark.parametrize(
    ("compute", "options", "expected"),
    [
        ({"resources": {"limits": {"memory": "4Gi"}}}, {}, 4 * GIB),
        ({"resources": {"limits": {"memory": "4Gi"}}}, {"processes_per_node": 2}, 2 * GIB),
        ({}, {}, 64 * GIB),
        ({"nodeSelector": {"pool": "small"}}, {}, 8 * GIB),
        ({"nodeSelector": {"pool": "none"}}, {}, None),
        ({}, {"nodes": None}, None),
        ({"accelerator": {}}, {"on_cpu": False}, 24564 * 2**20),
        ({"accelerator": {}}, {"on_cpu": False, "nodes": None}, None),
        ({"accelerator": {}}, {"on_cpu": False, "nodes": None, "memory_per_device_bytes": 80 * GIB}, 80 * GIB),
        ({"accelerator": {}, "resources": {"limits": {"memory": "4Gi"}}}, {"on_cpu": False}, 24564 * 2**20),
    ],
)
def test_what_one_process_has(compute: dict[str, Any], options: dict[str, Any], expected: int | None) -> None:
    defaults: dict[str, Any] = {"processes_per_node": 1, "on_cpu": True, "nodes": NODES, "memory_per_device_bytes": 0}
    found = capacity(Compute.model_validate(compute), **(defaults | options))
    assert found.bytes == expected


def test_an_estimate_above_the_capacity_says_both_numbers_and_where_the_limit_comes_from() -> None:
    judged = compare(
        memory_per_device_bytes=3 * GIB, message="weights", available=Capacity(bytes=GIB, source="the limit")
    )
    assert judged.fits is False
    assert judged.message == "needs 3.0 GiB per process, but has only 1.0 GiB (the limit); weights"


def test_what_is_not_known_is_not_judged() -> None:
    judged = compare(memory_per_device_bytes=3 * GIB, message="", available=Capacity(bytes=None, source="no nodes"))
    assert judged.fits is None
    assert compare(memory_per_device_bytes=None, message="m", available=Capacity(bytes=1, source="s")).fits is None
