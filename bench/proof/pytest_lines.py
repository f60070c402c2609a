"""Plugin of pytest: a line a test as it ends, and no test again that has passed."""

from __future__ import annotations

import pytest

from bench.proof.lines import Proof

_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    """Leave writing to the process that xdist's workers report to."""
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what has passed on this card."""
    passed = {line["figure"] for line in Proof.of_this_process().own_lines() if line["outcome"] == "measured"}
    items[:] = [item for item in items if _name(item.nodeid) not in passed]


def _name(nodeid: str) -> str:
    return f"test: {nodeid}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a test's line."""
    if _is_worker or (report.passed and report.when != "call"):
        return
    proof, seconds = Proof.of_this_process(), round(report.duration, 3)
    if report.passed:
        proof.write(_name(report.nodeid), "measured", seconds=seconds)
    elif report.failed:
        proof.write(_name(report.nodeid), "failed", seconds=seconds, reason=report.longreprtext[-2000:])
    else:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        proof.write(_name(report.nodeid), "skipped", reason=reason.removeprefix("Skipped: "))
