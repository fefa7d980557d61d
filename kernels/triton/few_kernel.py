"""The input transform for few tokens: several programs per token, the last of which to arrive quantizes.

Rotating a whole token on one multiprocessor is slow: its tensor cores need a microsecond for the arithmetic alone, and
every step waits for the one before. Here a program computes 16 columns of L^T X R of one rotation group
(`rotate_piece`) and writes them to memory; the last program of a group to arrive reads them all, computes the scale,
and writes codes, sum and bit planes. u = x A^T is split along its columns in the same way (`project_slice`).

**tf32 tensor cores, as accurate as float32.** The stored rotations are pairs of fp16 numbers (see `rotate.py`) of 11
significant bits each, which tf32 holds; so does it hold a bf16 or fp16 input. X R takes two products, L^T (X R) three,
with X R cut into two tf32 numbers that are rounded to nearest. The omitted product is below 2^-21 of the group's norm.
tf32 has float32's range: unlike fp16 it needs no scaling, and so no maximum of the input before the first product.

**Dependent launch** (PDL). The programs read what they need of the layer itself, then wait for the kernel before them
to end and only then read or write anything else.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples.

import triton
import triton.language as tl
from bwla_kernels.triton.fused_load import ADDS_AND_NORMS, NORMS, inverse_rms_of, raw_input, weigh
from bwla_kernels.triton.pdl import PDL_EARLY, PDL_LATE
from bwla_kernels.triton.rotate import UNSCALE
from bwla_kernels.triton.rounding import INFINITY, magnitude, round_half_even
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _split_tf32(value):
    """float32 -> two numbers that tf32 holds, the high one rounded to nearest: hi + lo = value to 2^-22.

    NaN stays in the high one: as the GPU makes it, 0x7FFFFFFF, rounding would carry it over to -0.
    """
    rounded = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    hi = tl.where(value == value, rounded, value)
    lo = value - hi
    return hi, ((lo.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _arrive(counter, programs: tl.constexpr, PDL: tl.constexpr):
    """Return whether this program is the last of `programs` to arrive; it may then read what the others wrote."""
    if PDL == PDL_LATE:
        gdc_launch_dependents()
    tl.debug_barrier()  # this program's own writes come first
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    last = arrived == programs - 1
    if last:
        tl.debug_barrier()
        tl.store(counter, 0)
    return last


@triton.jit(do_not_specialize=["m"])
def prepare_few_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, left_ptr, right_ptr, column_scale_ptr, a_ptr,
    q_ptr, scale_ptr, q_sum_ptr, u_ptr, planes_ptr, residual_out_ptr, turned_ptr, u_parts_ptr, counters_ptr,
    m, x_stride, residual_stride, level, eps,
    K: tl.constexpr, G: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N2P: tl.constexpr, ROWS: tl.constexpr,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, SLICES: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, FUSE: tl.constexpr,
    SPLIT_X: tl.constexpr, CHUNK: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: m * (G * N2P / PIECE rotations, then SLICES projections where RANK > 0).

    Args (arrays are row-major and contiguous unless a stride is named):
        x_ptr [m, K] with row stride `x_stride`; [m, 2 K] for SILU_MUL.
        left_ptr fp16 [G, 2, ROWS, ROWS], right_ptr fp16 [G, 2, N2P, N2P]: `prepare_input.split_rotations`.
        turned_ptr float32 [m, K], u_parts_ptr float32 [m, SLICES, RANK]: workspace.
        counters_ptr int32 [m, G + 1]: zeros, and zeros again afterwards.
        level: clip / q_max. CHUNK: columns of a chunk of bit planes; PLANES: whether they are written.
    """
    if PDL == PDL_EARLY:
        gdc_launch_dependents()
    PIECES: tl.constexpr = N2P // PIECE
    ROTATIONS: tl.constexpr = G * PIECES
    EACH: tl.constexpr = ROTATIONS + (SLICES if RANK > 0 else 0)
    token = tl.program_id(0) // EACH
    part = tl.program_id(0) % EACH
    start = token.to(tl.int64)
    x_ptr += start * x_stride
    if FUSE == ADDS_AND_NORMS:
        residual_ptr += start * residual_stride
        residual_out_ptr += start * K
    turned_ptr += start * K
    counters_ptr += token * (G + 1)
    if part < ROTATIONS:
        group = part // PIECES
        rotate_piece(
            x_ptr, residual_ptr, norm_weight_ptr, left_ptr, right_ptr, column_scale_ptr, residual_out_ptr, turned_ptr,
            x_stride, residual_stride, eps, group, part % PIECES,
            K, G, N1, N2, N2P, ROWS, STARTS, WIDTHS, PIECE, FUSE, SPLIT_X, PDL,
        )  # fmt: skip
        if _arrive(counters_ptr + group, PIECES, PDL):
            quantize_group(
                turned_ptr, q_ptr + start * K, scale_ptr + start * G, q_sum_ptr + start * G, planes_ptr, token, group,
                level, K, G, N1 * N2, BITS, CHUNK, PLANES,
            )  # fmt: skip
    elif RANK > 0:
        project_slice(
            x_ptr, residual_ptr, norm_weight_ptr, a_ptr, u_parts_ptr + start * (SLICES * RANK),
            x_stride, residual_stride, eps, part - ROTATIONS,
            K, RANK, RANKS, STEP, STEPS, FUSE, PDL,
        )  # fmt: skip
        if _arrive(counters_ptr + G, SLICES, PDL):
            add_slices(u_parts_ptr + start * (SLICES * RANK), u_ptr + start * RANK, RANK, RANKS, SLICES)


