"""The kernels of the 8-bit head: one quantizes tokens, one multiplies, reading every weight once.

A 16-bit code of a token is 256 high + low. Both halves are columns of one integer product: the weights are on the
M side of the dot, y^T [BN, BM] = W [BN, BK] [high, low]^T [BK, 2 BM], so that a byte of W that has arrived serves
both, and up to eight tokens fill no more than the 16 columns of the smallest tensor-core tile.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl
from bwla_kernels.head import Q_MAX
from bwla_kernels.triton.rounding import INFINITY, magnitude, round_half_even
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_Q_MAX = tl.constexpr(Q_MAX)
_STEP_OF_LARGEST = tl.constexpr(1.0 / Q_MAX)


@triton.jit
def _store_codes(value, step, sound, high, low, at, inside):
    """Quantize float32 values and store both halves of their codes; zeros where the token is not `sound`."""
    # IEEE 754 division, as in the reference implementation: `/` is an approximation in Triton.
    divisor = tl.where(sound, step, 1.0)
    code = round_half_even(tl.div_rn(value, tl.zeros_like(value) + divisor))
    # Beyond the range by more than rounding only where the step is a subnormal number.
    code = tl.where(sound, tl.minimum(tl.maximum(code, -_Q_MAX), _Q_MAX), 0)
    upper = (code + 128) >> 8
    tl.store(high + at, upper.to(tl.int8), mask=inside)
    tl.store(low + at, (code - (upper << 8)).to(tl.int8), mask=inside)


@triton.jit
def head_quantize_kernel(
    x, codes, scale, x_stride, K, STEP: tl.constexpr, ONE_STEP: tl.constexpr, PDL: tl.constexpr
):
    """Quantize one token. Grid: (M,).

    Args (arrays are row-major and contiguous unless a stride is named):
        x: [M, K] of any float type with row stride `x_stride`.
        codes: int8 [M, 2, K], high halves, then low ones. scale: float32 [M], NaN where x has a NaN or an infinity.
        STEP: columns at a time; ONE_STEP: whether they are all.
    """
    m = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()  # from here on the outputs of the kernel before this one may be read
    at = tl.arange(0, STEP)
    row = x + m.to(tl.int64) * x_stride
    high = codes + m.to(tl.int64) * K * 2
    if ONE_STEP:
        value = tl.load(row + at, mask=at < K, other=0.0).to(tl.float32)
        peak = tl.max(magnitude(value))
    else:
        peaks = tl.zeros([STEP], tl.int32)
        for start in range(0, K, STEP):
            value = tl.load(row + start + at, mask=at < K - start, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, magnitude(value))
        peak = tl.max(peaks)
    finite = peak < INFINITY
    step = tl.where(finite, peak.to(tl.float32, bitcast=True) * _STEP_OF_LARGEST, float("nan"))
    tl.store(scale + m, step)
    sound = finite & (step > 0)
    if ONE_STEP:
        _store_codes(value, step, sound, high, high + K, at, at < K)
    else:
        for start in range(0, K, STEP):
            value = tl.load(row + start + at, mask=at < K - start, other=0.0).to(tl.float32)
            _store_codes(value, step, sound, high + start, high + K + start, at, at < K - start)


# One compiled kernel for every number of tokens: none of its own for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["M"])
def head_matmul_kernel(
    codes,
    scale,
    weight,
    weight_scale,
    y,
    M,
    V,
    K,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of BM tokens and BN rows of the vocabulary. Grid: (tiles of V times tiles of M,).

    Args (arrays are row-major and contiguous):
        codes: int8 [M, 2, K]; scale: float32 [M]: of `head_quantize_kernel`.
        weight: int8 [V, K]; weight_scale: float32 [V]. y: [M, V] of any float type.
        EVEN: whether K is a multiple of BK.
    """
    tl.assume(K > 0)  # a loop that may run no round costs half of the registers
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(V, BN)
    # Groups of GROUP_M token tiles, so that neighbouring programs share weights and activations in the L2 cache.
    group = tile // (GROUP_M * tiles_n)
    in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    local = tile - group * (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + local % in_group
    tile_n = local // in_group

    k = tl.arange(0, BK)
    # Beyond the vocabulary the last row is read again: a row's mask would cost more than its bytes.
    row = tl.minimum(tl.arange(0, BN), V - 1 - tile_n * BN)
    w_ptrs = weight + tile_n.to(tl.int64) * BN * K + (row[:, None] * K + k[None, :])
    half = tl.arange(0, 2 * BM)
    exists = half < 2 * (M - tile_m * BM)
    q_ptrs = codes + tile_m.to(tl.int64) * (2 * BM) * K + (half[None, :] * K + k[:, None])
    if PDL:
        gdc_wait()  # from here on the outputs of the kernel before this one may be read
    acc = tl.zeros([BN, 2 * BM], tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            w = tl.load(w_ptrs)
            q = tl.load(q_ptrs, mask=exists[None, :], other=0)
        else:
            inside = k < K - start
            w = tl.load(w_ptrs, mask=inside[None, :], other=0)
            q = tl.load(q_ptrs, mask=exists[None, :] & inside[:, None], other=0)
        acc = tl.dot(w, q, acc, out_dtype=tl.int32)
        w_ptrs += BK
        q_ptrs += BK
    # A thread holds pairs of neighbouring columns, so nothing moves here.
    high, low = tl.split(tl.reshape(acc, (BN, BM, 2)))
    total = (high.to(tl.int64) * 256 + low).to(tl.float32)

    n = tile_n * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    inside_m, inside_n = m < M - tile_m * BM, n < V
    token = tl.load(scale + tile_m * BM + m, mask=inside_m, other=0.0)
    rows = tl.load(weight_scale + n, mask=inside_n, other=0.0)
    total *= token[None, :] * rows[:, None]
    out = y + tile_m.to(tl.int64) * BM * V + (m[:, None] * V + n[None, :])
    tl.store(out, tl.trans(total.to(y.dtype.element_ty)), mask=inside_m[:, None] & inside_n[None, :])
