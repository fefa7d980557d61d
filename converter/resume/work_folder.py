"""The work folder OUT.work holds the finished part of a conversion, so that `--resume` can continue it.

    lock            locked by the process that writes here; the kernel releases the lock when that process ends
    manifest.json   inputs, finished decoder layers, hashes; a step counts once this file names it
    checkpoint/     the unfinished output, one file for each decoder layer; renamed to OUT once they are merged
    states/         what the recipe passes from one decoder layer to the next, after each of the last two finished ones
    activations/    what the recipe keeps on disk while it runs; never resumed from
    replacements/   shards that whole-model tuning changed, until they are moved into checkpoint/
    replaced/       the previous contents of OUT, while they are being overwritten

The folder lies beside OUT, in the same file system, so that renaming is atomic.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
from bwla_converter.calibration.activations import StoredStates
from bwla_converter.checkpoint.writer import WORK, CheckpointWriter, put_in_place
from bwla_converter.common.atomic_files import move, sha256_of, whole_file
from bwla_converter.common.write_errors import write_error
from bwla_converter.resume.manifest import (
    VERSION,
    Inputs,
    LayerRecord,
    LayerReport,
    Manifest,
    StateFile,
    StoredFile,
    WorkError,
    difference,
    read_manifest,
    write_manifest,
)
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

LOCK, MANIFEST = "lock", "manifest.json"
CHECKPOINT, STATES, ACTIVATIONS = "checkpoint", "states", "activations"
REPLACEMENTS, REPLACED = "replacements", "replaced"
KNOWN = {LOCK, MANIFEST, MANIFEST + ".partial", CHECKPOINT, STATES, ACTIVATIONS, REPLACEMENTS, REPLACED}
STATES_KEPT = 2


def work_path(out: Path) -> Path:
    """Return the path of the work folder of the output `out`."""
    out = out.absolute()
    return out.with_name(out.name + WORK)


def check_work(out: Path, resume: bool, restart: bool) -> bool:
    """Check for a leftover work folder; return True to resume from it.

    Raises:
        WorkError: another process uses the folder, it is not a work folder, it holds an unfinished conversion and
            neither `resume` nor `restart` is set, or both are.
    """
    if resume and restart:
        raise WorkError("--resume and --restart exclude each other: give one of them")
    path = work_path(out)
    if not path.exists():
        return False
    _check_names(path)
    with _locked(path):
        if not (path / MANIFEST).is_file():
            return False
        if not resume and not restart:
            raise WorkError(
                f"{path}: holds an unfinished conversion{_progress(path)}: add --resume to continue it, or "
                "--restart to discard it"
            )
    return resume


def _progress(path: Path) -> str:
    try:
        return f" ({len(read_manifest(path / MANIFEST).layers)} layers done)"
    except WorkError:
        return ""


def _check_names(path: Path) -> None:
    """Raise unless `path` is a folder that holds only names of a work folder."""
    unknown = sorted({entry.name for entry in path.iterdir()} - KNOWN) if path.is_dir() else [path.name]
    if unknown:
        raise WorkError(f"{path}: expected a work folder of bwla-convert, found {unknown[0]}: move it away")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the work folder `path`.

    Raises:
        WorkError: another process holds it.
        WriteError: the folder may not be written to.
    """
    file = path / LOCK
    lock = FileLock(file, timeout=0)
    # While this handle is open, no new file gets the inode, so a folder that was replaced meanwhile is noticed.
    with _opened(file) as handle:
        try:
            lock.acquire()
        except Timeout:
            raise WorkError(f"{path}: another bwla-convert is writing here: wait for it or stop it") from None
        try:
            if not file.exists() or not os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                raise WorkError(f"{path}: another bwla-convert has just finished here: try again")
            yield
        finally:
            lock.release()


def _opened(file: Path) -> TextIO:
    """Open a file to append to it; raise WriteError if that is not allowed."""
    try:
        return file.open("a")
    except OSError as cause:
        raise write_error(cause, file) or cause from None


def remove_work(path: Path) -> None:
    """Remove a work folder, its manifest last, so that the rest is still recognized if this process is killed."""
    for name in sorted(KNOWN - {MANIFEST, LOCK}):
        shutil.rmtree(path / name, ignore_errors=True)
    shutil.rmtree(path)


