"""The kernels of the sign search for several planes: a program owns 32 rows and walks through the columns of a block.

They are made like those for one plane (`sign_steps_kernel`). A thread holds a step's columns of all planes for one row.
Which of the 2^P levels a column has is a number whose bit p is the sign of plane p.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples.

import triton
import triton.language as tl
from bwla_kernels.triton.sign_steps_kernel import (
    DEPTH,
    ROW_POINTERS,
    ROWS,
    STEP,
    _add_product,
    _column,
    _load_columns,
    _load_current,
    _load_matrix_row,
    _load_step,
    _store_columns,
)

_ROWS = tl.constexpr(ROWS)
_STEP = tl.constexpr(STEP)
_DEPTH = tl.constexpr(DEPTH)


@triton.jit
def _sign_of(code, p: tl.constexpr):
    """Return the sign of plane p, -1.0 or 1.0."""
    return tl.where(((code >> p) & 1) == 1, 1.0, -1.0)


@triton.jit
def _level(scales, code):
    """Return the level of a code: the sum of the planes' scales with their signs."""
    level = _sign_of(code, 0) * scales[0]
    for p in tl.static_range(1, len(scales)):
        level += _sign_of(code, p) * scales[p]
    return level


@triton.jit
def _levels(scales, PLANES: tl.constexpr):
    """Return all levels of the rows, in the order of their codes."""
    levels = ()
    for code in tl.static_range(1 << PLANES):
        levels = levels + (_level(scales, code),)
    return levels


@triton.jit
def _nearest(wanted, levels, code, distance):
    """Return the code of the level nearest to `wanted`, and `code` where none is nearer than `distance` (squared)."""
    for other in tl.static_range(len(levels)):
        step = wanted - levels[other]
        squared = step * step
        code = tl.where(squared < distance, other, code)
        distance = tl.minimum(distance, squared)
    return code


@triton.jit
def _code_column(codes, at: tl.constexpr):
    """Return column `at` of [STEP, ROWS] codes; like `_column`, it costs no instruction."""
    return tl.sum(tl.where((tl.arange(0, _STEP) == at)[:, None], codes, 0), 0)


@triton.jit
def _dot_scales(scales, tiles, j: tl.constexpr):
    """Return the sum of a_p times column j of the tile of plane p."""
    total = scales[0] * _column(tiles[0], j)
    for p in tl.static_range(1, len(scales)):
        total += scales[p] * _column(tiles[p], j)
    return total


@triton.jit
def _add_to(pointers, value, inside):
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _add_sums(dots, norms, dot, norm, n, N, inside, PLANES: tl.constexpr):
    """Add a program's part to `dots` [P, N] and to both triangles of `norms` [P, P, N]."""
    for p in tl.static_range(PLANES):
        _add_to(dots + p * N + n, dot[p], inside)
        for q in tl.static_range(p, PLANES):
            pair = norm[p * PLANES - p * (p + 1) // 2 + q]
            _add_to(norms + (p * PLANES + q) * N + n, pair, inside)
            if q > p:
                _add_to(norms + (q * PLANES + p) * N + n, pair, inside)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=ROW_POINTERS)
def choose_levels_kernel(
    target,
    product,
    factor,
    pivots,
    scale,
    sign,
    dots,
    norms,
    N,
    B,
    PLANES: tl.constexpr,
    PURE: tl.constexpr,
):
    """Choose the signs of a block for ROWS rows. Grid: N over ROWS.

    Args: those of `choose_levels_reference`, float32 and contiguous: target [B, N]; product, sign [B, P, N];
        factor [B, B]; pivots [B]; scale, dots [P, N]; norms [P, P, N]. B is a multiple of DEPTH.
    """
    n = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    inside = n < N
    stride = PLANES * N
    column = tl.arange(0, _STEP)[:, None]
    scales = ()
    dot = ()
    norm = ()
    for p in tl.static_range(PLANES):
        scales = scales + (tl.load(scale + p * N + n, mask=inside, other=0.0),)
        dot = dot + (tl.zeros([_ROWS], tl.float32),)
        for _ in tl.static_range(p, PLANES):
            norm = norm + (tl.zeros([_ROWS], tl.float32),)
    levels = _levels(scales, PLANES)
    for begin in range(0, B, _STEP):
        qs = ()
        for p in tl.static_range(PLANES):
            at = p * N + n
            q = _load_current(product + at, factor, sign + at, begin, stride, inside, B, PURE)
            qs = qs + (q,)
        t = _load_columns(target + n, begin, N, inside, _STEP)
        codes = tl.zeros([_STEP, _ROWS], tl.int32)
        for j in tl.static_range(_STEP):
            row = _load_matrix_row(factor, begin + j, begin, B)
            wanted = _column(t, j) - _dot_scales(scales, qs, j)
            start = tl.full([_ROWS], float("inf"), tl.float32)
            code = _nearest(wanted, levels, tl.zeros([_ROWS], tl.int32), start)
            codes = tl.where(column == j, code[None, :], codes)
            moved = ()
            for p in tl.static_range(PLANES):
                s = _sign_of(code, p)
                moved = moved + (tl.where(column >= j, qs[p] + row[:, None] * s[None, :], qs[p]),)
            qs = moved
        pivot = _load_step(pivots, begin, 1)[:, None]
        new_dot = ()
        new_norm = ()
        for p in tl.static_range(PLANES):
            _store_columns(sign + p * N + n, _sign_of(codes, p), begin, stride, inside, _STEP)
            weighted = pivot * qs[p]
            new_dot = new_dot + (dot[p] + tl.sum(weighted * t, 0),)
            for q in tl.static_range(p, PLANES):
                pair = norm[p * PLANES - p * (p + 1) // 2 + q]
                new_norm = new_norm + (pair + tl.sum(weighted * qs[q], 0),)
        dot = new_dot
        norm = new_norm
    _add_sums(dots, norms, dot, norm, n, N, inside, PLANES)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=ROW_POINTERS)
