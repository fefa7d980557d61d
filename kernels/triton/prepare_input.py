"""The input side on a GPU: rotate, scale the columns, quantize, project onto the low-rank rows; one launch.

The definition is `reference.prepare_input`; `rotate.py` and `project.py` say how the kernel does it. What holds:
- The error of x_hat is below 2^-16 of the 2-norm of the token's block for every input, and about 2^-21 of it in
  practice (`rotate.py` derives it). A code differs from the reference's only where x_hat / scale lies within the
  two errors of a rounding tie, and then by one; `scale` agrees to the same relative error.
- `q_sum` and `planes` are exact for the codes in `q`.
- u: float32 accumulation of exact products for bf16 and fp16 inputs; float32 inputs are multiplied in float32, or
  as tf32x3 beyond `DOT_FROM` tokens.
- NaN and infinity make the scale of their token and block NaN, and of no other.
- No atomics: the same input gives the same bits, whatever tokens stand beside it, in the same configuration.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
from bwla_kernels.errors import BackendError
from bwla_kernels.factorize import MAX_FACTOR
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.fused_load import ADD_NORM, NORM, PLAIN, SILU_MUL
from bwla_kernels.triton.prepare_kernel import prepare_input_kernel
from bwla_kernels.triton.rotate import ROTATION_EXPONENT
from torch import Tensor

PLANES_MAX_TOKENS = 4
"""Most tokens for which bit planes are written."""

MIN_TILE = 16
"""Smallest side of a tensor-core tile."""

UNROLL = 8
"""Steps of a projection whose loads are in flight together."""


@dataclass(frozen=True)
class PreparedInput:
    """What the input side hands to the weight side.

    Attributes:
        q: int8 codes [M, K], natural column order.
        scale: float32 [M, G].
        q_sum: int32 [M, G], the sum of a block's codes.
        u: float32 [M, r], None for rank 0.
        planes: int32 [M, bits, G * P, C / 32], bit planes of the codes (two's complement) in P chunks of C columns
            a block; bit j of byte b of chunk t is column t C + (C / 8) j + b of the block, 0 beyond it; bytes are
            little-endian in their words. None where not asked for.
        residual: [M, K] in the dtype of x, x + residual; None without one.
    """

    q: Tensor
    scale: Tensor
    q_sum: Tensor
    u: Tensor | None = None
    planes: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class InputConfig:
    """How the kernel is cut.

    Attributes:
        tokens: tokens whose block one program rotates (a power of two).
        piece, out_piece: widest piece of columns of L^T X, and of (L^T X) R.
        early: whether the right rotation is loaded before the input has arrived.
        num_warps: warps of a program.
        max_registers: registers a thread may have; None lets the assembler trade them for occupancy.
        u_tokens, u_ranks, u_step: tokens, rows of A and columns a step of a program that projects.
        u_dot: whether it uses tensor cores.
    """

    tokens: int
    piece: int
    out_piece: int
    early: bool
    num_warps: int
    max_registers: int | None
    u_tokens: int
    u_ranks: int
    u_step: int
    u_dot: bool


def padded_rows(n1: int) -> int:
    """Rows of a token's tile: n1 padded to what a tensor core takes."""
    return max(MIN_TILE, int(triton.next_power_of_2(n1)))


@cache
def column_pieces(n2: int, widest: int = MAX_FACTOR) -> tuple[int, ...]:
    """Cut n2, padded to a multiple of 16, into powers of two of at most `widest`: 80 -> (64, 16)."""
    rest = -(-n2 // MIN_TILE) * MIN_TILE
    pieces = []
    while rest:
        pieces.append(min(widest, 1 << (rest.bit_length() - 1)))
        rest -= pieces[-1]
    return tuple(pieces)


def split_rotations(rotation_left: Tensor, rotation_right: Tensor) -> tuple[Tensor, Tensor]:
    """Split the rotations into pairs of fp16 numbers for the kernel, once at load.

    Args:
        rotation_left: [G, n1, n1].
        rotation_right: [G, n2, n2].

    Returns: L^T * 2^6 as fp16 [G, 2, n1p, n1p] and R * 2^6 as fp16 [G, 2, n2p, n2p], high and low parts, padded
        with zeros.
    """

    def split(matrix: Tensor, padded: int) -> Tensor:
        scaled = matrix.float() * 2.0**ROTATION_EXPONENT
        high = scaled.half()
        out = matrix.new_zeros(matrix.shape[0], 2, padded, padded, dtype=torch.float16)
        out[:, 0, : matrix.shape[1], : matrix.shape[2]] = high
        out[:, 1, : matrix.shape[1], : matrix.shape[2]] = (scaled - high.float()).half()
        return out

    left = split(rotation_left.transpose(1, 2), padded_rows(rotation_left.shape[-1]))
    return left, split(rotation_right, sum(column_pieces(rotation_right.shape[-1])))


def can_prepare(spec: LayerSpec) -> tuple[bool, str]:
    """Whether the kernel can run this layer's input side, and why (not)."""
    if not 2 <= spec.bits <= 8:
        return False, f"the GPU kernel quantizes activations to 2..8 bits, found {spec.bits}"
    if max(spec.n1, spec.n2) > MAX_FACTOR:
        return False, f"the GPU kernel rotates factors up to {MAX_FACTOR}, found {spec.n1} x {spec.n2}"
    return True, "the GPU kernel covers this input side"


def select_config(spec: LayerSpec, m: int, capability: tuple[int, int]) -> InputConfig:
    """Choose the tiles for `m` tokens, from the layer's sizes alone: nothing is measured at request time.

    Args:
        spec: the layer.
        m: tokens.
        capability: compute capability of the GPU.
    """
    rows = padded_rows(spec.n1)
    many = m * spec.blocks > FILLS_GPU
    tokens = max(1, 64 // rows) if many and m > PLANES_MAX_TOKENS else 1
    warps = 8 if tokens * rows > 64 else 4
    right = sum(column_pieces(spec.n2))
    early = not many and 4 * right * right <= EARLY_BYTES * 32 * warps
    if capability >= (9, 0):  # operands come from shared memory
        piece = out_piece = 128
    elif right <= 96:  # operands go through registers: the widest pieces that do not spill
        piece = out_piece = 64
    else:
        piece, out_piece = (32, 128) if rows > 64 else (64, 32)
    # Left alone the assembler may spill a register or two for one more program on a processor, and with a limit
    # it uses all of it: these limits are those under which nothing spills.
    registers = None
    if right <= 96 and (early or m <= DOT_FROM):
        registers = 255
    elif capability < (9, 0) and 64 < right <= 96 and tokens * rows == 64:
        registers = 224
    elif capability < (9, 0) and right <= 64 and tokens * rows == 64 and spec.n2 < right:
        registers = 176
    elif capability < (9, 0) and right <= 64 and tokens == 1 and spec.n1 < rows == 64:
        registers = 160
    elif capability >= (10, 0) and m > WIDE_FROM and right <= 96 and spec.blocks == 1 and tokens * rows == 64:
        registers = 128  # for the fused norms
    ranks = triton.next_power_of_2(max(spec.rank, 1))
    if m <= PLANES_MAX_TOKENS:
        projection = (1, 1, 256 * warps, False)
    elif m <= DOT_FROM:
        projection = (4, min(ranks, 4), 256, False)
    else:
        u_tokens, u_step = (16, 128) if m <= WIDE_FROM else (64, 64)
        projection = (u_tokens, max(MIN_TILE, min(ranks, 64)), u_step, True)
    return InputConfig(tokens, piece, out_piece, early, warps, registers, *projection)


FILLS_GPU = 256
"""Token blocks from which throughput counts more than the time of one."""

EARLY_BYTES = 224
"""Bytes of the right rotation that a thread can hold while it waits for the input."""

DOT_FROM, WIDE_FROM = 128, 1024
"""Tokens above which u is computed on tensor cores, 16 tokens a program, then 64."""


def launch_constants(
    spec: LayerSpec,
    config: InputConfig,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype | None,
    fuse: int,
    chunk: int,
) -> dict[str, object]:
    """The kernel's compile-time arguments."""
    widths = column_pieces(spec.n2, config.piece)
    out_widths = column_pieces(spec.n2, config.out_piece)
    precision = ""
    if config.u_dot:
        precision = "tf32x3" if x_dtype == torch.float32 else "tf32"
        if x_dtype == a_dtype == torch.bfloat16:
            precision = "native"
    return {
        "K": spec.in_features,
        "G": spec.blocks,
        "N1": spec.n1,
        "N2": spec.n2,
        "STARTS": tuple(itertools.accumulate(widths[:-1], initial=0)),
        "WIDTHS": widths,
        "OUT_STARTS": tuple(itertools.accumulate(out_widths[:-1], initial=0)),
        "OUT_WIDTHS": out_widths,
        "TOKENS": config.tokens,
        "ROWS": config.tokens * padded_rows(spec.n1),
        "BITS": spec.bits,
        "RANK": spec.rank,
        "FUSE": fuse,
        "SPLIT_X": x_dtype == torch.float32,
        "CHUNK": chunk,
        "EARLY": config.early,
        "U_TOKENS": config.u_tokens,
        "U_RANKS": config.u_ranks,
        "U_STEP": config.u_step,
        "U_DOT": precision,
        "U_UNROLL": min(
            -(-spec.in_features // config.u_step), UNROLL if config.u_tokens == 1 else UNROLL // 2
        ),
    }


@cache
def _capability(index: int | None) -> tuple[int, int]:
    if index is None:
        return INTERPRETER_CAPABILITY
    return torch.cuda.get_device_capability(index)


INTERPRETER_CAPABILITY = (9, 0)
"""What a tensor on the CPU counts as (the interpreter has no GPU to ask)."""


def prepare_input(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: LayerSpec,
    *,
    planes: bool = False,
    chunk: int = 256,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    config: InputConfig | None = None,
) -> PreparedInput:
    """Rotate, scale, quantize and project M tokens; allocates its outputs and launches one kernel.

    Args:
        x: [M, K] (with `silu_mul` [M, 2 K]) bfloat16, float16 or float32; rows may be strided.
        tensors: `left_split` and `right_split` (from `split_rotations`), `column_scale` float32 [K], and
            `low_rank_a` [r, K] where the rank is not 0.
        spec: the layer; `can_prepare(spec)` must hold.
        planes: also write bit planes, for at most 4 tokens.
        chunk: columns of a chunk of planes, 128 or 256.
        norm_weight: [K]; normalizes the input first, as vLLM's RMSNorm does: in float32, rounded to the weight's
            dtype before and after the weight, then to the dtype of x.
        eps: of the norm.
        residual: [M, K] in the dtype of x, added (in float32) before the norm; needs `norm_weight`. The rounded
            sum comes back in `PreparedInput.residual`, in new memory: other programs still read the old one.
        silu_mul: the input is silu(x[:, :K]) * x[:, K:], each step rounded to the dtype of x.
        config: tiles, where `select_config` shall not choose them.

    Raises:
        BackendError: arguments that do not fit each other or the layer.
    """
    m = x.shape[0]
    _check(x, tensors, spec, planes, chunk, norm_weight, residual, silu_mul)
    fuse = PLAIN
    if silu_mul:
        fuse = SILU_MUL
    elif norm_weight is not None:
        fuse = NORM if residual is None else ADD_NORM
    config = config or select_config(spec, m, _capability(x.device.index))
    k, blocks = spec.in_features, spec.blocks
    q = x.new_empty(m, k, dtype=torch.int8)
    scale = x.new_empty(m, blocks, dtype=torch.float32)
    q_sum = x.new_empty(m, blocks, dtype=torch.int32)
    u = x.new_empty(m, spec.rank, dtype=torch.float32) if spec.rank else None
    bit_planes = None
    if planes:
        chunks = -(-spec.block_width // chunk)
        bit_planes = x.new_empty(m, spec.bits, blocks * chunks, chunk // 32, dtype=torch.int32)
    residual_out = x.new_empty(m, k) if residual is not None else None
    if m == 0:
        return PreparedInput(q, scale, q_sum, u, bit_planes, residual_out)
    low_rank_a = tensors["low_rank_a"] if spec.rank else None
    constants = launch_constants(
        spec, config, x.dtype, None if low_rank_a is None else low_rank_a.dtype, fuse, chunk if planes else 0
    )
    programs = blocks * -(-m // config.tokens)
    if spec.rank:
        programs += -(-m // config.u_tokens) * -(-spec.rank // config.u_ranks)
    prepare_input_kernel[(programs,)](
        x,
        residual,
        norm_weight,
        tensors["left_split"],
        tensors["right_split"],
        tensors["column_scale"],
        low_rank_a,
        q,
        scale,
        q_sum,
        u,
        bit_planes,
        residual_out,
        m,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        spec.clip / spec.q_max,
        eps,
        **constants,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
    )
    return PreparedInput(q, scale, q_sum, u, bit_planes, residual_out)


def _check(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: LayerSpec,
    planes: bool,
    chunk: int,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
) -> None:
    able, reason = can_prepare(spec)
    if not able:
        raise BackendError(reason)
    m, k = x.shape[0], spec.in_features
    columns = 2 * k if silu_mul else k
    if x.dim() != 2 or x.shape[1] != columns or (m and x.stride(1) != 1):
        raise BackendError(
            f"expected an input [M, {columns}] with contiguous rows, found shape {list(x.shape)}, "
            f"strides {list(x.stride())}"
        )
    left, right = padded_rows(spec.n1), sum(column_pieces(spec.n2))
    wanted = {
        "left_split": (spec.blocks, 2, left, left),
        "right_split": (spec.blocks, 2, right, right),
        "column_scale": (k,),
        **({"low_rank_a": (spec.rank, k)} if spec.rank else {}),
    }
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].is_contiguous():
            raise BackendError(
                f"{name}: expected contiguous {list(shape)}, found shape {list(tensors[name].shape)}, strides "
                f"{list(tensors[name].stride())}: `split_rotations` prepares the rotations"
            )
    if planes and (m > PLANES_MAX_TOKENS or chunk not in (128, 256)):
        raise BackendError(
            f"bit planes are for at most {PLANES_MAX_TOKENS} tokens in chunks of 128 or 256 columns, "
            f"found {m} tokens, chunks of {chunk}"
        )
    if silu_mul and norm_weight is not None:
        raise BackendError("silu_mul and norm_weight exclude each other: no layer norms after its activation")
    if residual is not None and (
        norm_weight is None or residual.shape != x.shape or residual.dtype != x.dtype
    ):
        raise BackendError(
            f"a residual needs norm_weight and the input's shape {list(x.shape)} and dtype {x.dtype}, found "
            f"{list(residual.shape)} {residual.dtype}"
        )
