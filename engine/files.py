"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError

TEMPORARY = ".writing-"
"""How the names of files begin that are not complete; a process that is killed leaves them behind."""


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

    Args:
        path: The final name.
        ending: Of the temporary name, for writers that choose the format by it; by default that of `path`.

    Raises:
        OutputError: Where the folder or the disk does not take the file; nothing is left behind.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=ending or path.suffix)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; a result has the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, complete or not at all."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
