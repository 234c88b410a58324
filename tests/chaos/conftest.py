"""How often the tests of this folder killed something: a line at the end of their run."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of kills in all tests that passed, those of other workers included."""
    passed = terminalreporter.stats.get("passed", [])
    kills = [value for report in passed for name, value in report.user_properties if name == "kills"]
    if kills:
        terminalreporter.write_line(f"{sum(kills)} kills in {len(kills)} tests")
