"""Writing of checkpoints: into a temporary folder beside the output, which is renamed at the end."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bwla_converter.checkpoint.merge import group_parts, is_part, merge_files, shard_name
from bwla_converter.common.atomic_files import LONGEST_NAME, move, sha256_of, whole_file
from bwla_converter.common.tensors import entry_bytes
from bwla_converter.common.write_errors import WriteError, write_error
from bwla_converter.source.folder.files import CODE_KEYS, files_beside, settings_without_code
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import INDEX_FILE, SINGLE_FILE, Entry, read_headers
from rich.filesize import decimal
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class OutputError(BWLAError):
    """The output folder cannot be written."""


class CheckpointWriter:
    """Writes the parts of a checkpoint, then index and config, into `folder`, and merges the parts at the end.

    Each file is written atomically. The checkpoint can be loaded before and after the parts are merged.

    Attributes:
        folder: the folder of the checkpoint.
        digests: SHA-256 of every file with tensors, by file name.
        entries: file, shape and dtype of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}

    def write_shard(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file and add its tensors to the index."""
        owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(self.folder / file) as partial:
            save_file(owned, partial, metadata={"format": "pt"})
        self.entries.update(
            {name: Entry(file, tuple(tensor.shape), tensor.dtype) for name, tensor in owned.items()}
        )
        self.digests[file] = sha256_of(self.folder / file)

    def adopt_shard(self, file: str, digest: str) -> None:
        """Add the tensors of a shard from an earlier session, with SHA-256 `digest`, to the index."""
        self.entries.update(read_headers(self.folder / file))
        self.digests[file] = digest

    def changed_shards(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield every shard that holds one of `tensors`, with all of its tensors after the replacement.

        Replacements must have the shape and dtype of the tensors they replace.
        """
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            files.setdefault(self.entries[name].file, {})[name] = tensor
        for file, changed in files.items():
            yield file, {**load_file(self.folder / file), **changed}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors in the index."""
        return sum(map(entry_bytes, self.entries.values()))

    def finish(self, source: Path, config: Mapping[str, Any]) -> None:
        """Copy the files beside the weights from the folder `source`; write the index and, last, config.json."""
        for name in files_beside(source).kept:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            settings = settings_without_code(source / name)
            if settings is not None:
                self.write_json(name, settings, indent=2)
                continue
            with whole_file(target) as partial:
                shutil.copyfile(source / name, partial)
        self._write_index()
        plain = {key: value for key, value in config.items() if key not in CODE_KEYS}
        self.write_json("config.json", plain, indent=2)

    def merge_parts(self, on_merged: Callable[[Mapping[str, str]], None] = lambda digests: None) -> None:
        """Merge the parts into one file, or into numbered files of at most 5 GB, and remove them.

        Continues where an earlier call was interrupted.

        Args:
            on_merged: called with the new `digests` whenever a file is complete, before its parts are removed.
        """
        files = sorted(self.digests)
        sizes = {file: self._bytes_of(file) for file in files if is_part(file)}
        groups = group_parts(sizes)
        merged = len(files) - len(sizes)
        for index, group in enumerate(groups, merged):
            shard = shard_name(index, merged + len(groups))
            merge_files([self.folder / file for file in group], self.folder / shard)
            for name, entry in self.entries.items():
                if entry.file in group:
                    self.entries[name] = replace(entry, file=shard)
            for file in group:
                del self.digests[file]
            self.digests[shard] = sha256_of(self.folder / shard)
            on_merged(self.digests)
            for file in group:
                (self.folder / file).unlink()
        self._write_index()

    def _bytes_of(self, file: str) -> int:
        """Return the bytes of a file's tensors."""
        return sum(entry_bytes(entry) for entry in self.entries.values() if entry.file == file)

    def _write_index(self) -> None:
        """Write the index; remove it where a single file holds all tensors."""
        if set(self.digests) == {SINGLE_FILE}:
            (self.folder / INDEX_FILE).unlink(missing_ok=True)
            return
        index = {
            "metadata": {"total_size": self.total_size},
            "weight_map": {name: self.entries[name].file for name in sorted(self.entries)},
        }
        self.write_json(INDEX_FILE, index, indent=2)

    def write_json(self, file: str, data: Mapping[str, Any], indent: int = 1) -> None:
        """Write a JSON file into the checkpoint."""
        with whole_file(self.folder / file) as partial:
            partial.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")


WORK = ".work"
"""Suffix of the folder in which a conversion works, beside the output."""


def check_name(out: Path) -> None:
    """Raise if a file system cannot have a folder of this name, or the work folder beside it.

    Raises:
        OutputError: a name is too long.
    """
    for part in (*out.absolute().parts, f"{out.name}{WORK}"):
        if len(os.fsencode(part)) > LONGEST_NAME:
            longest = LONGEST_NAME - len(WORK)
            raise OutputError(
                f"{part[:20]}...: expected a name of at most {longest} bytes for the output and the folders above it, "
                f"found {len(os.fsencode(part.removesuffix(WORK)))}: choose a shorter name"
            )


def check_output(out: Path, overwrite: bool) -> None:
    """Raise if writing to `out` would destroy existing data. Call before converting.

    Raises:
        OutputError: `out` exists and `overwrite` is off, or it is not a folder with a model, or its parent folder, or
            the one in which that is to be created, is not writable, or a name is too long.
    """
    check_name(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: expected a folder to create, found a file: choose another output")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: already exists: choose another output or add --overwrite")
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise OutputError(f"{out}: expected a model to overwrite, found other files: choose another output")
    parent = existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        found = "one that may not be written to" if parent.is_dir() else "a file"
        raise OutputError(
            f"{parent}: expected a writable folder for {out.name}, found {found}: make it writable or choose another "
            "output"
        )


def existing_parent(out: Path) -> Path:
    """Return the nearest folder above `out` that exists."""
    return next(parent for parent in out.absolute().parents if parent.exists())


@contextmanager
def parents_created(out: Path) -> Iterator[None]:
    """Create the folders above `out`; remove those that are still empty if the body of the `with` statement fails."""
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def atomic_output(out: Path, overwrite: bool, needed: float = 0.0) -> Iterator[CheckpointWriter]:
    """Yield a writer into a temporary folder beside `out`, which is renamed to `out` if the body succeeds.

    On any failure the temporary folder is removed and `out` is unchanged.

    Args:
        out: the folder to create, with the folders above it.
        overwrite: replace `out` if it holds a model.
        needed: bytes of disk space that it takes, for the error message.

    Raises:
        OutputError: as `check_output`, or the disk is full or read-only.
    """
    check_output(out, overwrite)
    out = out.absolute()
    with write_errors_explained(out, needed, "then run the same command again"), parents_created(out):
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        new, aside = work / "new", work / "old"
        try:
            new.mkdir()
            yield CheckpointWriter(new)
            put_in_place(new, out, aside)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def write_errors_explained(out: Path, needed: float, then: str) -> Iterator[None]:
    """Turn errors of a disk that is full or read-only into a sentence about the space that `out` needs.

    Args:
        out: the output folder.
        needed: bytes of disk space that writing it takes.
        then: what the user can do afterwards.

    Raises:
        OutputError: writing failed in the body of the `with` statement.
    """
    try:
        yield
    except (OSError, SafetensorError, WriteError) as cause:
        problem = write_error(cause, out)
        if problem is None:
            raise
        parent = existing_parent(out)
        free = shutil.disk_usage(parent).free
        raise OutputError(
            f"{parent}: {out.name} could not be written there ({problem.path.name}: {problem.reason}): expected "
            f"{decimal(int(needed))} of free disk space in a writable folder, found {decimal(free)}: "
            f"{problem.advice}, {then}"
        ) from None


def put_in_place(new: Path, out: Path, aside: Path) -> None:
    """Rename the folder `new` to `out`; an existing `out` is first renamed to `aside`, and restored on failure.

    After a kill in between, `out` is missing but `new` and `aside` are complete, so calling this again completes it.
    """
    if out.exists():
        move(out, aside)
    try:
        move(new, out)
    except OSError:
        if aside.exists():
            move(aside, out)
        raise
