"""The kernel behind `prepare_input` for many tokens: one grid, two roles.

The first programs compute u = x A^T from the unrotated input, so that the low-rank matrix does not go through the
few multiprocessors that rotate; each of the others rotates and quantizes one rotation group of `TOKENS` tokens.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl
from bwla_kernels.triton.pdl import PDL_EARLY
from bwla_kernels.triton.project import project_role
from bwla_kernels.triton.rotate import rotate_role
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["m"])
def prepare_input_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, left_ptr, right_ptr, column_scale_ptr, a_ptr,
    q_ptr, scale_ptr, q_sum_ptr, u_ptr, residual_out_ptr,
    m, x_stride, residual_stride, level, eps,
    K: tl.constexpr, G: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N2P: tl.constexpr, STARTS: tl.constexpr,
    WIDTHS: tl.constexpr, OUT_STARTS: tl.constexpr, OUT_WIDTHS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr,
    FUSE: tl.constexpr, SPLIT_X: tl.constexpr,
    U_TOKENS: tl.constexpr, U_RANKS: tl.constexpr, U_STEP: tl.constexpr, U_DOT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: programs of u (where RANK > 0), then G * ceil(m / TOKENS) rotations.

    Args (arrays are row-major and contiguous unless a stride is named):
        x_ptr [m, K] with row stride `x_stride`; [m, 2 K] for SILU_MUL.
        left_ptr fp16 [G, 2, ROWS / TOKENS, ROWS / TOKENS], right_ptr fp16 [G, 2, N2P, N2P]: `split_rotations`.
        level: clip / q_max.
    """
    if PDL == PDL_EARLY:
        gdc_launch_dependents()
    if PDL:
        gdc_wait()
    program = tl.program_id(0)
    projections = 0
    if RANK > 0:
        projections = tl.cdiv(m, U_TOKENS) * ((RANK + U_RANKS - 1) // U_RANKS)
    if program >= projections:
        rotate_role(
            x_ptr, residual_ptr, norm_weight_ptr, left_ptr, right_ptr, column_scale_ptr,
            q_ptr, scale_ptr, q_sum_ptr, residual_out_ptr,
            m, x_stride, residual_stride, level, eps, program - projections,
            K, G, N1, N2, N2P, STARTS, WIDTHS, OUT_STARTS, OUT_WIDTHS, TOKENS, ROWS, BITS,
            FUSE, SPLIT_X,
        )  # fmt: skip
    elif RANK > 0:
        project_role(
            x_ptr, residual_ptr, norm_weight_ptr, a_ptr, u_ptr,
            m, x_stride, residual_stride, eps, program,
            K, RANK, FUSE, U_TOKENS, U_RANKS, U_STEP, U_DOT,
        )  # fmt: skip
