"""The GEMM of a layer on an NVIDIA GPU: quantized activations times one to four binary planes.

y[m, n] = sum_p alpha[n, p] sum_g s[m, g] sum_{k in g} S[n, p, k] q[m, k] + sum_r u[m, r] B[n, r] + b[n]

Three regimes, chosen by `tuning.select_config`: binary tensor cores for up to four tokens, or eight where the table
has measured it (`binary_mma`), and integer tensor cores for a few (columns split among programs) and for many
(`integer_mma`). One weight layout serves all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import launch
from bwla_kernels.triton.binary_mma import binary_mma_kernel
from bwla_kernels.triton.epilogue import RANK_STEP
from bwla_kernels.triton.integer_mma import integer_mma_kernel
from bwla_kernels.triton.layout import ChunkLayout, layer_layout, repack_weights
from bwla_kernels.triton.prepare_input import QuantizedInput
from bwla_kernels.triton.tuning import BINARY, INTEGER, MatmulConfig
from torch import Tensor

GROUP_M = 8
"""Token tiles that share part of the weights in the cache."""

MAX_SPLIT_TILES = 4096
"""Tiles of a matmul that is split: length of the counters that a layer keeps."""


OPERANDS = {1: ((0,), (1,)), 2: ((0,), (2,)), 3: ((0, 2), (2, 1)), 4: ((0,), (4,))}
"""Planes -> first plane and number of planes of each operand of the integer kernel, whose rows are a power of two."""


@dataclass(frozen=True)
class Weights:
    """A layer's repacked weights, as `prepare_weights` returns them.

    Attributes:
        packed: uint8 `layout.shape`, [chunks, N_padded * P, C / 8].
        scale: float32 [N], or [N, P] with several planes.
        low_rank_b: bfloat16 [N_padded, r padded to 16], zeros beyond; None for rank 0.
        bias: [N] of any float dtype, or None.
        counters: int32 [4096], zeros; counted up by the shares of a split matmul, and before them by the programs of
            the input kernel for few tokens (zero again after each call, so a layer must not run on two streams at
            once). None allocates them for each call.
        layout: sizes.
    """

    packed: Tensor
    scale: Tensor
    low_rank_b: Tensor | None
    bias: Tensor | None
    counters: Tensor | None
    layout: ChunkLayout


def prepare_weights(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Repack a layer's stored weights, once, at load.

    Returns: `weight_chunks`, `weight_scale`, `split_counters` and, for a rank other than 0, padded `low_rank_b`; a bias
        passes through. The packed bytes are the only copy of the weights.
    """
    layout = layer_layout(spec)
    packed = repack_weights(tensors["weight_packed"], layout)
    prepared = {
        "weight_chunks": packed,
        "weight_scale": tensors["weight_scale"].float().contiguous(),
        "split_counters": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=packed.device),
    }
    if spec.rank:
        low_b = tensors["low_rank_b"].bfloat16()
        spare = -spec.rank % RANK_STEP
        padding = (0, spare, 0, layout.rows - spec.out_features)
        prepared["low_rank_b"] = torch.nn.functional.pad(low_b, padding).contiguous()
    if "bias" in tensors:
        prepared["bias"] = tensors["bias"]
    return prepared


