// The experts of a layer: prepare the tokens, gate and up with the activation, prepare the hidden values, down, and
// the sum over a token's experts; all in one parallel region.
//
// The products are those of multiply.h. A unit is some panels of one expert; its tokens have their tables built by the
// thread that needs them, which keeps them for the next unit: a single token has them built once for all experts.

// The rows of an expert whose tables a thread holds.
struct HeldRows {
    const Call* call = nullptr;
    int64_t count = 0;
    int64_t source[kChunkTokens];  // their rows in the codes of the call
};

// Builds the tables of `count` rows of codes, and gathers their scales and u, unless they are there already.
static void hold_rows(const Call& c, const Plan& plan, const Tiles& tiles, const int64_t* source, int64_t count,
                      ExpertsScratch& s, HeldRows& held) {
    if (held.call == &c && held.count == count &&
        std::memcmp(held.source, source, std::size_t(count) * sizeof(int64_t)) == 0) {
        return;
    }
    held.call = &c, held.count = count;
    std::memcpy(held.source, source, std::size_t(count) * sizeof(int64_t));
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t g = 0; g < c.z.blocks; ++g) {
            const int64_t from = g * c.z.width();
            s.tables.abs_sum[t * c.z.blocks + g] = token_tables(
                c, plan, tiles, t, from, c.z.width(), c.q + source[t] * c.z.k() + from, s.tables.entries);
        }
        std::memcpy(s.scale + t * c.z.blocks, c.scale + source[t] * c.z.blocks,
                    std::size_t(c.z.blocks) * sizeof(float));
        if (c.z.rank) {
            std::memcpy(s.u + t * c.z.rank, c.u + source[t] * c.z.rank, std::size_t(c.z.rank) * sizeof(float));
        }
    }
}

// Panels [panel, panel + count) times one tile, in as many streams as the registers hold.
static void multiply_range(const Call& c, const Plan& plan, const Batch& batch, const Tables& tables, int64_t tile,
                           int64_t panel, int64_t count) {
    const int64_t digits = batch.tiles.tokens_of(tile) * plan.digits, streams = stream_count(digits);
    const int64_t gap = count / streams, ahead = tile == 0 ? kReadAhead / streams : 0;
    for (int64_t i = 0; i < gap; ++i) {
        if (streams == 4) {
            multiply_panels<4>(c, plan, batch, tables, tile, panel + i, gap, ahead);
        } else if (streams == 2) {
            multiply_panels<2>(c, plan, batch, tables, tile, panel + i, gap, ahead);
        } else {
            multiply_panels<1>(c, plan, batch, tables, tile, panel + i, 0, ahead);
        }
    }
    for (int64_t i = streams * gap; i < count; ++i) {
        multiply_panels<1>(c, plan, batch, tables, tile, panel + i, 0, ahead);
    }
}

// The product of one expert's panels: a call and a plan as multiply.h takes them, for rows held in the scratch.
struct ExpertProduct {
    Call call;
    Plan plan;

    ExpertProduct(const Call& c, const Plan& p, const ExpertsScratch& s, int64_t expert, int64_t first_panel, int64_t n)
        : call(c), plan(p) {
        if (c.bias) call.bias = static_cast<const uint16_t*>(c.bias) + expert * n;
        call.packed = c.packed + first_panel * c.z.panel_bytes();
        call.x = nullptr, call.z.n = n, call.out_dtype = kFloat32;
        plan.scale = s.scale, plan.u = s.u;
    }
};

