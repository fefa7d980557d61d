// The input transform of a batch of tokens: codes, scales and u, and the lookup tables or tiles.

struct Batch {
    int64_t first, tokens;
    Tiles tiles;
};

static int8_t* token_codes(const Call& c, const Plan& plan, const Batch& batch, int64_t token) {
    return plan.q + (c.q ? batch.first + token : token) * c.z.k();
}

// Codes of columns [begin, begin + n) of a block.
static void quantize_block(const Call& c, const Plan& plan, const Batch& batch, int64_t block, int64_t begin,
                           int64_t n, const float* x_hat, float scale) {
    const int64_t token = block / c.z.blocks, g = block % c.z.blocks;
    if (!plan.tiled) {
        quantize(x_hat, n, scale, c.bits, token_codes(c, plan, batch, token) + g * c.z.width() + begin);
        return;
    }
    for (int64_t i = 0; i < n; i += kTileColumns) {
        const int64_t count = n - i < kTileColumns ? n - i : kTileColumns;
        quantize(x_hat + i, count, scale, c.bits, tile_codes(c, plan, token, g, begin + i));
    }
}

static void load_block(const Call& c, const Batch& batch, int64_t block, float* x) {
    const int64_t token = batch.first + block / c.z.blocks, g = block % c.z.blocks;
    convert(c.x_dtype, c.x, token * c.x_stride + g * c.z.width(), x, c.z.width());
}

// Tables of columns [begin, end) of a block, shared by all threads.
static void share_tables(const Call& c, const Plan& plan, const Batch& batch, int64_t block, int64_t begin,
                         int64_t end) {
    const int64_t token = block / c.z.blocks, from = block % c.z.blocks * c.z.width() + begin;
    const int8_t* q = token_codes(c, plan, batch, token) + from;
    const int32_t sum = token_tables(c, plan, batch.tiles, token, from, end - begin, q, plan.tables.entries);
    __atomic_fetch_add(plan.tables.abs_sum + block, sum, __ATOMIC_RELAXED);
}

static bool shares_tables(const Call& c, const Plan& plan) {
    return c.multiplies() && !plan.tiled && !plan.private_tables;
}

// Codes and scale of one block.
static void prepare_block(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                          int64_t block) {
    const int64_t g = block % c.z.blocks, width = c.z.width();
    load_block(c, batch, block, scratch.x);
    const float* x_hat = scratch.x;
    int32_t bits;
    if (c.z.grouped) {
        bits = largest_magnitude(x_hat, width);
    } else {
        rotate_rows(c, g, scratch.x, 0, c.z.n1, scratch.half, scratch.rotated);
        bits = scale_columns(scratch.rotated, c.column_scale() + g * width, width);
        x_hat = scratch.rotated;
    }
    const float scale = block_scale(bits, plan.step);
    scale_of(c, plan, batch.first + block / c.z.blocks, g) = scale;
    quantize_block(c, plan, batch, block, 0, width, x_hat, scale);
}

// Many blocks: a thread computes whole ones.
static void prepare_whole(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                          const Team& team) {
    const int64_t projections = project_units(c, batch.tokens);
    for (Units unit(plan.shares, Split(projections + batch.tokens * c.z.blocks, team), team); unit.next();) {
        const int64_t block = unit.item() - projections;
        if (block < 0) {
            project_unit(c, plan, batch.first, batch.tokens, unit.item());
            continue;
        }
        prepare_block(c, plan, batch, scratch, block);
        if (shares_tables(c, plan)) share_tables(c, plan, batch, block, 0, c.z.width());
    }
}

