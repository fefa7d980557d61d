"""Source models with BitNet weights (quant_method "bitnet"): three values and one scale for each linear.

Offline, `weight` is uint8 [N / 4, K] with four values of two bits in a byte, those of rows i, N / 4 + i, N / 2 + i and
3 N / 4 + i, and `weight_scale` has one value: transformers' class BitLinear divides by it, AutoBitLinear multiplies.
Online, the weights have 16 bits and are rounded to three values each time they are used
(transformers/integrations/bitnet.py; BitNet b1.58, arXiv 2402.17764).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import Entry
from torch import Tensor

SCALE = "weight_scale"
VALUES_PER_BYTE = 4
MULTIPLIES = "autobitlinear"
"""The `linear_class` whose weights are multiplied by their scale; those of the other one are divided by it."""


def is_bitnet(quantization: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` describes BitNet weights."""
    return quantization.get("quant_method") == "bitnet"


def check_config(quantization: Mapping[str, Any], path: str) -> None:
    """Check that the weights are stored with their values, and the linears have no norm of their own.

    Raises:
        SourceError: they are not, or they have.
    """
    if quantization.get("use_rms_norm"):
        raise SourceError(
            f"{path}: expected BitNet linears without a norm of their own, found use_rms_norm, for which vLLM has no "
            "class: use another model"
        )
    if quantization.get("quantization_mode", "offline") != "offline":
        raise SourceError(
            f"{path}: expected BitNet weights that are stored in three values (quantization_mode offline), found "
            f"{quantization['quantization_mode']}: convert the model's packed version instead"
        )


def linear_class(quantization: Mapping[str, Any]) -> str:
    """Return transformers' name of the class of the linears."""
    return str(quantization.get("linear_class", "bitlinear"))


def parts_of(name: str, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the names of a packed weight and its scale; empty for a tensor that is stored as it is."""
    stem, _, key = name.rpartition(".")
    scale = f"{stem}.{SCALE}"
    packed = key == "weight" and name in entries and entries[name].dtype == torch.uint8
    return (name, scale) if packed and scale in entries else ()


def dequantized_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors as they are read: packed weights as float32, which holds them exactly, without scales."""
    read: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name.rpartition(".")[2] == SCALE:
            continue
        if parts_of(name, entries) and len(entry.shape) == 2:
            shape = (VALUES_PER_BYTE * entry.shape[0], entry.shape[1])
            entry = replace(entry, shape=shape, dtype=torch.float32)
        read[name] = entry
    return read


def packed_problems(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Yield a message for every packed weight that has no scale, or more than one."""
    for name, entry in entries.items():
        if entry.dtype != torch.uint8 or not name.endswith(".weight"):
            continue
        parts = parts_of(name, entries)
        if not parts:
            yield f"{entry.file}: {name}: expected {SCALE} for this BitNet weight, found none"
            continue
        scale = parts[1]
        if entries[scale].shape not in ((), (1,)) or not entries[scale].dtype.is_floating_point:
            yield (
                f"{entries[scale].file}: {scale}: expected one float value, found "
                f"{str(entries[scale].dtype).removeprefix('torch.')} {list(entries[scale].shape)}"
            )


def dequantize(packed: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Return a weight, float32 [N, K].

    Args:
        packed: uint8 [N / 4, K].
        scale: one value, any float dtype.
        kind: transformers' name of the linear's class, see `linear_class`.

    Raises:
        SourceError: a byte holds a value that is none of the three, or the scale is not positive and finite.
    """
    value = float(scale.float().reshape(()))
    if not 0 < value < float("inf"):
        raise SourceError(f"expected a positive, finite weight_scale, found {value:g}: download it again")
    if bool(((packed & (packed >> 1)) & 0b01010101).any()):
        raise SourceError("a BitNet weight has values other than -1, 0 and 1: download it again")
    codes = torch.cat([(packed >> (2 * i)) & 3 for i in range(VALUES_PER_BYTE)]).float() - 1
    factor = scale.float().reshape(())
    return codes * factor if kind == MULTIPLIES else codes / factor
