// The GEMM for many tokens with AMX. One instruction multiplies a tile of codes, int8 [16 tokens, 64
// columns], by a tile of signs, int8 [64 columns, 16 rows], and adds the product to int32 [16 tokens, 16
// rows].
//
// A unit of work is 32 output rows times many tokens. The signs of the rows are expanded from bits to bytes
// once, and multiplied by the codes of 32 tokens at a time: two tiles of codes and two of signs give four
// tiles of sums, which loads each operand from memory half as often as one product at a time would. The sums
// are the integers that table lookup computes (lut_vbmi.h), and the arithmetic after them is that of
// multiply.h in the same order, so both give the same output bit for bit.

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kSumBytes = kTileRows * sizeof(int32_t);  // of one token

// GCC's tile intrinsics do not declare the memory that they read: without this, stores before them could be
// delayed.
static inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Expands the signs of 32 rows and `steps` steps of 32 columns, which begin at `bits`, into tiles [columns /
// 64][2]. A tile is [16 groups of 4 columns][16 rows][4 columns], as AMX expects the second operand. A nibble
// of a packed row has the signs of one group (layout.h), so a register of 16 four-byte entries serves as a
// lookup table.
static NOINLINE void expand(const uint8_t* bits, int64_t steps, int8_t* tiles) {
    alignas(64) static constexpr auto table = [] {
        struct {
            int8_t byte[16][4];
        } made{};
        for (int i = 0; i < 16; ++i) {
            for (int b = 0; b < 4; ++b) made.byte[i][b] = (i >> b & 1) ? 1 : -1;
        }
        return made;
    }();
    const __m512i entries = _mm512_load_si512(&table);
    for (int64_t c = 0; c < steps; ++c) {
        UNROLL (half, 2) {
            prefetch_far(bits + c * kStepBytes + 64 * half + kReadAhead);
            const __m512i words = _mm512_loadu_si512(bits + c * kStepBytes + 64 * half);
            int8_t* tile = tiles + (c / 2 * 2 + half) * kTileBytes + c % 2 * (kTileBytes / 2);
            UNROLL (i, 8) {
                const int nibble = i < 4 ? 8 * i : 8 * (i - 4) + 4;  // of columns 4 i .. 4 i + 3
                const __m512i row = _mm512_permutexvar_epi32(_mm512_srli_epi32(words, nibble), entries);
                _mm512_store_si512(tile + 64 * i, row);
            }
        }
    }
    if (steps % 2) {  // zeros, because the other half of the last tile of codes is uninitialized
        UNROLL (half, 2) {
            std::memset(tiles + (steps - 1 + half) * kTileBytes + kTileBytes / 2, 0,
                        std::size_t(kTileBytes / 2));
        }
    }
}

// The output rows of one unit.
struct Rows {
    int64_t first, count;
    const uint8_t* signs;

    Rows(const Call& c, int64_t unit) : first(unit * kTileRows) {
        count = c.z.n - first < kTileRows ? c.z.n - first : kTileRows;
        signs = Panel(c.packed, c.z, first / kRows).signs + first % kRows * 4;
    }
};

static NOINLINE void load_factors(const Call& c, const Rows& rows, float* factors) {
    const Panel panel(c.packed, c.z, rows.first / kRows);
    const int64_t at = rows.first % kRows;
    for (int64_t r = 0; r < kTileRows; r += kLanes) {
        const int64_t n = rows.count - r < kLanes ? rows.count - r : kLanes;
        for (int64_t p = 0; p < c.z.planes; ++p)
            store(factors + p * kTileRows + r, load(panel.scale + p * kRows + at + r));
        store(factors + c.z.planes * kTileRows + r,
              c.bias && n > 0 ? load_any(c.bias_dtype, c.bias, rows.first + r, n) : zero());
        for (int64_t j = 0; j < c.z.rank; ++j) {
            store(factors + (c.z.planes + 1 + j) * kTileRows + r, load_bf16(panel.low_rank + j * kRows + at + r));
        }
    }
}

// Integer sums of rotation group g of a plane and `count` tokens from `token` on, which still have to be scaled and
// stored.
struct Epilogue {
    int64_t token = 0, count = 0, g = 0, plane = 0;
    const int32_t* sums = nullptr;
    float* y = nullptr;  // sums over the rotation groups so far, [kPairTokens, kTileRows]
};

// Stores the outputs of `count` of 8 tokens.
static inline void store_rows(const Call& c, const Rows& rows, int64_t token, int64_t count,
                              const V (&y)[kEpilogueTokens][2]) {
    if (c.out_dtype == kBFloat16 && rows.count == kTileRows) {
        __mmask16 subnormal = 0;  // the instruction below would flush them to zero
        UNROLL (t, kEpilogueTokens)
            UNROLL (i, 2) subnormal |= _mm512_fpclass_ps_mask(y[t][i], 0x20);
        if (!subnormal) {
            uint16_t* to = static_cast<uint16_t*>(c.out) + token * c.z.n + rows.first;
            UNROLL (t, kEpilogueTokens) {
                if (t < count)
                    _mm512_storeu_si512(to + t * c.z.n, __m512i(_mm512_cvtne2ps_pbh(y[t][1], y[t][0])));
            }
            return;
        }
    }
    alignas(64) float values[kEpilogueTokens][kTileRows];
    UNROLL (t, kEpilogueTokens)
        UNROLL (i, 2) store(values[t] + i * kLanes, y[t][i]);
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t r = 0; r < rows.count; r += kLanes) {
            const int64_t n = rows.count - r < kLanes ? rows.count - r : kLanes;
            store_output(c.out_dtype, c.out, (token + t) * c.z.n + rows.first + r, load(values[t] + r), n);
        }
    }
}

