"""Load the input of a layer, with RMSNorm, residual addition or SiLU * mul fused into the load."""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl

PLAIN, SILU_MUL, NORM, ADD_NORM = 0, 1, 2, 3
"""What is fused into the load (the constexpr FUSE); those with a norm last."""

# Kernels may read module constants only as constexpr.
NORMS = tl.constexpr(NORM)
ADDS_AND_NORMS = tl.constexpr(ADD_NORM)
MULTIPLIES_SILU = tl.constexpr(SILU_MUL)
_NORM_TILE = tl.constexpr(4096)  # elements a step where a row's mean square is computed


@triton.jit
def raw_input(x_ptr, residual_ptr, x_at, residual_at, mask, K: tl.constexpr, FUSE: tl.constexpr):
    """Load the float32 input before a norm: x, x + residual, or silu(gate) * up rounded as in vLLM's kernel."""
    stored = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    value = stored.to(tl.float32)
    if FUSE == ADDS_AND_NORMS:
        value += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
    if FUSE == MULTIPLIES_SILU:
        up = tl.load(x_ptr + x_at + K, mask=mask, other=0.0).to(tl.float32)
        gate = (value / (1.0 + tl.exp(-value))).to(stored.dtype).to(tl.float32)
        value = (gate * up).to(stored.dtype).to(tl.float32)
    return value


@triton.jit
def apply_norm(x_ptr, norm_weight_ptr, value, inverse_rms, columns, mask):
    """Normalize, round to the weight's dtype, multiply by the weight, round: the order of vLLM's RMSNorm."""
    return weigh(x_ptr, value, inverse_rms, tl.load(norm_weight_ptr + columns, mask=mask, other=0.0))


@triton.jit
def weigh(x_ptr, value, inverse_rms, weight):
    """Apply the norm with a weight that is already loaded (see `apply_norm`)."""
    value = (value * inverse_rms).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    return value.to(weight.dtype).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def inverse_rms_of(
    x_ptr, residual_ptr, x_stride, residual_stride, rows, eps,
    TOKENS: tl.constexpr, K: tl.constexpr, FUSE: tl.constexpr,
):  # fmt: skip
    """Compute 1 / sqrt(mean(input^2) + eps) of the first TOKENS rows, of which `rows` exist: a scalar or [TOKENS]."""
    STEP: tl.constexpr = _NORM_TILE // TOKENS
    row = tl.arange(0, TOKENS)[:, None]
    total = tl.zeros([TOKENS, STEP], tl.float32)
    for start in range(0, K, STEP):
        column = start + tl.arange(0, STEP)[None, :]
        mask = (row < rows) & (column < K)
        value = raw_input(
            x_ptr, residual_ptr, row * x_stride + column, row * residual_stride + column, mask, K, FUSE
        )  # fmt: skip
        total += value * value
    squares = tl.sum(total) if TOKENS == 1 else tl.sum(total, 1)
    return tl.rsqrt(squares / K + eps)


@triton.jit
def over_columns(value, TOKENS: tl.constexpr):
    """Reshape a value of each token so that it broadcasts over a tile."""
    return value if TOKENS == 1 else value[:, None]
