"""Integer tensor cores on bits unpacked in registers, for more tokens or GPUs without binary tensor cores.

The weights are on the M side of the dot: y^T [BN, BM] = W [BN, C] q^T [C, BM]. A tile of packed bytes goes through
shared memory (cp.async) into the registers of the dot's left operand, where `(w >> j) & 0x01010101` makes four
weights of two instructions; the eight bit planes joined along K are that operand, and no layout is converted.
On Hopper it is a wgmma whose left operand comes from registers.

Of a weight with several binary planes, the left operand has the rows of one plane after those of the other: a tile of
activations is loaded once, each plane is summed apart, and the sums are scaled and added at the end. An operand has a
power of two of rows, so that three planes are two operands.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples.

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

import triton
import triton.language as tl
from bwla_kernels.triton.epilogue import low_rank_term
from bwla_kernels.triton.pdl import PDL_EARLY, PDL_LATE
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _plane(w, J: tl.constexpr, PURE: tl.constexpr):
    """Extract bit J of every byte as int8 {0, 1}; four bytes at a time on the GPU."""
    if PURE:
        result = ((w >> J) & 1).to(tl.int8)
    elif J == 0:
        result = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x01010101;", "=r,r", [w], tl.int8, is_pure=True, pack=4
        )
    else:
        result = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {J}; and.b32 $0, t, 0x01010101; }}",
            "=r,r",
            [w],
            tl.int8,
            is_pure=True,
            pack=4,
        )
    return result


@triton.jit
def unpack_chunk(w, BN: tl.constexpr, C: tl.constexpr, PURE: tl.constexpr):
    """Unpack bytes [BN, C / 8] to int8 {0, 1} [BN, C] in the order of the columns: (C / 8) j + b."""
    even = tl.join(
        tl.join(_plane(w, 0, PURE), _plane(w, 1, PURE)), tl.join(_plane(w, 2, PURE), _plane(w, 3, PURE))
    )
    odd = tl.join(
        tl.join(_plane(w, 4, PURE), _plane(w, 5, PURE)), tl.join(_plane(w, 6, PURE), _plane(w, 7, PURE))
    )
    # Axes: row, byte, then the bits of j from the lowest.
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 4, 3, 2, 1)), (BN, C))


@triton.jit
def _block_scale(scale, m, g, blocks):
    """Load scale[m, g] as a tile of eight rotation groups: spread over the threads, it costs few addresses.

    (Read as a vector, every thread would load it for each of its columns and keep their addresses.)
    """
    at = g // 8 * 8 + tl.arange(0, 8)
    tile = tl.load(scale + m[:, None] * blocks + at[None, :], mask=(at < blocks)[None, :], other=0.0)
    return tl.sum(tl.where(at[None, :] == g, tile, 0.0), 1)


@triton.jit
def _planes_of(n, BN: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return (row, plane) of an operand's COUNT BN rows: the tile's rows for COUNT planes from FIRST on."""
    index = tl.arange(0, COUNT * BN)
    return n + index % BN, FIRST + index // BN


