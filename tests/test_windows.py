"""The simulation of Windows refuses what Windows refuses, and nnturbo writes its results under it all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.factory import write_model, write_scan

FOLDER = Path(__file__).parent / "windows"


def run(code, cwd, *arguments):
    """Run Python code as if on Windows."""
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False, timeout=300)


REFUSED = {
    "no POSIX modules": ("__name__ = 'nnturbo.x'; import fcntl", "ModuleNotFoundError"),
    "no POSIX functions": ("__name__ = 'nnturbo.x'; import os; os.fork", "AttributeError"),
    "no POSIX signals": ("__name__ = 'nnturbo.x'; import signal; signal.SIGKILL", "AttributeError"),
    "cp1252": ("open('a', 'w').write('\\u0141')", "UnicodeEncodeError"),
    "no syncing of what is read": ("import os; os.fsync(open('a').fileno())", "Bad file descriptor"),
    "no replacing of what is open": ("import os; held = open('a'); os.replace('b', 'a')", "WindowsError"),
    "no moving of what is open": ("import os; held = open('b'); os.replace('b', 'a')", "WindowsError"),
    "no moving of folders with what is open": ("import os; held = open('c/d'); os.rename('c', 'e')", "WindowsError"),
    "no removing of what is open": ("import os; held = open('a'); os.remove('a')", "WindowsError"),
    "no folder onto another": ("import os; os.mkdir('e'); os.replace('c', 'e')", "WindowsError"),
    "no renaming onto another file": ("import os; os.rename('a', 'b')", "FileExistsError"),
    "no colons in names": ("open('x:y', 'w')", "Invalid argument"),
    "no devices for names": ("import os; os.mkdir('aux.d')", "Invalid argument"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(tmp_path, what):
    for name in ("a", "b", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    code, expected = REFUSED[what]
    done = run(code, tmp_path)
    assert done.returncode == 1
    assert expected in done.stderr.splitlines()[-1]


COMMAND = "import sys; from nnturbo.engine.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.thorough), "torchscript"])
def test_a_folder_of_scans_with_names_of_all_the_world(tmp_path, backend):
    model = write_model(tmp_path / "m")
    (tmp_path / "in").mkdir()
    for index, name in enumerate(["a", "Ł", "é"]):
        write_scan(tmp_path / "in" / "new.nii.gz", index).rename(tmp_path / "in" / f"{name}_0000.nii.gz")
    done = run(
        COMMAND, tmp_path, *("predict", "-i", "in", "-o", "out", "-m", model, "-device", "cpu"),
        *("--disable_tta", "--report", "--log", "log.jsonl", "--backend", backend),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "Ł.nii.gz", "é.nii.gz"}
    assert (tmp_path / "out" / "predictions.json").is_file()
