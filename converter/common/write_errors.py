"""Recognize the errors of a disk that is full or read-only, whichever library raises them."""

import errno
import os
import re
from pathlib import Path

from bwla_kernels.errors import BWLAError
from safetensors import SafetensorError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class WriteError(BWLAError):
    """A file or folder cannot be written.

    Attributes:
        path: the file or folder.
        reason: what the operating system says, like "No space left on device".
        full: whether the disk or the user's quota is full.
    """

    def __init__(self, path: Path, reason: str, full: bool = True) -> None:
        self.path, self.reason, self.full = path, reason, full
        super().__init__(f"{path}: expected to be able to write here, found: {reason}: {self.advice}")

    @property
    def advice(self) -> str:
        """What the user can do."""
        return "free some disk space" if self.full else "make the folder writable"


def write_error(error: BaseException, path: Path) -> WriteError | None:
    """Return the `WriteError` that `error` amounts to; None if it is not one about writing below or beside `path`.

    Args:
        error: an exception of Python or of the safetensors library, which raises a type of its own.
        path: the file or folder that was being written.
    """
    if isinstance(error, WriteError):
        return error
    if isinstance(error, SafetensorError):
        match = _OS_ERROR.search(str(error))
        if match is None:
            return WriteError(path, " ".join(str(error).split()))
        number, reason, name = int(match[1]), os.strerror(int(match[1])), None
    elif isinstance(error, OSError) and error.errno is not None:
        number, reason, name = error.errno, error.strerror or str(error), error.filename
    else:
        return None
    if number in DISK_FULL:
        return WriteError(path, reason)
    # A file elsewhere, like one of the source, was to be read.
    here = name is None or path.absolute().parent in Path(os.fsdecode(name)).absolute().parents
    if (number in NOT_WRITABLE or isinstance(error, SafetensorError)) and here:
        return WriteError(path, reason, full=False)
    return None
