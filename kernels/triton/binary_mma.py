"""Binary tensor cores for a few tokens: mma.m16n8k256 and.popc on the bit planes of the activations.

The planes of M tokens with `bits` planes each are the columns of the right operand, eight to an instruction; no
weight is ever unpacked: one instruction covers 4,096 weights. Native on compute capability 8.0, 8.9 and 9.0
(emulated from 10.0 on, where `integer_mma` is used instead).

Of a weight with several binary planes, a program multiplies all planes of its rows with the bit planes that it has
loaded, sums each weight plane apart, and scales and adds these sums at the end.

Triton has no such dot. The instruction is written as inline assembly on tensors whose layout makes a thread's four
neighbouring elements its fragment: [R, 128 warps], four elements (16 bytes) a thread, 32 threads a warp. Triton
chooses that layout for the 16-byte loads; `compile_check` asserts it, and `self_check.check_matmul` computes it.
"""

# mypy: ignore-errors
# (Triton's own language: its arguments are tensors and pointers of the compiler, not of Python.)

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples.

import triton
import triton.language as tl
from bwla_kernels.triton.epilogue import load_low_rank_rows, low_rank_row
from bwla_kernels.triton.pdl import PDL_EARLY, PDL_LATE
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _popcount(x):
    """Count the bits set in each int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _multiply(low, high, b, c, R: tl.constexpr, WARPS: tl.constexpr, PURE: tl.constexpr):
    """Compute c + popcount(weights & planes) for 16 rows x 8 planes per warp, over 512 columns (two instructions).

    Fragments [R, 128 WARPS] int32, element 128 warp + 4 lane + i: `low` and `high` hold word 4 (lane % 4) + i of row
    lane // 4 and of row lane // 4 + 8; `b` holds that word of plane lane // 4; `c` holds planes 2 (lane % 4) + {0, 1}
    of row lane // 4 (i = 0, 1) and of row lane // 4 + 8 (i = 2, 3).
    """
    if PURE:
        rows_low = tl.reshape(low, (R * WARPS, 8, 1, 16))
        rows_high = tl.reshape(high, (R * WARPS, 8, 1, 16))
        planes = tl.reshape(b, (R * WARPS, 1, 8, 16))
        low_sum = tl.sum(_popcount(rows_low & planes), 3)
        high_sum = tl.sum(_popcount(rows_high & planes), 3)
        both = tl.reshape(tl.join(low_sum, high_sum), (R * WARPS, 8, 4, 2, 2))
        result = c + tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), (R, 128 * WARPS))
    else:
        result = tl.inline_asm_elementwise(
            """
            mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
                {$0, $1, $2, $3}, {$4, $8, $5, $9}, {$12, $13}, {$16, $17, $18, $19};
            mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc
                {$0, $1, $2, $3}, {$6, $10, $7, $11}, {$14, $15}, {$0, $1, $2, $3};
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [low, high, b, c],
            tl.int32,
            is_pure=True,
            pack=4,
        )
    return result


@triton.jit
def _sum_rows(x, R: tl.constexpr, ROW_WARPS: tl.constexpr, K_WARPS: tl.constexpr):
    """Add a fragment's planes and the warps that share rows: [R, 128 warps] -> [16 R ROW_WARPS], in row order."""
    x = tl.reshape(x, (R * ROW_WARPS, K_WARPS, 8, 4, 2, 2))
    x = tl.sum(tl.sum(tl.sum(x, 5), 3), 1)
    return tl.reshape(tl.permute(x, (0, 2, 1)), (16 * R * ROW_WARPS,))


@triton.jit
def _load_weights(
    a_ptrs, chunk0, block0, group, rows,
    BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_TURNS: tl.constexpr, GROUPS: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr,
    WEIGHT_PLANES: tl.constexpr,
):  # fmt: skip
    """Load the weights of UNROLL steps together: (low, high) fragments of each step and weight plane.

    They are zeros beyond the last step, with MASKED also beyond the chunks of a rotation group.
    """
    turn = group // GROUPS
    first = (group % GROUPS) * UNROLL
    loaded = ()
    for i in tl.static_range(UNROLL):
        at = turn * (BLOCK_TURNS * CHUNKS) + (first + i) * STRIDE
        a_at = a_ptrs + at * (rows.to(tl.int64) * (WORDS * WEIGHT_PLANES))
        live = turn * BLOCK_TURNS + block0 < BLOCKS
        if MASKED:
            live = live & ((first + i) * STRIDE + chunk0 < CHUNKS)
        for p in tl.static_range(WEIGHT_PLANES):
            loaded = loaded + (
                tl.load(a_at + p * (16 * WORDS), mask=live[None, :], other=0),
                tl.load(a_at + (p * 16 + 8) * WORDS, mask=live[None, :], other=0),
            )
    return loaded


