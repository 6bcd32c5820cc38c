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
        several: Regular expression that matches names which stand for several files in this format.

    Returns:
        Path of an existing regular file. Links are not resolved, since ITK does not resolve them either.

    Raises:
        VolumeError: If the header names several files, an absolute path, or no regular file.

    Note:
        A header may come from a stranger. It may name regular files, also through `..` and links, as in ITK and
        nnU-Net, because data sets keep voxels in folders beside the headers: all that leaves the machine again is
        labels. It may not name devices and pipes, which give endless bytes or block. It may not name absolute paths,
        which are valid on one machine only. The file must also be as long as the header claims.
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
