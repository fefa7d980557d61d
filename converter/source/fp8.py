"""Sources in 8-bit floats, seen as bfloat16: a weight in float8_e4m3fn and the scale that it is multiplied by.

Three layouts are on the Hub: one scale a block of the weight (`weight_scale_inv` beside `weight_block_size` in
config.json: DeepSeek, Qwen), one a row and one a tensor (`weight_scale`: compressed-tensors' float-quantized).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from bwla_kernels.format.files import Entry
from torch import Tensor

SCALES = ("weight_scale_inv", "weight_scale")
ACTIVATION_SCALES = ("input_scale", "input_activation_scale", "activation_scale")
"""Scales of activations, which a conversion has no use for."""


def is_fp8(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that the weights are 8-bit floats in one of the layouts above."""
    method = quantization.get("quant_method")
    return method == "fp8" or (
        method == "compressed-tensors" and quantization.get("format") == "float-quantized"
    )


def block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where config.json gives them."""
    size = quantization.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return size[0], size[1]
    return None


def scale_name(name: str, entries: Mapping[str, Entry]) -> str | None:
    """Name of the scale beside the weight called `name`, if there is one."""
    stem = name.rpartition(".")[0]
    return next((f"{stem}.{key}" for key in SCALES if f"{stem}.{key}" in entries), None)


def plain_view(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors as they will be read: fp8 weights as bfloat16, without the scales."""
    hidden = {*SCALES, *ACTIVATION_SCALES}
    return {
        name: Entry(entry.file, entry.shape, torch.bfloat16) if _is_scaled(name, entries) else entry
        for name, entry in entries.items()
        if name.rpartition(".")[2] not in hidden
    }


def scale_problems(entries: Mapping[str, Entry], block: tuple[int, int] | None) -> Iterator[str]:
    """Say in words which fp8 weights cannot be read because their scale is missing or does not fit."""
    for name, entry in entries.items():
        if entry.dtype != torch.float8_e4m3fn:
            continue
        scale = scale_name(name, entries)
        if scale is None:
            yield f"{entry.file}: {name}: expected {' or '.join(SCALES)} beside this fp8 weight, found neither"
        elif not _fits(entry.shape, entries[scale].shape, block):
            blocks = f", or one for each block of {list(block)}" if block else ""
            yield (
                f"{entries[scale].file}: {scale}: expected one scale, one a row{blocks} of a weight of shape "
                f"{list(entry.shape)}, found shape {list(entries[scale].shape)}"
            )
        elif not entries[scale].dtype.is_floating_point or entries[scale].dtype.itemsize == 1:
            yield f"{entries[scale].file}: {scale}: expected a float dtype, found {entries[scale].dtype}"


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """weight float8 [N, K] times its scale ([], [1], [N], [N, 1] or one a block) -> bfloat16 [N, K]."""
    rows, columns = weight.shape
    if block is not None and scale.shape == _grid((rows, columns), block):
        factor = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    else:
        factor = scale.reshape(-1, 1)
    return (weight.float() * factor.float()).bfloat16()


def _is_scaled(name: str, entries: Mapping[str, Entry]) -> bool:
    return entries[name].dtype == torch.float8_e4m3fn and scale_name(name, entries) is not None


def _grid(weight: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a weight has, down and across."""
    return math.ceil(weight[0] / block[0]), math.ceil(weight[1] / block[1])


def _fits(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    if len(weight) != 2:
        return False
    allowed: list[tuple[int, ...]] = [(), (1,), (1, 1), (weight[0],), (weight[0], 1)]
    return scale in allowed or (block is not None and scale == _grid((weight[0], weight[1]), block))
