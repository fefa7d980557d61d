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
    int32_t* sums;  // [m, blocks, planes, n]: if set, the integer dot products are written here, and nothing to `out`

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

// The AMX variant (amx.h). A tile holds the codes of 16 tokens and 64 columns, or the signs of 64 columns and
// 16 output rows.
constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileColumns = 64;
constexpr int64_t kTileBytes = kTileTokens * kTileColumns;
constexpr int64_t kTileRows = 32;       // output rows of one unit of work: two tiles side by side
constexpr int64_t kPairTokens = 32;     // tokens that are multiplied at a time: two tiles
constexpr int64_t kEpilogueTokens = 8;  // tokens whose outputs are computed at a time
// Column tiles whose signs are expanded at a time, so that they fit the level-1 cache, and the number of
// token pairs up to which this pays: with several chunks, the sums of every pair are stored and loaded again
// for each chunk.
constexpr int64_t kChunkTiles = 8;
constexpr int64_t kChunkPairs = 4;
// Bytes of codes in use at a time, which should stay in the level-2 cache, and the least number of tokens,
// which share the work of expanding the signs.
constexpr int64_t kCodeBudget = 1 << 20;
constexpr int64_t kLeastBatch = 128;
// Tokens of a tile from which transforming all 16 lanes is faster than transforming one token after the
// other.
constexpr int64_t kLaneTokens = 9;
// Tokens from which AMX is faster than table lookup. Measured on a fifth-generation Xeon for seven layers between
// 576 x 576 and 4096 x 12288: the two are equal at 8 to 10 tokens for narrow layers and at 13 for 4096 x 4096.
constexpr int64_t kAmxTokens = 12;

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
    // AMX only:
    int8_t* signs;   // tiles of expanded signs, [columns of a rotation group / 64][2]
    float* factors;  // weight_scale, bias and low_rank_b of one unit's rows, [planes + 1 + rank, kTileRows]
    int32_t* sums;   // integer dot products, [kChunkPairs, kPairTokens, kTileRows]
    float* y;        // sums over rotation groups and planes, [batch, kTileRows]; one pair of tiles if both are 1
    float* lanes;    // one rotation group of 16 tokens, before and after multiplying by L^T: [2, width, 16]
};

// How a call is cut. The input transform: threads take whole blocks, or, where there are too few, share each
// block (`split`). The tables: with many tiles threads share them; with a single tile each builds its own
// from the codes (`private_tables`), since they are four times larger than the codes and cores may be far
// apart.
struct Plan {
    int threads;
    float step;           // scale = max|x_hat| * step
    int digits;           // a code above 6 bits is two digits to base 4: q = 4 q1 + q0, one table each
    int64_t tile_tokens;  // tokens whose tables lie side by side: kMaxTile / digits
    int64_t batch;        // tokens that have tables, or tiles of codes, at a time
    bool split;
    bool tiled;  // AMX tiles of codes instead of lookup tables
    bool lanes;  // the input transform computes 16 tokens at a time, see amx_prepare.h
    bool private_tables;
    int64_t panels_per_unit;
    Share* shares;  // one for each thread
    int32_t*
        magnitude;   // [m, blocks], split only: max|x_hat| as the bits of a float, which order like integers
    int8_t* q;       // [batch, k], or tiles of codes
    float* scale;    // [m, blocks], or [m / 8, blocks, 8]: see scale_of
    float* u;        // [m, rank], or [m / 8, rank, 8]: see u_of
    float* rotated;  // [batch, k], split only
    Tables tables;   // where they are shared
    char* scratch;
    int64_t scratch_bytes;  // of one thread
};

// A rough count of cycles, only to decide whether more than one thread pays.
inline int64_t estimated_cycles(const Call& c) {
    int64_t cycles = 0;
    if (c.x) cycles += c.m * c.z.k() * (c.z.grouped ? 12 : c.z.n1 + c.z.n2 + c.z.rank) / 12;
    if (c.multiplies()) cycles += c.z.n * c.z.planes * c.z.k() / 128 * (c.m + 1) + c.m * c.z.k() / 2;
    return cycles;
}