// Adds the sums of one rotation group (`from`) to the sums over groups (`total`) for 8 tokens from `at` on,
// and computes the output after the last group. The last 8 - count tokens do not exist: they are computed,
// but not stored.
static void finish_group(const Call& c, const Plan& plan, const Rows& rows, const float* factors, int64_t at,
                         int64_t count, int64_t g, int64_t plane, const int32_t* from, float* total) {
    constexpr int T = kEpilogueTokens;
    V row[T][2];
    const float* scale = &scale_of(c, plan, at, g);
    UNROLL (t, T) {
        const V s = set1(scale[t]);
        UNROLL (i, 2) {
            const V dots = to_float(load_int(from + t * kTileRows + i * kLanes));
            const V factor = c.z.planes > 1 ? mul(s, load(factors + plane * kTileRows + i * kLanes)) : s;
            row[t][i] = g || plane ? fma(factor, dots, load(total + t * kTileRows + i * kLanes)) : mul(factor, dots);
        }
    }
    if (g + 1 < c.z.blocks || plane + 1 < c.z.planes) {
        UNROLL (t, T)
            UNROLL (i, 2) store(total + t * kTileRows + i * kLanes, row[t][i]);
        return;
    }
    UNROLL (i, 2) {
        const V alpha = c.z.planes > 1 ? set1(1.0f) : load(factors + i * kLanes);
        UNROLL (t, T) row[t][i] = mul(alpha, row[t][i]);
    }
    const float *u = &u_of(c, plan, at, 0), *factor = factors + (c.z.planes + 1) * kTileRows;
    for (int64_t j = 0; j < c.z.rank; ++j, u += T, factor += kTileRows) {
        const V low = load(factor), high = load(factor + kLanes);
        UNROLL (t, T) {
            const V value = set1(u[t]);
            row[t][0] = fma(value, low, row[t][0]);
            row[t][1] = fma(value, high, row[t][1]);
        }
    }
    UNROLL (i, 2) {
        const V bias = load(factors + c.z.planes * kTileRows + i * kLanes);
        UNROLL (t, T) row[t][i] = add(row[t][i], bias);
    }
    store_rows(c, rows, at, count, row);
}

static NOINLINE void finish(const Call& c, const Plan& plan, const Rows& rows, const float* factors,
                            const Epilogue& e) {
    for (int64_t t = 0; t < e.count; t += kEpilogueTokens) {
        const int64_t count = e.count - t < kEpilogueTokens ? e.count - t : kEpilogueTokens;
        const int32_t* sums = e.sums + t * kTileRows;
        if (!c.sums) {
            finish_group(c, plan, rows, factors, e.token + t, count, e.g, e.plane, sums, e.y + t * kTileRows);
            continue;
        }
        for (int64_t i = 0; i < count; ++i) {
            int32_t* to = c.sums + (((e.token + t + i) * c.z.blocks + e.g) * c.z.planes + e.plane) * c.z.n + rows.first;
            std::memcpy(to, sums + i * kTileRows, std::size_t(rows.count) * sizeof(int32_t));
        }
    }
}

enum class Start { kZero, kKeep, kLoad };

