"""Read the JSON files and safetensors headers of a model folder, and describe every damage that is found.

The safetensors library checks that a header's offsets tile the file; it does not notice a key that appears twice.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import BWLAError, FormatError
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors headers."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        dtype: its dtype.
        key: its name in the file, where that differs from the name it is known by; else empty.
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str = ""


@dataclass(frozen=True)
class Scan:
    """The tensors of a folder and its problems.

    Attributes:
        entries: every tensor that can be read.
        problems: one sentence for each file or tensor that contradicts the index or the format.
        lost: tensors that the index lists in files that cannot be read.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys, of which json would silently keep the last."""
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} appears twice")
    return table


def _parse_json(text: str) -> Any:
    """Parse JSON without duplicate keys; raise ValueError for any problem."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, error: type[BWLAError] = FormatError) -> dict[str, Any]:
    """Read a JSON object without duplicate keys.

    Raises:
        error: the file is missing, is not JSON, has a duplicate key, or is not an object.
    """
    try:
        data = _parse_json(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}): check the folder") from None
    except ValueError as cause:  # includes bad UTF-8 and bad JSON
        raise error(f"{path}: not valid JSON ({cause}): the file is damaged, get it again") from None
    if not isinstance(data, dict):
        raise error(
            f"{path}: expected a JSON object, found {type(data).__name__}: the file is damaged, get it again"
        )
    return data


def read_headers(path: Path, error: type[BWLAError] = FormatError) -> dict[str, Entry]:
    """Read the shapes and dtypes of the tensors in one safetensors file.

    Raises:
        error: the file is missing, truncated or malformed, names a tensor twice, or holds a dtype that torch lacks.
    """
    if not path.is_file():
        raise error(f"{path}: the file is missing: download or convert the model again")
    entries = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                part = handle.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise error(f"{path}: {name} has dtype {part.get_dtype()}, which is not supported")
                entries[name] = Entry(path.name, tuple(part.get_shape()), dtype)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            _parse_json(file.read(size).decode("utf-8"))
    except (SafetensorError, OSError) as cause:
        raise error(
            f"{path}: not a complete safetensors file ({cause}): download or convert it again"
        ) from None
    except (ValueError, OverflowError) as cause:
        if isinstance(cause, BWLAError):
            raise
        raise error(
            f"{path}: its header is not valid ({cause}): the file is damaged, download or convert it again"
        ) from None
    return entries


def scan_folder(folder: Path) -> Scan:
    """List every tensor of a checkpoint folder, sharded with an index or in a single file, and all problems."""
    index_path = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if not index_path.is_file():
        if not single.is_file():
            return _unreadable(
                f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither: "
                "give a folder that holds a model in safetensors"
            )
        try:
            return Scan(read_headers(single))
        except FormatError as problem:
            return _unreadable(str(problem))
    try:
        weight_map = read_json(index_path).get("weight_map")
    except FormatError as problem:
        return _unreadable(str(problem))
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        return _unreadable(
            f"{index_path}: expected a weight_map of tensor to file, found none: get the index again"
        )
    outside = sorted({file for file in weight_map.values() if Path(file).name != file})
    if outside:
        return _unreadable(f"{index_path}: {outside[0]!r} is not a file of this folder: get the index again")
    if single.is_file() and SINGLE_FILE not in weight_map.values():
        # Loaders differ in which of the two they take.
        return _unreadable(
            f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found both, and the index does not list the file: "
            "remove the one that does not belong to this model"
        )
    return _scan_shards(folder, weight_map)


def _unreadable(problem: str) -> Scan:
    return Scan(problems=(problem,))


def _scan_shards(folder: Path, weight_map: Mapping[str, str]) -> Scan:
    """Read every file that the index lists, and compare their tensors with the index."""
    index_path = folder / INDEX_FILE
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    broken: set[str] = set()
    for file in sorted(set(weight_map.values())):
        try:
            stored = read_headers(folder / file)
        except FormatError as problem:
            problems.append(str(problem))
            broken.add(file)
            continue
        for name, entry in stored.items():
            if weight_map.get(name) != file:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                problems.append(
                    f"{index_path}: {name} is stored in {file}, but the index {listed}: get both again"
                )
            else:
                entries[name] = entry
    lost = {name for name, file in weight_map.items() if file in broken}
    problems += (
        f"{index_path}: {name} should be in {weight_map[name]}, but is not: get the index and that file again"
        for name in sorted(weight_map.keys() - entries.keys() - lost)
    )
    return Scan(entries, tuple(problems), frozenset(lost))


def read_folder(folder: Path, error: type[BWLAError] = FormatError) -> dict[str, Entry]:
    """List every tensor of a checkpoint folder, sharded with an index or in a single file.

    Raises:
        error: index and shards disagree, a shard is missing or damaged, or there are no weights; the message gives
            the first problem and the number of further ones.
    """
    scan = scan_folder(folder)
    if scan.problems:
        more = f" ({len(scan.problems) - 1} more such problems)" if len(scan.problems) > 1 else ""
        raise error(scan.problems[0] + more)
    return scan.entries


def each_tensor(
    folder: Path, entries: Mapping[str, Entry], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors by name, one at a time, file by file; open each file once.

    Opening a file parses its header, which takes as long as reading many of the small tensors of experts.

    Args:
        folder: the checkpoint.
        entries: where its tensors are, from `read_folder`.
        names: the tensors to read.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(entries[name].file, []).append(name)
    for file, own in sorted(by_file.items()):
        with safe_open(folder / file, framework="pt") as handle:
            for name in own:
                yield name, handle.get_tensor(entries[name].key or name)


def read_tensors(folder: Path, entries: Mapping[str, Entry], names: Sequence[str]) -> dict[str, Tensor]:
    """Read tensors by name, and nothing else; open each file once.

    Args:
        folder: the checkpoint.
        entries: where its tensors are, from `read_folder`.
        names: the tensors to read; the result keeps their order.
    """
    tensors = dict(each_tensor(folder, entries, names))
    return {name: tensors[name] for name in names}