inline Plan make_plan(const Call& c, int threads, bool amx) {
    Plan p{};
    p.tiled = amx && c.multiplies() && c.m >= kAmxTokens && !c.z.grouped;  // amx.h has one scale a row and plane
    p.threads = threads < 0 ? -threads : estimated_cycles(c) < kSerialCost ? 1 : threads;
    if (p.threads < 1) p.threads = 1;
    p.step = float(c.clip / double((1 << (c.bits - 1)) - 1));
    p.digits = c.bits > 6 ? 2 : 1;
    p.tile_tokens = kMaxTile / p.digits;
    const int64_t token_bytes = p.digits * c.z.k() / kColumns * kTableBytes;
    p.batch = kTableBudget / token_bytes / p.tile_tokens * p.tile_tokens;
    if (p.batch < 16) p.batch = 16;
    if (p.tiled) {  // batches of about equal size, near the budget
        const int64_t budget = kCodeBudget / (c.z.blocks * c.z.tiles() * kTileColumns);
        const int64_t tokens = budget < kLeastBatch ? kLeastBatch : budget;
        const int64_t batches = (c.m + tokens / 2) / tokens;
        p.batch = round_up(ceil_div(c.m, batches < 1 ? 1 : batches), kPairTokens);
    }
    if (p.batch > c.m) p.batch = c.m;
    p.lanes = p.tiled && c.x && ceil_div(p.batch, kTileTokens) * c.z.blocks >= p.threads;
    p.split = c.x && !c.z.grouped && !p.lanes && p.threads > 1 && p.batch * c.z.blocks < 4 * p.threads;
    p.private_tables = !p.tiled && c.m <= p.tile_tokens;
    p.panels_per_unit = kWeightBudget / c.z.panel_bytes();
    if (p.panels_per_unit < 1) p.panels_per_unit = 1;
    return p;
}

inline Tables place_tables(const Call& c, const Plan& p, Arena& arena) {
    uint8_t* entries = arena.array<uint8_t>(p.batch * p.digits * c.z.k() / kColumns * kTableBytes);
    return {entries, arena.array<int32_t>(p.batch * c.z.blocks)};
}

inline Scratch place_scratch(const Call& c, const Plan& p, Arena& arena) {
    Scratch s{};
    if (c.x) {
        s.x = arena.array<float>(c.z.width() + 16);
        if (!c.z.grouped) {
            s.half = arena.array<float>(c.z.n1 * c.z.padded());
            s.rotated = arena.array<float>(c.z.width());
        }
    }
    if (c.multiplies() && p.private_tables) s.tables = place_tables(c, p, arena);
    if (p.tiled) {
        s.signs = arena.array<int8_t>(2 * c.z.tiles() * kTileBytes);
        s.factors = arena.array<float>((1 + c.z.planes + c.z.rank) * kTileRows);
        s.sums = arena.array<int32_t>(kChunkPairs * kPairTokens * kTileRows);
        if (p.lanes) s.lanes = arena.array<float>(2 * c.z.width() * kTileTokens);
        s.y = arena.array<float>((c.z.blocks * c.z.planes > 1 ? round_up(p.batch, kPairTokens) : kPairTokens) * kTileRows);
    }
    return s;
}

// Points the plan's arrays into the arena (which measures where its base is null). What must start as zeros
// comes first.
inline std::size_t place(const Call& c, Plan& p, Arena arena) {
    const Sizes& z = c.z;
    p.shares = arena.array<Share>(p.threads);
    if (p.split) p.magnitude = arena.array<int32_t>(c.m * z.blocks);
    if (p.tiled) {
        p.scale = arena.array<float>(round_up(c.m, kTileTokens) * z.blocks);
        p.u = arena.array<float>(round_up(c.m, kTileTokens) * z.rank);
    }
    if (arena.base) std::memset(arena.base, 0, arena.used);
    if (!p.tiled) {
        p.scale = c.scale ? c.scale : arena.array<float>(c.m * z.blocks);
        p.u = c.u ? c.u : arena.array<float>(c.m * z.rank);
    }
    if (p.tiled) {
        p.q = arena.array<int8_t>(ceil_div(p.batch, kTileTokens) * z.blocks * z.tiles() * kTileBytes);
    } else {
        p.q = c.q ? c.q : arena.array<int8_t>(p.batch * z.k());
    }
    if (p.split) p.rotated = arena.array<float>(p.batch * z.k());
    if (c.multiplies() && !p.tiled && !p.private_tables) p.tables = place_tables(c, p, arena);
    Arena measure{nullptr, 0};
    place_scratch(c, p, measure);
    p.scratch_bytes = int64_t(measure.used);
    p.scratch = arena.array<char>(p.threads * p.scratch_bytes);
    return arena.used;
}

// The scale of a token's rotation group, and element j of its u. For AMX the values of 8 tokens are adjacent.
inline float& scale_of(const Call& c, const Plan& p, int64_t token, int64_t g) {
    if (!p.tiled) return p.scale[token * c.z.blocks + g];
    return p.scale[(token / kEpilogueTokens * c.z.blocks + g) * kEpilogueTokens + token % kEpilogueTokens];
}

inline float& u_of(const Call& c, const Plan& p, int64_t token, int64_t j) {
    if (!p.tiled) return p.u[token * c.z.rank + j];
    return p.u[(token / kEpilogueTokens * c.z.rank + j) * kEpilogueTokens + token % kEpilogueTokens];
}

// The codes of one token of a batch, from one column of a rotation group on: tiles
// [batch / 16][blocks][width / 64][16][64].
inline int8_t* tile_codes(const Call& c, const Plan& p, int64_t token, int64_t g, int64_t column) {
    const int64_t tile = (token / kTileTokens * c.z.blocks + g) * c.z.tiles() + column / kTileColumns;
    return p.q + tile * kTileBytes + token % kTileTokens * kTileColumns + column % kTileColumns;
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
