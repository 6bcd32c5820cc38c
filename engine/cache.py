"""Models compiled on the fly, kept for the next time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from .backends import Backend
from .bundle import MANIFEST, Manifest, compile_model, new_bundle, read_manifest
from .errors import BundleError, OutputError
from .files import cache_root
from .model import Model

logger = logging.getLogger(__name__)

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

    Raises:
        OutputError: Where the cache cannot be written.
    """
    root = cache_root()
    description = json.dumps(asdict(manifest), sort_keys=True).encode()
    folder = root / hashlib.sha256(description).hexdigest()[:32]
    while True:
        with _locked(folder, fcntl.LOCK_SH):
            if _is_whole(folder):
                os.utime(folder / MANIFEST)
                yield folder
                return
        with _locked(folder, fcntl.LOCK_EX):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                logger.warning("compiling for %s, once: it is kept in %s", backend.name, root)
                tiles = torch.zeros(2, model.plan.input_channels, *model.plan.patch_size, device=device)
                with new_bundle(folder) as aside:
                    compile_model(model, manifest, backend, tiles, aside)
        _remove_oldest(root, keep=folder)


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except BundleError:
        return False
    return True


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    """Hold a lock on a bundle: shared while it is used, exclusive while it is made or removed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"compiled models are kept in {folder.parent}, which cannot be written ({error.strerror or error}): name "
            "another folder in the environment variable NNTURBO_CACHE, or build a bundle with nnturbo build"
        ) from error
    with lock:
        fcntl.flock(lock, operation)
        yield


def _remove_oldest(root: Path, *, keep: Path) -> None:
    """Remove what was not used for longest until the rest is small enough; what is in use stays."""
    bundles = sorted(root.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    sizes = {path.parent: sum(file.stat().st_size for file in path.parent.iterdir()) for path in bundles}
    total = sum(sizes.values())
    for folder, size in sizes.items():
        if total <= LARGEST_CACHE_BYTES:
            return
        if folder == keep:
            continue
        with contextlib.suppress(BlockingIOError), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(folder)
            total -= size
