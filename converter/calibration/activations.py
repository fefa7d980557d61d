"""Hidden states of all calibration samples, in memory or, where they do not fit, in a file.

A file is read and written a few samples at a time with plain reads and writes instead of a memory map: only the part
that was asked for is in memory, and each part is a newly allocated tensor, as it is without a file. The alignment of
a tensor decides how sums are split up, and with it their last bits.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bwla_converter.calibration.distributed import Processes
from bwla_converter.common.atomic_files import sync
from torch import Tensor


@dataclass
class ActivationStore:
    """Where hidden states are kept.

    Attributes:
        folder: folder for the files; None keeps everything in memory.
        device: device of the parts that `Activations` returns.
        processes: the processes among which the samples are divided; each keeps its own.
    """

    folder: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    processes: Processes = field(default_factory=Processes)
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def keep(self, shape: torch.Size, parts: Iterable[Tensor]) -> "Activations":
        """Store hidden states of `shape` [S, T, hidden], given in consecutive parts [S_i, T, hidden], as float32."""
        with self.writer(shape[0]) as writer:
            for part in parts:
                writer.append(part)
        return writer.activations

    def writer(self, count: int, dtype: torch.dtype = torch.float32) -> "ActivationWriter":
        """Return a writer of the activations of `count` samples, to be used in a `with` statement."""
        return ActivationWriter(self, count, dtype)

    def empty(self) -> "Activations":
        """Return hidden states of no samples."""
        return Activations(self, torch.empty(0, 0, 0), None)

    def take(self, source: "Tensor | StoredStates | None") -> "Activations":
        """Return the hidden states that an earlier session stored in a tensor or in a file, which is left unchanged.

        Args:
            source: the hidden states of all samples; with several processes, process 0 has them and the others None.
        """
        if self.processes.world_size > 1:
            whole = read_samples(source, 0, source.shape[0]) if isinstance(source, StoredStates) else source
            source = self.processes.scatter(whole)
        assert source is not None
        if isinstance(source, Tensor):
            return self.keep(source.shape, [source])
        if self.folder is None:
            return self.keep(
                source.shape, (read_samples(source, first, 1) for first in range(source.shape[0]))
            )
        path = self.new_file()
        path.hardlink_to(source.path)
        return Activations(self, None, replace(source, path=path))

    def new_file(self) -> Path:
        """Return the path of a new file."""
        assert self.folder is not None
        self.folder.mkdir(exist_ok=True)
        return self.folder / f"{next(self._numbers)}.bin"


@dataclass(frozen=True)
class StoredStates:
    """A file that contains the values of a tensor [S, T, hidden] and nothing else."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype = torch.float32

    def link_to(self, path: Path) -> None:
        """Create a hard link to the file at `path`, durably; the file is never changed afterwards."""
        path.hardlink_to(self.path)
        sync(path)
        sync(path.parent)


def read_samples(stored: StoredStates, first: int, count: int) -> Tensor:
    """Read `count` consecutive samples from number `first` on [count, T, hidden].

    Raises:
        OSError: the file is too short.
    """
    part = torch.empty(count, *stored.shape[1:], dtype=stored.dtype)
    with stored.path.open("rb") as file:
        file.seek(first * part[:1].nbytes)
        count_read = file.readinto(_bytes_of(part))
    if count_read != part.nbytes:
        raise OSError(f"{stored.path}: expected {part.nbytes} bytes of hidden states, found {count_read}")
    return part


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    array: np.ndarray[Any, Any] = tensor.view(torch.uint8).numpy()
    return array.data.cast("B")


class ActivationWriter:
    """Store activations part by part.

    Args:
        store: where they are stored.
        count: number of samples S.
        dtype: dtype in which they are stored.

    Attributes:
        activations: all of them, at the end of the `with` statement.
    """

    activations: "Activations"

    def __init__(self, store: ActivationStore, count: int, dtype: torch.dtype) -> None:
        self._store, self._count, self._dtype = store, count, dtype
        self._shape, self._written = torch.Size((0, 0, 0)), 0
        self._whole = torch.empty(self._shape)
        self._path = store.new_file() if store.folder is not None else None
        self._file = self._path.open("wb") if self._path is not None else None

    def append(self, part: Tensor) -> None:
        """Store the activations of the next samples [S_i, T, K]."""
        if not self._written:
            self._shape = torch.Size((self._count, *part.shape[1:]))
            if self._file is None:
                self._whole = torch.empty(self._shape, dtype=self._dtype)
        if self._file is None:
            self._whole[self._written : self._written + len(part)] = part
        else:
            self._file.write(_bytes_of(part.to("cpu", self._dtype).contiguous()))
        self._written += len(part)

    def __enter__(self) -> "ActivationWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None or self._path is None:
            self.activations = Activations(self._store, self._whole, None)
        else:
            self._file.close()
            stored = StoredStates(self._path, self._shape, self._dtype)
            self.activations = Activations(self._store, None, stored)


class Activations:
    """Hidden states [S, T, hidden], read a few samples at a time. Created by `ActivationStore.keep` and `take`."""

    def __init__(self, store: ActivationStore, tensor: Tensor | None, stored: StoredStates | None) -> None:
        self._store, self._tensor, self._stored = store, tensor, stored
        if stored is not None:
            weakref.finalize(self, stored.path.unlink, missing_ok=True)

    @property
    def shape(self) -> torch.Size:
        """The shape [S, T, hidden]."""
        if self._tensor is not None:
            return self._tensor.shape
        assert self._stored is not None
        return self._stored.shape

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the samples of the given indices [n]: [n, T, hidden]."""
        if self._tensor is not None:
            return self._tensor[indices].to(self._store.device)
        assert self._stored is not None
        parts = [read_samples(self._stored, index, 1) for index in indices.tolist()]
        return torch.cat(parts).to(self._store.device)

    def split(self, count: int) -> Iterator[Tensor]:
        """Yield consecutive parts of `count` samples; the last one may be smaller."""
        for first in range(0, len(self), count):
            size = min(count, len(self) - first)
            if self._tensor is not None:
                yield self._tensor[first : first + size].to(self._store.device)
            else:
                assert self._stored is not None
                yield read_samples(self._stored, first, size).to(self._store.device)

    def map(self, change: Callable[[Tensor], Tensor], count: int) -> "Activations":
        """Return new hidden states: `change` applied to each part of `count` samples."""
        return self._store.keep(self.shape, (change(part) for part in self.split(count)))

    def mean_square(self) -> float:
        """Return the mean of the squares of all values."""
        total = sum(float(part.double().square().sum()) for part in self.split(1))
        return total / self.shape.numel()

    def stored(self) -> Tensor | StoredStates:
        """Return what to store for a later `ActivationStore.take`: a tensor, or the file that holds them already.

        With several processes, process 0 gets the hidden states of all of them.
        """
        if self._store.processes.world_size > 1:
            return self._store.processes.gather(torch.cat(list(self.split(len(self)))))
        if self._tensor is not None:
            return self._tensor
        assert self._stored is not None
        return self._stored
