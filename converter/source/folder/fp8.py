"""Source models with fp8 weights: float8_e4m3fn with scales, read as bfloat16.

Three layouts exist on the Hub: one scale per block of the weight (`weight_scale_inv`, with `weight_block_size` in
config.json: DeepSeek, Qwen), one per row and one per tensor (`weight_scale`: compressed-tensors' float-quantized).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from bwla_kernels.format.files import Entry
from torch import Tensor

SCALES = ("weight_scale_inv", "weight_scale")
ACTIVATION_SCALES = ("input_scale", "input_activation_scale", "activation_scale")
"""Scales of activations. The conversion ignores them."""


def is_fp8(quantization: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` describes fp8 weights in one of the layouts above."""
    method = quantization.get("quant_method")
    return method == "fp8" or (
        method == "compressed-tensors" and quantization.get("format") == "float-quantized"
    )


def scale_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a scale block; None if `quantization_config` does not give them."""
    size = quantization.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return None


def scale_name(name: str, entries: Mapping[str, Entry]) -> str | None:
    """Return the name of the scale that is stored for the weight `name`, if there is one."""
    stem = name.rpartition(".")[0]
    return next((f"{stem}.{key}" for key in SCALES if f"{stem}.{key}" in entries), None)


def parts_of(name: str, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the names of an fp8 weight and its scale; empty for another tensor, or one without a scale."""
    scale = scale_name(name, entries) if entries[name].dtype == torch.float8_e4m3fn else None
    return () if scale is None else (name, scale)


def dequantized_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors as they are read: fp8 weights as bfloat16, without any scales."""
    scales = {*SCALES, *ACTIVATION_SCALES}
    return {
        name: replace(entry, dtype=torch.bfloat16) if _is_scaled(name, entries) else entry
        for name, entry in entries.items()
        if name.rpartition(".")[2] not in scales
    }


def scale_problems(entries: Mapping[str, Entry], block: tuple[int, int] | None) -> Iterator[str]:
    """Yield a message for every fp8 weight whose scale is missing or does not fit."""
    for name, entry in entries.items():
        if entry.dtype != torch.float8_e4m3fn:
            continue
        scale = scale_name(name, entries)
        if scale is None:
            yield f"{entry.file}: {name}: expected {' or '.join(SCALES)} for this fp8 weight, found neither"
        elif not _fits(entry.shape, entries[scale].shape, block):
            blocks = f", or one per block of {list(block)}," if block else ""
            yield (
                f"{entries[scale].file}: {scale}: expected one scale, one per row{blocks} for a weight of shape "
                f"{list(entry.shape)}, found shape {list(entries[scale].shape)}"
            )
        elif not entries[scale].dtype.is_floating_point or entries[scale].dtype.itemsize == 1:
            yield f"{entries[scale].file}: {scale}: expected a float dtype, found {entries[scale].dtype}"


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Multiply weight float8 [N, K] by its scale ([], [1], [1, 1], [N], [N, 1] or one per block): bfloat16 [N, K]."""
    rows, columns = weight.shape
    if block is not None and scale.shape == _grid((rows, columns), block):
        factor = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    else:
        factor = scale.reshape(-1, 1)
    return (weight.float() * factor.float()).bfloat16()


def _is_scaled(name: str, entries: Mapping[str, Entry]) -> bool:
    """Return whether this is an fp8 weight with a scale."""
    return entries[name].dtype == torch.float8_e4m3fn and scale_name(name, entries) is not None


def _grid(weight: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many scale blocks a weight has along its rows and columns."""
    return math.ceil(weight[0] / block[0]), math.ceil(weight[1] / block[1])


def _fits(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Return whether the shape of a scale fits that of its weight."""
    if len(weight) != 2:
        return False
    allowed: list[tuple[int, ...]] = [(), (1,), (1, 1), (weight[0],), (weight[0], 1)]
    return scale in allowed or (block is not None and scale == _grid((weight[0], weight[1]), block))
