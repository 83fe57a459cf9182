"""The chart, rendered by Helm as an installation would render it."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.chart.rendering import Rendered, render_chart


@pytest.fixture(scope="session")
def render() -> Callable[..., Rendered]:
    """Render the chart with values; the same values are rendered once per session."""
    done: dict[str, Rendered] = {}

    def rendered(values: dict[str, Any] | None = None) -> Rendered:
        key = yaml.safe_dump(values or {})
        if key not in done:
            done[key] = render_chart(values or {})
        return done[key]

    return rendered