def weights_from_tensors(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Weights:
    """View the tensors of `prepare_weights` as `Weights`."""
    return Weights(
        tensors["weight_chunks"],
        tensors["weight_scale"],
        tensors.get("low_rank_b"),
        tensors.get("bias"),
        tensors.get("split_counters"),
        layer_layout(spec),
    )


def binary_matmul(
    prepared: QuantizedInput,
    weights: Weights,
    bits: int,
    config: MatmulConfig,
    out_dtype: torch.dtype,
    dependent_launch: bool = False,
) -> Tensor:
    """Multiply: [M, N] of `out_dtype` (bfloat16, float16 or float32).

    With `dependent_launch` (compute capability 9.0 or newer) the launch may overlap the end of the kernel before
    it on the stream (programmatic dependent launch); the binary kernel reads its first weights meanwhile.

    Integer sums are exact; the rest is float32, rounded once.

    Raises:
        BackendError: the configuration does not fit the input.
    """
    m = prepared.scale.shape[0]
    y = prepared.scale.new_empty(m, weights.layout.out_features, dtype=out_dtype)
    if m == 0:
        return y
    if config.kernel == BINARY:
        _launch_binary(prepared, weights, bits, config, y, launch.trigger(dependent_launch))
    elif config.kernel == INTEGER:
        _launch_integer(prepared, weights, config, y, launch.trigger(dependent_launch))
    else:
        raise BackendError(f"expected kernel {BINARY} or {INTEGER}, found {config.kernel}")
    return y


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported)."""
    return not isinstance(integer_mma_kernel, triton.JITFunction)


def _rank(prepared: QuantizedInput, weights: Weights) -> tuple[int, int]:
    """Return (r, padded r); zeros without a low-rank term."""
    if prepared.u is None or weights.low_rank_b is None:
        return 0, 0
    return prepared.u.shape[1], weights.low_rank_b.shape[1]


def _launch_binary(
    prepared: QuantizedInput, weights: Weights, bits: int, config: MatmulConfig, y: Tensor, pdl: int
) -> None:
    layout, planes = weights.layout, prepared.planes
    m = y.shape[0]
    if planes is None or m > config.block_m:
        raise BackendError(
            f"{config} takes the bit planes of at most {config.block_m} tokens, found {m} tokens"
        )
    meta = binary_meta(layout, bits, config)
    rank, padded_rank = _rank(prepared, weights)
    binary_mma_kernel[(layout.rows // config.block_n,)](
        planes,
        prepared.scale,
        prepared.q_sum,
        prepared.u,
        weights.packed.view(torch.int32),
        weights.scale,
        weights.low_rank_b,
        weights.bias,
        y,
        m,
        layout.out_features,
        layout.rows,
        rank,
        **meta,
        RANK=padded_rank,
        BIAS=weights.bias is not None,
        PDL=pdl,
        PURE=interpreted(),
        launch_pdl=pdl != launch.OFF,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers or None,
    )


def binary_meta(layout: ChunkLayout, bits: int, config: MatmulConfig) -> dict[str, int | bool]:
    """Return the compile-time arguments of `binary_mma_kernel` that follow from sizes and configuration."""
    row_warps = config.num_warps // config.k_warps
    by_group = layout.groups >= config.k_warps
    step = 512 // layout.chunk * (1 if by_group else config.k_warps)
    even_steps = layout.chunks_per_group % (step * config.unroll) == 0
    even_groups = not by_group or layout.groups % config.k_warps == 0
    return {
        "BLOCKS": layout.groups,
        "CHUNKS": layout.chunks_per_group,
        "BITS": bits,
        "TOKENS": config.block_m,
        "TILES": -(-config.block_m * bits // 8),
        "C": layout.chunk,
        "R": config.block_n // (16 * row_warps),
        "ROW_WARPS": row_warps,
        "K_WARPS": config.k_warps,
        "UNROLL": config.unroll,
        "BY_BLOCK": by_group,
        "MASKED": not (even_steps and even_groups),
        "WEIGHT_PLANES": layout.planes,
    }


def _launch_integer(
    prepared: QuantizedInput, weights: Weights, config: MatmulConfig, y: Tensor, pdl: int
) -> None:
    layout, q = weights.layout, prepared.q
    m = y.shape[0]
    tiles = triton.cdiv(m, config.block_m) * (layout.rows // config.block_n)
    partial = counters = None
    if config.split > 1:
        if tiles > MAX_SPLIT_TILES:
            raise BackendError(f"{config} splits at most {MAX_SPLIT_TILES} tiles, found {tiles}")
        partial = y.new_empty(tiles * config.split * config.block_n * config.block_m, dtype=torch.float32)
        counters = weights.counters
        if counters is None:
            counters = torch.zeros(tiles, dtype=torch.int32, device=y.device)
    rank, padded_rank = _rank(prepared, weights)
    integer_mma_kernel[(tiles, config.split)](
        q,
        prepared.scale,
        prepared.q_sum,
        prepared.u,
        weights.packed,
        weights.scale,
        weights.low_rank_b,
        weights.bias,
        y,
        partial,
        counters,
        m,
        layout.out_features,
        layout.rows,
        q.shape[1],
        layout.group_width,
        layout.chunks_per_group,
        layout.groups,
        rank,
        config.split,
        **integer_meta(layout, config),
        RANK=padded_rank,
        BIAS=weights.bias is not None,
        PDL=pdl,
        PURE=interpreted(),
        launch_pdl=pdl != launch.OFF,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers or None,
    )


def integer_meta(layout: ChunkLayout, config: MatmulConfig) -> dict[str, int | bool | tuple[int, ...]]:
    """Return the compile-time arguments of `integer_mma_kernel` that follow from sizes and configuration."""
    first, count = OPERANDS[layout.planes]
    return {
        "BN": config.block_n,
        "BM": config.block_m,
        "C": layout.chunk,
        "SPLIT": config.split > 1,
        "GROUP_M": GROUP_M,
        "ONE_BLOCK": layout.groups == 1,
        "PADDED": layout.padded,
        "WEIGHT_PLANES": layout.planes,
        "FIRST": first,
        "COUNT": count,
    }
