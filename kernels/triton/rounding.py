"""Rounding float32 numbers to integers and comparing their magnitudes, as all kernels that quantize do it."""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl

# Kernels may read module constants only as constexpr.
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest even integer
_ROUND_BITS = tl.constexpr(0x4B400000)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def round_half_even(value):
    """Round float32 values below 2^22 to the nearest integer, ties to even; return int32."""
    return (value + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def magnitude(value):
    """Return |value| as int32 bits: they are ordered like the magnitudes, and NaN is the largest."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
