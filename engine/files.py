"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError, is_busy

WRITING = ".writing-"
"""How the names of folders begin whose content is not complete; a process that is killed leaves them behind."""

TEMPORARY = f"{WRITING}file-"
"""How they begin where files are written."""

_ABANDONED_S = 600
"""A file that is being written changes more often."""

_HELD_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""How long to wait between attempts; virus scanners let go of a new file after a second or so."""


def cache_root() -> Path | None:
    """Where compiled models are kept: what NNTURBO_CACHE names, or `~/.cache/nnturbo`; None for a user without home."""
    if named := os.environ.get("NNTURBO_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "nnturbo"
    except RuntimeError:
        return None


@contextlib.contextmanager
def written_atomically(path: str | os.PathLike[str], *, ending: str | None = None) -> Iterator[Path]:
    """Give a temporary path in the same folder; when the block ends well, sync it and rename it to `path`.

    Files that the block writes beside the temporary one come along under their own names, before it.

    Args:
        path: The final name.
        ending: Of the temporary name, for writers that choose the format by it; by default that of `path`.

    Raises:
        OutputError: Where the folder or the disk does not take the file; nothing is left behind.
    """
    path = Path(path)
    with staging_folder(path) as folder:
        temporary = folder / f"new{ending or path.suffix}"
        yield temporary
        for written in sorted(folder.iterdir(), key=lambda each: each == temporary):
            with written.open("r+b") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
            put_in_place(written, path if written == temporary else path.with_name(written.name))


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written in its folder, or in one that is to be made for it, before long work.

    Raises:
        OutputError: Where the folder does not take files.
    """
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    with staging_folder(existing / path.name):
        pass


def put_in_place(written: Path, path: Path) -> None:
    """Give a file or folder its final name; wait a little for a program that has one of the two open.

    Raises:
        OSError: Where it stays as it was.
    """
    for pause_s in (*_HELD_S, None):
        try:
            written.replace(path)
            return
        except OSError as error:
            if pause_s is None or not is_busy(error):
                raise
        time.sleep(pause_s)


@contextlib.contextmanager
def staging_folder(path: Path, *, prefix: str = TEMPORARY) -> Iterator[Path]:
    """Give a folder beside where `path` will be, on the same disk, that goes with the block.

    What is not complete is in a folder, so that a listing by file ending misses it.

    Args:
        path: The final name.
        prefix: Of the folder's name. Not the final name where files are written: some libraries do not take every name.

    Raises:
        OutputError: Where it cannot be made, and in place of an `OSError` from inside.
    """
    try:
        folder = tempfile.mkdtemp(dir=path.parent, prefix=prefix)
    except OSError as error:
        raise OutputError.of(path, error) from error
    try:
        yield Path(folder)
    except OSError as error:
        raise OutputError.of(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that gets the name `path` when the block ends well, and goes otherwise.

    Raises:
        OutputError: Where something has that name already, or it cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path} exists: choose another folder, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError.of(path, error) from error
    with staging_folder(path, prefix=f"{WRITING}{path.name[:80]}-") as staged:
        folder = staged / "new"
        folder.mkdir()
        yield folder
        put_in_place(folder, path)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left there half written, once nobody writes it any more."""
    for left in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # another process may have ended with it, or it is another user's
            changed = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - changed > _ABANDONED_S:
                shutil.rmtree(left)


def sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, complete or not at all."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
