"""Atomic file writes: write under a temporary name, sync to disk, rename."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bwla_converter.common.write_errors import write_error
from safetensors import SafetensorError

PARTIAL = ".partial"
"""Suffix of the name of a file that is being written."""

LONGEST_NAME = 255
"""Bytes in the longest name of a file or folder, on nearly all file systems."""


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(old: Path, new: Path) -> None:
    """Rename a file or folder within its file system and flush the new name to disk."""
    old.rename(new)
    sync(new.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` if the body of the `with` statement succeeds.

    The file gets the permissions of any new file, also from libraries that keep theirs private to the user:
    a server may run as another one.

    Raises:
        WriteError: the disk is full or read-only, or the folder may not be written to.
    """
    name = os.fsencode(path.name + PARTIAL)
    fits = len(name) <= LONGEST_NAME
    partial = path.with_name(path.name + PARTIAL if fits else hashlib.sha256(name).hexdigest() + PARTIAL)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as cause:
        problem = write_error(cause, path)
        if problem is None:
            raise
        raise problem from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
