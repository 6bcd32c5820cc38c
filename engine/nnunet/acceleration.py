"""Runs programs that call nnU-Net with nnturbo's predictor in its place."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import ModelError, OutputError
from ..files import cache_root, written_atomically
from .hook import install, uninstall

STARTUP = Path(__file__).with_name("startup")
COMMANDS = ("nnUNetv2_predict", "nnUNetv2_predict_from_modelfolder")
"""nnU-Net's commands, whose flags `nnturbo predict` takes."""

_ON_WINDOWS = os.name == "nt"
_COMMAND = (
    '@"{python}" -m nnturbo.engine.cli predict %*\n'
    if _ON_WINDOWS
    else "#!/bin/sh\nexec '{python}' -m nnturbo.engine.cli predict \"$@\"\n"
)


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """Let code in this block that imports or constructs nnU-Net's predictor get nnturbo's.

    Processes that it starts get it too. A name that was imported before keeps what it stands for.

    Raises:
        ImportError: Where nnU-Net is not installed.
    """
    before = {name: os.environ.get(name) for name in ("PATH", "PYTHONPATH")}
    os.environ.update(environment(before))
    install()
    try:
        yield
    finally:
        uninstall()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def environment(before: dict[str, str | None]) -> dict[str, str]:
    """Make what a process needs in its environment.

    Args:
        before: PATH and PYTHONPATH as they are.
    """
    added = {"PATH": command_folder(), "PYTHONPATH": str(STARTUP)}
    return {name: os.pathsep.join([first, *filter(None, [before.get(name)])]) for name, first in added.items()}


def command_folder() -> str:
    """Write commands with the names of nnU-Net's, for this Python, and give their folder.

    Raises:
        OutputError: Where they cannot be written.
    """
    root = cache_root()
    if root is None:
        raise OutputError("nnturbo run keeps two small commands in a folder: name one as NNTURBO_CACHE")
    folder = root / "commands" / f"{zlib.crc32(sys.executable.encode()):08x}"
    text = _COMMAND.format(python=sys.executable)
    for name in COMMANDS:
        path = folder / (f"{name}.cmd" if _ON_WINDOWS else name)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            temporary.chmod(0o755)
    return str(folder)


def run(program: str, arguments: Sequence[str]) -> NoReturn:
    """Start a Python program in this one's place, with nnturbo's predictor under it.

    Args:
        program: A console script on the PATH or by its path, a `.py` file, or "python".
        arguments: Of the program.

    Raises:
        ValueError: For what is no Python program.
        EngineError: Where nnU-Net is not installed.
    """
    command = command_of(program)
    if command[0] == sys.executable and importlib.util.find_spec("nnunetv2") is None:
        raise ModelError(
            "nnturbo run is for programs that call nnU-Net, which is not installed here: pip install nnunetv2, or use "
            "nnturbo predict, which does without"
        )
    os.environ.update(environment({name: os.environ.get(name) for name in ("PATH", "PYTHONPATH")}))
    command = [*command, *arguments]
    if _ON_WINDOWS:  # where exec returns to the shell at once
        raise SystemExit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)


def command_of(program: str) -> list[str]:
    """Say how a program is started.

    Raises:
        ValueError: For what is no Python program, or not there.
    """
    if program in ("python", "python3"):
        return [sys.executable]  # another Python on the PATH need not have nnturbo
    found = program if program.endswith(".py") else shutil.which(program)
    if found is None or not Path(found).is_file():
        raise ValueError(f"{program} must be a program on the PATH or a .py file; nothing of this name is there")
    if found.endswith(".py"):
        return [sys.executable, found]
    if Path(found).resolve() == Path(sys.executable).resolve():
        return [found]
    with open(found, "rb") as file:
        begin = file.read(512)
    if _ON_WINDOWS and begin[:2] == b"MZ":
        return [found]
    # Longer paths than a first line takes are on the second one.
    if begin[:2] == b"#!" and any(b"python" in line for line in begin.split(b"\n")[:2]):
        return [found]
    raise ValueError(
        f"nnturbo run starts Python programs, and {found} is not one: write nnturbo run before the Python program that "
        "it starts"
    )
