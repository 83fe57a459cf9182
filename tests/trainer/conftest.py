"""What tests of the trainer share."""

from collections.abc import Callable, Iterator

import pytest

from kubetune_trainer.distributed import World, join_world
from tests.parity import HELD

Held = Callable[[str, str], None]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One rank that has joined a world of its own."""
    with join_world() as alone:
        yield alone


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Held:
    """Note that a family was held to a check; it counts if the test passes."""
    return lambda family, check: request.node.user_properties.append((HELD, [family, check]))
