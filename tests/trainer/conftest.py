"""What tests of the trainer share."""

from collections.abc import Callable

import pytest

from tests.parity import HELD

Held = Callable[[str, str], None]


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Held:
    """Note that a family was held to a check; it counts if the test passes."""
    return lambda family, check: request.node.user_properties.append((HELD, [family, check]))
