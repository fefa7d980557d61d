"""The kernels of layers with scales for groups of columns: quantize each group, and the GEMM on integer tensor cores.

The weights lie in the chunk layout of all GPU kernels (`layout.py`); a chunk belongs to one group. Bits are unpacked in
registers to {0, 1}, as in `integer_mma.py`. With dots d = sum w q and z = sum q of a chunk, the signed sum is 2 d - z:
float32 holds it exactly, so it is scaled by s[m, g] alpha[n, p, g] and added right away, chunk by chunk.

There are no bit planes of activations and no binary tensor cores here: groups of 128 columns end after half an
instruction of them, and the scales of all rows would have to be applied to every eighth of a fragment.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl
from bwla_kernels.triton.integer_mma import unpack_chunk
from bwla_kernels.triton.rounding import INFINITY, magnitude, round_half_even


@triton.jit
def quantize_groups_kernel(
    x_ptr, q_ptr, scale_ptr, m, x_stride, level,
    G: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, Q_MAX: tl.constexpr,
):  # fmt: skip
    """Quantize GROUPS groups of one token: grid (M, ceil(G / GROUPS)).

    Divides as the reference implementation does, so that codes and scales are equal to the last bit.

    Args:
        x_ptr [m, G WIDTH] with row stride `x_stride`; q_ptr int8 [m, G WIDTH]; scale_ptr float32 [G, m].
        level: clip / q_max.
        COLUMNS: WIDTH, rounded up to a power of two.
    """
    token = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, COLUMNS)
    at = g[:, None] * WIDTH + column[None, :]
    inside = (g < G)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_ptr + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes are compared as integers: there NaN is the largest and cannot get lost.
    peak = tl.max(magnitude(x), 1)
    step = tl.where(peak < INFINITY, peak.to(tl.float32, bitcast=True) * level, float("nan"))
    safe = tl.where(step > 0.0, step, 1.0)
    ratio = tl.div_rn(x, tl.broadcast_to(safe[:, None], (GROUPS, COLUMNS)))
    ratio = tl.minimum(tl.maximum(ratio, -Q_MAX), Q_MAX)
    code = tl.where((step > 0.0)[:, None], round_half_even(ratio).to(tl.int8), 0)
    tl.store(q_ptr + token * (G * WIDTH) + at, code, mask=inside)
    tl.store(scale_ptr + g.to(tl.int64) * m + token, step, mask=g < G)


@triton.jit(do_not_specialize=["M", "chunks_per_group", "chunks", "share"])
def grouped_mma_kernel(
    q, scale, weight, weight_scale, bias, y,
    M, N, rows, K, group_width, chunks_per_group, chunks, share,
    BN: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr, PADDED: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, PURE: tl.constexpr,
):  # fmt: skip
    """Compute a tile y[m, n] of BM tokens and BN rows over `share` chunks: grid (tiles of N, tiles of M, splits).

    Args:
        q int8 [M, K], scale float32 [G, M]: from `quantize_groups_kernel`.
        weight uint8 [chunks, rows / 16, PLANES, 16, C / 8]; weight_scale float32 [G, PLANES, rows], zeros beyond N.
        y [M, N], or with SPLIT float32 [splits, M, N], to be added up, without the bias.
        PADDED: the last chunk of a group is partly empty.
    """
    S: tl.constexpr = C // 8
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_read = tl.minimum(m, M - 1)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, chunks)
    byte = tl.arange(0, S)
    column = tl.arange(0, C)
    row = n // 16 * (16 * PLANES) + n % 16
    w_ptrs = weight + first.to(tl.int64) * rows * (S * PLANES) + row[:, None] * S + byte[None, :]
    q_rows = q + m_read.to(tl.int64)[None, :] * K
    total = tl.zeros([BN, BM], tl.float32)
    for t in range(first, last):
        g = t // chunks_per_group
        in_group = (t - g * chunks_per_group) * C + column
        if PADDED:
            x = tl.load(
                q_rows + (g * group_width + in_group)[:, None],
                mask=(in_group < group_width)[:, None],
                other=0,
            )
        else:
            x = tl.load(q_rows + (t * C + column)[:, None])
        lift = tl.sum(x.to(tl.int32), 0)
        s = tl.load(scale + g.to(tl.int64) * M + m_read)
        for p in tl.static_range(PLANES):
            bits = unpack_chunk(tl.load(w_ptrs + p * (16 * S)), BN, C, PURE)
            dots = 2 * tl.dot(bits, x, out_dtype=tl.int32) - lift[None, :]
            alpha = tl.load(weight_scale + (g * PLANES + p).to(tl.int64) * rows + n)
            total += dots.to(tl.float32) * (alpha[:, None] * s[None, :])
        w_ptrs += rows * (S * PLANES)
    inside = (m < M)[:, None] & (n < N)[None, :]
    out = y + m.to(tl.int64)[:, None] * N + n[None, :]
    if SPLIT:
        out += tl.program_id(2).to(tl.int64) * M * N
    elif BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out, tl.trans(total.to(y.dtype.element_ty)), mask=inside)
