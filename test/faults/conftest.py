"""What every fault test gets: its place in the table, and whether this is the short or the full run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import table  # noqa: E402
from extent import FULL  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("faults")


@pytest.fixture
def record() -> Callable[[str, int, int, int, int], None]:
    """`record(row, injected, detected, recovered, silent)`."""
    return table.record


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether all faults are injected (`make faults`) or a few of each (AR_TEST_FAULTS=short, the default)."""
    return FULL


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if table.ROWS:
        terminalreporter.section("faults")
        for line in table.render():
            terminalreporter.write_line(line)
        file = os.environ.get("AR_TEST_FAULTS_TABLE")
        if file:
            table.save(Path(file))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if any(row.silent for row in table.ROWS.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
