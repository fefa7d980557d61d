// The input transform of a batch of tokens: codes, scales and u, and the lookup tables.

struct Batch {
    int64_t first, tokens;
    Tiles tiles;
};

static int8_t* token_codes(const Call& c, const Plan& plan, const Batch& batch, int64_t token) {
    return plan.q + (c.q ? batch.first + token : token) * c.z.k();
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

static bool shares_tables(const Call& c, const Plan& plan) { return c.multiplies() && !plan.private_tables; }

// Many blocks: a thread computes whole ones.
static void prepare_whole(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                          const Team& team) {
    const int64_t projections = project_units(c, batch.tokens), width = c.z.width();
    for (Units unit(plan.shares, Split(projections + batch.tokens * c.z.blocks, team), team); unit.next();) {
        const int64_t block = unit.item() - projections;
        if (block < 0) {
            project_unit(c, plan, batch.first, batch.tokens, unit.item());
            continue;
        }
        const int64_t token = block / c.z.blocks, g = block % c.z.blocks;
        load_block(c, batch, block, scratch.x);
        rotate_rows(c, g, scratch.x, 0, c.z.n1, scratch.half, scratch.rotated);
        const int32_t bits = scale_columns(scratch.rotated, c.column_scale() + g * width, width);
        const float scale = plan.scale[batch.first * c.z.blocks + block] = block_scale(bits, plan.step);
        quantize(scratch.rotated, width, scale, c.bits, token_codes(c, plan, batch, token) + g * width);
        if (shares_tables(c, plan)) share_tables(c, plan, batch, block, 0, width);
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
            const int64_t at = batch.first * c.z.blocks + block, g = block % c.z.blocks;
            const float scale = block_scale(plan.magnitude[at], plan.step);
            if (begin == 0) plan.scale[at] = scale;
            int8_t* q = token_codes(c, plan, batch, block / c.z.blocks) + g * width + begin;
            quantize(plan.rotated + block * width + begin, end - begin, scale, c.bits, q);
        }
        if (shares_tables(c, plan)) share_tables(c, plan, batch, block, begin, end);
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
    if (c.x || shares_tables(c, plan)) team.barrier();
    if (!c.multiplies() || shares_tables(c, plan)) return plan.tables;
    build_private_tables(c, plan, batch, scratch.tables);
    return scratch.tables;
}
