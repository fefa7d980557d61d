"""A whole checkpoint folder, checked by its safetensors headers alone: no tensor is read.

vLLM's stock model classes serve NaN for a missing tensor of a quantized model and narrow an oversized one
silently, so completeness and shapes are settled here, before a loader starts.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import BWLAError, FormatError
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.format.head import HEAD_MODULE, HeadSpec, head_tensor_specs
from bwla_kernels.format.layer import LayerSpec, TensorSpec, shape_problem, tensor_specs
from bwla_kernels.format.schema import BWLAFormat, parse_config
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
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""

_BLOCK_NAME = re.compile(r"(?P<stem>.*?\.)(?P<index>\d+)(?P<leaf>\..*)")


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder: the file that holds it, its shape and dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate keys, of which json would silently keep the last."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return table


def read_json(path: Path, error: type[BWLAError] = FormatError) -> dict[str, Any]:
    """Read a JSON object without duplicate keys.

    Raises:
        error: the file is missing, is not JSON, has a duplicate key, or is not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}): check the folder") from None
    except ValueError as cause:  # bad UTF-8 and bad JSON too
        raise error(f"{path}: not valid JSON ({cause}): the file is damaged, get it again") from None
    if not isinstance(data, dict):
        raise error(
            f"{path}: expected a JSON object, found {type(data).__name__}: the file is damaged, get it again"
        )
    return data


