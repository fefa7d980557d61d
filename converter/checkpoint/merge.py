"""Merge safetensors files into larger ones, without reading more than a piece of a tensor into memory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bwla_converter.common.atomic_files import whole_file
from bwla_converter.planning.disk import MAX_FILE_BYTES
from bwla_kernels.format.files import DTYPES, SINGLE_FILE

PIECE_BYTES = 2**24
ALIGNMENT = 8
"""The data of a safetensors file begins at a multiple of this."""


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a safetensors file: its name, its header, and where in which file its bytes are."""

    name: str
    header: Mapping[str, Any]
    path: Path
    start: int
    size: int


def part_name(index: int) -> str:
    """Return the name of a part of an unfinished checkpoint."""
    return f"part-{index + 1:05d}.safetensors"


def is_part(file: str) -> bool:
    """Return whether a file is a part of an unfinished checkpoint, by its name."""
    return file.startswith("part-")


def shard_name(index: int, count: int) -> str:
    """Return the name of one of `count` files of a checkpoint, as transformers names them."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def group_parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Group consecutive parts into files of at most `MAX_FILE_BYTES`; a larger part gets its own.

    The groups after the first ones stay the same where the parts of these are left out.
    """
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > MAX_FILE_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def merge_files(parts: Sequence[Path], target: Path) -> None:
    """Write all tensors of `parts` into the safetensors file `target`, atomically.

    Larger dtypes come first, as in all safetensors files, so that every tensor is aligned.

    Raises:
        WriteError: the disk is full or read-only.
    """
    tensors = [tensor for path in parts for tensor in _tensors(path)]
    tensors.sort(key=lambda tensor: -DTYPES[tensor.header["dtype"]].itemsize)
    with whole_file(target) as partial, partial.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            with tensor.path.open("rb") as stored:
                stored.seek(tensor.start)
                _copy(stored, file, tensor.size)


def _tensors(path: Path) -> Iterable[_StoredTensor]:
    """Yield the tensors of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield _StoredTensor(name, entry, path, 8 + size + start, stop - start)


def _header(tensors: Sequence[_StoredTensor]) -> bytes:
    """Return the beginning of a safetensors file with these tensors: the size of the header, and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {**tensor.header, "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _copy(stored: BinaryIO, file: BinaryIO, size: int) -> None:
    while size:
        piece = stored.read(min(size, PIECE_BYTES))
        if not piece:
            raise OSError(f"{stored.name}: expected {size} more bytes, found the end of the file")
        file.write(piece)
        size -= len(piece)