@triton.jit
def rotate_piece(
    x_ptr, residual_ptr, norm_weight_ptr, left_ptr, right_ptr, column_scale_ptr, residual_out_ptr, turned_ptr,
    x_stride, residual_stride, eps, group, piece,
    K: tl.constexpr, G: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N2P: tl.constexpr, ROWS: tl.constexpr,
    STARTS: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr, FUSE: tl.constexpr,
    SPLIT_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write PIECE columns of a rotation group's L^T X R, times the column scale and 2^12 (the rotations' scaling)."""
    row = tl.arange(0, ROWS)[:, None]
    c = piece * PIECE + tl.arange(0, PIECE)[None, :]
    left_at = left_ptr + group * (2 * ROWS * ROWS) + row * ROWS + tl.arange(0, ROWS)[None, :]
    left_hi = tl.load(left_at).to(tl.float32)
    left_lo = tl.load(left_at + ROWS * ROWS).to(tl.float32)
    rights = ()
    for i in tl.static_range(len(WIDTHS)):
        j = STARTS[i] + tl.arange(0, WIDTHS[i])
        right_at = right_ptr + group * (2 * N2P * N2P) + j[:, None] * N2P + c
        rights = rights + (tl.load(right_at).to(tl.float32), tl.load(right_at + N2P * N2P).to(tl.float32))
    inside = (row < N1) & (c < N2)
    at = group * (N1 * N2) + row * N2
    factor = tl.load(column_scale_ptr + at + c, mask=inside, other=0.0)
    norms = ()
    if FUSE >= NORMS:
        for i in tl.static_range(len(WIDTHS)):
            j = STARTS[i] + tl.arange(0, WIDTHS[i])[None, :]
            norms = norms + (tl.load(norm_weight_ptr + at + j, mask=(row < N1) & (j < N2), other=0.0),)
    if PDL:
        gdc_wait()  # from here on the outputs of the kernel before this one may be read

    inputs = ()
    squares = 0.0
    for i in tl.static_range(len(WIDTHS)):
        j = STARTS[i] + tl.arange(0, WIDTHS[i])[None, :]
        mask = (row < N1) & (j < N2)
        x = raw_input(x_ptr, residual_ptr, at + j, at + j, mask, K, FUSE)
        if FUSE == ADDS_AND_NORMS:
            own = mask & (j >= piece * PIECE) & (j < (piece + 1) * PIECE)
            tl.store(residual_out_ptr + at + j, x.to(residual_out_ptr.dtype.element_ty), mask=own)
        if FUSE >= NORMS and G == 1:
            squares += tl.sum(x * x)
        inputs = inputs + (x,)
    inverse_rms = 0.0
    if FUSE >= NORMS:
        if G == 1:
            inverse_rms = tl.rsqrt(squares / K + eps)
        else:
            inverse_rms = inverse_rms_of(x_ptr, residual_ptr, x_stride, residual_stride, 1, eps, 1, K, FUSE)

    turned = tl.zeros([ROWS, PIECE], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        x = inputs[i]
        if FUSE >= NORMS:
            x = weigh(x_ptr, x, inverse_rms, norms[i])
        if SPLIT_X:
            x, x_lo = _split_tf32(x)
            turned = tl.dot(x_lo, rights[2 * i], turned, input_precision="tf32")
        turned = tl.dot(x, rights[2 * i + 1], turned, input_precision="tf32")
        turned = tl.dot(x, rights[2 * i], turned, input_precision="tf32")
    hi, lo = _split_tf32(turned)
    y = tl.dot(left_hi, lo, input_precision="tf32")
    y = tl.dot(left_lo, hi, y, input_precision="tf32")
    y = tl.dot(left_hi, hi, y, input_precision="tf32")
    tl.store(turned_ptr + at + c, y * factor, mask=inside)


@triton.jit
def quantize_group(
    turned_ptr, q_ptr, scale_ptr, q_sum_ptr, planes_ptr, token, group, level,
    K: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
    PLANES: tl.constexpr,
):  # fmt: skip
    """Write scale, codes, their sum and bit planes of one token's rotation group.

    Bit j of byte b of chunk t is column t * CHUNK + (CHUNK / 8) * j + b. A thread reads the columns of four
    neighbouring bytes for all eight j, which make up the words of the planes that it writes.
    """
    Q_MAX: tl.constexpr = (1 << (BITS - 1)) - 1
    WORDS: tl.constexpr = CHUNK // 32
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    PADDED: tl.constexpr = triton.next_power_of_2(CHUNKS * WORDS)
    index = tl.arange(0, PADDED)
    byte = tl.arange(0, 4)[None, :]
    column = (index // WORDS * CHUNK + index % WORDS * 4)[:, None] + byte
    valid = (index < CHUNKS * WORDS)[:, None]
    turned_ptr += group * WIDTH
    # Magnitudes are compared as integers: there NaN is the largest and cannot get lost.
    values = ()
    peaks = tl.zeros([PADDED, 4], tl.int32)
    for j in tl.static_range(8):
        at = column + j * (CHUNK // 8)
        value = tl.load(turned_ptr + at, mask=valid & (at < WIDTH), other=0.0, cache_modifier=".cg")
        peaks = tl.maximum(peaks, magnitude(value))
        values = values + (value,)
    peak = tl.max(peaks)
    step = tl.where(peak < INFINITY, peak.to(tl.float32, bitcast=True) * level, float("nan"))
    inverse = tl.where(step > 0.0, 1.0 / step, 0.0)
    tl.store(scale_ptr + group, step * UNSCALE)

    total = tl.zeros([PADDED, 4], tl.int32)
    planes = ()
    for _ in tl.static_range(BITS):
        planes = planes + (tl.zeros([PADDED], tl.int32),)
    for j in tl.static_range(8):
        at = column + j * (CHUNK // 8)
        value = tl.minimum(tl.maximum(values[j] * inverse, -Q_MAX), Q_MAX)
        code = round_half_even(value)
        total += code
        tl.store(q_ptr + group * WIDTH + at, code.to(tl.int8), mask=valid & (at < WIDTH))
        if PLANES:
            word = tl.sum((code & 0xFF) << (8 * byte), 1)
            added = ()
            for p in tl.static_range(BITS):
                added = added + (planes[p] | (((word >> p) & 0x01010101) << j),)
            planes = added
    tl.store(q_sum_ptr + group, tl.sum(total))
    if PLANES:
        for p in tl.static_range(BITS):
            row = (token.to(tl.int64) * BITS + p) * G + group
            tl.store(planes_ptr + row * (CHUNKS * WORDS) + index, planes[p], mask=index < CHUNKS * WORDS)


@triton.jit
def project_slice(
    x_ptr, residual_ptr, norm_weight_ptr, a_ptr, parts_ptr, x_stride, residual_stride, eps, part,
    K: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    FUSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the share of u over STEPS * STEP columns, for all ranks, in float32: parts[part, rank]."""
    ranks = tl.arange(0, RANKS)[:, None]
    first = part * (STEPS * STEP)
    rows = ()
    norms = ()
    for i in tl.static_range(STEPS):
        column = first + i * STEP + tl.arange(0, STEP)[None, :]
        rows = rows + (tl.load(a_ptr + ranks * K + column, mask=(ranks < RANK) & (column < K), other=0.0),)
        if FUSE >= NORMS:
            norms = norms + (tl.load(norm_weight_ptr + column, mask=column < K, other=0.0),)
    if PDL:
        gdc_wait()
    inverse_rms = 0.0
    if FUSE >= NORMS:
        inverse_rms = inverse_rms_of(x_ptr, residual_ptr, x_stride, residual_stride, 1, eps, 1, K, FUSE)
    total = tl.zeros([RANKS, STEP], tl.float32)
    for i in tl.static_range(STEPS):
        column = first + i * STEP + tl.arange(0, STEP)[None, :]
        value = raw_input(x_ptr, residual_ptr, column, column, column < K, K, FUSE)
        if FUSE >= NORMS:
            value = weigh(x_ptr, value, inverse_rms, norms[i])
        total += value * rows[i].to(tl.float32)
    rank = tl.arange(0, RANKS)
    tl.store(parts_ptr + part * RANK + rank, tl.sum(total, 1), mask=rank < RANK)


@triton.jit
def add_slices(parts_ptr, u_ptr, RANK: tl.constexpr, RANKS: tl.constexpr, SLICES: tl.constexpr):
    """Add the shares of u, always in the same order."""
    rank = tl.arange(0, RANKS)
    part = tl.arange(0, triton.next_power_of_2(SLICES))[:, None]
    at = parts_ptr + part * RANK + rank[None, :]
    parts = tl.load(at, mask=(part < SLICES) & (rank < RANK)[None, :], other=0.0, cache_modifier=".cg")
    tl.store(u_ptr + rank, tl.sum(parts, 0), mask=rank < RANK)
