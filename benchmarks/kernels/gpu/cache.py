"""A compile cache that was built ahead: which sources it is for, and how it moves to another folder."""

import hashlib
import json
from pathlib import Path

import bwla_kernels

SOURCES_FILE = "bwla_sources.json"
"""In the cache's folder: the digest of the kernels that it is for, with commit and Triton's version."""


def sources_digest() -> str:
    """SHA-256 over the Triton kernels' sources: equal where a cache built ahead can be of use."""
    digest = hashlib.sha256()
    for path in sorted((Path(bwla_kernels.__file__).parent / "triton").glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def relocate(folder: Path) -> int:
    """Make a cache that was moved to `folder` usable there; returns how many groups of files it has.

    Triton lists the files of a compiled kernel by absolute paths, and compiles anew where one does not exist.
    """
    groups = list(folder.glob("*/__grp__*"))
    for path in groups:
        group = json.loads(path.read_text(encoding="utf-8"))
        children = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps({**group, "child_paths": children}), encoding="utf-8")
    return len(groups)