// Few blocks (decoding): all threads share each block, first for the rotation, by rows ...
static void prepare_rows(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                         const Team& team) {
    const int64_t strips = ceil_div(c.z.n1, kStripRows), projections = project_units(c, batch.tokens);
    int64_t loaded = -1;
    for (Units unit(plan.shares, Split(projections + batch.tokens * c.z.blocks * strips, team), team);
         unit.next();) {
        const int64_t strip = unit.item() - projections;
        if (strip < 0) {
            project_unit(c, plan, batch.first, batch.tokens, unit.item());
            continue;
        }
        const int64_t block = strip / strips, g = block % c.z.blocks, row = strip % strips * kStripRows;
        const int64_t end = row + kStripRows < c.z.n1 ? row + kStripRows : c.z.n1, from = row * c.z.n2;
        if (block != loaded) load_block(c, batch, block, scratch.x);
        loaded = block;
        float* rotated = plan.rotated + block * c.z.width() + from;
        rotate_rows(c, g, scratch.x, row, end, scratch.half, rotated);
        const float* column_scale = c.column_scale() + g * c.z.width() + from;
        const int32_t bits = scale_columns(rotated, column_scale, (end - row) * c.z.n2);
        int32_t* high = plan.magnitude + batch.first * c.z.blocks + block;
        int32_t seen = __atomic_load_n(high, __ATOMIC_RELAXED);
        while (seen < bits &&
               !__atomic_compare_exchange_n(high, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
}

// ... then, when the maximum of the block is known, for the codes and the tables.
static void prepare_pieces(const Call& c, const Plan& plan, const Batch& batch, const Team& team) {
    const int64_t width = c.z.width(), pieces = ceil_div(width, kPieceColumns);
    for (Units unit(plan.shares, Split(batch.tokens * c.z.blocks * pieces, team), team); unit.next();) {
        const int64_t block = unit.item() / pieces, begin = unit.item() % pieces * kPieceColumns;
        const int64_t end = begin + kPieceColumns < width ? begin + kPieceColumns : width;
        if (c.x) {
            const float scale = block_scale(plan.magnitude[batch.first * c.z.blocks + block], plan.step);
            if (begin == 0) scale_of(c, plan, batch.first + block / c.z.blocks, block % c.z.blocks) = scale;
            quantize_block(c, plan, batch, block, begin, end - begin, plan.rotated + block * width + begin,
                           scale);
        }
        if (shares_tables(c, plan)) share_tables(c, plan, batch, block, begin, end);
    }
}

// Copies the codes, scales and u that were passed in into the layout of the AMX variant.
static void tile_given(const Call& c, const Plan& plan, const Batch& batch, const Team& team) {
    const int64_t width = c.z.width();
    for (Units unit(plan.shares, Split(batch.tokens * c.z.blocks, team), team); unit.next();) {
        const int64_t token = unit.item() / c.z.blocks, g = unit.item() % c.z.blocks;
        const int8_t* from = c.q + (batch.first + token) * c.z.k() + g * width;
        if (c.scale)
            scale_of(c, plan, batch.first + token, g) = c.scale[(batch.first + token) * c.z.blocks + g];
        for (int64_t j = 0; j < c.z.rank && c.u && g == 0; ++j) {
            u_of(c, plan, batch.first + token, j) = c.u[(batch.first + token) * c.z.rank + j];
        }
        for (int64_t i = 0; i < width; i += kTileColumns) {
            const int64_t count = width - i < kTileColumns ? width - i : kTileColumns;
            std::memcpy(tile_codes(c, plan, token, g, i), from + i, std::size_t(count));
        }
    }
}

static void build_private_tables(const Call& c, const Plan& plan, const Batch& batch, const Tables& tables) {
    for (int64_t block = 0; block < batch.tokens * c.z.blocks; ++block) {
        const int64_t token = block / c.z.blocks, from = block % c.z.blocks * c.z.width();
        const int8_t* q = token_codes(c, plan, batch, token) + from;
        tables.abs_sum[block] =
            token_tables(c, plan, batch.tiles, token, from, c.z.width(), q, tables.entries);
    }
}

// Leaves the codes, scales and u of a batch in the plan, behind a barrier, and returns its tables if there
// are to be any.
static Tables prepare(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                      Team& team) {
    if (shares_tables(c, plan)) {
        if (team.id == 0)
            std::memset(plan.tables.abs_sum, 0, std::size_t(batch.tokens * c.z.blocks) * sizeof(int32_t));
        team.barrier();
    }
    if (c.x && !plan.split) prepare_whole(c, plan, batch, scratch, team);
    if (plan.split) {
        prepare_rows(c, plan, batch, scratch, team);
        team.barrier();
    }
    if (plan.split || (!c.x && shares_tables(c, plan))) prepare_pieces(c, plan, batch, team);
    if (!c.x && plan.tiled) tile_given(c, plan, batch, team);
    if (c.x || plan.tiled || shares_tables(c, plan)) team.barrier();
    if (!c.multiplies() || plan.tiled || shares_tables(c, plan)) return plan.tables;
    build_private_tables(c, plan, batch, scratch.tables);
    return scratch.tables;
}
