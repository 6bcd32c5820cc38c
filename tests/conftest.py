"""What tests of several folders share, and rows of agreement with nnU-Net, shown after the tests."""

import gc
import os
from dataclasses import asdict
from pathlib import Path

# One thread for each process of tests: small networks gain nothing by more, and processes side by side are not in each
# other's way. It counts from torch's import on; tests that are about threads ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from nnturbo.engine.backends import choose

from tests.parity.report import ParityRow, format_table, write_json
from tests.paths import ROOT

TRAINERS = ROOT / "training" / "nnunet_trainers"
ROWS = pytest.StashKey[list[ParityRow]]()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for no garbage while tests are collected, nor later among what is imported and collected then.

    There are millions of objects, which a search would take most of a second for.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what Windows cannot do, there and where it is simulated (tests/windows)."""
    for mark in item.iter_markers("posix"):
        if not hasattr(os, "fork"):
            pytest.skip(f"needs {mark.args[0]}, which Windows lacks")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that all processes of this run of tests share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True, scope="session")
def own_cache(run_folder: Path):
    """Keep what tests compile out of the user's cache; one process compiles it for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNTURBO_CACHE", str(run_folder / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_is_compiled_unasked():
    """Run networks as they are unless a test asks for more: compiling takes seconds, and few are about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choose.AUTOMATIC, "cpu", ("torch",))
        yield


@pytest.fixture
def found_by_nnunet(monkeypatch: pytest.MonkeyPatch):
    """Let nnU-Net find its trainers outside of itself alone; gives its search.

    It would import every built-in one first, for seconds; one needs torchvision, which beside a CPU build of torch
    cannot be imported. The search of external folders, which follows it, is nnU-Net's own.
    """
    from nnunetv2.utilities import find_objects

    search = find_objects.recursive_find_python_class

    def search_outside(folder, class_name, current_module, *arguments, **options):
        return None if current_module else search(folder, class_name, current_module, *arguments, **options)

    monkeypatch.setattr(find_objects, "recursive_find_python_class", search_outside)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/nowhere", str(TRAINERS)]))
    return find_objects.recursive_find_trainer_class_by_name


@pytest.fixture(scope="session")
def parity_rows(pytestconfig: pytest.Config) -> list[ParityRow]:
    """Rows to append to."""
    return pytestconfig.stash.setdefault(ROWS, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the rows of a process of pytest-xdist to the one that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = [asdict(row) for row in session.config.stash.get(ROWS, [])]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take the rows of a process that is done."""
    rows = [ParityRow(**row) for row in getattr(node, "workeroutput", {}).get("parity", [])]
    node.config.stash.setdefault(ROWS, []).extend(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the rows, and write them where NNTURBO_PARITY_JSON says."""
    rows = sorted(config.stash.get(ROWS, []), key=lambda row: row.name)
    if not rows:
        return
    terminalreporter.section("voxels whose label is not nnU-Net's")
    terminalreporter.write_line(format_table(rows))
    if file := os.environ.get("NNTURBO_PARITY_JSON"):
        write_json(rows, Path(file))