def move_levels_kernel(
    target,
    product,
    hessian,
    scale,
    sign,
    change,
    dots,
    norms,
    N,
    B,
    PLANES: tl.constexpr,
    PURE: tl.constexpr,
):
    """Move every column of a block to its best level for ROWS rows. Grid: N over ROWS.

    Args: those of `move_levels_reference`, float32 and contiguous: target [B, N]; product, sign, change [B, P, N];
        hessian [B, B]; scale, dots [P, N]; norms [P, P, N]. B is a multiple of DEPTH.
    """
    n = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    inside = n < N
    stride = PLANES * N
    column = tl.arange(0, _STEP)[:, None]
    scales = ()
    dot = ()
    norm = ()
    for p in tl.static_range(PLANES):
        scales = scales + (tl.load(scale + p * N + n, mask=inside, other=0.0),)
        dot = dot + (tl.zeros([_ROWS], tl.float32),)
        for _ in tl.static_range(p, PLANES):
            norm = norm + (tl.zeros([_ROWS], tl.float32),)
    levels = _levels(scales, PLANES)
    for begin in range(0, B, _STEP):
        gs = ()
        codes = tl.zeros([_STEP, _ROWS], tl.int32)
        for p in tl.static_range(PLANES):
            at = p * N + n
            g = _load_current(product + at, hessian, change + at, begin, stride, inside, B, PURE)
            gs = gs + (g,)
            positive = _load_columns(sign + at, begin, stride, inside, _STEP) > 0
            codes = codes | (positive.to(tl.int32) << p)
        t = _load_columns(target + n, begin, N, inside, _STEP)
        chosen = codes
        for j in tl.static_range(_STEP):
            row = _load_matrix_row(hessian, begin + j, begin, B)
            own = tl.load(hessian + (begin + j) * (B + 1))
            code = _code_column(codes, j)
            step = tl.div_rn(_dot_scales(scales, gs, j) - _column(t, j), tl.zeros([_ROWS], tl.float32) + own)
            new = _nearest(_level(scales, code) - step, levels, code, step * step)
            chosen = tl.where(column == j, new[None, :], chosen)
            moved = ()
            for p in tl.static_range(PLANES):
                by = _sign_of(new, p) - _sign_of(code, p)
                # Column j keeps what the decision was made with.
                moved = moved + (tl.where(column > j, gs[p] + row[:, None] * by[None, :], gs[p]),)
            gs = moved
        diagonal = _load_step(hessian, begin, B + 1)[:, None]
        new_dot = ()
        new_norm = ()
        for p in tl.static_range(PLANES):
            at = p * N + n
            changes = _sign_of(chosen, p) - _sign_of(codes, p)
            signs = _load_columns(sign + at, begin, stride, inside, _STEP)
            _store_columns(change + at, changes, begin, stride, inside, _STEP)
            _store_columns(sign + at, signs + changes, begin, stride, inside, _STEP)
            new_dot = new_dot + (dot[p] + tl.sum(changes * t, 0),)
            for q in tl.static_range(p, PLANES):
                others = _sign_of(chosen, q) - _sign_of(codes, q)
                both = changes * gs[q] + others * gs[p] + diagonal * changes * others
                new_norm = new_norm + (norm[p * PLANES - p * (p + 1) // 2 + q] + tl.sum(both, 0),)
        dot = new_dot
        norm = new_norm
    _add_sums(dots, norms, dot, norm, n, N, inside, PLANES)
    tl.debug_barrier()
    for begin in range(0, B, _DEPTH):
        for p in tl.static_range(PLANES):
            at = p * N + n
            total = _load_columns(product + at, begin, stride, inside, _DEPTH)
            for first in range(0, B, _DEPTH):
                total = _add_product(
                    total, hessian, change + at, first, B, begin, stride, inside, B, _DEPTH, PURE
                )
            _store_columns(product + at, total, begin, stride, inside, _DEPTH)
