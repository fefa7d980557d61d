"""Project the unrotated input: u = x A^T for 16 tokens and some rows of A."""

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


@triton.jit
def _project_input(
    x_ptr, residual_ptr, norm_weight_ptr, rows, column, inverse_rms, x_stride, residual_stride,
    TOKENS: tl.constexpr, K: tl.constexpr, FUSE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS)[:, None]
    x_at, residual_at = row * x_stride + column, row * residual_stride + column
    value = raw_input(x_ptr, residual_ptr, x_at, residual_at, (row < rows) & (column < K), K, FUSE)
    if FUSE >= NORMS:
        value = apply_norm(x_ptr, norm_weight_ptr, value, inverse_rms, column, column < K)
    return value


@triton.jit
def project_role(
    x_ptr, residual_ptr, norm_weight_ptr, a_ptr, u_ptr, m, x_stride, residual_stride, eps, program,
    K: tl.constexpr, RANK: tl.constexpr, FUSE: tl.constexpr, U_TOKENS: tl.constexpr, U_RANKS: tl.constexpr,
    U_STEP: tl.constexpr, U_DOT: tl.constexpr,
):  # fmt: skip
    """Compute u for U_TOKENS tokens and U_RANKS rows of A, over the whole width: no atomics, a reproducible sum.

    U_DOT: how tensor cores multiply: "native" for two bf16 operands, or the name of an input precision for float32
    ones (tf32 is exact for bf16 and fp16 values).
    """
    GROUPS: tl.constexpr = (RANK + U_RANKS - 1) // U_RANKS
    first = program // GROUPS * U_TOKENS
    rows = m - first
    start = first.to(tl.int64)
    x_ptr += start * x_stride
    if FUSE == ADDS_AND_NORMS:
        residual_ptr += start * residual_stride
    ranks = program % GROUPS * U_RANKS + tl.arange(0, U_RANKS)
    rank_ok = ranks < RANK
    inverse_rms = 0.0
    if FUSE >= NORMS:
        inverse_rms = inverse_rms_of(
            x_ptr, residual_ptr, x_stride, residual_stride, rows, eps, U_TOKENS, K, FUSE
        )  # fmt: skip
        inverse_rms = over_columns(inverse_rms, U_TOKENS)
    u = tl.zeros([U_TOKENS, U_RANKS], tl.float32)
    for step in tl.range(0, K, U_STEP):
        k = step + tl.arange(0, U_STEP)
        value = _project_input(
            x_ptr, residual_ptr, norm_weight_ptr, rows, k[None, :], inverse_rms,
            x_stride, residual_stride, U_TOKENS, K, FUSE,
        )  # fmt: skip
        mask = rank_ok[None, :] & (k[:, None] < K)
        a = tl.load(a_ptr + ranks[None, :] * K + k[:, None], mask=mask, other=0.0)
        if U_DOT == "native":
            u = tl.dot(value.to(a.dtype), a, u)
        else:
            u = tl.dot(value, a.to(tl.float32), u, input_precision=U_DOT)
    row = tl.arange(0, U_TOKENS)[:, None]
    tl.store(u_ptr + start * RANK + row * RANK + ranks[None, :], u, mask=(row < rows) & rank_ok[None, :])