static void gate_up_unit(const ExpertsCall& c, const ExpertsPlan& plan, const ExpertUnit& unit, ExpertsScratch& s,
                         HeldRows& held) {
    const int64_t half = c.half(), stride = 2 * half * kRows, first = unit.panel * kRows;
    const int64_t columns = c.inner() - first < unit.panels * kRows ? c.inner() - first : unit.panels * kRows;
    ExpertProduct product(c.gate_up, plan.gate_up, s, unit.expert, unit.expert * 2 * half, stride);
    product.call.out = s.y;
    for (int64_t done = 0; done < unit.rows; done += plan.gate_up_chunk) {
        const int64_t row = unit.row + done, left = unit.rows - done;
        const int64_t count = left < plan.gate_up_chunk ? left : plan.gate_up_chunk;
        const Batch batch{0, count, Tiles(count, plan.gate_up.tile_tokens)};
        int64_t source[kChunkTokens];
        for (int64_t t = 0; t < count; ++t) source[t] = plan.routing->pair[std::size_t(row + t)] / c.top_k;
        hold_rows(c.gate_up, plan.gate_up, batch.tiles, source, count, s, held);
        for (int64_t tile = 0; tile < batch.tiles.count; ++tile) {
            multiply_range(product.call, product.plan, batch, s.tables, tile, unit.panel, unit.panels);
            multiply_range(product.call, product.plan, batch, s.tables, tile, half + unit.panel, unit.panels);
        }
        for (int64_t t = 0; t < count; ++t) {
            const float* gate = s.y + t * stride + first;
            activate(c, gate, gate + half * kRows, columns, plan.hidden + (row + t) * c.inner() + first);
        }
    }
}

static void down_unit(const ExpertsCall& c, const ExpertsPlan& plan, const ExpertUnit& unit, ExpertsScratch& s,
                      HeldRows& held) {
    ExpertProduct product(c.down, plan.down, s, unit.expert, unit.expert * c.down.z.panels(), c.width());
    for (int64_t done = 0; done < unit.rows; done += plan.down_chunk) {
        const int64_t row = unit.row + done, left = unit.rows - done;
        const int64_t count = left < plan.down_chunk ? left : plan.down_chunk;
        const Batch batch{0, count, Tiles(count, plan.down.tile_tokens)};
        int64_t source[kChunkTokens];
        for (int64_t t = 0; t < count; ++t) source[t] = row + t;
        hold_rows(c.down, plan.down, batch.tiles, source, count, s, held);
        product.call.out = plan.y + row * c.width();
        for (int64_t tile = 0; tile < batch.tiles.count; ++tile) {
            multiply_range(product.call, product.plan, batch, s.tables, tile, unit.panel, unit.panels);
        }
    }
}

// The weighted sum over the experts of one token, in the order of the router, for some columns.
static void combine(const ExpertsCall& c, const ExpertsPlan& plan, int64_t token, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
        const int64_t n = end - i < kLanes ? end - i : kLanes;
        V sum = zero();
        for (int64_t pair = token * c.top_k; pair < (token + 1) * c.top_k; ++pair) {
            const int32_t row = plan.routing->row[std::size_t(pair)];
            if (row >= 0) sum = fma(set1(c.weights[pair]), load_n(plan.y + row * c.width() + i, n), sum);
        }
        store_output(c.out_dtype, c.out, token * c.width() + i, sum, n);
    }
}

// Everything that one thread of the team does for a call.
static void run_experts(const ExpertsCall& c, const ExpertsPlan& plan, Team& team) {
    Arena arena{plan.scratch + team.id * plan.scratch_bytes, 0};
    ExpertsScratch scratch = place_experts_scratch(c, plan, arena);
    const Routing& routing = *plan.routing;
    HeldRows held;
    if (c.rows()) {
        run(c.gate_up, plan.gate_up, team);
        for (Units unit(plan.shares, Split(int64_t(routing.gate_up.size()), team), team); unit.next();) {
            gate_up_unit(c, plan, routing.gate_up[std::size_t(unit.item())], scratch, held);
        }
        team.barrier();
        run(c.down, plan.down, team);
        for (Units unit(plan.shares, Split(int64_t(routing.down.size()), team), team); unit.next();) {
            down_unit(c, plan, routing.down[std::size_t(unit.item())], scratch, held);
        }
        team.barrier();
    }
    const int64_t pieces = ceil_div(c.width(), kCombineColumns);
    for (Units unit(plan.shares, Split(c.m() * pieces, team), team); unit.next();) {
        const int64_t begin = unit.item() % pieces * kCombineColumns, end = begin + kCombineColumns;
        combine(c, plan, unit.item() / pieces, begin, end < c.width() ? end : c.width());
    }
}
