"""The last steps of both matmul kernels: the low-rank term."""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples.

import triton
import triton.language as tl
from bwla_kernels.factorize import RANK_STEP as RANK_STEP

_STEP = tl.constexpr(RANK_STEP)
_LARGE_TILE = tl.constexpr(128 * 128)


@triton.jit
def low_rank_term(y, u, low_b, m, n, rank, RANK: tl.constexpr, PURE: tl.constexpr):
    """Add B[n, :] . u[m, :] to y [BN, BM], exact to float32 rounding although B is bfloat16.

    u is split into three bfloat16 parts that add up to all of its 24 bits, so that each product on the tensor cores is
    exact in float32. The interpreter cannot compute in bfloat16 (PURE) and uses float32.

    RANK is walked in steps of 16: it need not be a power of two, and the operands of one step fit the registers.

    Args:
        u: float32 [M, rank]; low_b: bfloat16 [N_padded, RANK], zero beyond rank.
    """
    if y.shape[0] * y.shape[1] < _LARGE_TILE:
        for start in tl.static_range(0, RANK, _STEP):
            y = _low_rank_step(y, u, low_b, m, n, rank, start, RANK, PURE)
    else:  # a loop that stays one: loads of all steps at once would not fit the registers beside the sums
        for start in tl.range(0, RANK, _STEP, num_stages=1):
            y = _low_rank_step(y, u, low_b, m, n, rank, start, RANK, PURE)
    return y


@triton.jit
def _low_rank_step(y, u, low_b, m, n, rank, start, RANK: tl.constexpr, PURE: tl.constexpr):
    """Add the part of `low_rank_term` over 16 ranks from `start` on."""
    r = start + tl.arange(0, _STEP)
    b = tl.load(low_b + n[:, None] * RANK + r[None, :])
    x = tl.load(u + m[None, :] * rank + r[:, None], mask=(r < rank)[:, None], other=0.0)
    if PURE:
        y = tl.dot(b.to(tl.float32), x, y, input_precision="ieee")
    else:
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            y = tl.dot(b, part, y)
            x -= part.to(tl.float32)
    return y


@triton.jit
def load_low_rank_rows(low_b, n, RANK: tl.constexpr):
    """Load B[n, :] as bfloat16 tiles [BN, 16], ahead of their use."""
    tiles = ()
    for start in tl.static_range(0, RANK, _STEP):
        tiles = tiles + (tl.load(low_b + n[:, None] * RANK + (start + tl.arange(0, _STEP))[None, :]),)
    return tiles


@triton.jit
def low_rank_row(tiles, u, m, rank, RANK: tl.constexpr):
    """Compute B[n, :] . u[m, :] for one token m and the rows of `load_low_rank_rows`: float32 [BN], no tensor cores."""
    total = tiles[0].to(tl.float32) * _row_of_u(u, m, rank, 0)[None, :]
    for i in tl.static_range(1, RANK // _STEP):
        total += tiles[i].to(tl.float32) * _row_of_u(u, m, rank, i * _STEP)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _row_of_u(u, m, rank, START: tl.constexpr):
    r = START + tl.arange(0, _STEP)
    return tl.load(u + m * rank + r, mask=r < rank, other=0.0)
