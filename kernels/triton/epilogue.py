"""Last steps of both matmul kernels: low-rank term, bias, rounding to the output's dtype."""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl


@triton.jit
def low_rank_term(y, u, low_b, m, n, rank, RANK: tl.constexpr, PURE: tl.constexpr):
    """y [BN, BM] + B[n, :] . u[m, :], exact to float32's rounding although B is bfloat16.

    u is cut into three bfloat16 parts that add up to all of its 24 bits; each product with the tensor cores'
    float32 sums is then exact. The interpreter cannot compute in bfloat16 (PURE): there it is float32.

    Args:
        u: float32 [M, rank]; low_b: bfloat16 [N_padded, RANK], zero beyond rank.
    """
    r = tl.arange(0, RANK)
    b = tl.load(low_b + n[:, None] * RANK + r[None, :])
    x = tl.load(u + m[None, :] * rank + r[:, None], mask=(r < rank)[:, None], other=0.0)
    if PURE:
        return tl.dot(b.to(tl.float32), x, y, input_precision="ieee")
    for _ in tl.static_range(3):
        part = x.to(tl.bfloat16)
        y = tl.dot(b, part, y)
        x -= part.to(tl.float32)
    return y


@triton.jit
def low_rank_row(u, low_b, m, n, rank, RANK: tl.constexpr):
    """B[n, :] . u[m, :] for one token m: float32 [BN], without tensor cores."""
    r = tl.arange(0, RANK)
    b = tl.load(low_b + n[:, None] * RANK + r[None, :]).to(tl.float32)
    x = tl.load(u + m * rank + r, mask=r < rank, other=0.0)
    return tl.sum(b * x[None, :], 1)
