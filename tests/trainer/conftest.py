"""The table of families and checks: what was held, and how often, printed at the end of a run that held any of it."""

from collections import Counter
from collections.abc import Callable

import pytest

Held = Callable[[str, str], None]


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Held:
    """Note that a family was held to a check; it counts if the test passes."""
    return lambda family, check: request.node.user_properties.append(("held", [family, check]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of all tests that passed."""
    counts = Counter(
        tuple(value)
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
        if name == "held"
    )
    if not counts:
        return
    families = list(dict.fromkeys(family for family, _ in counts))
    checks = list(dict.fromkeys(check for _, check in counts))
    terminalreporter.section("configs of each family that passed each check")
    terminalreporter.write_line("| | " + " | ".join(checks) + " |")
    terminalreporter.write_line("|---" * (len(checks) + 1) + "|")
    for family in families:
        cells = (str(counts[family, check] or "") for check in checks)
        terminalreporter.write_line(f"| {family} | " + " | ".join(cells) + " |")
