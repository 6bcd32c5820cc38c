"""Rows of agreement that tests add to, shown after them and written where NNTURBO_PARITY_JSON says."""

import os
from pathlib import Path

import pytest

from tests.parity.report import ParityRow, format_table, write_json

ROWS = pytest.StashKey[list[ParityRow]]()


@pytest.fixture(scope="session")
def parity_rows(pytestconfig: pytest.Config) -> list[ParityRow]:
    """Rows to append to."""
    return pytestconfig.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the rows, and write them if asked to."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("voxels whose label is not nnU-Net's")
    terminalreporter.write_line(format_table(rows))
    if file := os.environ.get("NNTURBO_PARITY_JSON"):
        write_json(rows, Path(file))