// Adds the products of 16 or 32 tokens and 32 rows over `count` column tiles to the sums in tiles 0 to 3,
// which are first set to zero, kept, or loaded from `sums`.
template <int Tiles>
static inline void add_tiles(const int8_t* codes, int64_t next_codes, const int8_t* signs, int64_t count,
                             Start start, const int32_t* sums) {
    if (start == Start::kLoad) {
        _tile_loadd(0, sums, kSumBytes);
        _tile_loadd(1, sums + kTileTokens, kSumBytes);
        if (Tiles == 2) {
            _tile_loadd(2, sums + kTileTokens * kTileRows, kSumBytes);
            _tile_loadd(3, sums + kTileTokens * kTileRows + kTileTokens, kSumBytes);
        }
    } else if (start == Start::kZero) {
        _tile_zero(0);
        _tile_zero(1);
        if (Tiles == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int64_t i = 0; i < count; ++i, codes += kTileBytes, signs += 2 * kTileBytes) {
        _tile_loadd(4, codes, kTileColumns);
        _tile_loadd(6, signs, kTileColumns);
        _tile_loadd(7, signs + kTileBytes, kTileColumns);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (Tiles == 2) {
            _tile_loadd(5, codes + next_codes, kTileColumns);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
}

template <int Tiles>
static inline void store_tiles(int32_t* sums) {
    _tile_stored(0, sums, kSumBytes);
    _tile_stored(1, sums + kTileTokens, kSumBytes);
    if (Tiles == 2) {
        _tile_stored(2, sums + kTileTokens * kTileRows, kSumBytes);
        _tile_stored(3, sums + kTileTokens * kTileRows + kTileTokens, kSumBytes);
    }
}

// Multiplies the 32 rows of a unit by tokens [begin, end) of a batch; `begin` is a multiple of 32.
static void multiply_rows(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                          int64_t unit, int64_t begin, int64_t end) {
    const Rows rows(c, unit);
    const int64_t tiles = c.z.tiles(), steps = c.z.width() / kColumns,
                  pairs = ceil_div(end - begin, kPairTokens);
    const int64_t chunks = pairs > kChunkPairs ? 1 : ceil_div(tiles, kChunkTiles);
    const bool alternate = chunks == 1 || pairs == 1;  // two buffers of sums suffice
    if (!c.sums) load_factors(c, rows, scratch.factors);
    Epilogue before;  // of the previous pair: vector instructions that overlap with the tile instructions of
                      // this one
    int64_t turn = 0;
    for (int64_t block = 0; block < c.z.planes * c.z.blocks; ++block) {
        const int64_t plane = block / c.z.blocks, g = block % c.z.blocks;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t tile = tiles * chunk / chunks, count = tiles * (chunk + 1) / chunks - tile;
            const int64_t left = steps - 2 * tile;
            expand(rows.signs + (block * steps + 2 * tile) * kStepBytes, left < 2 * count ? left : 2 * count,
                   scratch.signs);
            finish_stores();
            for (int64_t pair = 0; pair < pairs; ++pair) {
                const int64_t token = begin + pair * kPairTokens;
                const int64_t tokens = end - token < kPairTokens ? end - token : kPairTokens;
                const int8_t* codes = tile_codes(c, plan, token, g, tile * kTileColumns);
                const int8_t* next = tile_codes(c, plan, token + kTileTokens, g, tile * kTileColumns);
                int32_t* sums = scratch.sums + (alternate ? turn : pair) * kPairTokens * kTileRows;
                const Start start = chunk == 0 ? Start::kZero : pairs == 1 ? Start::kKeep : Start::kLoad;
                if (tokens > kTileTokens) {
                    add_tiles<2>(codes, next - codes, scratch.signs, count, start, sums);
                } else {
                    add_tiles<1>(codes, 0, scratch.signs, count, start, sums);
                }
                finish(c, plan, rows, scratch.factors, before);
                before.count = 0;
                if (pairs == 1 && chunk + 1 < chunks) continue;
                if (tokens > kTileTokens) {
                    store_tiles<2>(sums);
                } else {
                    store_tiles<1>(sums);
                }
                if (chunk + 1 < chunks) continue;
                float* y = scratch.y + (c.z.blocks * c.z.planes > 1 ? (token - begin) * kTileRows : 0);
                before = {batch.first + token, tokens, g, plane, sums, y};
                turn = !turn;
            }
        }
    }
    finish(c, plan, rows, scratch.factors, before);
}

static void multiply(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                     const Team& team) {
    static constexpr TileShapes shapes;
    _tile_loadconfig(&shapes);
    const int64_t down = ceil_div(c.z.n, kTileRows), pairs = ceil_div(batch.tokens, kPairTokens);
    const int64_t wanted = ceil_div(8 * team.size, down);  // enough units for all threads to finish together
    const int64_t pairs_per_unit = team.size == 1 ? pairs : ceil_div(pairs, wanted);
    const int64_t across = ceil_div(pairs, pairs_per_unit), tokens = pairs_per_unit * kPairTokens;
    for (Units unit(plan.shares, Split(down * across, team), team); unit.next();) {
        const int64_t begin = unit.item() % across * tokens, end = begin + tokens;
        multiply_rows(c, plan, batch, scratch, unit.item() / across, begin,
                      end < batch.tokens ? end : batch.tokens);
    }
    _tile_release();  // back to the initial state, which costs nothing to save and which other users of AMX
                      // expect
}

// Everything that one thread of the team does for a call.
static void run(const Call& c, const Plan& plan, Team& team) {
    if (!plan.tiled) return avx512vbmi::run(c, plan, team);
    Arena arena{plan.scratch + team.id * plan.scratch_bytes, 0};
    const Scratch scratch = place_scratch(c, plan, arena);
    for (int64_t first = 0; first < c.m; first += plan.batch) {
        const int64_t tokens = c.m - first < plan.batch ? c.m - first : plan.batch;
        const Batch batch{first, tokens, Tiles(tokens, plan.tile_tokens)};
        if (plan.lanes) {
            prepare_lanes(c, plan, batch, scratch, team);
        } else {
            prepare(c, plan, batch, scratch, team);
        }
        multiply(c, plan, batch, scratch, team);
        if (first + plan.batch < c.m) team.barrier();  // the codes are about to be overwritten
    }
}
