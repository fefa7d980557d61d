"""The input transform on a GPU: rotate, scale the columns, quantize, project onto the low-rank rows; one launch.

The reference implementation is `reference.prepare_input`; `few_kernel.py` (few tokens), `rotate.py` and `project.py`
describe the kernels. Guarantees:
- The error of x_hat is below 2^-16 of the 2-norm of the token's rotation group, and about 2^-21 of it in practice
  (`rotate.py` derives it), for every input; the kernel for few tokens keeps it where that norm lies between 2^-100 and
  2^115. A code differs from the reference's only where x_hat / scale lies within the two errors of a rounding tie, and
  then by one; `scale` agrees to the same relative error.
- `q_sum` and `planes` are exact for the codes in `q`.
- u: float32 accumulation of exact products for bf16 and fp16 inputs; float32 inputs are multiplied in float32 for few
  tokens, as tf32x3 for many.
- NaN and infinity make the scale of their token and rotation group NaN, and of no other.
- Sums are taken in a fixed order: the same input gives the same bits, whatever other tokens are in the call, in the
  same configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.factorize import MAX_FACTOR
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import launch
from bwla_kernels.triton.few_kernel import prepare_few_kernel
from bwla_kernels.triton.fused_load import ADD_NORM, NORM, PLAIN, SILU_MUL
from bwla_kernels.triton.gpu import gpu_properties
from bwla_kernels.triton.prepare_config import (
    FEW_REGISTERS,
    PLANES_MAX_TOKENS,
    FewConfig,
    InputConfig,
    few_constants,
    few_programs,
    launch_constants,
    padded_rows,
    right_columns,
    select_config,
)
from bwla_kernels.triton.prepare_kernel import prepare_input_kernel
from bwla_kernels.triton.rotate import ROTATION_EXPONENT
from torch import Tensor


@dataclass(frozen=True)
class QuantizedInput:
    """What `prepare_input` computes of M tokens and `binary_matmul` multiplies.

    Attributes:
        q: int8 codes [M, K], natural column order; the binary kernel reads `planes` instead.
        scale: float32 [M, G].
        q_sum: int32 [M, G], the sum of the codes of each rotation group.
        u: float32 [M, r], x A^T; None for rank 0.
        planes: int32 [M, bits, G * P, C / 32], bit planes of the codes (two's complement) in P chunks of C columns for
            each rotation group; bit j of byte b of chunk t is column t C + (C / 8) j + b of the group, 0 beyond it;
            bytes are little-endian in their words. None unless requested; only the binary kernel reads it.
        residual: [M, K] in the dtype of x, x + residual; None without one.
    """

    q: Tensor
    scale: Tensor
    q_sum: Tensor
    u: Tensor | None = None
    planes: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class FusedInput:
    """What is computed where a layer's input is loaded: RMSNorm, with or without a residual, or SiLU * mul.

    Attributes:
        norm_weight: [K]; normalizes the input first, as vLLM's RMSNorm does: in float32, rounded to the weight's
            dtype before and after the weight, then to the dtype of x. None for no norm.
        eps: of the norm.
        residual: [M, K] in the dtype of x, added (in float32) before the norm; needs `norm_weight`. The rounded
            sum is returned in `QuantizedInput.residual`, in new memory: other programs still read the old one.
        silu_mul: the input is silu(x[:, :K]) * x[:, K:], each step rounded to the dtype of x.
    """

    norm_weight: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    silu_mul: bool = False

    @property
    def kind(self) -> int:
        """The constexpr FUSE of the kernels (see `fused_load`)."""
        if self.silu_mul:
            return SILU_MUL
        if self.norm_weight is None:
            return PLAIN
        return NORM if self.residual is None else ADD_NORM


NOTHING_FUSED = FusedInput()


@dataclass(frozen=True)
class _Launch:
    """What one launch of either kernel reads and writes.

    Attributes:
        x: [M, K], or [M, 2 K] for SiLU * mul.
        tensors: the layer's input transform, as for `prepare_input`.
        spec: sizes of the layer.
        fused: what is computed where x is loaded.
        out: the allocated outputs.
        chunk: columns of a chunk of bit planes.
        pdl: the kernels' constexpr PDL (see `launch`).
    """

    x: Tensor
    tensors: Mapping[str, Tensor]
    spec: LayerSpec
    fused: FusedInput
    out: QuantizedInput
    chunk: int
    pdl: int


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
    return left, split(rotation_right, right_columns(rotation_right.shape[-1]))


def join_rotations(left_split: Tensor, right_split: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return the float32 rotations [G, n1, n1] and [G, n2, n2] that `split_rotations` has split."""
    left, right = (split.float().sum(1) * 2.0**-ROTATION_EXPONENT for split in (left_split, right_split))
    return left[:, : spec.n1, : spec.n1].transpose(1, 2), right[:, : spec.n2, : spec.n2]


def can_prepare(spec: LayerSpec) -> tuple[bool, str]:
    """Return whether the kernels compute the input transform of such a layer, and the reason."""
    if not 2 <= spec.bits <= 8:
        return False, f"the GPU kernel quantizes activations to 2..8 bits, found {spec.bits}"
    if max(spec.n1, spec.n2) > MAX_FACTOR:
        return False, f"the GPU kernel rotates factors up to {MAX_FACTOR}, found {spec.n1} x {spec.n2}"
    return True, "the GPU kernel covers this input transform"


def prepare_input(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: LayerSpec,
    *,
    planes: bool = False,
    chunk: int = 256,
    fused: FusedInput = NOTHING_FUSED,
    config: InputConfig | FewConfig | None = None,
    dependent_launch: bool = False,
) -> QuantizedInput:
    """Rotate, scale, quantize and project M tokens; allocate the outputs and launch one kernel.

    Args:
        x: [M, K] (with `fused.silu_mul` [M, 2 K]) bfloat16, float16 or float32; rows may be strided.
        tensors: `left_split` and `right_split` (from `split_rotations`), `column_scale` float32 [K], and
            `low_rank_a` [r, K] where the rank is not 0; `split_counters` int32, zeros before and after: without
            them, or with fewer than M (G + 1), a call with few tokens costs one more launch, which allocates some.
        spec: the layer; `can_prepare(spec)` must hold.
        planes: also write bit planes, for at most 8 tokens.
        chunk: columns of a chunk of planes, 128 or 256.
        fused: what is computed where x is loaded.
        config: tiles, to override those of `select_config`.
        dependent_launch: overlap the kernel before this one (compute capability 9.0 or newer, see `launch`).

    Raises:
        BackendError: arguments that do not fit each other or the layer.
    """
    m = x.shape[0]
    _check(x, tensors, spec, fused)
    if planes and (m > PLANES_MAX_TOKENS or chunk not in (128, 256)):
        raise BackendError(
            f"bit planes are for at most {PLANES_MAX_TOKENS} tokens in chunks of 128 or 256 columns, "
            f"found {m} tokens, chunks of {chunk}"
        )
    config = config or select_config(spec, m, gpu_properties(x.device).capability)
    if planes and isinstance(config, InputConfig):
        raise BackendError(f"only the kernel for few tokens writes bit planes, found {config}")
    out = _empty_outputs(x, spec, chunk if planes else 0, fused)
    if m:
        call = _Launch(x, tensors, spec, fused, out, chunk, launch.trigger(dependent_launch))
        if isinstance(config, FewConfig):
            _launch_few(call, config)
        else:
            _launch_many(call, config)
    return out


def _empty_outputs(x: Tensor, spec: LayerSpec, chunk: int, fused: FusedInput) -> QuantizedInput:
    """Allocate the outputs for x; chunk 0 for no bit planes."""
    m, k, groups = x.shape[0], spec.in_features, spec.rotation_groups
    planes = None
    if chunk:
        chunks = -(-spec.group_width // chunk)
        planes = x.new_empty(m, spec.bits, groups * chunks, chunk // 32, dtype=torch.int32)
    return QuantizedInput(
        x.new_empty(m, k, dtype=torch.int8),
        x.new_empty(m, groups, dtype=torch.float32),
        x.new_empty(m, groups, dtype=torch.int32),
        x.new_empty(m, spec.rank, dtype=torch.float32) if spec.rank else None,
        planes,
        x.new_empty(m, k) if fused.residual is not None else None,
    )


def _check(x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec, fused: FusedInput) -> None:
    able, reason = can_prepare(spec)
    if not able:
        raise BackendError(reason)
    m, k = x.shape[0], spec.in_features
    columns = 2 * k if fused.silu_mul else k
    if x.dim() != 2 or x.shape[1] != columns or (m and x.stride(1) != 1):
        raise BackendError(
            f"expected an input [M, {columns}] with contiguous rows, found shape {list(x.shape)}, "
            f"strides {list(x.stride())}"
        )
    left, right = padded_rows(spec.n1), right_columns(spec.n2)
    shapes = {
        "left_split": (spec.rotation_groups, 2, left, left),
        "right_split": (spec.rotation_groups, 2, right, right),
        "column_scale": (k,),
        **({"low_rank_a": (spec.rank, k)} if spec.rank else {}),
    }
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].is_contiguous():
            raise BackendError(
                f"{name}: expected contiguous {list(shape)}, found shape {list(tensors[name].shape)}, strides "
                f"{list(tensors[name].stride())}: prepare the rotations with `split_rotations`"
            )
    norm_weight, residual = fused.norm_weight, fused.residual
    if fused.silu_mul and norm_weight is not None:
        raise BackendError("silu_mul and norm_weight exclude each other: no layer norms after its activation")
    if residual is not None and (
        norm_weight is None or residual.shape != x.shape or residual.dtype != x.dtype
    ):
        raise BackendError(
            f"a residual needs norm_weight and the input's shape {list(x.shape)} and dtype {x.dtype}, found "
            f"{list(residual.shape)} {residual.dtype}"
        )


def _launch_few(call: _Launch, config: FewConfig) -> None:
    x, tensors, spec, fused, out = call.x, call.tensors, call.spec, call.fused, call.out
    m, groups = x.shape[0], spec.rotation_groups
    counters = tensors.get("split_counters")
    if counters is None or counters.numel() < m * (groups + 1):
        counters = torch.zeros(m * (groups + 1), dtype=torch.int32, device=x.device)
    turned = x.new_empty(m, spec.in_features, dtype=torch.float32)
    u_parts = x.new_empty(m, config.slices, spec.rank, dtype=torch.float32) if spec.rank else None
    programs = few_programs(spec) + (config.slices if spec.rank else 0)
    chunk = call.chunk if out.planes is not None else 0
    prepare_few_kernel[(m * programs,)](
        x,
        fused.residual,
        fused.norm_weight,
        tensors["left_split"],
        tensors["right_split"],
        tensors["column_scale"],
        tensors.get("low_rank_a"),
        out.q,
        out.scale,
        out.q_sum,
        out.u,
        out.planes,
        out.residual,
        turned,
        u_parts,
        counters,
        m,
        x.stride(0),
        0 if fused.residual is None else fused.residual.stride(0),
        spec.clip / spec.q_max,
        fused.eps,
        **few_constants(spec, config, x.dtype, fused.kind, chunk, call.pdl),
        num_warps=config.num_warps,
        maxnreg=FEW_REGISTERS,
        launch_pdl=call.pdl != launch.OFF,
    )


def _launch_many(call: _Launch, config: InputConfig) -> None:
    x, tensors, spec, fused, out = call.x, call.tensors, call.spec, call.fused, call.out
    m = x.shape[0]
    low_rank_a = tensors["low_rank_a"] if spec.rank else None
    a_dtype = None if low_rank_a is None else low_rank_a.dtype
    programs = spec.rotation_groups * -(-m // config.tokens)
    if spec.rank:
        programs += -(-m // config.u_tokens) * -(-spec.rank // config.u_ranks)
    prepare_input_kernel[(programs,)](
        x,
        fused.residual,
        fused.norm_weight,
        tensors["left_split"],
        tensors["right_split"],
        tensors["column_scale"],
        low_rank_a,
        out.q,
        out.scale,
        out.q_sum,
        out.u,
        out.residual,
        m,
        x.stride(0),
        0 if fused.residual is None else fused.residual.stride(0),
        spec.clip / spec.q_max,
        fused.eps,
        **launch_constants(spec, config, x.dtype, a_dtype, fused.kind, call.pdl),
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        launch_pdl=call.pdl != launch.OFF,
    )
