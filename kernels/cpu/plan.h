// What one call computes, and how it is cut into pieces of work. Nothing here depends on the instruction set.
#pragma once

#include "layout.h"
#include "runtime.h"

namespace bwla {

enum Dtype : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// One call. The input transform is computed where `x` is set (else q, scale and u are given), the GEMM
// where `out` or `sums` is set.
struct Call {
    const uint8_t* packed;
    Sizes z;
    int64_t m;
    int32_t bits;
    double clip;
    // Input transform.
    const void* x;  // [m, k], rows x_stride elements apart
    int64_t x_stride;
    int32_t x_dtype;
    // Between the two; null: kept in the workspace.
    int8_t* q;     // [m, k]
    float* scale;  // [m, blocks]
    float* u;      // [m, rank]
    // GEMM.
    const void* bias;  // [n], or null
    int32_t bias_dtype;
    void* out;  // [m, n]
    int32_t out_dtype;
    int32_t* sums;  // [m, blocks, n]: if set, the integer dot products are written here, and nothing to `out`

    bool multiplies() const { return out || sums; }
    const float* left(int64_t g) const { return reinterpret_cast<const float*>(packed) + g * z.n1 * z.n1; }
    const float* right(int64_t g) const {
        return reinterpret_cast<const float*>(packed + z.right_at()) + g * z.n2 * z.padded();
    }
    const float* column_scale() const { return reinterpret_cast<const float*>(packed + z.column_scale_at()); }
    const uint16_t* low_rank_a() const {
        return reinterpret_cast<const uint16_t*>(packed + z.low_rank_a_at());
    }
};

constexpr int64_t kStripRows = 4;          // rows of a block that one rotation unit computes
constexpr int64_t kPieceColumns = 512;     // columns that one quantization unit covers
constexpr int64_t kTableBudget = 4 << 20;  // bytes of tables in use at a time: they should stay in cache
constexpr int64_t kWeightBudget = 192
                                  << 10;  // bytes of weights that one matmul unit keeps in the level-2 cache
constexpr int64_t kSerialCost = 30000;    // cycles below which waking other threads costs more than it gives

// Lookup tables of the tokens of a batch, and sum|q| [tokens, blocks].
struct Tables {
    uint8_t* entries;
    int32_t* abs_sum;
};

// What one thread needs for itself.
struct Scratch {
    float* x;        // one block as float32, [n1, n2], a vector longer
    float* half;     // L^T X, [n1, padded]
    float* rotated;  // [n1, n2]
    Tables tables;   // where tables are not shared
};

// How a call is cut. The input transform: threads take whole blocks, or, where there are too few, share each
// block (`split`). The tables: with many tiles threads share them; with a single tile each builds its own from the
// codes (`private_tables`), since they are four times larger than the codes and cores may be far apart.
struct Plan {
    int threads;
    float step;           // scale = max|x_hat| * step
    int planes;           // a code above 6 bits is two digits to base 4: q = 4 q1 + q0, one table each
    int64_t tile_tokens;  // tokens whose tables lie side by side: kMaxTile / planes
    int64_t batch;        // tokens that have tables at a time
    bool split;
    bool private_tables;
    int64_t panels_per_unit;
    Share* shares;  // one for each thread
    int32_t*
        magnitude;   // [m, blocks], split only: max|x_hat| as the bits of a float, which order like integers
    int8_t* q;       // [batch, k]
    float* scale;    // [m, blocks]
    float* u;        // [m, rank]
    float* rotated;  // [batch, k], split only
    Tables tables;   // where they are shared
    char* scratch;
    int64_t scratch_bytes;  // of one thread
};

// A rough count of cycles, only to decide whether more than one thread pays.
inline int64_t estimated_cycles(const Call& c) {
    int64_t cycles = 0;
    if (c.x) cycles += c.m * c.z.k() * (c.z.n1 + c.z.n2 + c.z.rank) / 12;
    if (c.multiplies()) cycles += c.z.n * c.z.k() / 128 * (c.m + 1) + c.m * c.z.k() / 2;
    return cycles;
}

inline Plan make_plan(const Call& c, int threads) {
    Plan p{};
    p.threads = threads < 0 ? -threads : estimated_cycles(c) < kSerialCost ? 1 : threads;
    if (p.threads < 1) p.threads = 1;
    p.step = float(c.clip / double((1 << (c.bits - 1)) - 1));
    p.planes = c.bits > 6 ? 2 : 1;
    p.tile_tokens = kMaxTile / p.planes;
    const int64_t token_bytes = p.planes * c.z.k() / kColumns * kTableBytes;
    p.batch = kTableBudget / token_bytes / p.tile_tokens * p.tile_tokens;
    if (p.batch < 16) p.batch = 16;
    if (p.batch > c.m) p.batch = c.m;
    p.split = c.x && p.threads > 1 && p.batch * c.z.blocks < 4 * p.threads;
    p.private_tables = c.m <= p.tile_tokens;
    p.panels_per_unit = kWeightBudget / c.z.panel_bytes();
    if (p.panels_per_unit < 1) p.panels_per_unit = 1;
    return p;
}

inline Tables place_tables(const Call& c, const Plan& p, Arena& arena) {
    uint8_t* entries = arena.array<uint8_t>(p.batch * p.planes * c.z.k() / kColumns * kTableBytes);
    return {entries, arena.array<int32_t>(p.batch * c.z.blocks)};
}

inline Scratch place_scratch(const Call& c, const Plan& p, Arena& arena) {
    Scratch s{};
    if (c.x) {
        s.x = arena.array<float>(c.z.width() + 16);
        s.half = arena.array<float>(c.z.n1 * c.z.padded());
        s.rotated = arena.array<float>(c.z.width());
    }
    if (c.multiplies() && p.private_tables) s.tables = place_tables(c, p, arena);
    return s;
}

// Points the plan's arrays into the arena (which measures where its base is null). What must start as zeros
// comes first.
inline std::size_t place(const Call& c, Plan& p, Arena arena) {
    const Sizes& z = c.z;
    p.shares = arena.array<Share>(p.threads);
    if (p.split) p.magnitude = arena.array<int32_t>(c.m * z.blocks);
    if (arena.base) std::memset(arena.base, 0, arena.used);
    p.scale = c.scale ? c.scale : arena.array<float>(c.m * z.blocks);
    p.u = c.u ? c.u : arena.array<float>(c.m * z.rank);
    p.q = c.q ? c.q : arena.array<int8_t>(p.batch * z.k());
    if (p.split) p.rotated = arena.array<float>(p.batch * z.k());
    if (c.multiplies() && !p.private_tables) p.tables = place_tables(c, p, arena);
    Arena measure{nullptr, 0};
    place_scratch(c, p, measure);
    p.scratch_bytes = int64_t(measure.used);
    p.scratch = arena.array<char>(p.threads * p.scratch_bytes);
    return arena.used;
}

// Tokens [begin, end) of a batch that share a tile; tiles differ by at most one token.
struct Tiles {
    int64_t tokens, count;
    Tiles(int64_t batch, int64_t tile_tokens) : tokens(batch), count(ceil_div(batch, tile_tokens)) {}
    int64_t begin(int64_t tile) const {
        const int64_t large = tokens % count;
        return tile * (tokens / count) + (tile < large ? tile : large);
    }
    int64_t tokens_of(int64_t tile) const { return begin(tile + 1) - begin(tile); }
    int64_t of(int64_t token) const {
        const int64_t base = tokens / count, large = tokens % count;  // the first `large` tiles hold base + 1
        return token < large * (base + 1) ? token / (base + 1) : large + (token - large * (base + 1)) / base;
    }
};

}  // namespace bwla
