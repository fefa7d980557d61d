"""Layers with scales for groups of columns on a GPU: quantize each group of the input, then the GEMM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.binary_matmul import interpreted
from bwla_kernels.triton.grouped_kernel import grouped_mma_kernel, quantize_groups_kernel
from bwla_kernels.triton.layer import as_rows
from bwla_kernels.triton.layout import ChunkLayout, layer_layout, repack_weights
from torch import Tensor

MAX_WIDTH = 1 << 15
"""Widest group that one program quantizes."""

GROUP_ELEMENTS = 4096
"""Columns that a program quantizes at least, in as many groups."""

PROGRAMS = 264
"""Programs that a matmul is split for: two for each multiprocessor of an H100."""

MAX_SPLITS = 16


@dataclass(frozen=True)
class GroupedConfig:
    """How a GEMM is cut.

    Attributes:
        block_n, block_m: rows and tokens of a tile.
        num_warps, num_stages: as at launch.
    """

    block_n: int
    block_m: int
    num_warps: int = 4
    num_stages: int = 3


CONFIG = GroupedConfig(64, 16)
"""Tiles for any number of tokens. They are not tuned: no GPU has run these kernels yet. Of the larger tiles that
compile without register spills everywhere, none needs fewer instructions for each weight and token."""


def can_quantize(spec: LayerSpec) -> tuple[bool, str]:
    """Return whether the kernels cover the groups of such a layer, and the reason."""
    if spec.group_width > MAX_WIDTH:
        return (
            False,
            f"the GPU kernel quantizes groups of up to {MAX_WIDTH} columns, found {spec.group_width}",
        )
    return True, "the GPU kernel covers these groups"


def repack_grouped(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Repack a layer's stored weights, once, at load.

    Returns: `weight_chunks` uint8 `layout.shape`, and `weight_scale` float32 [G, P, N_padded], zeros beyond N; a bias
        passes through.
    """
    layout = layer_layout(spec)
    scale = tensors["weight_scale"].float().view(spec.out_features, spec.planes, spec.rotation_groups)
    padded = torch.nn.functional.pad(scale.permute(2, 1, 0), (0, layout.rows - spec.out_features))
    prepared = {
        "weight_chunks": repack_weights(tensors["weight_packed"], layout),
        "weight_scale": padded.contiguous(),
    }
    if "bias" in tensors:
        prepared["bias"] = tensors["bias"]
    return prepared


def quantize_groups(x: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Quantize each group of columns of M tokens: codes int8 [M, K] and scales float32 [G, M].

    Args:
        x: [M, K] bfloat16, float16 or float32; rows may be strided.
        spec: the layer.
    """
    m, groups = len(x), spec.rotation_groups
    q = x.new_empty(m, spec.in_features, dtype=torch.int8)
    scale = x.new_empty(groups, m, dtype=torch.float32)
    constants = quantize_constants(spec)
    if m:
        grid = (m, triton.cdiv(groups, constants["GROUPS"]))
        quantize_groups_kernel[grid](
            x, q, scale, m, x.stride(0), spec.clip / spec.q_max, **constants, num_warps=4
        )
    return q, scale


def quantize_constants(spec: LayerSpec) -> dict[str, int]:
    """Return the compile-time arguments of `quantize_groups_kernel`."""
    columns = triton.next_power_of_2(spec.group_width)
    return {
        "G": spec.rotation_groups,
        "WIDTH": spec.group_width,
        "GROUPS": max(1, min(GROUP_ELEMENTS // columns, triton.next_power_of_2(spec.rotation_groups))),
        "COLUMNS": columns,
        "Q_MAX": spec.q_max,
    }


def run_grouped(
    x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec, config: GroupedConfig = CONFIG
) -> Tensor:
    """Compute a layer: x [..., K] -> [..., N] in the dtype of x.

    Integer sums are exact; the rest is float32, rounded once. Sums are taken in a fixed order.

    Args:
        x: bfloat16, float16 or float32.
        tensors: from `repack_grouped`.
        spec: the layer.
        config: how the GEMM is cut.
    """
    q, scale = quantize_groups(as_rows(x, spec.in_features), spec)
    y = _multiply(q, scale, tensors, layer_layout(spec), config, x.dtype)
    return y.reshape(*x.shape[:-1], spec.out_features)


def _multiply(
    q: Tensor,
    scale: Tensor,
    tensors: Mapping[str, Tensor],
    layout: ChunkLayout,
    config: GroupedConfig,
    dtype: torch.dtype,
) -> Tensor:
    m, n, bias = len(q), layout.out_features, tensors.get("bias")
    y = q.new_empty(m, n, dtype=dtype)
    if m == 0:
        return y
    tiles = (layout.rows // config.block_n, triton.cdiv(m, config.block_m))
    splits = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), MAX_SPLITS, layout.chunks))
    share = triton.cdiv(layout.chunks, splits)
    splits = triton.cdiv(layout.chunks, share)
    out = y if splits == 1 else q.new_empty(splits, m, n, dtype=torch.float32)
    grouped_mma_kernel[(*tiles, splits)](
        q,
        scale,
        tensors["weight_chunks"],
        tensors["weight_scale"],
        bias,
        out,
        m,
        n,
        layout.rows,
        q.shape[1],
        layout.group_width,
        layout.chunks_per_group,
        layout.chunks,
        share,
        **grouped_constants(layout, config, splits > 1, bias is not None),
        PURE=interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits == 1:
        return y
    total = out.sum(0)
    return (total if bias is None else total + bias.float()).to(dtype)


def grouped_constants(layout: ChunkLayout, config: GroupedConfig, split: bool, bias: bool) -> dict[str, Any]:
    """Return the compile-time arguments of `grouped_mma_kernel` that follow from sizes and configuration."""
    return {
        "BN": config.block_n,
        "BM": config.block_m,
        "C": layout.chunk,
        "PLANES": layout.planes,
        "PADDED": layout.padded,
        "SPLIT": split,
        "BIAS": bias,
    }
