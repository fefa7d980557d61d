// The GEMM: panels of 64 rows times tiles of at most kMaxTile digits of codes.

static void store_output(int32_t dtype, void* out, int64_t at, V a, int64_t n) {
    if (dtype == kFloat32) {
        store_n(static_cast<float*>(out) + at, a, n);
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    uint16_t last[kLanes];
    uint16_t* direct = n == kLanes ? to : last;
    if (dtype == kBFloat16) {
        store_bf16(direct, a);
    } else {
        store_fp16(direct, a);
    }
    if (n != kLanes) std::memcpy(to, last, std::size_t(n) * sizeof(uint16_t));
}

// The table totals S of kLanes rows over a token's digits.
template <int Digits>
static inline VI table_totals(const int32_t* sums) {
    const VI total = load_int(sums);
    return Digits == 2 ? times4_plus(total, load_int(sums + kRows)) : total;
}

// Their dot products, 2 S - sum|q|, see lut_vbmi.h.
template <int Digits>
static inline VI dot_products(const int32_t* sums, int32_t abs_sum) {
    return twice_minus(table_totals<Digits>(sums), abs_sum);
}

// Adds the dot products of one block and plane to y. row_scale: the scales of the panel's rows; null where a row has a
// single one: it is a factor of all blocks, and `finish_rows` applies it.
template <int Tokens, int Digits>
static void add_block(const Call& c, const Plan& plan, const int32_t* sums, const int32_t* abs_sums,
                      int64_t token, int64_t g, int64_t plane, const float* row_scale, int64_t first_row, float* y) {
    for (int t = 0; t < Tokens; ++t) {
        const int64_t at = (token + t) * c.z.blocks + g;
        const int32_t abs_sum = abs_sums[t * c.z.blocks + g];
        const int32_t* token_sums = sums + t * Digits * kRows;
        if (c.sums) {
            const int64_t rows = c.z.n - first_row < kRows ? c.z.n - first_row : kRows;
            for (int64_t r = 0; r < rows; r += kLanes) {
                const VI dots = dot_products<Digits>(token_sums + r, abs_sum);
                store_int_n(c.sums + (at * c.z.planes + plane) * c.z.n + first_row + r, dots, rows - r < kLanes ? rows - r : kLanes);
            }
            continue;
        }
        const V scale = set1(plan.scale[at]);
        float* to = y + t * kRows;
        if (row_scale) {
            // Twice the scale times half the dot product: exact, and cheaper than the dot product in integers.
            const V twice = add(scale, scale), half_sum = set1(-0.5f * float(abs_sum));
            UNROLL (i, kRows / kLanes) {
                const V half = add(to_float(table_totals<Digits>(token_sums + i * kLanes)), half_sum);
                const V factor = mul(twice, load(row_scale + i * kLanes));
                store(to + i * kLanes, g || plane ? fma(factor, half, load(to + i * kLanes)) : mul(factor, half));
            }
            continue;
        }
        for (int64_t r = 0; r < kRows; r += kLanes) {
            const V dots = to_float(dot_products<Digits>(token_sums + r, abs_sum));
            store(to + r, g ? fma(scale, dots, load(to + r)) : mul(scale, dots));
        }
    }
}

// Vectors of rows that are finished at a time: with all tokens they fit the registers, and their chains of additions
// over the ranks are independent of each other.
constexpr int finish_vectors(int tokens) { return kRows / kLanes < 8 / tokens ? kRows / kLanes : 8 / tokens; }

template <int Tokens>
static void finish_rows(const Call& c, const Plan& plan, const Panel& panel, int64_t token, int64_t first_row,
                        const float* y) {
    constexpr int kVectors = finish_vectors(Tokens);
    const int64_t rows = c.z.n - first_row < kRows ? c.z.n - first_row : kRows;
    const float* u = plan.u + token * c.z.rank;
    for (int64_t begin = 0; begin < rows; begin += kVectors * kLanes) {
        V row[kVectors][Tokens];
        UNROLL (v, kVectors) {
            const int64_t r = begin + v * kLanes;
            const V scale = c.z.single_scale() ? load(panel.scale + r) : set1(1.0f);
            UNROLL (t, Tokens) row[v][t] = mul(scale, load(y + t * kRows + r));
        }
        for (int64_t j = 0; j < c.z.rank; ++j) {
            V factor[kVectors];
            UNROLL (v, kVectors) factor[v] = load_bf16(panel.low_rank + j * kRows + begin + v * kLanes);
            UNROLL (t, Tokens) {
                const V one = set1(u[t * c.z.rank + j]);
                UNROLL (v, kVectors) row[v][t] = fma(one, factor[v], row[v][t]);
            }
        }
        UNROLL (v, kVectors) {
            const int64_t r = begin + v * kLanes, n = rows - r < kLanes ? rows - r : kLanes;
            if (n <= 0) break;
            const V bias = c.bias ? load_any(c.bias_dtype, c.bias, first_row + r, n) : zero();
            UNROLL (t, Tokens) {
                store_output(c.out_dtype, c.out, (token + t) * c.z.n + first_row + r, add(row[v][t], bias), n);
            }
        }
    }
}

// Streams panels, `gap` panels apart, times one tile, whose first token is `token` of the call.
template <int Tokens, int Digits, int Streams>
static void multiply_tile(const Call& c, const Plan& plan, int64_t first_panel, int64_t gap, int64_t token,
                          const Tables& tile, int64_t ahead) {
    constexpr int kTile = Tokens * Digits;
    const int64_t steps = c.z.width() / kColumns, tail = c.z.panel_bytes() - c.z.sign_bytes();
    const int64_t block_bytes = c.z.block_bytes(), scale_at = c.z.scale_at(0, 0);
    const bool single = c.z.single_scale(), grouped = c.z.grouped;
    const uint8_t* signs[Streams];
    const float* scales[Streams];
    for (int s = 0; s < Streams; ++s) {
        const Panel panel(c.packed, c.z, first_panel + s * gap);
        signs[s] = panel.signs, scales[s] = panel.scale;
    }
    alignas(64) int32_t sums[Streams * kTile * kRows];
    alignas(64) float y[Streams * Tokens * kRows];
    for (int64_t i = 0; i < c.z.planes * c.z.blocks; ++i) {
        const int64_t plane = i / c.z.blocks, g = i % c.z.blocks;
        accumulate<kTile, Streams>(signs, tile.entries + g * steps * kTile * kTableBytes, steps, ahead, sums);
        for (int s = 0; s < Streams; ++s) {
            const float* row_scale = single ? nullptr : scales[s] + plane * kRows;
            if (grouped) {
                row_scale = reinterpret_cast<const float*>(signs[s] + scale_at);
                UNROLL (line, kRows / 16) prefetch_far(row_scale + 16 * line + ahead / 4);
            }
            add_block<Tokens, Digits>(c, plan, sums + s * kTile * kRows, tile.abs_sum, token, g, plane, row_scale,
                                      (first_panel + s * gap) * kRows, y + s * Tokens * kRows);
            signs[s] += block_bytes;
        }
    }
    for (int s = 0; s < Streams; ++s) {
        for (int64_t i = 0; i < tail; i += 64) prefetch_far(signs[s] + ahead + i);
        if (c.sums) continue;
        const int64_t panel = first_panel + s * gap;
        finish_rows<Tokens>(c, plan, Panel(c.packed, c.z, panel), token, panel * kRows,
                            y + s * Tokens * kRows);
    }
}

template <int Streams>
static void multiply_panels(const Call& c, const Plan& plan, const Batch& batch, const Tables& tables,
                            int64_t tile_index, int64_t panel, int64_t gap, int64_t ahead) {
    const int64_t first = batch.tiles.begin(tile_index), token = batch.first + first;
    const Tables tile{tables.entries + first * plan.digits * (c.z.k() / kColumns) * kTableBytes,
                      tables.abs_sum + first * c.z.blocks};
    switch (batch.tiles.tokens_of(tile_index) * plan.digits * 10 + plan.digits) {
#define BWLA_TILE(t, p, s) multiply_tile<t, p, s>(c, plan, panel, gap, token, tile, ahead)
        case 11: BWLA_TILE(1, 1, Streams); break;
        case 21: BWLA_TILE(2, 1, (Streams < 2 ? Streams : 2)); break;
        case 22: BWLA_TILE(1, 2, (Streams < 2 ? Streams : 2)); break;
        case 31: BWLA_TILE(3, 1, 1); break;
        case 41: BWLA_TILE(4, 1, 1); break;
        case 42: BWLA_TILE(2, 2, 1); break;
#undef BWLA_TILE
    }
}

// Panels that one tile of `digits` digits of codes is multiplied with at a time: what the registers hold.
static int64_t stream_count(int64_t digits) { return digits == 1 ? 4 : digits == 2 ? 2 : 1; }

// One tile for all (decoding): the weights come from memory, each once, in as many streams.
static void multiply_streams(const Call& c, const Plan& plan, const Batch& batch, const Tables& tables,
                             const Team& team) {
    const int64_t streams = stream_count(batch.tokens * plan.digits);
    const int64_t ahead = kReadAhead / streams;
    const Split split(c.z.panels(), team, streams);
    for (Units unit(plan.shares, split, team); unit.next();) {
        const int64_t begin = split.begin(unit.owner), gap = split.gap(unit.owner), single = unit.index - gap;
        if (single >= 0) {
            multiply_panels<1>(c, plan, batch, tables, 0, begin + streams * gap + single, 0, ahead);
        } else if (streams == 4) {
            multiply_panels<4>(c, plan, batch, tables, 0, begin + unit.index, gap, ahead);
        } else if (streams == 2) {
            multiply_panels<2>(c, plan, batch, tables, 0, begin + unit.index, gap, ahead);
        } else {
            multiply_panels<1>(c, plan, batch, tables, 0, begin + unit.index, 0, ahead);
        }
    }
}

// Many tiles: a unit is some panels times some tiles. Within it the tile is the outer loop: its tables and
// the panels' weights both stay in the level-2 cache.
static void multiply_unit(const Call& c, const Plan& plan, const Batch& batch, const Tables& tables,
                          int64_t panel, int64_t tile, int64_t tile_end) {
    const int64_t panels = c.z.panels(), panel_end = panel + plan.panels_per_unit;
    for (int64_t t = tile; t < tile_end; ++t) {
        for (int64_t p = panel; p < panel_end && p < panels; ++p) {
            multiply_panels<1>(c, plan, batch, tables, t, p, 0, t == tile ? kReadAhead : 0);
        }
    }
}

static void multiply(const Call& c, const Plan& plan, const Batch& batch, const Tables& tables,
                     const Team& team) {
    if (batch.tiles.count == 1) return multiply_streams(c, plan, batch, tables, team);
    const int64_t down = ceil_div(c.z.panels(), plan.panels_per_unit);
    const int64_t wanted = ceil_div(8 * team.size, down);  // enough units for all threads to finish together
    const int64_t tiles_per_unit = team.size == 1 ? batch.tiles.count : ceil_div(batch.tiles.count, wanted);
    const int64_t across = ceil_div(batch.tiles.count, tiles_per_unit);
    for (Units unit(plan.shares, Split(down * across, team), team); unit.next();) {
        const int64_t tile = unit.item() % across * tiles_per_unit, end = tile + tiles_per_unit;
        multiply_unit(c, plan, batch, tables, unit.item() / across * plan.panels_per_unit, tile,
                      end < batch.tiles.count ? end : batch.tiles.count);
    }
}

// Everything that one thread of the team does for a call.
static void run(const Call& c, const Plan& plan, Team& team) {
    Arena arena{plan.scratch + team.id * plan.scratch_bytes, 0};
    const Scratch scratch = place_scratch(c, plan, arena);
    for (int64_t first = 0; first < c.m; first += plan.batch) {
        const int64_t tokens = c.m - first < plan.batch ? c.m - first : plan.batch;
        const Batch batch{first, tokens, Tiles(tokens, plan.tile_tokens)};
        const Tables tables = prepare(c, plan, batch, scratch, team);
        if (!c.multiplies()) continue;
        multiply(c, plan, batch, tables, team);
        if (first + plan.batch < c.m) team.barrier();  // the tables are about to be overwritten
    }
}
