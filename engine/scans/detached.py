"""The file that holds the voxels of a text header (.mhd, .nhdr), found by the name that the header gives it."""

import os
import re
from pathlib import Path

from ..errors import IncompleteFile, VolumeError


def find_data_file(header: Path, named: str, several: str) -> Path:
    """Find the one data file of a header.

    Args:
        header: The header's own file.
        named: What the header says, its bytes as Latin-1: a path relative to the header's folder.
        several: Regular expression for how the format names several files at once.

    Returns:
        Path of an existing regular file, not resolved: ITK goes the same way.

    Raises:
        VolumeError: If the header names several files, an absolute path, or no regular file.

    Note:
        A header may come from a stranger, and its voxels leave the machine again at most as labels. So it may point at
        regular files, through `..` and links as in ITK and nnU-Net, since data sets keep voxels in folders beside the
        headers. It may not point at devices and pipes, which would give endless bytes or block, nor at absolute paths,
        which make sense on one machine only. What it points at must also be as long as the header claims.
    """
    named = os.fsdecode(named.encode("latin-1"))
    if re.match(several, named):
        raise VolumeError(
            f"voxels must be in this file or in one other file, the header names several ({named[:60]!r}): "
            "convert the image to .nrrd or .mha"
        )
    if Path(named).anchor:
        raise VolumeError(
            f"the header must name its data file by a path relative to its own folder, it names {named[:60]!r}: "
            "put that file beside the header and its plain name into it"
        )
    data_file = header.parent / named
    if "\0" in named or not named or not data_file.is_file():
        raise IncompleteFile(
            f"the header names the data file {named[:60]!r}, and there is no such regular file: put it there, or "
            "convert the image to .nrrd or .mha"
        )
    return data_file
