"""Source models whose weights are quantized: which methods are known, and how their tensors are read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_converter.source import fp8
from bwla_converter.source.folder import mxfp4
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import Entry, read_tensors
from torch import Tensor


def quantization_config(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the `quantization_config` of a model with fp8 or MXFP4 weights; empty for an unquantized model.

    Args:
        config: contents of config.json.
        path: its path, for messages.

    Raises:
        SourceError: the model is quantized with another method.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise SourceError(
            f"{path}: expected quantization_config to be an object, found {quantization!r:.60}: restore config.json"
        )
    if quantization and not fp8.is_fp8(quantization) and not mxfp4.is_mxfp4(quantization):
        method = quantization.get("quant_method", "an unnamed method")
        raise SourceError(
            f"{path}: expected an unquantized model, fp8 or MXFP4 weights, found one quantized with {method}: "
            "convert the original checkpoint instead"
        )
    return quantization


def entries_as_read(stored: Mapping[str, Entry], quantization: Mapping[str, Any]) -> Mapping[str, Entry]:
    """Return the tensors as `read_dequantized` returns them: weights in bfloat16, without scales."""
    if mxfp4.is_mxfp4(quantization):
        return mxfp4.dequantized_entries(stored)
    return fp8.dequantized_entries(stored) if quantization else stored


def scale_problems(stored: Mapping[str, Entry], quantization: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every quantized weight whose scales are missing or do not fit."""
    yield from fp8.scale_problems(stored, fp8.scale_block(quantization))
    if mxfp4.is_mxfp4(quantization):
        yield from mxfp4.packed_problems(stored)


def read_dequantized(
    folder: Path, stored: Mapping[str, Entry], names: list[str], block: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Read tensors by name, with quantized weights as bfloat16.

    Args:
        folder: the checkpoint folder.
        stored: its tensors.
        names: which ones to read, by the names that `entries_as_read` gives them.
        block: rows and columns of the scale blocks of fp8 weights, if they have scale blocks.
    """
    packed = {name: parts for name in names if (parts := mxfp4.packed_names(name, stored))}
    whole = [name for name in names if name not in packed]
    scaled = [name for name in whole if stored[name].dtype == torch.float8_e4m3fn]
    scales = {name: scale for name in scaled if (scale := fp8.scale_name(name, stored))}
    parts_of_packed = [part for parts in packed.values() for part in parts]
    tensors = read_tensors(folder, stored, [*whole, *scales.values(), *parts_of_packed])
    dequantized = {
        name: fp8.dequantize(tensors[name], tensors[scale], block) for name, scale in scales.items()
    }
    for name, (blocks, scale) in packed.items():
        dequantized[name] = mxfp4.dequantize(tensors[blocks], tensors[scale])
    return {name: dequantized[name] if name in dequantized else tensors[name] for name in names}
