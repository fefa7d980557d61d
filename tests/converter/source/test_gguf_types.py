"""Types of GGUF tensors: Q1_0, which gguf does not dequantize, and those whose values float16 holds exactly."""

import gguf
import numpy as np
import pytest
import torch
from bwla_converter.source.gguf_types import FLOAT16_TYPES, dequantize, exact_dtype
from gguf_models import quantized
from random_tensors import normal


def test_q1_0_by_hand() -> None:
    """A float16 scale, then the signs: bit j of byte i is that of weight 8 i + j, and 1 means plus."""
    scale = np.array([0.75], np.float16).view(np.uint8)
    signs = np.array([0b00000101, *[0] * 14, 0b10000000], np.uint8)
    (row,) = dequantize(np.concatenate([scale, signs])[None], gguf.GGMLQuantizationType.Q1_0)
    assert (row.dtype, row.shape) == (np.float32, (128,))
    assert np.flatnonzero(row > 0).tolist() == [0, 2, 127]
    assert set(np.abs(row)) == {0.75}


@pytest.mark.parametrize("kind", FLOAT16_TYPES)
def test_float16_holds_their_values(kind: gguf.GGMLQuantizationType) -> None:
    value = normal(5, 512).numpy()
    row = dequantize(quantized(value, kind), kind)
    assert exact_dtype(kind) == torch.float16
    assert row.shape == value.shape
    assert np.array_equal(row.astype(np.float16).astype(np.float32), row)
    if kind != gguf.GGMLQuantizationType.Q1_0:
        assert np.array_equal(row, gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind))


def test_other_types_are_kept_in_bfloat16() -> None:
    assert exact_dtype(gguf.GGMLQuantizationType.Q8_0) == torch.bfloat16
