"""Recognize GGUF files, and find this project's cache, without loading what reads them."""

import os
from collections.abc import Callable
from pathlib import Path

MAGIC = b"GGUF"
SUFFIX = ".gguf"
CACHE_VARIABLE = "BWLA_CACHE"

OnProgress = Callable[[Path, int, int], None]
"""Called while a GGUF file is written as a folder, with the folder, the number of weights in it, and that of the whole
model."""


def ignore_progress(folder: Path, done: int, total: int) -> None:
    """Do nothing: the `OnProgress` of callers that report none."""


def is_gguf(path: Path) -> bool:
    """Return whether a path is meant as a GGUF file: by its suffix, or by the first bytes of an existing file."""
    if path.suffix == SUFFIX:
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def cache_folder() -> Path:
    """Return this project's cache: $BWLA_CACHE, or `bwla` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bwla"
