"""Unpacks a model that nnU-Net has exported as a zip."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..errors import ModelError
from .checkpoint import UNREADABLE
from .plans import PLANS


@contextlib.contextmanager
def model_folder(path: Path, configuration: str | None) -> Iterator[Path]:
    """Give the model folder; a zip is unpacked to a temporary folder that exists during the block."""
    if path.suffix == ".pth" or not (path.is_file() and zipfile.is_zipfile(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="nnturbo-") as target, zipfile.ZipFile(path) as archive:
        root = _choose_in_zip(path, archive, configuration)
        wanted = [
            member
            for member in archive.infolist()
            if member.filename.startswith(f"{root}/" if root else "") and member.filename.endswith((".json", ".pth"))
        ]
        free = shutil.disk_usage(target).free
        if (needed := sum(member.file_size for member in wanted)) > free:
            raise ModelError(f"{path} unpacks to {needed} bytes, {target} has {free} free")
        for member in wanted:
            inside = PurePosixPath(member.filename)
            if inside.is_absolute() or ".." in inside.parts or "\\" in member.filename:
                raise ModelError(f"{path} must not hold paths that leave its folder, it holds {member.filename!r:.120}")
            try:
                archive.extract(member, target)
            except UNREADABLE as error:
                raise ModelError(
                    f"{path} must be a whole zip without a password; {member.filename:.120} cannot be unpacked: "
                    f"{str(error).partition(chr(10))[0]:.120}"
                ) from error
        yield Path(target) / root


def _choose_in_zip(path: Path, archive: zipfile.ZipFile, configuration: str | None) -> str:
    """Find the folder inside a zip that holds the model."""
    roots = sorted({name.rpartition("/")[0] for name in archive.namelist() if name.rpartition("/")[2] == PLANS})
    chosen = [root for root in roots if configuration is None or root.endswith(f"__{configuration}")]
    if len(chosen) != 1:
        wanted = f"the configuration {configuration!r}" if configuration else "exactly one model; name a configuration"
        raise ModelError(f"{path} must hold {wanted}; it holds {', '.join(roots) or 'none'}")
    return chosen[0]
