"""Rotate and quantize many tokens: one rotation group of one or several of them for each program.

**fp16 tensor cores, as accurate as float32.** fp16 holds 11 significant bits, so a float32 number is the sum of
two fp16 numbers to 2^-24, and three products hi*hi + hi*lo + lo*hi with float32 accumulation carry that accuracy
(what is left out, lo*lo, is below 2^-24 too). fp16's narrow range is no obstacle: the tokens are scaled by a power
of two so that their largest magnitude in the group lies in [16, 32), the rotations by 2^`ROTATION_EXPONENT`, and
X -> L^T X cannot exceed 32 * sqrt(128) * 2^6 < 65504. A bf16 or fp16 input is one fp16 number after that scaling
(bits below 2^-29 of the group's largest are dropped), so L^T X takes two products and (L^T X) R three: 2.5 passes
at the fp16 rate. tf32 would take as many at half the rate, bf16 six or lose eight bits. Powers of two cancel
exactly.

**Bound.** Tensor cores accumulate in float32 and may truncate where float32 arithmetic rounds. With partial sums
never above the group's 2-norm (rows and columns of a rotation have norm 1), each of at most 2 * 8 + 3 * 8 steps of
16 products loses at most 2 * 2^-23 of it: |error of x_hat| < 2^-16 |group|_2 before the column scale, for every
input; errors that do not conspire give 2^-21.

**Pieces.** The columns are processed in pieces (80 as 64 + 16), because Triton's tiles are powers of two and padding
80 to 128 would cost 2.5 times the arithmetic. From compute capability 9.0 on all pieces are equal (80 as 3 x 32): their
layouts in shared memory then are, too, and the assembler of CUDA 12.8 (Triton 3.6) makes wrong code where two layouts
share an address (`sass.undefined_registers`). Where n1 is small several tokens share a tile, with a block-diagonal
L.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl
from bwla_kernels.triton.fused_load import (
    ADDS_AND_NORMS,
    NORMS,
    apply_norm,
    inverse_rms_of,
    over_columns,
    raw_input,
)
from bwla_kernels.triton.rounding import INFINITY, magnitude, round_half_even

ROTATION_EXPONENT = 6
"""Stored split rotations are 2^6 times the rotation: fp16's subnormals then lie far below what matters."""

# Kernels may read module constants only as constexpr.
UNSCALE = tl.constexpr(2.0 ** (-2 * ROTATION_EXPONENT))


# A value of each token is a scalar where a tile holds one token, else a vector that has it on all of the token's
# rows: reshaping between tokens and rows makes Triton choose layouts that repeat whole tiles in every thread.


@triton.jit
def token_sum(tile, slot, TOKENS: tl.constexpr):
    """The sum over each token's rows of a tile; `slot` [rows] says which token a row belongs to."""
    if TOKENS == 1:
        result = tl.sum(tile)
    else:
        per_row = tl.sum(tile, 1)
        result = per_row
        for t in tl.static_range(TOKENS):
            result = tl.where(slot == t, tl.sum(tl.where(slot == t, per_row, 0)), result)
    return result


@triton.jit
def token_max(tile, slot, TOKENS: tl.constexpr):
    """The largest of each token's rows of a tile without negative values."""
    if TOKENS == 1:
        result = tl.max(tile)
    else:
        per_row = tl.max(tile, 1)
        result = per_row
        for t in tl.static_range(TOKENS):
            result = tl.where(slot == t, tl.max(tl.where(slot == t, per_row, 0)), result)
    return result


