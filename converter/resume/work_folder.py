"""The work folder OUT.work: what a conversion has finished, kept so that `--resume` can go on with it.

    lock            held (flock) by the process that writes here; the kernel lets go of it when that one ends
    manifest.json   inputs, finished blocks, hashes: the one file whose renaming makes a step count
    checkpoint/     the output that is coming to be; renamed to OUT at the end
    states/         what the recipe carries on from block to block: after the last two finished blocks
    activations/    what the recipe holds on disk while it works; nothing to come back to
    replacements/   shards that whole-model tuning changed, until they take their places
    replaced/       what stood at OUT and is being overwritten

It lies beside OUT, in the same file system, so that renaming is one step.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from bwla_converter.calibration.activations import StoredStates
from bwla_converter.checkpoint.writer import CheckpointWriter, put_in_place
from bwla_converter.common.atomic_files import move, sha256_of, whole_file
from bwla_converter.resume.manifest import (
    Inputs,
    LayerRecord,
    Manifest,
    StateFile,
    StoredFile,
    WorkError,
    difference,
    read_manifest,
    write_manifest,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

LOCK, MANIFEST = "lock", "manifest.json"
CHECKPOINT, STATES, ACTIVATIONS = "checkpoint", "states", "activations"
REPLACEMENTS, REPLACED = "replacements", "replaced"
KNOWN = {LOCK, MANIFEST, MANIFEST + ".partial", CHECKPOINT, STATES, ACTIVATIONS, REPLACEMENTS, REPLACED}
STATES_KEPT = 2


def work_path(out: Path) -> Path:
    """Where the work folder of the output `out` is."""
    out = out.absolute()
    return out.with_name(out.name + ".work")


def check_work(out: Path, resume: bool, restart: bool) -> bool:
    """Say before any work whether the work folder, if there is one, is in the way. Returns whether to resume it.

    Raises:
        WorkError: it is in use, or unfinished and neither `resume` nor `restart` is given, or no work folder.
    """
    if resume and restart:
        raise WorkError("--resume and --restart exclude each other: give one of them")
    path = work_path(out)
    if not path.exists():
        return False
    _check_known(path)
    with _locked(path):
        if not (path / MANIFEST).is_file():
            return False
        if not resume and not restart:
            raise WorkError(
                f"{path}: holds an unfinished conversion{_progress(path)}: add --resume to go on with it, or "
                "--restart to discard it"
            )
    return resume


def _progress(path: Path) -> str:
    try:
        return f" ({len(read_manifest(path / MANIFEST).blocks)} blocks done)"
    except WorkError:
        return ""


def _check_known(path: Path) -> None:
    strange = sorted({entry.name for entry in path.iterdir()} - KNOWN) if path.is_dir() else [path.name]
    if strange:
        raise WorkError(f"{path}: is no work folder of bwla-convert (it holds {strange[0]}): move it away")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only one to write in the folder `path`.

    Raises:
        WorkError: another process is.
    """
    file = path / LOCK
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(f"{path}: another bwla-convert is writing here: wait for it or stop it") from None
        if not file.exists() or os.fstat(handle).st_ino != file.stat().st_ino:
            raise WorkError(f"{path}: another bwla-convert has just finished here: try again")
        yield
    finally:
        os.close(handle)


def remove_work(path: Path) -> None:
    """Remove a work folder, its manifest last, so that what a kill leaves is still known for what it is."""
    for name in sorted(KNOWN - {MANIFEST, LOCK}):
        shutil.rmtree(path / name, ignore_errors=True)
    shutil.rmtree(path)


