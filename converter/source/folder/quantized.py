"""Source models whose weights are quantized: which methods are known, and how their tensors are read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_converter.source import fp8
from bwla_converter.source.folder import bitnet, mlx, mxfp4
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import Entry, read_tensors
from torch import Tensor


def quantization_config(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return what config.json says about quantized weights that can be read; empty for an unquantized model.

    Args:
        config: contents of config.json. MLX calls the entry `quantization`.
        path: its path, for messages.

    Raises:
        SourceError: the model is quantized with another method.
    """
    quantization = config.get("quantization_config") or config.get("quantization") or {}
    if not isinstance(quantization, Mapping):
        raise SourceError(
            f"{path}: expected quantization_config to be an object, found {quantization!r:.60}: restore config.json"
        )
    if not quantization or fp8.is_fp8(quantization) or mxfp4.is_mxfp4(quantization):
        return quantization
    if bitnet.is_bitnet(quantization):
        bitnet.check_config(quantization, path)
    elif mlx.is_mlx(quantization):
        mlx.check_config(quantization, path)
    else:
        method = quantization.get("quant_method", "an unnamed method")
        raise SourceError(
            f"{path}: expected an unquantized model, or fp8, MXFP4, BitNet or MLX weights, found one quantized with "
            f"{method}: convert the original checkpoint instead"
        )
    return quantization


def entries_as_read(stored: Mapping[str, Entry], quantization: Mapping[str, Any]) -> Mapping[str, Entry]:
    """Return the tensors as `read_dequantized` returns them: weights in a float dtype, without scales."""
    if mxfp4.is_mxfp4(quantization):
        return mxfp4.dequantized_entries(stored)
    if bitnet.is_bitnet(quantization):
        return bitnet.dequantized_entries(stored)
    if quantization and mlx.is_mlx(quantization):
        return mlx.dequantized_entries(stored, quantization)
    return fp8.dequantized_entries(stored) if quantization else stored


def scale_problems(stored: Mapping[str, Entry], quantization: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every quantized weight whose scales are missing or do not fit."""
    yield from fp8.scale_problems(stored, fp8.scale_block(quantization))
    if mxfp4.is_mxfp4(quantization):
        yield from mxfp4.packed_problems(stored)
    if bitnet.is_bitnet(quantization):
        yield from bitnet.packed_problems(stored)
    if quantization and mlx.is_mlx(quantization):
        yield from mlx.packed_problems(stored, quantization)


def read_dequantized(
    folder: Path, stored: Mapping[str, Entry], names: list[str], quantization: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Read tensors by name, with quantized weights in a float dtype.

    Args:
        folder: the checkpoint folder.
        stored: its tensors.
        names: which ones to read, by the names that `entries_as_read` gives them.
        quantization: from `quantization_config`.
    """
    parts = {name: found for name in names if (found := _parts(name, stored, quantization))}
    whole = [name for name in names if name not in parts]
    needed = dict.fromkeys([*whole, *(part for found in parts.values() for part in found)])
    tensors = read_tensors(folder, stored, list(needed))
    return {
        name: _dequantize([tensors[part] for part in parts[name]], quantization, name)
        if name in parts
        else tensors[name]
        for name in names
    }


def _parts(name: str, stored: Mapping[str, Entry], quantization: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the tensors that a quantized weight is stored as; empty for one that is stored as it is."""
    if mxfp4.is_mxfp4(quantization):
        return mxfp4.packed_names(name, stored) or ()
    if bitnet.is_bitnet(quantization):
        scale = bitnet.scale_name(name, stored)
    elif quantization and mlx.is_mlx(quantization):
        return (name, *found) if (found := mlx.parts_of(name, stored)) else ()
    else:
        is_fp8 = stored[name].dtype == torch.float8_e4m3fn
        scale = fp8.scale_name(name, stored) if is_fp8 else None
    return () if scale is None else (name, scale)


def _dequantize(tensors: list[Tensor], quantization: Mapping[str, Any], name: str) -> Tensor:
    """Return a weight from the tensors that `_parts` names; `name` is its own, for messages."""
    if mxfp4.is_mxfp4(quantization):
        return mxfp4.dequantize(*tensors)
    if bitnet.is_bitnet(quantization):
        try:
            return bitnet.dequantize(*tensors, quantization.get("linear_class", "bitlinear"))
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from None
    if mlx.is_mlx(quantization):
        return mlx.dequantize(*tensors, quantization["bits"])
    return fp8.dequantize(*tensors, fp8.scale_block(quantization))
