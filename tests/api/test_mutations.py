"""Manifests that are damaged at random, with fixed seeds: pydantic and the real API server always agree."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from kubetune_operator.api.kinds import parse_job
from kubetune_operator.cluster import Cluster, object_path
from kubetune_operator.errors import RefusedError, SpecError
from tests.api.test_eval_and_quantize import FULL, changed
from tests.api.test_eval_and_quantize import manifest as other
from tests.cluster.controlplane import ControlPlane
from tests.render.manifests import EVERYTHING

pytestmark = pytest.mark.control_plane

ROUNDS = 150
VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 10**12, 0.5, "", "x", "0", "0.5", "1e-3", "-1", "1.0", "None", "a b", "A", "é", "s3://bucket/x",
    "file:///x", "x" * 300, [], {}, [None], ["a", "a"], {"name": "a"}, [{"name": "a"}], [{"name": "a"}, {"name": "a"}],
)  # fmt: skip


def whole(kind: str) -> dict[str, Any]:
    """A manifest that uses as much of a kind as fits together."""
    if kind != "FineTuneJob":
        return changed(other(kind), **FULL[kind])
    return changed(yaml.safe_load(EVERYTHING), metadata={"name": "run7"})


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a manifest, as the object or list that holds it and its place in there."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from places(value)


def damage(manifest: dict[str, Any], *, dice: random.Random) -> dict[str, Any]:
    """Change a value, remove one, add one that nobody knows, or repeat an item of a list."""
    damaged = copy.deepcopy(manifest)
    holder, key = dice.choice(list(places(damaged["spec"])))
    match dice.choice(("change", "change", "change", "remove", "add", "repeat")):
        case "change":
            holder[key] = copy.deepcopy(dice.choice(VALUES))
        case "remove":
            del holder[key]
        case "add" if isinstance(holder, dict):
            holder["unknown"] = 1
        case "repeat" if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        case _:
            holder[key] = {"unknown": True}
    return damaged


def ours(manifest: dict[str, Any]) -> list[str]:
    try:
        parse_job(manifest)
    except SpecError as error:
        return error.problems
    return []


@pytest.mark.parametrize("kind", ["FineTuneJob", "EvalJob", "QuantizeJob"])
async def test_a_manifest_that_is_damaged_at_random_gets_the_same_verdict_and_words_from_both(
    kind: str, control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    cluster, dice, intact, accepted = Cluster(qps=1000, burst=1000), random.Random(kind), whole(kind), 0  # noqa: S311 (seeded)
    assert not ours(intact)
    try:
        for _ in range(ROUNDS):
            manifest = damage(intact, dice=dice)
            problems = ours(manifest)
            said = ""
            try:
                path = object_path(kind, namespace=namespace)
                await cluster.request(
                    "POST", path, params={"dryRun": "All", "fieldValidation": "Strict"}, body=manifest
                )
            except RefusedError as error:
                said = str(error)
            assert bool(said) == bool(problems), (
                f"{said or 'accepted'} / {problems}\n{yaml.safe_dump(manifest['spec'])}"
            )
            # The API server speaks of unknown fields alone, and of rules only where the schema holds.
            shared = [problem for problem in problems if problem in said]
            assert shared or not said or "unknown field" in said, f"{problems}\n{said}"
            accepted += not problems
    finally:
        await cluster.close()
    assert ROUNDS / 20 < accepted < ROUNDS / 2, "some damage does no harm, and most of it does"
