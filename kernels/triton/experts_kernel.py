"""The grouped GEMM of experts: tiles of tokens that share an expert times that expert's binary planes.

Like `integer_mma` it unpacks bits in registers for the left operand of int8 tensor cores. The columns of a tile are
pairs of a token and one of its experts, in the order of `experts.align_pairs`, so that a tile needs one expert's
weights. Few tokens make tiles of 16 that are mostly empty: their time is that of reading the weights.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl
from bwla_kernels.triton.epilogue import low_rank_term
from bwla_kernels.triton.integer_mma import _block_scale, unpack_chunk


@triton.jit(do_not_specialize=["pairs", "pairs_per_row", "chunks_per_block", "blocks", "rank"])
def experts_mma_kernel(
    q, scale, q_sum, u, weight, weight_scale, low_b, bias, router, sorted_pairs, tile_experts, y,
    pairs, pairs_per_row, N, rows, K, block_width, chunks_per_block, blocks, rank,
    BN: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, ONE_BLOCK: tl.constexpr, PADDED: tl.constexpr,
    WEIGHT_PLANES: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, PURE: tl.constexpr,
):  # fmt: skip
    """Compute y[pair, n] for one tile of BM pairs and BN rows of their expert.

    Grid: (tiles, rows / BN). The weights have `blocks` rotation groups of `block_width` columns in `chunks_per_block`
    chunks of C columns; ONE_BLOCK: they are one group; PADDED: a group ends with a partly empty chunk.

    Args (arrays are row-major and contiguous):
        q, scale, q_sum, u: of the quantized input, row pair / pairs_per_row.
        weight uint8 [E, chunks, rows * WEIGHT_PLANES, C / 8] (`layout.repack_weights` of each expert),
        weight_scale float32 [E, N, WEIGHT_PLANES], low_b bfloat16 [E, rows, RANK], bias bfloat16 [E, N] where BIAS.
        router float32 [pairs]: the result is multiplied by it where WEIGHTED.
        sorted_pairs int32 [tiles, BM]: `pairs` where there is none. tile_experts int32 [tiles]: -1 for no tile.
        y float32 [pairs, N].
    """
    S: tl.constexpr = C // 8
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(sorted_pairs + tile * BM + tl.arange(0, BM))
    inside = pair < pairs
    m = tl.minimum(pair, pairs - 1) // pairs_per_row
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    chunks = blocks * chunks_per_block
    byte = tl.arange(0, S)
    column = tl.arange(0, C)
    q_rows = q + m.to(tl.int64)[None, :] * K
    weight += expert * chunks * rows * (S * WEIGHT_PLANES)
    weight_scale += expert * N * WEIGHT_PLANES
    if ONE_BLOCK:
        first_scale = tl.load(scale + m)
        lift = tl.load(q_sum + m)
    else:
        lift = tl.zeros([BM], tl.float32)
        for g in range(blocks):
            lift += tl.load(scale + m * blocks + g) * tl.load(q_sum + m * blocks + g).to(tl.float32)

    result = tl.zeros([BN, BM], tl.float32)
    for plane in tl.static_range(WEIGHT_PLANES):
        row = n // 16 * (16 * WEIGHT_PLANES) + plane * 16 + n % 16
        w_ptrs = weight + row[:, None] * S + byte[None, :]
        acc = tl.zeros([BN, BM], tl.int32)
        total = tl.zeros([BN, BM], tl.float32)
        for t in range(chunks):
            w = tl.load(w_ptrs)
            if PADDED:
                g = t // chunks_per_block
                at = g * block_width + (t - g * chunks_per_block) * C + column
                # Beyond a rotation group the weights' bits are 0: any readable codes will do.
                x = tl.load(q_rows + at[:, None], mask=(at < K)[:, None], other=0)
            else:
                x = tl.load(q_rows + (t * C + column)[:, None])
            acc = tl.dot(unpack_chunk(w, BN, C, PURE), x, acc, out_dtype=tl.int32)
            w_ptrs += rows * (S * WEIGHT_PLANES)
            if (not ONE_BLOCK) and (t + 1) % chunks_per_block == 0:
                s = _block_scale(scale, m, t // chunks_per_block, blocks)
                total += acc.to(tl.float32) * s[None, :]
                acc = tl.zeros([BN, BM], tl.int32)
        # sum (2 w - 1) q = 2 sum w q - sum q, w in {0, 1}.
        if ONE_BLOCK:
            total = (2 * acc - lift[None, :]).to(tl.float32) * first_scale[None, :]
        else:
            total = 2.0 * total - lift[None, :]
        alpha = tl.load(weight_scale + n * WEIGHT_PLANES + plane, mask=n < N, other=0.0)
        result += total * alpha[:, None]
    if RANK > 0:
        result = low_rank_term(result, u, low_b + expert * rows * RANK, m, n, rank, RANK, PURE)
    if BIAS:
        shift = tl.load(bias + expert * N + n, mask=n < N, other=0.0)
        result += shift.to(tl.float32)[:, None]
    if WEIGHTED:
        result *= tl.load(router + pair, mask=inside, other=0.0)[None, :]
    out = y + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, tl.trans(result), mask=inside[:, None] & (n < N)[None, :])