# One compiled kernel for every number of tokens: none of its own for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["M", "rank"])
def binary_mma_kernel(
    planes,
    scale,
    q_sum,
    u,
    weight,
    weight_scale,
    low_b,
    bias,
    y,
    M,
    N,
    rows,
    rank,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    K_WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    WEIGHT_PLANES: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
    PURE: tl.constexpr,
):
    """Multiply all M <= TOKENS tokens with 16 R ROW_WARPS rows; K_WARPS warps share the columns of a row.

    They take turns by rotation groups (BY_BLOCK), else by steps of 512 columns within each group.

    `planes` int32 [M, BITS, chunks, C / 32] and `weight` int32 [chunks, rows / 16, WEIGHT_PLANES, 16, C / 32] in the
    chunk layout, of BLOCKS rotation groups of CHUNKS chunks; `weight_scale` float32 [N, WEIGHT_PLANES].
    TILES = ceil(TOKENS BITS / 8). MASKED: the turns do not come out even.
    UNROLL: steps whose weights are loaded together, one group ahead of the one that is multiplied: what a thread has
    in flight.
    PDL: the launch may overlap the kernel before it, which makes the activations (see `launch`): until that is done,
    this one only reads weights.
    """
    WARPS: tl.constexpr = ROW_WARPS * K_WARPS
    WORDS: tl.constexpr = C // 32
    STEP: tl.constexpr = 16 // WORDS  # chunks that one step of a warp covers: 512 columns
    BN: tl.constexpr = 16 * R * ROW_WARPS
    ONE_BLOCK: tl.constexpr = BLOCKS == 1
    if PDL == PDL_EARLY:
        gdc_launch_dependents()
    e = tl.arange(0, 128 * WARPS)
    word = e % 4
    quad = e // 4 % 4
    group = e // 16 % 8
    warp = e // 128
    k_warp = warp % K_WARPS
    chunk_in_step = quad * 4 // WORDS
    word_in_chunk = quad * 4 % WORDS + word
    r = tl.arange(0, R)
    row = (r[:, None] * ROW_WARPS + (warp // K_WARPS)[None, :]) * (16 * WEIGHT_PLANES) + group[None, :]
    if BY_BLOCK:
        BLOCK_TURNS: tl.constexpr = K_WARPS
        STRIDE: tl.constexpr = STEP
        chunk0 = chunk_in_step
        block0 = k_warp
    else:
        BLOCK_TURNS: tl.constexpr = 1
        STRIDE: tl.constexpr = STEP * K_WARPS
        chunk0 = k_warp * STEP + chunk_in_step
        block0 = k_warp * 0
    STEPS: tl.constexpr = (CHUNKS + STRIDE - 1) // STRIDE
    GROUPS: tl.constexpr = (STEPS + UNROLL - 1) // UNROLL
    TURNS: tl.constexpr = (BLOCKS + BLOCK_TURNS - 1) // BLOCK_TURNS
    first_row = tl.program_id(0) * BN
    at0 = block0 * CHUNKS + chunk0
    ROW_WORDS: tl.constexpr = WORDS * WEIGHT_PLANES
    a_ptrs = (
        weight
        + first_row * ROW_WORDS
        + (at0.to(tl.int64) * rows * ROW_WORDS + word_in_chunk)[None, :]
        + row * WORDS
    )
    ahead = _load_weights(
        a_ptrs, chunk0, block0, 0, rows,
        BLOCKS, CHUNKS, WORDS, STRIDE, BLOCK_TURNS, GROUPS, UNROLL, MASKED, WEIGHT_PLANES,
    )  # fmt: skip
    # The layer's other tensors are loaded early, so that the last steps do not wait for memory.
    n = first_row + tl.arange(0, BN)
    inside = n < N
    alphas = ()
    for p in tl.static_range(WEIGHT_PLANES):
        alphas = alphas + (tl.load(weight_scale + n * WEIGHT_PLANES + p, mask=inside, other=0.0),)
    low_rows = ()
    if RANK > 0:
        low_rows = load_low_rank_rows(low_b, n, RANK)
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    PLANE: tl.constexpr = BLOCKS * CHUNKS * WORDS
    b_ptrs = planes + (group * PLANE + at0 * WORDS + word_in_chunk)

    tokens = 1 if TOKENS == 1 else M
    # What a column of the fragments stands for: plane 8 tile + 2 quad + word % 2 = token * BITS + bit.
    # `counts` and `totals` have an element for each tile and weight plane, which is the inner index.
    column = 2 * quad + word % 2
    counts = ()
    totals = ()
    for _ in tl.static_range(WEIGHT_PLANES * TILES):
        counts = counts + (tl.zeros([R, 128 * WARPS], tl.int32),)
        totals = totals + (tl.zeros([R, 128 * WARPS], tl.float32),)
    for step_group in range(TURNS * GROUPS):
        turn = step_group // GROUPS
        first = (step_group % GROUPS) * UNROLL
        g = turn * BLOCK_TURNS + block0
        current = ahead
        ahead = _load_weights(
            a_ptrs, chunk0, block0, step_group + 1, rows,
            BLOCKS, CHUNKS, WORDS, STRIDE, BLOCK_TURNS, GROUPS, UNROLL, MASKED, WEIGHT_PLANES,
        )  # fmt: skip
        for i in tl.static_range(UNROLL):
            b_at = b_ptrs + (turn * (BLOCK_TURNS * CHUNKS) + (first + i) * STRIDE) * WORDS
            live = ((first + i) * STRIDE + chunk0 < CHUNKS) & (g < BLOCKS)
            new = ()
            for tile in tl.static_range(TILES):
                exists = group + 8 * tile < tokens * BITS
                if MASKED:
                    exists = exists & live
                b = tl.load(b_at + 8 * tile * PLANE, mask=exists, other=0)
                b = tl.broadcast_to(b[None, :], (R, 128 * WARPS))
                for p in tl.static_range(WEIGHT_PLANES):
                    low = current[2 * (i * WEIGHT_PLANES + p)]
                    high = current[2 * (i * WEIGHT_PLANES + p) + 1]
                    new = new + (_multiply(low, high, b, counts[tile * WEIGHT_PLANES + p], R, WARPS, PURE),)
            counts = new
        if not ONE_BLOCK:
            # A rotation group's counts are scaled when it ends; before that the factor is 0 and they are kept.
            ends = step_group % GROUPS == GROUPS - 1
            added = ()
            cleared = ()
            for tile in tl.static_range(TILES):
                plane = column + 8 * tile
                s = tl.load(
                    scale + plane // BITS * BLOCKS + g,
                    mask=(plane < tokens * BITS) & (g < BLOCKS) & ends,
                    other=0.0,
                )
                for p in tl.static_range(WEIGHT_PLANES):
                    count = counts[tile * WEIGHT_PLANES + p]
                    weighted = (count * _plane_value(plane, BITS)[None, :]).to(tl.float32)
                    added = added + (totals[tile * WEIGHT_PLANES + p] + weighted * s[None, :],)
                    cleared = cleared + (tl.where(ends, 0, count),)
            totals = added
            counts = cleared

    if PDL == PDL_LATE:
        gdc_launch_dependents()
    for m in tl.static_range(TOKENS):
        if m < tokens:
            # sum (2 w - 1) q = 2 sum w q - sum q, w in {0, 1}.
            for p in tl.static_range(WEIGHT_PLANES):
                if ONE_BLOCK:
                    codes = tl.zeros([R, 128 * WARPS], tl.int32)
                    for tile in tl.static_range(TILES):
                        plane = column + 8 * tile
                        value = tl.where(plane // BITS == m, _plane_value(plane, BITS), 0)
                        codes += counts[tile * WEIGHT_PLANES + p] * value[None, :]
                    lifted = 2 * _sum_rows(codes, R, ROW_WARPS, K_WARPS) - tl.load(q_sum + m)
                    product = lifted.to(tl.float32) * tl.load(scale + m)
                else:
                    part = tl.zeros([R, 128 * WARPS], tl.float32)
                    for tile in tl.static_range(TILES):
                        total = totals[tile * WEIGHT_PLANES + p]
                        part += tl.where(((column + 8 * tile) // BITS == m)[None, :], total, 0.0)
                    if p == 0:
                        lift = 0.0
                        for g in tl.static_range(BLOCKS):
                            at = m * BLOCKS + g
                            lift += tl.load(scale + at) * tl.load(q_sum + at).to(tl.float32)
                    product = 2.0 * _sum_rows(part, R, ROW_WARPS, K_WARPS) - lift
                if p == 0:
                    out = product * alphas[p]
                else:
                    out += product * alphas[p]
            if RANK > 0:
                out += low_rank_row(low_rows, u, m, rank, RANK)
            if BIAS:
                out += shift
            tl.store(y + m * N + n, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _plane_value(plane, BITS: tl.constexpr):
    """Return the two's complement weight of a plane's bit: 2^bit, negative for the last one."""
    bit = plane % BITS
    return tl.where(bit == BITS - 1, -1, 1) * (1 << bit)
