"""A whole checkpoint folder, checked by its safetensors headers alone: no tensor is read.

vLLM's stock model classes serve NaN for a missing tensor of a quantized model and narrow an oversized one
silently, so completeness and shapes are settled here, before a loader starts.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.format.files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    read_folder,
    read_headers,
    read_json,
    read_tensors,
    scan_folder,
)
from bwla_kernels.format.head import HEAD_MODULE, HeadSpec, head_tensor_specs
from bwla_kernels.format.layer import FLOAT_DTYPES, LayerSpec, TensorSpec, shape_problem, tensor_specs
from bwla_kernels.format.schema import BWLAFormat, parse_config

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Entry",
    "check_folder",
    "read_folder",
    "read_headers",
    "read_json",
    "read_tensors",
    "scan_folder",
]

_BLOCK_NAME = re.compile(r"(?P<stem>.*?\.)(?P<index>\d+)(?P<leaf>\..*)")


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
    problem = problem or _plain_problem(entries, specs, config.lm_head is not None, folder)
    problem = problem or _stray_problem(entries, folder)
    if problem:
        raise FormatError(f"{problem}; {advice}")
    count = _block_count(raw_config, config_path)
    for name in specs:
        match = _BLOCK_NAME.fullmatch(name)
        if match and int(match["index"]) >= count:
            raise FormatError(
                f"{config_path}: expected num_hidden_layers to be more than {match['index']}, because {name} is "
                f"stored, found {count}; {advice}"
            )
    for name in _expected_names(specs, count):
        if name not in specs and not config.is_ignored(name):
            raise FormatError(f"{folder}: {name}{suffix} is missing, although other blocks have it; {advice}")
    return specs


def plain_names(entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec], with_head: bool) -> list[str]:
    """Names of the stored tensors that every loader takes as they are.

    Args:
        entries: all tensors.
        specs: the quantized linears.
        with_head: whether the head is quantized.
    """
    head = {f"{HEAD_MODULE}.{key}" for key in head_tensor_specs(HeadSpec(1, 1))} if with_head else set()
    return [name for name in entries if name.rpartition(".")[0] not in specs and name not in head]


def _plain_problem(
    entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec], with_head: bool, folder: Path
) -> str | None:
    """The first tensor that is stored as it was and that loaders would cast without a word."""
    for name in plain_names(entries, specs, with_head):
        problem = shape_problem(
            TensorSpec(entries[name].shape, FLOAT_DTYPES), entries[name].shape, entries[name].dtype
        )
        if problem:
            return f"{folder / entries[name].file}: {name}: {problem}"
    return None


def _stray_problem(entries: Mapping[str, Entry], folder: Path) -> str | None:
    """A weight file that is not part of the checkpoint: vLLM may read it over the others."""
    stray = {path.name for path in folder.glob("*.safetensors")} - {entry.file for entry in entries.values()}
    return (
        f"{folder / min(stray)}: expected only files of this checkpoint, found one that is not"
        if stray
        else None
    )


def _head_problem(entries: Mapping[str, Entry], raw_config: Mapping[str, Any], folder: Path) -> str | None:
    """The first difference between the stored 8-bit head and what config.json describes."""
    text_config = raw_config.get("text_config") or raw_config
    sizes = text_config if isinstance(text_config, Mapping) else {}
    vocabulary, hidden = sizes.get("vocab_size"), sizes.get("hidden_size")
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


def _block_count(raw_config: Mapping[str, Any], path: Path) -> int:
    text_config = raw_config.get("text_config") or raw_config
    count = text_config.get("num_hidden_layers") if isinstance(text_config, Mapping) else None
    if not isinstance(count, int) or isinstance(count, bool):
        raise FormatError(
            f"{path}: expected num_hidden_layers to be a number, found {count!r:.40}; restore this file"
        )
    return count


def _expected_names(specs: Mapping[str, LayerSpec], count: int) -> Iterator[str]:
    """Every decoder block must hold the same linears: what one block has, the others are expected to have."""
    kinds = {(m["stem"], m["leaf"]) for m in map(_BLOCK_NAME.fullmatch, specs) if m}
    for index in range(count):
        yield from (f"{stem}{index}{leaf}" for stem, leaf in sorted(kinds))


def _spec_of(config: BWLAFormat, name: str, n: int, k: int, bias: bool, file: Path) -> LayerSpec:
    spec = config.layer_spec(name, n, k, bias)
    if spec is None:
        raise FormatError(
            f"{file}: {name} is stored in one bit, but config.json gives no rotation for it or ignores it; "
            "convert or download the model again"
        )
    return spec
