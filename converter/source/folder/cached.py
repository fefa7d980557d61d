"""Name files in the cache after the model, and whatever else their contents are computed from."""

import hashlib
import json
from pathlib import Path
from typing import Any

from bwla_converter.source.gguf_path import cache_folder
from torch import Tensor

SUFFIXES = (".safetensors", ".json", ".jinja")
"""Suffixes of the model's files that are read."""


def cached_file(kind: str, suffix: str, folder: Path, *parts: Any) -> Path:
    """Return the path of a file in the cache, named by a digest of everything that determines its contents.

    The model counts as changed if its path, or the name, size or modification time of one of its files has changed. Its
    weights are not read.

    Args:
        kind: name of the cache's subfolder.
        suffix: suffix of the file.
        folder: folder of the model.
        parts: what else determines the contents, as values that JSON can hold.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([str(folder.resolve()), marks, *parts], sort_keys=True)
    return cache_folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"


def digest_of_tokens(ids: Tensor) -> str:
    """Return a digest of token ids [S, T], as one of `cached_file`'s parts."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes() + str(list(ids.shape)).encode()).hexdigest()
