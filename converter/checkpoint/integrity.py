"""Hashes of a checkpoint's files: stored when it is written, compared when somebody asks.

What is hashed is the same for two conversions with one seed; the two report files, which hold times, are left
out. So the file of hashes is also a fingerprint of the conversion.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwla_converter.common.atomic_files import sha256_of, whole_file
from bwla_kernels.errors import FormatError
from bwla_kernels.format.folder import read_json

HASHES_FILE = "bwla_hashes.json"
NOT_HASHED = frozenset({HASHES_FILE, "bwla_report.json", "bwla_report.html"})
MAY_CHANGE = frozenset({"README.md"})
"""Text for people, meant to be edited: a change of it is told, but is no damage."""


@dataclass(frozen=True)
class Verdict:
    """How the files of a folder compare with the stored hashes; lists of file names.

    Attributes:
        checked: files whose hash is as stored.
        changed, missing: files that are not what was written.
        edited: changed or missing files that may change.
        added: files that were not there; damage only where a loader reads them unasked (`is_read`).
    """

    checked: list[str]
    changed: list[str]
    missing: list[str]
    edited: list[str]
    added: list[str]

    @property
    def intact(self) -> bool:
        """Whether everything that a loader reads is what was written."""
        return not self.changed and not self.missing and not any(map(is_read, self.added))

    def __str__(self) -> str:
        if self.intact:
            notes = f"; edited since: {', '.join(self.edited)}" if self.edited else ""
            return f"intact: {len(self.checked)} files are as they were written (SHA-256){notes}"
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
    """Whether loaders pick up a file of that name unasked."""
    return file.endswith((".safetensors", ".bin", ".py"))


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in NOT_HASHED)


def _write(folder: Path, table: Mapping[str, Any]) -> None:
    with whole_file(folder / HASHES_FILE) as partial:
        partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def write_hashes(folder: Path) -> None:
    """Store the size and SHA-256 of every file of `folder`; call it when they are all written."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in _files(folder)}
    _write(folder, {"version": 1, "files": files})


def update_hash(folder: Path, file: str) -> None:
    """Store the hash of one file anew, where hashes are stored at all."""
    if not (folder / HASHES_FILE).is_file():
        return
    table = read_json(folder / HASHES_FILE)
    path = folder / file
    table["files"][file] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write(folder, table)


def check_hashes(folder: Path) -> Verdict | None:
    """Compare a folder with its stored hashes; None where there are none.

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
            "the file is damaged, get it again"
        )
    present = {file.name: file for file in _files(folder)}
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
