"""The types of tensors in GGUF files: how one is dequantized, and which dtype holds its values without loss."""

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as dequantize_with_gguf
from numpy.typing import NDArray

FLOAT16_TYPES = (
    GGMLQuantizationType.Q1_0,
    GGMLQuantizationType.TQ1_0,
    GGMLQuantizationType.TQ2_0,
)
"""Types of one bit or three values: those are a float16 scale, its negative and 0, which float16 holds exactly."""

Q1_0_BYTES = 18
"""Bytes of 128 weights of type Q1_0: a float16 scale d, then a bit for each weight."""


def exact_dtype(kind: GGMLQuantizationType) -> torch.dtype:
    """Return the dtype that a weight of this type is kept in: the one that a model is computed in, or an exact one."""
    return torch.float16 if kind in FLOAT16_TYPES else torch.bfloat16


def dequantize(rows: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Dequantize rows of a tensor.

    Args:
        rows: the stored bytes of whole rows.
        kind: the tensor's type.

    Returns: float32, as many rows.

    Raises:
        NotImplementedError: neither this project nor gguf can dequantize the type.
    """
    if kind == GGMLQuantizationType.Q1_0:
        return _dequantize_q1_0(rows)
    values: NDArray[np.float32] = dequantize_with_gguf(rows, kind)
    return values


def _dequantize_q1_0(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return d where a bit is set and -d where it is not; bit j of byte i belongs to weight 8 i + j of a block.

    gguf lists the type, but does not dequantize it (ggml: dequantize_row_q1_0 in ggml-quants.c).
    """
    blocks = np.ascontiguousarray(rows).reshape(len(rows), -1, Q1_0_BYTES)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    signed = np.where(bits == 1, scale, -scale)
    return signed.reshape(len(rows), -1)
