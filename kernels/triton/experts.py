"""The experts of a layer on an NVIDIA GPU: two input transforms, two grouped GEMMs, a sum over each token's experts.

The tokens are prepared once for all experts. Pairs of a token and one of its experts are sorted by expert into tiles
(`align_pairs`), all on the device, so that CUDA graphs capture it. The hidden values of all pairs are prepared by one
launch, in which SiLU * mul is fused; the down projection multiplies by the router's weights in its epilogue.

Unlike `backend.py` this module imports Triton; `experts_backend` does so when a layer first needs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels.experts.reference import gated
from bwla_kernels.experts.spec import ExpertsSpec, expert_tensors
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import ROW_TENSORS
from bwla_kernels.triton.backend import repack
from bwla_kernels.triton.binary_matmul import interpreted
from bwla_kernels.triton.experts_kernel import experts_mma_kernel
from bwla_kernels.triton.launch import is_dependent
from bwla_kernels.triton.layout import ChunkLayout, layer_layout
from bwla_kernels.triton.prepare_input import NOTHING_FUSED, FusedInput, QuantizedInput, prepare_input
from torch import Tensor


@dataclass(frozen=True)
class ExpertsConfig:
    """Tiles of the grouped GEMM: `block_m` pairs times `block_n` rows."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"tile {self.block_n}x{self.block_m}, {self.num_warps} warps, {self.num_stages} stages"


FEW = ExpertsConfig(16, 64, 4, 3)
MANY = ExpertsConfig(64, 64, 4, 3)

MANY_PAIRS = 32
"""Pairs for each expert, on average, from which the larger tile is used: it is then at least half full."""


def choose_config(pairs: int, experts: int) -> ExpertsConfig:
    """Choose the tiles by the number of pairs; derived from the sizes, not measured on a GPU."""
    return MANY if pairs >= MANY_PAIRS * experts else FEW


def align_pairs(topk_ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Sort pairs of a token and an expert into tiles of `block` pairs that share the expert.

    Args:
        topk_ids: int [M, top-k]; negative for experts of another rank, whose pairs get no tile.
        experts: E.
        block: pairs of a tile.

    Returns: pair numbers m * top_k + j, int32 [tiles * block], with the number of pairs where a tile has none; and
        the expert of each tile, int32 [tiles], -1 for tiles that are not needed. The number of tiles depends on the
        shapes alone.
    """
    ids = topk_ids.flatten().long()
    pairs = len(ids)
    tiles = pairs // block + min(experts, pairs)
    keys = torch.where(ids < 0, experts, ids)
    order = keys.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device).scatter_add_(
        0, keys, torch.ones_like(keys)
    )
    blocks = (counts + block - 1) // block
    ends = blocks[:experts].cumsum(0)
    first_row = (blocks.cumsum(0) - blocks) * block - (counts.cumsum(0) - counts)
    sorted_keys = keys[order]
    at = torch.arange(pairs, device=ids.device) + first_row[sorted_keys]
    # What belongs to another rank goes to one place beyond the tiles, which is cut off.
    at = torch.where(sorted_keys < experts, at, tiles * block)
    rows = torch.full((tiles * block + 1,), pairs, dtype=torch.int32, device=ids.device)
    rows.scatter_(0, at, order.to(torch.int32))
    owner = torch.searchsorted(ends, torch.arange(tiles, device=ids.device), right=True)
    return rows[:-1], torch.where(owner < experts, owner, -1).to(torch.int32)


def repack_experts(tensors: Mapping[str, Tensor], experts: int, spec: LayerSpec) -> dict[str, Tensor]:
    """Repack one projection: each expert's rows as those of a linear, the input transform once."""
    repacked = [repack(expert_tensors(tensors, expert), spec) for expert in range(experts)]
    own = {"bias": tensors["bias"].contiguous()} if spec.bias else {}
    rows = ("weight_chunks", *ROW_TENSORS[1:])
    shared = {name: tensor for name, tensor in repacked[0].items() if name not in (*rows, "split_counters")}
    stacked = {name: torch.stack([one[name] for one in repacked]) for name in rows if name in repacked[0]}
    return shared | stacked | own


def grouped_meta(layout: ChunkLayout, config: ExpertsConfig) -> dict[str, int | bool]:
    """Return the compile-time arguments of `experts_mma_kernel` that follow from sizes and configuration."""
    return {
        "BN": config.block_n,
        "BM": config.block_m,
        "C": layout.chunk,
        "ONE_BLOCK": layout.groups == 1,
        "PADDED": layout.padded,
        "WEIGHT_PLANES": layout.planes,
    }


def grouped_matmul(
    prepared: QuantizedInput,
    tensors: Mapping[str, Tensor],
    spec: LayerSpec,
    topk_ids: Tensor,
    router: Tensor | None = None,
    config: ExpertsConfig | None = None,
) -> Tensor:
    """Multiply each pair of a token and an expert by that expert's weights.

    Args:
        prepared: of the M tokens, or of the M * top-k pairs.
        tensors: from `repack_experts`.
        spec: sizes of one expert's projection.
        topk_ids: int [M, top-k].
        router: float32 [M, top-k] to multiply by, or None.
        config: tiles; by default as `choose_config` chooses.

    Returns: float32 [M * top-k, N], zeros for experts of another rank. Integer sums are exact.
    """
    experts, pairs, layout = len(tensors["weight_chunks"]), topk_ids.numel(), layer_layout(spec)
    y = prepared.scale.new_zeros(pairs, spec.out_features)
    if pairs == 0:
        return y
    config = config or choose_config(pairs, experts)
    rows, tile_experts = align_pairs(topk_ids, experts, config.block_m)
    low_b, bias = tensors.get("low_rank_b"), tensors.get("bias")
    experts_mma_kernel[(len(tile_experts), layout.rows // config.block_n)](
        prepared.q,
        prepared.scale,
        prepared.q_sum,
        prepared.u,
        tensors["weight_chunks"],
        tensors["weight_scale"],
        low_b,
        bias,
        router,
        rows,
        tile_experts,
        y,
        pairs,
        pairs // len(prepared.scale),
        spec.out_features,
        layout.rows,
        spec.in_features,
        layout.group_width,
        layout.chunks_per_group,
        layout.groups,
        spec.rank,
        **grouped_meta(layout, config),
        RANK=0 if low_b is None else low_b.shape[-1],
        BIAS=bias is not None,
        WEIGHTED=router is not None,
        PURE=interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def run_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Mapping[str, Tensor],
    down: Mapping[str, Tensor],
    spec: ExpertsSpec,
) -> Tensor:
    """Compute the experts, in agreement with `experts.reference.binary_experts`.

    Args:
        x: [M, H] bfloat16, float16 or float32.
        topk_weights: float [M, top-k].
        topk_ids: int [M, top-k]; negative for experts of another rank.
        gate_up, down: from `repack_experts`.
        spec: the sizes.

    Returns: [M, H] in the dtype of x.
    """
    dependent = is_dependent(x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    prepared = prepare_input(x, gate_up, spec.gate_up, dependent_launch=dependent)
    hidden = grouped_matmul(prepared, gate_up, spec.gate_up, topk_ids)
    fused = FusedInput(silu_mul=True) if spec.activation == "silu" else NOTHING_FUSED
    if not fused.silu_mul:
        hidden = gated(hidden, spec.activation, spec.limit, spec.alpha)
    inner = prepare_input(hidden, down, spec.down, fused=fused)
    terms = grouped_matmul(inner, down, spec.down, topk_ids, topk_weights.float().contiguous())
    return terms.view(*topk_ids.shape, spec.hidden_size).sum(1).to(x.dtype)
