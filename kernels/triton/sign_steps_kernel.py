"""The kernels of the sign search: a program owns 32 rows of one candidate and walks through the columns of a block.

A step of 16 columns is sequential. A thread holds all of them for one row, so that neither reading a column nor
updating those after it moves data between threads. What the earlier steps of the block mean for the next one is a
product with tensor cores: signs are exact in bfloat16, and a float32 number is the sum of three bfloat16 numbers, so
these products are as precise as those in float32.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl

ROWS = 32
"""Rows of a program: one for each thread of its only warp."""

STEP = 16
"""Columns of a step: the height of a tensor-core tile. Its rows of the matrix have fewer elements than a warp has
threads; only then does the compiler give each thread all of them."""

DEPTH = 32
"""Signs that are multiplied at a time, and in the update after the last step also columns."""

ROW_POINTERS = ["target", "product", "scale", "sign", "change", "dots", "norms"]
"""Arguments of the kernels that are read row by row."""

_ROWS = tl.constexpr(ROWS)
_STEP = tl.constexpr(STEP)
_DEPTH = tl.constexpr(DEPTH)


@triton.jit
def _column(tile, at: tl.constexpr):
    """Return column `at` of [STEP, ROWS]. It costs no instruction: `at` is a constant, and x + -0.0 is x."""
    return tl.sum(tl.where((tl.arange(0, _STEP) == at)[:, None], tile, -0.0), 0)


@triton.jit
def _load_columns(rows, begin, stride, inside, COUNT: tl.constexpr):
    """Load columns [begin, begin + COUNT), float32 [COUNT, ROWS]. `rows` are pointers into column 0."""
    j = begin + tl.arange(0, COUNT)
    return tl.load(rows[None, :] + (j * stride)[:, None], mask=inside[None, :], other=0.0)


@triton.jit
def _store_columns(rows, value, begin, stride, inside, COUNT: tl.constexpr):
    j = begin + tl.arange(0, COUNT)
    tl.store(rows[None, :] + (j * stride)[:, None], value, mask=inside[None, :])


@triton.jit
def _load_step(vector, begin, stride):
    """Load elements [begin, begin + STEP) of a vector of elements `stride` apart."""
    return tl.load(vector + (begin + tl.arange(0, _STEP)) * stride)


@triton.jit
def _load_matrix_row(matrix, row, begin, B):
    """Load columns [begin, begin + STEP) of a row of [B, B]."""
    return tl.load(matrix + row * B + begin + tl.arange(0, _STEP))


@triton.jit
def _leading_bits(value):
    """Clear the bits of float32 numbers that bfloat16 has not."""
    return (value.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _as_bfloat16(value, PURE: tl.constexpr):
    """Convert float32 numbers that bfloat16 represents; a conversion that may round takes longer.

    The interpreter cannot multiply bfloat16 (PURE): there they stay float32.
    """
    if not PURE:
        value = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def _add_product(
    total, matrix, signs, first, known, begin, stride, inside,
    B, COUNT: tl.constexpr, PURE: tl.constexpr,
):  # fmt: skip
    """Add matrix[first : first + DEPTH, begin : begin + COUNT]^T @ signs[first : first + DEPTH], [COUNT, ROWS].

    Args:
        signs: pointers to the rows in column 0; -2, -1, 0, 1 or 2. Those of columns from `known` on are not read.
    """
    column = begin + tl.arange(0, COUNT)
    k = first + tl.arange(0, _DEPTH)
    part = tl.load(matrix + k[None, :] * B + column[:, None], mask=(k < known)[None, :], other=0.0)
    at = signs[None, :] + (k * stride)[:, None]
    sign = _as_bfloat16(tl.load(at, mask=inside[None, :] & (k < known)[:, None], other=0.0), PURE)
    high = _leading_bits(part)
    part -= high
    middle = _leading_bits(part)
    total = tl.dot(_as_bfloat16(part - middle, PURE), sign, total)
    total = tl.dot(_as_bfloat16(middle, PURE), sign, total)
    return tl.dot(_as_bfloat16(high, PURE), sign, total)


@triton.jit
def _load_current(product, matrix, signs, begin, stride, inside, B, PURE: tl.constexpr):
    """Return `product` with the part of the signs before `begin`, for columns [begin, begin + STEP).

    The part goes through the memory of the signs that come next: without a load, the compiler would lay out the step
    like a tensor-core tile, whose columns are spread over threads.
    """
    tl.debug_barrier()  # other threads have stored the signs
    total = tl.zeros([_STEP, _ROWS], tl.float32)
    for first in range(0, begin, _DEPTH):
        total = _add_product(total, matrix, signs, first, begin, begin, stride, inside, B, _STEP, PURE)
    _store_columns(signs, total, begin, stride, inside, _STEP)
    tl.debug_barrier()
    total = _load_columns(signs, begin, stride, inside, _STEP)
    tl.debug_barrier()
    return _load_columns(product, begin, stride, inside, _STEP) + total


# One compiled kernel for every number of rows and candidates, and wherever the rows begin. Besides, a load of several
# neighbouring rows at once would spread the columns of a step over threads.
@triton.jit(do_not_specialize=["N", "C"], do_not_specialize_on_alignment=ROW_POINTERS)
def choose_signs_kernel(
    target,
    product,
    factor,
    pivots,
    scale,
    sign,
    dots,
    norms,
    N,
    C,
    B,
    PURE: tl.constexpr,
):
    """Choose the signs of a block for ROWS rows of one candidate. Grid: (N over ROWS, C).

    Args: those of `choose_signs_reference`, float32 and contiguous: target [B, N]; product, sign [B, C, N];
        factor [B, B]; pivots [B]; scale, dots, norms [C, N]. B is a multiple of DEPTH.
    """
    n = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    inside = n < N
    at = tl.program_id(1) * N + n
    stride = C * N
    a = tl.load(scale + at, mask=inside, other=0.0)
    dot = tl.load(dots + at, mask=inside, other=0.0)
    norm = tl.load(norms + at, mask=inside, other=0.0)
    column = tl.arange(0, _STEP)[:, None]
    for begin in range(0, B, _STEP):
        q = _load_current(product + at, factor, sign + at, begin, stride, inside, B, PURE)
        p = _load_columns(target + n, begin, N, inside, _STEP)
        signs = tl.zeros([_STEP, _ROWS], tl.float32)
        for j in tl.static_range(_STEP):
            row = _load_matrix_row(factor, begin + j, begin, B)
            s = tl.where(_column(p, j) - a * _column(q, j) >= 0, 1.0, -1.0)
            signs = tl.where(column == j, s[None, :], signs)
            q = tl.where(column >= j, q + row[:, None] * s[None, :], q)
        _store_columns(sign + at, signs, begin, stride, inside, _STEP)
        weighted = _load_step(pivots, begin, 1)[:, None] * q
        dot += tl.sum(weighted * p, 0)
        norm += tl.sum(weighted * q, 0)
    tl.store(dots + at, dot, mask=inside)
    tl.store(norms + at, norm, mask=inside)


@triton.jit(do_not_specialize=["N", "C"], do_not_specialize_on_alignment=ROW_POINTERS)
def flip_signs_kernel(
    target,
    product,
    hessian,
    scale,
    sign,
    change,
    dots,
    norms,
    N,
    C,
    B,
    PURE: tl.constexpr,
):
    """Visit the signs of a block for ROWS rows of one candidate. Grid: (N over ROWS, C).

    Args: those of `flip_signs_reference`, float32 and contiguous: target [B, N]; product, sign, change [B, C, N];
        hessian [B, B]; scale, dots, norms [C, N]. B is a multiple of DEPTH.
    """
    n = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    inside = n < N
    at = tl.program_id(1) * N + n
    stride = C * N
    a = tl.load(scale + at, mask=inside, other=0.0)
    dot = tl.load(dots + at, mask=inside, other=0.0)
    norm = tl.load(norms + at, mask=inside, other=0.0)
    column = tl.arange(0, _STEP)[:, None]
    for begin in range(0, B, _STEP):
        g = _load_current(product + at, hessian, change + at, begin, stride, inside, B, PURE)
        t = _load_columns(target + n, begin, N, inside, _STEP)
        signs = _load_columns(sign + at, begin, stride, inside, _STEP)
        changes = tl.zeros([_STEP, _ROWS], tl.float32)
        for j in tl.static_range(_STEP):
            row = _load_matrix_row(hessian, begin + j, begin, B)
            own = tl.load(hessian + (begin + j) * (B + 1))
            s = _column(signs, j)
            gain = s * (a * _column(g, j) - _column(t, j)) - a * own
            flip = tl.where(gain > 0, -2.0 * s, 0.0)
            changes = tl.where(column == j, flip[None, :], changes)
            # Column j keeps what the decision was made with.
            g = tl.where(column > j, g + row[:, None] * flip[None, :], g)
        _store_columns(change + at, changes, begin, stride, inside, _STEP)
        _store_columns(sign + at, signs + changes, begin, stride, inside, _STEP)
        dot += tl.sum(changes * t, 0)
        norm += tl.sum(changes * (2.0 * g + changes * _load_step(hessian, begin, B + 1)[:, None]), 0)
    tl.store(dots + at, dot, mask=inside)
    tl.store(norms + at, norm, mask=inside)
    tl.debug_barrier()
    for begin in range(0, B, _DEPTH):
        total = _load_columns(product + at, begin, stride, inside, _DEPTH)
        for first in range(0, B, _DEPTH):
            total = _add_product(
                total, hessian, change + at, first, B, begin, stride, inside, B, _DEPTH, PURE
            )
        _store_columns(product + at, total, begin, stride, inside, _DEPTH)