class WorkFolder:
    """A work folder whose lock this process holds. Use through `open_work`.

    Attributes:
        path: the folder.
        manifest: the contents of manifest.json.
        writer: writes the checkpoint in it.
        notes: which finished layers have to be quantized again and why, for the user.
    """

    def __init__(self, out: Path, manifest: Manifest) -> None:
        self.out, self.path, self.manifest = out.absolute(), work_path(out), manifest
        self.notes: list[str] = []
        self._started = time.monotonic() - manifest.seconds
        self.writer = CheckpointWriter(self.out if self.is_published() else self.path / CHECKPOINT)

    @property
    def activations(self) -> Path:
        """The folder for what the recipe keeps on disk while it runs."""
        return self.path / ACTIVATIONS

    @property
    def seconds(self) -> float:
        """Seconds spent so far, over all sessions."""
        return time.monotonic() - self._started

    @property
    def records(self) -> dict[int, LayerRecord]:
        """The finished decoder layers, by index."""
        return {int(index): record for index, record in self.manifest.layers.items()}

    def save(self, **changes: object) -> None:
        """Write the manifest with these fields changed."""
        changed = self.manifest.model_copy(update={**changes, "seconds": self.seconds})
        write_manifest(self.path / MANIFEST, changed)
        self.manifest = changed

    def commit_layer(
        self, index: int, file: str, state: Mapping[str, Tensor | StoredStates], report: LayerReport
    ) -> None:
        """Record decoder layer `index` as finished.

        Args:
            index: index of the layer.
            file: its shard, which `writer` has written.
            state: what the recipe passes on to the next layer; may be empty.
            report: what is reported about the layer.
        """
        stored = self._save_state(index, state)
        shard = StoredFile(file=file, sha256=self.writer.digests[file])
        record = LayerRecord(shard=shard, report=report, state=stored)
        self.save(layers={**self.manifest.layers, str(index): record})
        for path in (self.path / STATES).iterdir():
            if not path.name.startswith(tuple(self._state_name(index - back) for back in range(STATES_KEPT))):
                path.unlink()

    def adopt_all_shards(self) -> None:
        """Add all shards of a finished checkpoint to the writer's index."""
        for file, digest in sorted(self.manifest.finished.items()):
            self.writer.adopt_shard(file, digest)

    @staticmethod
    def _state_name(index: int) -> str:
        """Return the prefix of the files with the state after decoder layer `index`."""
        return f"after-{index:05d}."

    def _save_state(self, index: int, state: Mapping[str, Tensor | StoredStates]) -> list[StateFile]:
        """Save tensors into one safetensors file, and link to the files of hidden states that are already on disk."""
        folder, name = self.path / STATES, self._state_name(index)
        for old in folder.glob(f"{name}*"):
            old.unlink()
        tensors = {key: value.cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
        files = []
        if tensors:
            path = folder / f"{name}safetensors"
            with whole_file(path) as partial:
                save_file(tensors, partial)
            files.append(StateFile(file=path.name, sha256=sha256_of(path)))
        for key, value in state.items():
            if isinstance(value, StoredStates):
                path = folder / f"{name}{key}"
                value.link_to(path)
                shape = list(value.shape)
                files.append(StateFile(file=path.name, sha256=sha256_of(path), tensor=key, shape=shape))
        return files

    def load_state(self, index: int) -> dict[str, Tensor | StoredStates]:
        """Load the state after decoder layer `index`.

        Tensors are copied into freshly allocated memory, because the order of summation depends on the alignment.
        """
        state: dict[str, Tensor | StoredStates] = {}
        for stored in self.records[index].state:
            path = self.path / STATES / stored.file
            if stored.tensor:
                state[stored.tensor] = StoredStates(path, torch.Size(stored.shape))
            else:
                state.update({name: tensor.clone() for name, tensor in load_file(path).items()})
        return state

    def find_damaged_layers(self) -> dict[int, str]:
        """Return the finished decoder layers that cannot be kept, by index, each with the reason.

        Without a recipe state these are the layers whose shard is damaged. With one, a layer can only be quantized
        again from the state before it, so the layers after the last one that can be resumed from are included; their
        reason is empty where they are not damaged themselves.
        """
        records = self.records
        damaged = {
            index: f"its shard {record.shard.file} is damaged or missing"
            for index, record in records.items()
            if not self._is_intact(CHECKPOINT, record.shard)
        }
        if not any(record.state for record in records.values()):
            return damaged
        intact = records.keys() - damaged.keys()
        kept = next(index for index in range(len(records) + 1) if index not in intact)
        while kept and not self._has_state(records[kept - 1]):
            if kept == len(intact):
                damaged[kept - 1] = "its state is damaged or missing"
            kept -= 1
        return {index: damaged.get(index, "") for index in records if index >= kept}

    def discard_damaged_layers(self) -> None:
        """Remove the layers of `find_damaged_layers` from the manifest, and add the reasons to `notes`."""
        damaged = self.find_damaged_layers()
        self.notes += [f"layer {index}: {reason}" for index, reason in sorted(damaged.items()) if reason]
        if damaged:
            kept = {
                index: record for index, record in self.manifest.layers.items() if int(index) not in damaged
            }
            self.save(layers=kept, finished={})
        self._remove_all_but({record.shard.file for record in self.records.values()})

    def _has_state(self, record: LayerRecord) -> bool:
        return bool(record.state) and all(self._is_intact(STATES, stored) for stored in record.state)

    def _is_intact(self, folder: str, stored: StoredFile) -> bool:
        return _has_digest(self.path / folder / stored.file, stored.sha256)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors of the complete checkpoint, and record the hashes of all shards as final.

        The new shards are first written to another folder and named in the manifest, so that after a kill either
        none or all of them are used.
        """
        replacements = CheckpointWriter(self.path / REPLACEMENTS)
        for file, shard in self.writer.changed_shards(tensors):
            replacements.write_shard(file, shard)
        self.save(finished={**self.writer.digests, **replacements.digests})
        self.apply_replacements()

    def apply_replacements(self) -> bool:
        """Move replaced shards into the checkpoint; return whether all shards are final and intact."""
        for path in sorted((self.path / REPLACEMENTS).iterdir()):
            if self.manifest.finished.get(path.name) == sha256_of(path):
                move(path, self.path / CHECKPOINT / path.name)
            else:
                path.unlink()
        finished = self.manifest.finished.items()
        return bool(finished) and all(
            self._is_intact(CHECKPOINT, StoredFile(file=file, sha256=digest)) for file, digest in finished
        )

    def merge(self) -> None:
        """Merge the parts of the complete checkpoint, and remove what only quantization needs.

        The manifest names a merged file before its parts are removed, so after a kill all tensors are still there.
        """
        for name in (STATES, ACTIVATIONS, REPLACEMENTS):
            for path in (self.path / name).iterdir():
                path.unlink()
        if not self.is_published():
            self._remove_all_but(self.manifest.finished)
            self.writer.merge_parts(lambda digests: self.save(finished=dict(digests)))

    def _remove_all_but(self, files: Collection[str]) -> None:
        """Remove the files with tensors that an interrupted merge has left in the checkpoint."""
        for path in (self.path / CHECKPOINT).glob("*.safetensors"):
            if path.name not in files:
                path.unlink()

    def is_published(self) -> bool:
        """Return whether the checkpoint has been renamed to OUT, so that only the work folder has to be removed."""
        return (
            bool(self.manifest.finished)
            and not (self.path / CHECKPOINT).exists()
            and all(_has_digest(self.out / file, digest) for file, digest in self.manifest.finished.items())
        )

    def publish(self) -> None:
        """Rename the checkpoint to OUT and remove the work folder."""
        if not self.is_published():
            put_in_place(self.path / CHECKPOINT, self.out, self.path / REPLACED)
        remove_work(self.path)


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


@contextmanager
def open_work(out: Path, inputs: Inputs, restart: bool = False) -> Iterator[WorkFolder]:
    """Open the work folder of `out`, or create it.

    If the body fails, the folder is removed unless it holds a finished decoder layer.

    Raises:
        WorkError: another process uses the folder, or it was started with other inputs (`difference`).
    """
    path = work_path(out)
    path.mkdir(exist_ok=True)
    with _locked(path):
        _check_names(path)
        if (path / MANIFEST).is_file() and not restart:
            manifest = read_manifest(path / MANIFEST)
            reason = difference(manifest.inputs, inputs)
            if reason:
                raise WorkError(
                    f"{path}: cannot be resumed, {reason}, or add --restart to discard the unfinished conversion"
                )
        else:
            _clear(path, out)
            manifest = Manifest(version=VERSION, inputs=inputs)
            try:
                write_manifest(path / MANIFEST, manifest)
            except BaseException:
                with suppress(OSError):
                    remove_work(path)
                raise
        work = WorkFolder(out, manifest)
        if not work.is_published():
            (path / CHECKPOINT).mkdir(exist_ok=True)
        for name in (STATES, REPLACEMENTS):
            (path / name).mkdir(exist_ok=True)
        shutil.rmtree(path / ACTIVATIONS, ignore_errors=True)
        (path / ACTIVATIONS).mkdir()
        try:
            yield work
        except BaseException:
            if not work.manifest.layers and not (path / REPLACED).exists() and path.exists():
                with suppress(OSError):  # of a disk that is read-only by now; the first error says more
                    remove_work(path)
            raise


def _clear(path: Path, out: Path) -> None:
    """Empty a work folder; a previous output that was being overwritten is moved back to `out`."""
    if (path / REPLACED).exists() and not out.exists():
        move(path / REPLACED, out)
    for name in sorted(KNOWN - {LOCK, MANIFEST}):
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
