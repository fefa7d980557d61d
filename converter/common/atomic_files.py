"""Files that are there whole or not at all, whatever interrupts: written under another name, synced, renamed."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of the name of a file that is being written."""


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(old: Path, new: Path) -> None:
    """Rename a file or folder within its file system, and see that the new name lasts."""
    old.rename(new)
    sync(new.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name to write to; it becomes `path`, in place of what was there, when the body succeeds."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
