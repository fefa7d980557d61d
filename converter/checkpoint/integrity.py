"""Hashes of a checkpoint's files, stored when it is written and compared by `bwla-inspect`.

The two report files contain times and are not hashed. All other files are the same for two conversions with the same
seed, so the file of hashes also identifies the conversion.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwla_converter.common.atomic_files import sha256_of, whole_file
from bwla_kernels.errors import FormatError
from bwla_kernels.format.folder import read_json

HASHES_FILE = "bwla_hashes.json"
NOT_HASHED = frozenset({HASHES_FILE, "bwla_report.json", "bwla_report.html"})
MAY_CHANGE = frozenset({"README.md"})
"""Files that users may edit: changes are reported, but are not damage."""


@dataclass(frozen=True)
class Verdict:
    """Result of comparing the files of a folder with the stored hashes, as lists of file names.

    Attributes:
        checked: files with the stored hash.
        changed, missing: files with another hash, and files that do not exist.
        edited: the files of `MAY_CHANGE` that were changed or removed.
        added: files without a stored hash; damage only if loaders read them (`is_read`).
    """

    checked: list[str]
    changed: list[str]
    missing: list[str]
    edited: list[str]
    added: list[str]

    @property
    def intact(self) -> bool:
        """Whether every file that a loader reads is as it was written."""
        return not self.changed and not self.missing and not any(map(is_read, self.added))

    def __str__(self) -> str:
        if self.intact:
            notes = f"; edited: {', '.join(self.edited)}" if self.edited else ""
            return f"intact: {len(self.checked)} files match their SHA-256{notes}"
        parts = [
            f"{word}: {', '.join(files)}"
            for word, files in (
                ("changed", self.changed),
                ("missing", self.missing),
                ("added", list(filter(is_read, self.added))),
            )
            if files
        ]
        return f"NOT INTACT: {'; '.join(parts)}: download or convert the model again"


def is_read(file: str) -> bool:
    """Return whether loaders read a file with this path without being asked to."""
    return "/" not in file and file.endswith((".safetensors", ".bin", ".py"))


def _files(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield the files below `folder` that are hashed, with their paths relative to it; hidden ones are not."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _files(path, f"{name}/")
        elif path.is_file() and name not in NOT_HASHED:
            yield name, path


def _write(folder: Path, table: Mapping[str, Any]) -> None:
    with whole_file(folder / HASHES_FILE) as partial:
        partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def write_hashes(folder: Path) -> None:
    """Store the size and SHA-256 of every file of `folder`. Call once all other files are written."""
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in _files(folder)}
    _write(folder, {"version": 1, "files": files})


def update_hash(folder: Path, file: str) -> None:
    """Update the stored hash of one file; do nothing if the folder has no stored hashes."""
    if not (folder / HASHES_FILE).is_file():
        return
    table = read_json(folder / HASHES_FILE)
    path = folder / file
    table["files"][file] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write(folder, table)


def check_hashes(folder: Path) -> Verdict | None:
    """Compare a folder with its stored hashes; return None if it has none.

    Raises:
        FormatError: the stored hashes cannot be read.
    """
    path = folder / HASHES_FILE
    if not path.is_file():
        return None
    table = read_json(path)
    stored = table.get("files")
    if (
        table.get("version") != 1
        or not isinstance(stored, dict)
        or not all(
            isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in stored.values()
        )
    ):
        raise FormatError(
            f"{path}: expected version 1 and a sha256 for every file, found something else: "
            "the file is damaged, download it again"
        )
    present = dict(_files(folder))
    lists: dict[str, list[str]] = {"checked": [], "changed": [], "missing": [], "edited": []}
    for name, entry in sorted(stored.items()):
        if name not in present:
            lists["edited" if name in MAY_CHANGE else "missing"].append(name)
        elif (
            present[name].stat().st_size == entry.get("bytes") and sha256_of(present[name]) == entry["sha256"]
        ):
            lists["checked"].append(name)
        else:
            lists["edited" if name in MAY_CHANGE else "changed"].append(name)
    return Verdict(**lists, added=sorted(present.keys() - stored.keys()))
