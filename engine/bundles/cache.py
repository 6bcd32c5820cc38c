"""Models compiled on the fly, kept for the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..backends import Backend
from ..errors import BundleError
from ..files import WRITING, cache_root, new_folder
from ..model.folder import Model
from .manifest import MANIFEST, Manifest, compile_model, read_manifest

if TYPE_CHECKING:
    from filelock import ReadWriteLock

logger = logging.getLogger(__name__)

KEY_LENGTH = 32
LARGEST_CACHE_BYTES = 20 * 2**30
"""Beyond this, what was not used for longest goes."""


@contextlib.contextmanager
def cached_bundle(model: Model, manifest: Manifest, backend: Backend, device: torch.device) -> Iterator[Path]:
    """Give the bundle of a model, compiled now unless an earlier call has left it; nobody removes it in the block.

    Several processes may ask at the same time: one builds, the others wait.

    Args:
        model: With weights.
        manifest: Of `plan_bundle`.
        backend: What compiles it.
        device: What for.

    Note:
        Where the cache cannot be written, the bundle lives as long as the block; that is logged.
    """
    root = _writable(cache_root())
    if root is None:
        with temporary_bundle(model, manifest, backend, device) as folder:
            yield folder
        return
    description = json.dumps(manifest.to_json(), sort_keys=True).encode()
    folder = root / hashlib.sha256(description).hexdigest()[:KEY_LENGTH]
    while True:
        with _lock(folder).read_lock():
            if _is_whole(folder):
                with contextlib.suppress(OSError):  # another user's, in a shared cache
                    os.utime(folder / MANIFEST)
                yield folder
                return
        with _lock(folder).write_lock():
            if not _is_whole(folder):
                for left in (folder, *root.glob(f"{WRITING}{folder.name}-*")):
                    shutil.rmtree(left, ignore_errors=True)
                logger.warning("compiling for %s, once: it is kept in %s", backend.name, root)
                _compile(model, manifest, backend, device, folder)
        _remove_oldest(root, keep=folder)


@contextlib.contextmanager
def temporary_bundle(model: Model, manifest: Manifest, backend: Backend, device: torch.device) -> Iterator[Path]:
    """Give the bundle of a model, compiled now, for the time of the block; arguments as of `cached_bundle`."""
    # Windows removes no file that is mapped into memory, as a loaded network's weights are.
    with tempfile.TemporaryDirectory(prefix="nnturbo-", ignore_cleanup_errors=True) as own:
        folder = Path(own) / "bundle"
        _compile(model, manifest, backend, device, folder)
        yield folder


def _compile(model: Model, manifest: Manifest, backend: Backend, device: torch.device, folder: Path) -> None:
    with new_folder(folder) as aside:
        compile_model(model, manifest, backend, model.example_tiles(device), aside)


def _writable(root: Path | None) -> Path | None:
    """Make the cache's folder; None, with a warning, where that cannot be."""
    try:
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
            return root
        reason = "there is no home folder"
    except OSError as error:
        reason = f"{root} cannot be written ({error.strerror or error})"
    logger.warning(
        "what is compiled is not kept, %s: name another folder in the environment variable NNTURBO_CACHE, or build a "
        "bundle with nnturbo build",
        reason,
    )
    return None


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except BundleError:
        return False
    return True


def _lock(folder: Path) -> ReadWriteLock:
    """Give the lock of a bundle, across processes: to read while it is used, to write while it is made or removed."""
    from filelock import ReadWriteLock

    return ReadWriteLock(folder.with_suffix(".lock"), is_singleton=False)  # threads keep each other out too


def _remove_oldest(root: Path, *, keep: Path) -> None:
    """Remove what was not used for longest until the rest is small enough; what is in use stays."""
    from filelock import Timeout

    found = []
    for manifest in root.glob(f"{'[0-9a-f]' * KEY_LENGTH}/{MANIFEST}"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it at this moment
            size = sum(file.stat().st_size for file in manifest.parent.iterdir())
            found.append((manifest.stat().st_mtime, manifest.parent, size))
    total = sum(size for _, _, size in found)
    for _, folder, size in sorted(found):
        if total <= LARGEST_CACHE_BYTES:
            return
        if folder == keep:
            continue
        with contextlib.suppress(Timeout), _lock(folder).write_lock(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
