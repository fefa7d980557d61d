"""Source models with MXFP4 experts, as gpt-oss is published: 4-bit floats, 32 to a scale, read as bfloat16.

Instead of a stacked tensor `gate_up_proj` [E, columns, rows] the files have `gate_up_proj_blocks`, uint8 [E, rows,
columns / 32, 16] with two values a byte, and `gate_up_proj_scales`, uint8 [E, rows, columns / 32], powers of two
(Open Compute Project, Microscaling Formats (MX) Specification 1.0).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from bwla_kernels.format.files import Entry
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"

VALUES = 32
"""Values that share a scale."""

CHUNK_SCALES = 2**20
"""Scales that are applied at a time: temporary tensors of 64 MB."""


def is_mxfp4(quantization: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` describes MXFP4 weights in the layout above."""
    return quantization.get("quant_method") == "mxfp4"


def packed_names(name: str, entries: Mapping[str, Entry]) -> tuple[str, str] | None:
    """Return the names of blocks and scales that the weight `name` is stored as; None if it is stored as it is."""
    names = f"{name}{BLOCKS}", f"{name}{SCALES}"
    return names if name not in entries and all(part in entries for part in names) else None


def dequantized_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors as they are read: in the place of blocks and scales, the weight in bfloat16."""
    read: dict[str, Entry] = {}
    for name, entry in entries.items():
        weight = name.removesuffix(BLOCKS).removesuffix(SCALES)
        if weight == name or packed_names(weight, entries) is None:
            read[name] = entry
        elif name.endswith(BLOCKS) and len(entry.shape) == 4:
            experts, rows, groups, _ = entry.shape
            read[weight] = replace(
                entry, shape=(experts, groups * VALUES, rows), dtype=torch.bfloat16, key=""
            )
    return read


def packed_problems(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Yield a message for blocks and scales that do not belong together."""
    for name, entry in entries.items():
        if not name.endswith(BLOCKS) or entry.dtype != torch.uint8:
            continue
        scales = f"{name.removesuffix(BLOCKS)}{SCALES}"
        if scales not in entries:
            yield f"{entry.file}: {name}: expected {scales} for these MXFP4 weights, found none"
        elif len(entry.shape) != 4 or entry.shape[-1] != VALUES // 2:
            yield f"{entry.file}: {name}: expected shape [E, N, K / {VALUES}, 16], found {list(entry.shape)}"
        elif (entries[scales].shape, entries[scales].dtype) != (entry.shape[:-1], torch.uint8):
            yield (
                f"{entries[scales].file}: {scales}: expected uint8 {list(entry.shape[:-1])}, found "
                f"{str(entries[scales].dtype).removeprefix('torch.')} {list(entries[scales].shape)}"
            )


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return a weight, bfloat16 [E, columns, rows], by transformers' own function.

    Args:
        blocks: uint8 [E, rows, columns / 32, 16].
        scales: uint8 [E, rows, columns / 32].
    """
    from transformers.integrations import convert_moe_packed_tensors

    weight: Tensor = convert_moe_packed_tensors(blocks, scales, rows_per_chunk=CHUNK_SCALES)
    return weight
