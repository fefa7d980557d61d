"""What tells a changed model folder from an unchanged one, without reading the weights."""

from pathlib import Path
from typing import Any

SUFFIXES = (".safetensors", ".json", ".jinja")


def folder_marks(folder: Path) -> list[Any]:
    """Return the folder's absolute path, and name, size and time of change (in ns) of every file that is read.

    The result can be written as JSON; the cache's files are named by a digest of it.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(folder.resolve()), marks]