@triton.jit
def _weigh_planes(
    totals, weight_scale, first_row, N,
    BN: tl.constexpr, BM: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Scale and add the planes of operands [COUNT BN, BM]: [BN, BM]."""
    y = tl.zeros([BN, BM], tl.float32)
    for i in tl.static_range(len(COUNT)):
        row, plane = _planes_of(first_row, BN, FIRST[i], COUNT[i])
        alpha = tl.load(weight_scale + row * PLANES + plane, mask=row < N, other=0.0)
        weighed = totals[i] * alpha[:, None]
        if COUNT[i] > 1:
            weighed = tl.sum(tl.reshape(weighed, (COUNT[i], BN, BM)), 0)
        y += weighed
    return y


# One compiled kernel for every number of tokens: none of its own for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["M", "chunks_per_block", "blocks", "rank", "splits"])
def integer_mma_kernel(
    q,
    scale,
    q_sum,
    u,
    weight,
    weight_scale,
    low_b,
    bias,
    y,
    partial,
    counters,
    M,
    N,
    rows,
    K,
    block_width,
    chunks_per_block,
    blocks,
    rank,
    splits,
    BN: tl.constexpr,
    BM: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    WEIGHT_PLANES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
    PURE: tl.constexpr,
):
    """Compute one tile y[m, n] of BM tokens and BN rows, or a share of its chunks (SPLIT).

    The weights have `blocks` rotation groups of `block_width` columns in `chunks_per_block` chunks of C columns;
    ONE_BLOCK: they are one group; PADDED: a group ends with a partly empty chunk. They have WEIGHT_PLANES planes, of
    which operand i holds COUNT[i] from FIRST[i] on (`OPERANDS`); `weight_scale` is float32 [N, WEIGHT_PLANES].

    Grid: (tiles of N times tiles of M, splits). Of a tile that is split, every program leaves its share in
    `partial` float32 [tiles, splits, BN, BM], and the last one to arrive (`counters` int32 [tiles], zero before
    and after) adds them in a fixed order: deterministic, and one launch.
    """
    if PDL == PDL_EARLY:
        gdc_launch_dependents()
    S: tl.constexpr = C // 8
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = rows // BN
    # Groups of GROUP_M token tiles, so that neighbouring programs share weights and activations in the L2 cache.
    group = tile // (GROUP_M * tiles_n)
    in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    local = tile - group * (GROUP_M * tiles_n)
    tile_m = group * GROUP_M + local % in_group
    tile_n = local // in_group

    if PDL:
        gdc_wait()  # from here on the outputs of the kernel before this one may be read
    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    m_read = tl.minimum(m, M - 1)
    chunks = blocks * chunks_per_block
    if SPLIT:
        share = tl.cdiv(chunks, splits)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, chunks)
    else:
        first = chunks * 0
        last = chunks

    byte = tl.arange(0, S)
    column = tl.arange(0, C)
    w_ptrs = ()
    accs = ()
    totals = ()
    for i in tl.static_range(len(COUNT)):
        if WEIGHT_PLANES == 1:
            row = n
        else:
            of, plane = _planes_of(tile_n * BN, BN, FIRST[i], COUNT[i])
            row = of // 16 * (16 * WEIGHT_PLANES) + plane * 16 + of % 16
        w_ptrs = w_ptrs + (
            weight + first.to(tl.int64) * rows * (S * WEIGHT_PLANES) + (row[:, None] * S + byte[None, :]),
        )
        accs = accs + (tl.zeros([COUNT[i] * BN, BM], tl.int32),)
        totals = totals + (tl.zeros([COUNT[i] * BN, BM], tl.float32),)
    q_rows = q + m_read.to(tl.int64)[None, :] * K
    for t in range(first, last):
        w = ()
        for i in tl.static_range(len(COUNT)):
            w = w + (tl.load(w_ptrs[i]),)
        if PADDED:
            g = t // chunks_per_block
            at = g * block_width + (t - g * chunks_per_block) * C + column
            # Beyond a rotation group the weights' bits are 0: any readable codes will do.
            x = tl.load(q_rows + at[:, None], mask=(at < K)[:, None], other=0)
        else:
            x = tl.load(q_rows + (t * C + column)[:, None])
        summed = ()
        moved = ()
        for i in tl.static_range(len(COUNT)):
            bits = unpack_chunk(w[i], COUNT[i] * BN, C, PURE)
            summed = summed + (tl.dot(bits, x, accs[i], out_dtype=tl.int32),)
            moved = moved + (w_ptrs[i] + rows * (S * WEIGHT_PLANES),)
        accs = summed
        w_ptrs = moved
        if not ONE_BLOCK:
            g = t // chunks_per_block
            if (t + 1) % chunks_per_block == 0 or t + 1 == last:
                s = _block_scale(scale, m_read, g, blocks)
                added = ()
                cleared = ()
                for i in tl.static_range(len(COUNT)):
                    added = added + (totals[i] + accs[i].to(tl.float32) * s[None, :],)
                    cleared = cleared + (tl.zeros([COUNT[i] * BN, BM], tl.int32),)
                totals = added
                accs = cleared
    if PDL == PDL_LATE:
        gdc_launch_dependents()
    # sum (2 w - 1) q = 2 sum w q - sum q, w in {0, 1}; of a split tile the share that ends a group takes sum q.
    if ONE_BLOCK:
        s = tl.load(scale + m_read)
        lift = tl.load(q_sum + m_read)
        if SPLIT:
            lift = tl.where((last == chunks) & (first < chunks), lift, 0)
        lifted = ()
        for i in tl.static_range(len(COUNT)):
            lifted = lifted + ((2 * accs[i] - lift[None, :]).to(tl.float32) * s[None, :],)
    else:
        lift = tl.zeros([BM], tl.float32)
        for g in range(first // chunks_per_block, last // chunks_per_block):
            lift += tl.load(scale + m_read * blocks + g) * tl.load(q_sum + m_read * blocks + g).to(tl.float32)
        lifted = ()
        for i in tl.static_range(len(COUNT)):
            lifted = lifted + (2.0 * totals[i] - lift[None, :],)
    if WEIGHT_PLANES == 1:
        total = lifted[0]
    else:
        total = _weigh_planes(lifted, weight_scale, tile_n * BN, N, BN, BM, FIRST, COUNT, WEIGHT_PLANES)

    if SPLIT:
        cell = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        base = partial + tile.to(tl.int64) * (splits * BN * BM)
        tl.store(base + tl.program_id(1) * (BN * BM) + cell, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived < splits - 1:
            return
        tl.debug_barrier()
        total = tl.zeros([BN, BM], tl.float32)
        for i in range(splits):
            total += tl.load(base + i * (BN * BM) + cell, cache_modifier=".cg")
        tl.store(counters + tile, 0)

    inside = n < N
    if WEIGHT_PLANES == 1:
        total *= tl.load(weight_scale + n, mask=inside, other=0.0)[:, None]
    if RANK > 0:
        total = low_rank_term(total, u, low_b, m_read, n, rank, RANK, PURE)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    out = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, tl.trans(total.to(y.dtype.element_ty)), mask=(m < M)[:, None] & inside[None, :])