@triton.jit
def _power_of_two(exponent_field):
    return (exponent_field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(value):
    """float32 -> fp16 hi and lo with hi + lo = value to 2^-24."""
    hi = value.to(tl.float16)
    return hi, (value - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _piece_at(
    ROW: tl.constexpr, ROWS: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr
):
    """Offsets of a piece of a matrix."""
    return (ROW + tl.arange(0, ROWS))[:, None] * STRIDE + COLUMN + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _load_right(
    right_ptr, ROW: tl.constexpr, ROWS: tl.constexpr, COLUMN: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """High and low part of a piece of a right rotation [2, SIZE, SIZE]; zeros beyond it."""
    at = right_ptr + _piece_at(ROW, ROWS, COLUMN, COLUMNS, SIZE)
    if ROW + ROWS > SIZE or COLUMN + COLUMNS > SIZE:
        inside = ((ROW + tl.arange(0, ROWS)) < SIZE)[:, None] & ((COLUMN + tl.arange(0, COLUMNS)) < SIZE)[
            None, :
        ]
        return tl.load(at, mask=inside, other=0.0), tl.load(at + SIZE * SIZE, mask=inside, other=0.0)
    return tl.load(at), tl.load(at + SIZE * SIZE)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 zeros; Triton 3.6 takes an element of a constexpr tuple as an argument, but not in a list."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _load_inputs(
    x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, out_at, out_row, row_ok, slot, first_column,
    K: tl.constexpr, G: tl.constexpr, N2: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr,
    TOKENS: tl.constexpr, FUSE: tl.constexpr,
):  # fmt: skip
    """Load the columns of a tile in pieces, and store x + residual where it is fused.

    Args:
        x_row, residual_row, out_row [ROWS, 1]: offsets of the rows' first elements; `out_at` is added to the last.
        row_ok [ROWS]: which rows exist. slot [ROWS]: the token of each.
        first_column: of the rotation group.

    Returns: float32 [ROWS, WIDTHS[p]] for each piece p; the sum of squares of each token, where one rotation group
        covers the row and a norm is fused, else 0.
    """
    inputs = ()
    squares = 0.0
    for p in tl.static_range(len(WIDTHS)):
        j = STARTS[p] + tl.arange(0, WIDTHS[p])[None, :]
        mask = row_ok[:, None] & (j < N2)
        at = first_column + j
        value = raw_input(x_ptr, residual_ptr, x_row + at, residual_row + at, mask, K, FUSE)
        if FUSE == ADDS_AND_NORMS:
            rounded = value.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + out_at + out_row + j, rounded, mask=mask)
        if FUSE >= NORMS and G == 1:
            squares += token_sum(value * value, slot, TOKENS)
        inputs = inputs + (value,)  # noqa: RUF005
    return inputs, squares


@triton.jit
def _load_left(left_ptr, within, slot, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Load both halves of a group's L^T, fp16 [ROWS, ROWS], repeated on the diagonal for each token of the tile."""
    ROWS_EACH: tl.constexpr = ROWS // TOKENS
    left_at = left_ptr + within[:, None] * ROWS_EACH + within[None, :]
    if TOKENS == 1:
        return tl.load(left_at), tl.load(left_at + ROWS_EACH * ROWS_EACH)
    same = slot[:, None] == (tl.arange(0, ROWS) // ROWS_EACH)[None, :]
    return (
        tl.load(left_at, mask=same, other=0.0),
        tl.load(left_at + ROWS_EACH * ROWS_EACH, mask=same, other=0.0),
    )


@triton.jit
def _per_row(per_token, slot, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Spread a value of each token, [TOKENS], over the token's rows: [ROWS]."""
    result = tl.zeros([ROWS], tl.float32)
    for t in tl.static_range(TOKENS):
        one = tl.sum(tl.where(tl.arange(0, TOKENS) == t, per_token, 0.0))
        result = tl.where(slot == t, one, result)
    return result


@triton.jit
def _normalize(
    x_ptr, norm_weight_ptr, inputs, inverse_rms, row_ok, columns,
    N2: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """Apply the norm to each piece; `columns` [ROWS, 1] are the rows' first columns in the input."""
    normed = ()
    for p in tl.static_range(len(WIDTHS)):
        j = STARTS[p] + tl.arange(0, WIDTHS[p])[None, :]
        mask = row_ok[:, None] & (j < N2)
        value = apply_norm(x_ptr, norm_weight_ptr, inputs[p], inverse_rms, columns + j, mask)
        normed = normed + (value,)  # noqa: RUF005
    return normed


@triton.jit
def _turn_left(
    inputs, grow, finite_row, left_hi, left_lo, PIECES: tl.constexpr, TOKENS: tl.constexpr, SPLIT_X: tl.constexpr
):  # fmt: skip
    """Compute L^T X of each piece, scaled by `grow`: its fp16 high parts, then its low parts."""
    turned_hi = ()
    turned_lo = ()
    for p in tl.static_range(PIECES):
        scaled = inputs[p] * grow
        if TOKENS > 1:  # the zeros of the block-diagonal L do not stop another token's NaN
            scaled = tl.where(finite_row, scaled, 0.0)
        x_hi, x_lo = _split(scaled)
        turned = tl.dot(left_lo, x_hi)
        if SPLIT_X:
            turned = tl.dot(left_hi, x_lo, turned)
        hi, lo = _split(tl.dot(left_hi, x_hi, turned))
        turned_hi = turned_hi + (hi,)  # noqa: RUF005
        turned_lo = turned_lo + (lo,)  # noqa: RUF005
    return turned_hi, turned_lo


@triton.jit
def _turn_right(
    turned_hi, turned_lo, right_ptr, column_scale_ptr, first_column, columns, row_ok, slot,
    N2: tl.constexpr, N2P: tl.constexpr, STARTS: tl.constexpr, WIDTHS: tl.constexpr,
    OUT_STARTS: tl.constexpr, OUT_WIDTHS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute (L^T X) R times the column scale: float32 [ROWS, OUT_WIDTHS[p]] of each piece, and each token's largest
    magnitude in it, as bits."""
    outputs = ()
    peaks = ()
    for p in tl.static_range(len(OUT_WIDTHS)):
        acc = _zeros(ROWS, OUT_WIDTHS[p])
        for s in tl.static_range(len(WIDTHS)):
            pair = _load_right(right_ptr, STARTS[s], WIDTHS[s], OUT_STARTS[p], OUT_WIDTHS[p], N2P)
            right_hi = pair[0]
            right_lo = pair[1]
            acc = tl.dot(turned_hi[s], right_lo, acc)
            acc = tl.dot(turned_lo[s], right_hi, acc)
            acc = tl.dot(turned_hi[s], right_hi, acc)
        j = OUT_STARTS[p] + tl.arange(0, OUT_WIDTHS[p])[None, :]
        mask = row_ok[:, None] & (j < N2)
        acc *= tl.load(column_scale_ptr + first_column + columns + j, mask=mask, other=0.0)
        outputs = outputs + (acc,)  # noqa: RUF005
        peaks = peaks + (token_max(magnitude(acc), slot, TOKENS),)  # noqa: RUF005
    return outputs, peaks


@triton.jit
def _store_codes(
    outputs, inverse, q_ptr, out_at, out_row, row_ok, slot,
    N2: tl.constexpr, OUT_STARTS: tl.constexpr, OUT_WIDTHS: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Quantize and store each piece; return the sum of each token's codes.

    `out_row` [ROWS, 1] plus `out_at` are the offsets of the rows' first codes.
    """
    Q_MAX: tl.constexpr = (1 << (BITS - 1)) - 1
    total = 0
    for p in tl.static_range(len(OUT_WIDTHS)):
        j = OUT_STARTS[p] + tl.arange(0, OUT_WIDTHS[p])[None, :]
        mask = row_ok[:, None] & (j < N2)
        value = tl.minimum(tl.maximum(outputs[p] * inverse, -Q_MAX), Q_MAX)
        code = round_half_even(value)
        total += token_sum(code, slot, TOKENS)
        tl.store(q_ptr + out_at + out_row + j, code.to(tl.int8), mask=mask)
    return total


@triton.jit
def rotate_role(
    x_ptr, residual_ptr, norm_weight_ptr, left_ptr, right_ptr, column_scale_ptr,
    q_ptr, scale_ptr, q_sum_ptr, residual_out_ptr,
    m, x_stride, residual_stride, level, eps, program,
    K: tl.constexpr, G: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N2P: tl.constexpr, STARTS: tl.constexpr,
    WIDTHS: tl.constexpr, OUT_STARTS: tl.constexpr, OUT_WIDTHS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    FUSE: tl.constexpr, SPLIT_X: tl.constexpr,
):  # fmt: skip
    """Rotate, scale and quantize one rotation group of TOKENS tokens.

    Args (arrays are row-major and contiguous unless a stride is named):
        x_ptr: [m, K] bf16, fp16 or fp32 with row stride `x_stride`; [m, 2 K] where SiLU * mul is fused.
        residual_ptr: [m, K] in the dtype of x with row stride `residual_stride`; norm_weight_ptr: [K]. Both are read
            only where FUSE says so.
        left_ptr: fp16 [G, 2, ROWS / TOKENS, ROWS / TOKENS], high and low parts of 2^6 L^T.
        right_ptr: fp16 [G, 2, N2P, N2P], of 2^6 R. column_scale_ptr: fp32 [K].
        q_ptr: int8 [m, K], scale_ptr: fp32 [m, G], q_sum_ptr: int32 [m, G], residual_out_ptr: [m, K] in the dtype of
            x; all written.
        m: tokens. level: clip / q_max. eps: of the norm.
        program: index among the G * ceil(m / TOKENS) programs of this role.
        K: columns. G: rotation groups. N1, N2: orders of the rotation's factors, K = G N1 N2. N2P: N2 padded to a
            multiple of 16.
        STARTS, WIDTHS: first columns and widths of the pieces of X and L^T X; OUT_STARTS, OUT_WIDTHS: of
            (L^T X) R. Widths are powers of two.
        TOKENS: tokens of a tile, a power of two. ROWS: rows of a tile, TOKENS times N1 padded.
        BITS: of a code, 2 to 8.
        FUSE: what is fused into the load (see `fused_load`).
        SPLIT_X: whether x is float32 and so takes two fp16 numbers.
    """
    WIDTH: tl.constexpr = N1 * N2
    ROWS_EACH: tl.constexpr = ROWS // TOKENS
    PIECES: tl.constexpr = len(WIDTHS)
    OUT_PIECES: tl.constexpr = len(OUT_WIDTHS)

    tiles = tl.cdiv(m, TOKENS)
    group = program // tiles  # neighbours share the rotation of a group in the caches
    first = (program % tiles) * TOKENS
    row = tl.arange(0, ROWS)
    slot = row // ROWS_EACH
    within = row % ROWS_EACH
    row_ok = (within < N1) & (first + slot < m)
    # 64-bit offsets go into the base pointers, so that those inside a tile take one register each.
    start = first.to(tl.int64)
    right_ptr += group * (2 * N2P * N2P)
    x_ptr += start * x_stride
    out_at = start * K + group * WIDTH
    columns = (within * N2)[:, None]  # of the first element of each row, in the group
    x_row = (slot * x_stride)[:, None] + columns
    out_row = (slot * K)[:, None] + columns
    residual_row = columns
    if FUSE == ADDS_AND_NORMS:
        residual_ptr += start * residual_stride
        residual_row = (slot * residual_stride)[:, None] + columns

    inputs, squares = _load_inputs(
        x_ptr, residual_ptr, residual_out_ptr, x_row, residual_row, out_at, out_row, row_ok, slot, group * WIDTH,
        K, G, N2, STARTS, WIDTHS, TOKENS, FUSE,
    )  # fmt: skip
    left_hi, left_lo = _load_left(left_ptr + group * (2 * ROWS_EACH * ROWS_EACH), within, slot, ROWS, TOKENS)
    if FUSE >= NORMS:
        if G == 1:
            inverse_rms = tl.rsqrt(squares / K + eps)
        else:
            inverse_rms = inverse_rms_of(
                x_ptr, residual_ptr, x_stride, residual_stride, m - first, eps, TOKENS, K, FUSE
            )  # fmt: skip
            if TOKENS > 1:
                inverse_rms = _per_row(inverse_rms, slot, ROWS, TOKENS)
        inverse_rms = over_columns(inverse_rms, TOKENS)
        inputs = _normalize(
            x_ptr, norm_weight_ptr, inputs, inverse_rms, row_ok, group * WIDTH + columns, N2, STARTS, WIDTHS
        )  # fmt: skip

    # Magnitudes are compared as integers: there NaN is the largest and cannot get lost.
    peak = token_max(magnitude(inputs[0]), slot, TOKENS)
    for p in tl.static_range(1, PIECES):
        peak = tl.maximum(peak, token_max(magnitude(inputs[p]), slot, TOKENS))
    # 2^(4 - exponent of peak), kept where both it and its inverse are normal numbers.
    field = tl.minimum(258 - (peak >> 23), 253)
    grow = over_columns(_power_of_two(field), TOKENS)
    finite = peak < INFINITY
    finite_row = over_columns(finite, TOKENS)

    turned_hi, turned_lo = _turn_left(inputs, grow, finite_row, left_hi, left_lo, PIECES, TOKENS, SPLIT_X)
    outputs, peaks = _turn_right(
        turned_hi, turned_lo, right_ptr, column_scale_ptr, group * WIDTH, columns, row_ok, slot,
        N2, N2P, STARTS, WIDTHS, OUT_STARTS, OUT_WIDTHS, TOKENS, ROWS,
    )  # fmt: skip

    peak = peaks[0]
    for p in tl.static_range(1, OUT_PIECES):
        peak = tl.maximum(peak, peaks[p])
    step = tl.where(finite, peak.to(tl.float32, bitcast=True) * level, float("nan"))
    inverse = over_columns(tl.where(step > 0.0, 1.0 / step, 0.0), TOKENS)
    scale = step * (_power_of_two(254 - field) * UNSCALE)
    if TOKENS == 1:
        tl.store(scale_ptr + start * G + group, scale)
    else:
        tl.store(scale_ptr + start * G + group + slot * G, scale, mask=row_ok & (within == 0))
    total = _store_codes(
        outputs, inverse, q_ptr, out_at, out_row, row_ok, slot, N2, OUT_STARTS, OUT_WIDTHS, TOKENS, BITS
    )  # fmt: skip
    if TOKENS == 1:
        tl.store(q_sum_ptr + start * G + group, total)
    else:
        tl.store(q_sum_ptr + start * G + group + slot * G, total, mask=row_ok & (within == 0))
