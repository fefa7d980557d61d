"""Dequantize a linear without holding its whole weight in float32."""

from collections.abc import Mapping

import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import ROW_TENSORS
from bwla_kernels.reference import dequantize
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Number of weights that are dequantized at a time, in float32."""


def dequantized_weight(tensors: Mapping[str, Tensor], spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] of a quantized linear in `dtype`, computed a few rows at a time."""
    weight = torch.empty(spec.out_features, spec.in_features, dtype=dtype)
    step = max(1, CHUNK_ELEMENTS // spec.in_features)
    for start in range(0, spec.out_features, step):
        rows = slice(start, start + step)
        part = {key: value[rows] if key in ROW_TENSORS else value for key, value in tensors.items()}
        weight[rows] = dequantize(part, spec).to(dtype)
    return weight