def read_headers(path: Path, error: type[BWLAError] = FormatError) -> dict[str, Entry]:
    """Read the tensors' shapes and dtypes of one safetensors file.

    Raises:
        error: the file is missing, truncated or malformed, or holds a dtype that torch lacks.
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
    except (SafetensorError, OSError) as cause:
        raise error(
            f"{path}: not a complete safetensors file ({cause}): download or convert it again"
        ) from None
    return entries


def read_folder(folder: Path, error: type[BWLAError] = FormatError) -> dict[str, Entry]:
    """List every tensor of a checkpoint folder, sharded with an index or in a single file.

    Raises:
        error: index and shards disagree, a shard is missing or damaged, or there are no weights.
    """
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise error(
                f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither: "
                "give a folder that holds a model in safetensors"
            )
        return read_headers(folder / SINGLE_FILE, error)
    weight_map = read_json(index_path, error).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise error(f"{index_path}: expected a weight_map of tensor to file, found none: get the index again")
    outside = [file for file in weight_map.values() if Path(file).name != file]
    if outside:
        raise error(f"{index_path}: {outside[0]!r} is not a file of this folder: get the index again")
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_headers(folder / file, error).items():
            if weight_map.get(name) != file:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise error(
                    f"{index_path}: {name} is stored in {file}, but the index {listed}: get both again"
                )
            entries[name] = entry
    absent = sorted(weight_map.keys() - entries.keys())
    if absent:
        raise error(
            f"{index_path}: {absent[0]} should be in {weight_map[absent[0]]}, but is not "
            f"({len(absent)} such tensors): get the index and that file again"
        )
    return entries


def read_tensors(folder: Path, entries: Mapping[str, Entry], names: Sequence[str]) -> dict[str, Tensor]:
    """Read tensors by name, each file opened once; nothing else is brought into memory.

    Args:
        folder: the checkpoint.
        entries: where its tensors are, from `read_folder`.
        names: the tensors wanted; the result keeps their order.
    """
    tensors = {}
    for file in sorted({entries[name].file for name in names}):
        with safe_open(folder / file, framework="pt") as handle:
            for name in names:
                if entries[name].file == file:
                    tensors[name] = handle.get_tensor(name)
    return {name: tensors[name] for name in names}


def _layer_problems(name: str, entries: Mapping[str, Entry], spec: LayerSpec, folder: Path) -> str | None:
    prefix = name + "."
    stored = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    wanted: dict[str, TensorSpec] = tensor_specs(spec)
    for missing in wanted.keys() - stored.keys():
        return f"{folder}: {prefix}{missing} is missing, expected shape {list(wanted[missing].shape)}"
    for extra in sorted(stored.keys() - wanted.keys()):
        return f"{folder / stored[extra].file}: {prefix}{extra} is not part of the format (rank {spec.rank})"
    for key, want in wanted.items():
        problem = shape_problem(want, stored[key].shape, stored[key].dtype)
        if problem:
            return f"{folder / stored[key].file}: {prefix}{key}: {problem}"
    return None


def check_folder(folder: Path, entries: Mapping[str, Entry] | None = None) -> dict[str, LayerSpec]:
    """Check that a folder is a complete BWLA checkpoint, by config and headers.

    Args:
        folder: the checkpoint.
        entries: its tensors from `read_folder`, where the caller has them already.

    Returns: the spec of every quantized linear.

    Raises:
        FormatError: the first problem found, naming file and tensor.
    """
    config_path = folder / "config.json"
    raw_config = read_json(config_path)
    config = parse_config(raw_config.get("quantization_config") or {}, str(config_path))
    entries = read_folder(folder) if entries is None else entries
    advice = "convert or download the model again"
    suffix = ".weight_packed"
    specs = {}
    for key, entry in entries.items():
        if not key.endswith(suffix):
            continue
        name = key.removesuffix(suffix)
        rows, words = entry.shape if len(entry.shape) == 2 else (0, 0)
        has_bias = f"{name}.bias" in entries
        specs[name] = _spec_of(config, name, rows, words * PACK_FACTOR, has_bias, folder / entry.file)
        problem = _layer_problems(name, entries, specs[name], folder)
        if problem:
            raise FormatError(f"{problem}; {advice}")
    if not specs:
        raise FormatError(f"{folder}: expected quantized layers (*{suffix}), found none; {advice}")
    problem = _head_problem(entries, raw_config, folder) if config.lm_head else None
    if problem:
        raise FormatError(f"{problem}; {advice}")
    for name in _expected_names(specs, raw_config):
        if name not in specs and not config.is_ignored(name):
            raise FormatError(f"{folder}: {name}{suffix} is missing, although other blocks have it; {advice}")
    return specs


def _head_problem(entries: Mapping[str, Entry], raw_config: Mapping[str, Any], folder: Path) -> str | None:
    """The first difference between the stored 8-bit head and what config.json describes."""
    text_config = raw_config.get("text_config") or raw_config
    vocabulary, hidden = text_config.get("vocab_size"), text_config.get("hidden_size")
    if not isinstance(vocabulary, int) or not isinstance(hidden, int):
        return f"{folder / 'config.json'}: expected vocab_size and hidden_size, which an 8-bit head needs, found none"
    for key, want in head_tensor_specs(HeadSpec(vocabulary, hidden)).items():
        name = f"{HEAD_MODULE}.{key}"
        entry = entries.get(name)
        if entry is None:
            return f"{folder}: {name} is missing, expected shape {list(want.shape)}"
        problem = shape_problem(want, entry.shape, entry.dtype)
        if problem:
            return f"{folder / entry.file}: {name}: {problem}"
    return None


def _expected_names(specs: Mapping[str, LayerSpec], raw_config: Mapping[str, Any]) -> Iterator[str]:
    """Every decoder block must hold the same linears: what one block has, the others are expected to have."""
    text_config = raw_config.get("text_config") or raw_config
    count = text_config.get("num_hidden_layers")
    kinds = {(m["stem"], m["leaf"]) for m in map(_BLOCK_NAME.fullmatch, specs) if m}
    for index in range(count if isinstance(count, int) else 0):
        yield from (f"{stem}{index}{leaf}" for stem, leaf in sorted(kinds))


def _spec_of(config: BWLAFormat, name: str, n: int, k: int, bias: bool, file: Path) -> LayerSpec:
    spec = config.layer_spec(name, n, k, bias)
    if spec is None:
        raise FormatError(
            f"{file}: {name} is stored in one bit, but config.json gives no rotation for it or ignores it; "
            "convert or download the model again"
        )
    return spec
