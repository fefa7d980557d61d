"""A prebuilt compile cache: the digest of the sources that it is for, and its relocation to another folder."""

import hashlib
import json
from pathlib import Path

import bwla_kernels

SOURCES_FILE = "bwla_sources.json"
"""File in the cache's folder with the digest of the kernels' sources, the commit and Triton's version."""


def sources_digest() -> str:
    """Return a SHA-256 over the Triton kernels' sources; a prebuilt cache is valid only for the same digest."""
    digest = hashlib.sha256()
    for path in sorted((Path(bwla_kernels.__file__).parent / "triton").glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def relocate(folder: Path) -> int:
    """Make a cache that was moved to `folder` usable there; return the number of its compiled kernels.

    Triton stores absolute paths of a compiled kernel's files, and compiles it again if one of them does not exist.
    """
    groups = list(folder.glob("*/__grp__*"))
    for path in groups:
        group = json.loads(path.read_text(encoding="utf-8"))
        children = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps({**group, "child_paths": children}), encoding="utf-8")
    return len(groups)
