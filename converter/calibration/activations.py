"""Hidden states of all calibration windows, in memory or, where they would not fit, in a file.

A file is read and written a few windows at a time with plain reads and writes: what is in memory is what was asked
for, and every part lies in fresh memory, as in the other case (where numbers lie decides how sums are split up, and
so their last bits).
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bwla_converter.calibration.distributed import Ranks
from bwla_converter.common.atomic_files import sync
from torch import Tensor

ITEM = torch.float32.itemsize


@dataclass
class ActivationStore:
    """Where hidden states are kept.

    Attributes:
        folder: for the files; None keeps everything in memory.
        device: where parts are handed out.
        ranks: the processes that share out the windows; each keeps its own.
    """

    folder: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=Ranks)
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def keep(self, shape: torch.Size, parts: Iterable[Tensor]) -> "Activations":
        """Take over hidden states of `shape` [S, T, hidden], in consecutive parts [S_i, T, hidden], as float32."""
        if self.folder is None:
            whole, first = torch.empty(shape), 0
            for part in parts:
                whole[first : first + len(part)] = part
                first += len(part)
            return Activations(self, whole, None)
        path = self._new_file()
        with path.open("wb") as file:
            for part in parts:
                file.write(part.to("cpu", torch.float32).contiguous().numpy().data.cast("B"))
        return Activations(self, None, StoredStates(path, shape))

    def empty(self) -> "Activations":
        """No windows at all."""
        return Activations(self, torch.empty(0, 0, 0), None)

    def take(self, source: "Tensor | StoredStates | None") -> "Activations":
        """Hidden states of an earlier session: a tensor, or a file, which stays where it is.

        Of several ranks the first gives those of all windows, the others None.
        """
        if self.ranks.size > 1:
            whole = read_windows(source, 0, source.shape[0]) if isinstance(source, StoredStates) else source
            source = self.ranks.scatter(whole)
        assert source is not None
        if isinstance(source, Tensor):
            return self.keep(source.shape, [source])
        if self.folder is None:
            return self.keep(
                source.shape, (read_windows(source, first, 1) for first in range(source.shape[0]))
            )
        path = self._new_file()
        path.hardlink_to(source.path)
        return Activations(self, None, StoredStates(path, source.shape))

    def _new_file(self) -> Path:
        assert self.folder is not None
        self.folder.mkdir(exist_ok=True)
        return self.folder / f"{next(self._numbers)}.f32"


@dataclass(frozen=True)
class StoredStates:
    """A file of float32 [S, T, hidden], nothing else in it."""

    path: Path
    shape: torch.Size

    def link_to(self, path: Path) -> None:
        """Let the same file, which nobody changes any more, be at `path` too, and see that it lasts."""
        path.hardlink_to(self.path)
        sync(path)
        sync(path.parent)


def read_windows(stored: StoredStates, first: int, count: int) -> Tensor:
    """Some consecutive windows, float32 [count, T, hidden]."""
    part = torch.empty(count, *stored.shape[1:])
    with stored.path.open("rb") as file:
        file.seek(first * part[:1].numel() * ITEM)
        found = file.readinto(part.numpy().data.cast("B"))
    if found != part.numel() * ITEM:
        raise OSError(f"{stored.path}: expected {part.numel() * ITEM} bytes of hidden states, found {found}")
    return part


class Activations:
    """Hidden states [S, T, hidden] that are handed out by windows. Made by an `ActivationStore`."""

    def __init__(self, store: ActivationStore, tensor: Tensor | None, stored: StoredStates | None) -> None:
        self._store, self._tensor, self._stored = store, tensor, stored
        if stored is not None:
            weakref.finalize(self, stored.path.unlink, missing_ok=True)

    @property
    def shape(self) -> torch.Size:
        """[S, T, hidden]."""
        if self._tensor is not None:
            return self._tensor.shape
        assert self._stored is not None
        return self._stored.shape

    def __len__(self) -> int:
        """Windows."""
        return self.shape[0]

    def __getitem__(self, windows: Tensor) -> Tensor:
        """The windows of these numbers [n] -> [n, T, hidden]."""
        if self._tensor is not None:
            return self._tensor[windows].to(self._store.device)
        assert self._stored is not None
        parts = [read_windows(self._stored, number, 1) for number in windows.tolist()]
        return torch.cat(parts).to(self._store.device)

    def split(self, count: int) -> Iterator[Tensor]:
        """Consecutive parts of `count` windows, the last one may be smaller."""
        for first in range(0, len(self), count):
            size = min(count, len(self) - first)
            if self._tensor is not None:
                yield self._tensor[first : first + size].to(self._store.device)
            else:
                assert self._stored is not None
                yield read_windows(self._stored, first, size).to(self._store.device)

    def map(self, change: Callable[[Tensor], Tensor], count: int) -> "Activations":
        """What `change` makes of each part of `count` windows."""
        return self._store.keep(self.shape, (change(part) for part in self.split(count)))

    def mean_square(self) -> float:
        """Mean of the squares of all values."""
        total = sum(float(part.double().square().sum()) for part in self.split(1))
        return total / self.shape.numel()

    def stored(self) -> Tensor | StoredStates:
        """What to write down of them: the tensor, or the file that holds them already; on rank 0 that of all ranks."""
        if self._store.ranks.size > 1:
            return self._store.ranks.gather(torch.cat(list(self.split(len(self)))))
        if self._tensor is not None:
            return self._tensor
        assert self._stored is not None
        return self._stored
