"""Every error nnturbo raises on purpose. The text says what must hold, what came, and what to do."""

from __future__ import annotations

import errno


class EngineError(Exception):
    """Base of all errors that a caller of nnturbo can expect.

    Attributes:
        transient: Whether a second try may succeed: a disk did not answer, or other programs used the memory.
    """

    def __init__(self, *args: object, transient: bool = False) -> None:
        super().__init__(*args)
        self.transient = transient


class ModelError(EngineError):
    """A model folder, its plans or its dataset description cannot be used."""


class CheckpointError(ModelError):
    """A checkpoint cannot be read safely, or its weights do not fit the network."""


class BundleError(ModelError):
    """A bundle is damaged, from another machine, or of a newer version."""


class VolumeError(EngineError):
    """A scan cannot be read, or this engine cannot use it."""


class IncompleteFile(VolumeError):
    """A file is too short or its checksum is wrong: it was not written or copied to its end."""


class PredictionError(EngineError):
    """The network failed on a scan, or gave numbers that are not finite."""


class BackendUnavailable(EngineError):
    """A way of running the network is not installed or does not work on this device or in this precision."""


class DeviceLost(EngineError):
    """A GPU does not answer any more, or no process is left to work; a new start may succeed."""


class OutputError(EngineError):
    """A result cannot be written.

    Attributes:
        of_one_file: Whether only this file is affected, for example by a name that is too long. Otherwise the disk or
            the folder is affected, and the next result cannot be written either.
    """

    def __init__(self, *args: object, of_one_file: bool = False, transient: bool = False) -> None:
        super().__init__(*args, transient=transient)
        self.of_one_file = of_one_file

    @classmethod
    def of(cls, path: object, error: OSError) -> OutputError:
        """Make the error for a file from the system's; it is transient where another program has it open."""
        busy = is_busy(error)
        return cls(
            f"{path} cannot be written: {error.strerror or error}",
            of_one_file=busy or error.errno in _OF_ONE_FILE,
            transient=busy,
        )


def is_busy(error: OSError) -> bool:
    """Whether another program has the file open, so that a later attempt may succeed."""
    return getattr(error, "winerror", None) in _HELD_BY_ANOTHER or error.errno in (errno.EBUSY, errno.ETXTBSY)


_HELD_BY_ANOTHER = (5, 32)
"""What Windows says of files that another program has open: access denied, sharing violation."""

_OF_ONE_FILE = {
    getattr(errno, name)
    for name in ("ENAMETOOLONG", "EISDIR", "ENOTDIR", "EPERM", "EACCES", "EEXIST", "ENOTEMPTY", "EINVAL", "EILSEQ")
}