class WorkFolder:
    """A work folder that this process has to itself. Use through `open_work`.

    Attributes:
        path: the folder.
        manifest: what manifest.json says.
        writer: writes the checkpoint in it.
        notes: what had to be done again, for the user.
    """

    def __init__(self, out: Path, manifest: Manifest) -> None:
        self.out, self.path, self.manifest = out.absolute(), work_path(out), manifest
        self.notes: list[str] = []
        self._started = time.monotonic() - manifest.seconds
        self.writer = CheckpointWriter(self.out if self.is_published() else self.path / CHECKPOINT)

    @property
    def activations(self) -> Path:
        """Folder for what the recipe holds on disk while it works."""
        return self.path / ACTIVATIONS

    @property
    def seconds(self) -> float:
        """Working time, of all sessions."""
        return time.monotonic() - self._started

    @property
    def records(self) -> dict[int, LayerRecord]:
        """The finished blocks by their number."""
        return {int(index): record for index, record in self.manifest.blocks.items()}

    def save(self, **changes: object) -> None:
        """Write the manifest with these changes: from now on they are what a resume finds."""
        changed = self.manifest.model_copy(update={**changes, "seconds": self.seconds})
        write_manifest(self.path / MANIFEST, changed)
        self.manifest = changed

    def commit_layer(
        self,
        index: int,
        file: str,
        state: Mapping[str, Tensor | StoredStates],
        record: Callable[..., LayerRecord],
    ) -> None:
        """Block `index`, whose shard `file` the writer has written, is finished.

        Args:
            index: its number.
            file: its shard.
            state: what the next block needs; empty where it needs nothing.
            record: makes the record of the shard and the stored state.
        """
        stored = self._save_state(index, state)
        shard = StoredFile(file=file, sha256=self.writer.digests[file])
        blocks = {**self.manifest.blocks, str(index): record(shard=shard, state=stored)}
        self.save(blocks=blocks)
        for path in (self.path / STATES).iterdir():
            if not path.name.startswith(tuple(self._state_name(index - back) for back in range(STATES_KEPT))):
                path.unlink()

    def adopt_all(self) -> None:
        """Enter all shards of a finished checkpoint into the writer's index."""
        for file, digest in sorted(self.manifest.finished.items()):
            self.writer.adopt_shard(file, digest)

    @staticmethod
    def _state_name(index: int) -> str:
        """What the files of the state after block `index` begin with."""
        return f"after-{index:05d}."

    def _save_state(self, index: int, state: Mapping[str, Tensor | StoredStates]) -> list[StateFile]:
        """Small tensors go into one file; what the recipe has on disk is linked to."""
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
        """The state after block `index`, in memory of its own (aligned as fresh tensors are: sums depend on it)."""
        state: dict[str, Tensor | StoredStates] = {}
        for stored in self.records[index].state:
            path = self.path / STATES / stored.file
            if stored.tensor:
                state[stored.tensor] = StoredStates(path, torch.Size(stored.shape))
            else:
                state.update({name: tensor.clone() for name, tensor in load_file(path).items()})
        return state

    def finished_layers(self) -> dict[int, LayerRecord]:
        """The blocks that need not be done again; the rest are taken off the manifest.

        Where blocks pass a state on, these are the first ones, up to the last one whose state is whole; else all
        whose shards are whole.
        """
        records = self.records
        whole = {index for index, record in records.items() if self._is_whole(CHECKPOINT, record.shard)}
        for index in sorted(records.keys() - whole):
            self.notes.append(f"block {index}: its shard {records[index].shard.file} is damaged or missing")
        if any(record.state for record in records.values()):
            first = next(index for index in range(len(records) + 1) if index not in whole)
            while first and not self._has_state(records[first - 1]):
                if first == len(whole):
                    self.notes.append(f"block {first - 1}: its state is damaged or missing")
                first -= 1
            whole = set(range(first))
        if whole != records.keys():
            self.save(blocks={str(index): records[index] for index in sorted(whole)}, finished={})
        return {index: records[index] for index in sorted(whole)}

    def _has_state(self, record: LayerRecord) -> bool:
        return bool(record.state) and all(self._is_whole(STATES, stored) for stored in record.state)

    def _is_whole(self, folder: str, stored: StoredFile) -> bool:
        return _holds(self.path / folder / stored.file, stored.sha256)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors of the finished checkpoint in the places of others, and settle all shards: nothing changes them
        from here on.

        The new shards are written aside and named in the manifest before they take their places, so that a kill
        leaves either none or all of them to be found.
        """
        aside = CheckpointWriter(self.path / REPLACEMENTS)
        for file, shard in self.writer.changed_shards(tensors):
            aside.write_shard(file, shard)
        self.save(finished={**self.writer.digests, **aside.digests})
        self.settle()

    def settle(self) -> bool:
        """Move replacements in place. Returns whether all shards are then what the manifest says."""
        for path in sorted((self.path / REPLACEMENTS).iterdir()):
            if self.manifest.finished.get(path.name) == sha256_of(path):
                move(path, self.path / CHECKPOINT / path.name)
            else:
                path.unlink()
        finished = self.manifest.finished.items()
        return bool(finished) and all(
            self._is_whole(CHECKPOINT, StoredFile(file=file, sha256=digest)) for file, digest in finished
        )

    def is_published(self) -> bool:
        """Whether the checkpoint has taken its place at OUT, and only the clearing up is left."""
        return (
            bool(self.manifest.finished)
            and not (self.path / CHECKPOINT).exists()
            and all(_holds(self.out / file, digest) for file, digest in self.manifest.finished.items())
        )

    def publish(self) -> None:
        """Rename the checkpoint to OUT and remove the rest."""
        if not self.is_published():
            put_in_place(self.path / CHECKPOINT, self.out, self.path / REPLACED)
        remove_work(self.path)


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


@contextmanager
def open_work(out: Path, inputs: Inputs, restart: bool = False) -> Iterator[WorkFolder]:
    """Take up the work folder of `out`, or make it.

    On a failure, a folder that holds no finished block is removed; one that does is kept.

    Raises:
        WorkError: it is in use, or was begun with other inputs (`difference`).
    """
    path = work_path(out)
    path.mkdir(exist_ok=True)
    with _locked(path):
        _check_known(path)
        if (path / MANIFEST).is_file() and not restart:
            manifest = read_manifest(path / MANIFEST)
            reason = difference(manifest.inputs, inputs)
            if reason:
                raise WorkError(f"{path}: cannot be resumed, {reason}, or add --restart to discard that work")
        else:
            _clear(path, out)
            manifest = Manifest(version=1, inputs=inputs)
            write_manifest(path / MANIFEST, manifest)
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
            if not work.manifest.blocks and not (path / REPLACED).exists() and path.exists():
                remove_work(path)
            raise


def _clear(path: Path, out: Path) -> None:
    """Empty a work folder; what it was to replace goes back to where it was."""
    if (path / REPLACED).exists() and not out.exists():
        move(path / REPLACED, out)
    for name in sorted(KNOWN - {LOCK, MANIFEST}):
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
