"""The table of families and checks: what was held, and how often, printed at the end of a run that held any of it."""

from collections import Counter

import pytest

HELD = "held"
"""The property of a test under which it notes a family and a check."""


def write_table(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many configs of each family passed each check."""
    counts = Counter(
        tuple(value)
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
        if name == HELD
    )
    if not counts:
        return
    families, checks = (sorted(set(names)) for names in zip(*counts, strict=True))
    terminalreporter.section("configs of each family that passed each check")
    terminalreporter.write_line("| | " + " | ".join(checks) + " |")
    terminalreporter.write_line("|---" * (len(checks) + 1) + "|")
    for family in families:
        cells = (str(counts[family, check] or "") for check in checks)
        terminalreporter.write_line(f"| {family} | " + " | ".join(cells) + " |")
