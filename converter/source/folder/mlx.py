"""Source models that MLX has quantized to one or two bits (Bonsai): a scale and a bias for each group of columns.

`weight` is uint32 [N, K * bits / 32] with the first column in the lowest bits, `scales` and `biases` are
[N, K / group_size]; a code q stands for q * scale + bias (MLX, mlx.core.quantize, mode affine). One bit with bias -d
and scale 2 d stands for -d and d, two bits with bias -d and scale d for -d, 0 and d.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import Entry
from torch import Tensor

WORD = 32
BITS = (1, 2)
SCALES, BIASES = "scales", "biases"


def is_mlx(quantization: Mapping[str, Any]) -> bool:
    """Return whether a `quantization` of config.json is MLX's, which names no method."""
    return "quant_method" not in quantization and {"bits", "group_size"} <= quantization.keys()


def check_config(quantization: Mapping[str, Any], path: str) -> None:
    """Check that all weights have the same few bits.

    Raises:
        SourceError: they have more bits, or not all the same.
    """
    bits, size, mode = (quantization.get(key) for key in ("bits", "group_size", "mode"))
    if bits not in BITS or not isinstance(size, int) or size < 1 or mode not in (None, "affine"):
        raise SourceError(
            f"{path}: expected an unquantized model or MLX weights of 1 or 2 bits, found {bits} bits in groups of "
            f"{size}{f', mode {mode}' if mode else ''}: convert the original checkpoint instead"
        )
    others = [key for key, value in quantization.items() if isinstance(value, dict | bool)]
    if others:
        raise SourceError(
            f"{path}: expected the same bits for all MLX weights, found settings for {others[0]}: convert the original "
            "checkpoint instead"
        )


def parts_of(name: str, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the names of a packed weight, its scales and its biases; empty for a tensor that is stored as it is."""
    stem, _, key = name.rpartition(".")
    parts = name, f"{stem}.{SCALES}", f"{stem}.{BIASES}"
    packed = key == "weight" and name in entries and entries[name].dtype == torch.uint32
    return parts if packed and all(part in entries for part in parts) else ()


def dequantized_entries(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the tensors as they are read: packed weights in the dtype of their scales, without scales and biases."""
    read: dict[str, Entry] = {}
    for name, entry in entries.items():
        stem, _, key = name.rpartition(".")
        if key in (SCALES, BIASES) and parts_of(f"{stem}.weight", entries):
            continue
        parts = parts_of(name, entries)
        if parts and len(entry.shape) == 2:
            shape = (entry.shape[0], entry.shape[1] * WORD // quantization["bits"])
            entry = replace(entry, shape=shape, dtype=entries[parts[1]].dtype)
        read[name] = entry
    return read


def packed_problems(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every packed weight whose scales or biases are missing or do not fit."""
    for name, entry in entries.items():
        if entry.dtype != torch.uint32 or not name.endswith(".weight"):
            continue
        parts = parts_of(name, entries)
        if not parts:
            yield f"{entry.file}: {name}: expected {SCALES} and {BIASES} for this MLX weight, found none"
            continue
        columns = entry.shape[-1] * WORD // quantization["bits"]
        groups = (entry.shape[0], columns // quantization["group_size"])
        for part in parts[1:]:
            if entries[part].shape != groups or not entries[part].dtype.is_floating_point:
                yield (
                    f"{entries[part].file}: {part}: expected float values {list(groups)}, found "
                    f"{str(entries[part].dtype).removeprefix('torch.')} {list(entries[part].shape)}"
                )


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Return a weight [N, K] in the dtype of its scales.

    Args:
        packed: uint32 [N, K * bits / 32].
        scales, biases: [N, K / group_size], any float dtype.
        bits: bits of a code.
    """
    words = packed.view(torch.int32)
    codes: Tensor = torch.stack(
        [(words >> shift) & (2**bits - 1) for shift in range(0, WORD, bits)], -1
    ).flatten(1)
    cells = codes.unflatten(1, (scales.shape[1], -1)).float()
    values: Tensor = cells * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)
    return values.flatten(1).to(scales.dtype)
