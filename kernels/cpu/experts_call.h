// One call of the experts of a layer, and how it is cut into pieces of work (reference implementation:
// kernels/experts/reference.py). Nothing here depends on the instruction set.
//
// A packed projection of all experts is a packed layer (layout.h) with more panels: one input transform, then the
// panels of part after part. A part is the gate or the up projection of an expert (part 2 e and 2 e + 1), or its down
// projection (part e); each starts with a new panel.
#pragma once

#include <vector>

#include "plan.h"

namespace bwla {

enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kSwigluOai = 3, kActivationCount = 4 };

constexpr int64_t kExpertRows = 64;                // rows of an expert that one unit multiplies
constexpr int64_t kChunkTokens = 16;               // rows that have tables at a time, at most
constexpr int64_t kChunkBudget = 128 << 10;        // bytes of their tables: with the weights in the level-2 cache
constexpr int64_t kExpertsBudget = 64 << 20;       // bytes of hidden values and outputs of all experts at a time
constexpr int64_t kExpertsBatch = 64;              // the fewest tokens at a time
constexpr int64_t kCombineColumns = 512;           // outputs that one unit adds up

// Some panels of one expert times some of its rows.
struct ExpertUnit {
    int64_t expert, row, rows, panel, panels;
};

// A row is one pair of a token and one of its experts; rows are sorted by expert, then by token.
struct Routing {
    std::vector<int64_t> start;       // first row of each expert, and the end
    std::vector<int32_t> pair;        // [rows] token * top_k + slot
    std::vector<int32_t> row;         // [m, top_k], or -1 for an expert of another rank
    std::vector<ExpertUnit> gate_up;  // panels are those of the gate; those of up go with them
    std::vector<ExpertUnit> down;
};

struct ExpertsCall {
    // The two input transforms; z.n: the rows of one part. bias, if any: bfloat16 of all experts, those of gate and up
    // in whole panels each [experts, 2, half() * kRows], those of down [experts, width].
    Call gate_up, down;
    int64_t experts, top_k;
    int32_t activation;
    float limit, alpha;  // of kSwigluOai
    const float* weights;  // [m, top_k]
    void* out;             // [m, hidden size]
    int32_t out_dtype;

    int64_t m() const { return gate_up.m; }
    int64_t rows() const { return down.m; }
    int64_t inner() const { return down.z.k(); }
    int64_t width() const { return down.z.n; }
    // Gate and up of one expert as the kernel computes them: whole panels each.
    int64_t half() const { return gate_up.z.panels(); }
};

// What one thread needs for itself.
struct ExpertsScratch {
    Tables tables;
    float* scale;  // [chunk, rotation groups]
    float* u;      // [chunk, rank]
    float* y;      // [chunk, gate and up in whole panels]
};

struct ExpertsPlan {
    Plan gate_up, down;
    int threads;
    int64_t gate_up_chunk, down_chunk;  // rows that have tables at a time
    Share* shares;
    float* hidden;  // [rows, inner]
    float* y;       // [rows, width]
    char* scratch;
    int64_t scratch_bytes;  // of one thread
    const Routing* routing;
};

inline int64_t chunk_of(const Call& c, const Plan& p) {
    const int64_t token_bytes = p.digits * c.z.k() / kColumns * kTableBytes;
    const int64_t tokens = kChunkBudget / token_bytes / p.tile_tokens * p.tile_tokens;
    return tokens < p.tile_tokens ? p.tile_tokens : tokens < kChunkTokens ? tokens : kChunkTokens;
}

// Sorts the pairs of a call by expert. False if an id is neither an expert nor negative.
template <class Id>
bool sort_by_expert(const Id* ids, int64_t pairs, int64_t experts, Routing& r) {
    r.start.assign(std::size_t(experts + 1), 0);
    r.row.assign(std::size_t(pairs), -1);
    for (int64_t i = 0; i < pairs; ++i) {
        if (int64_t(ids[i]) >= experts) return false;
        if (ids[i] >= 0) ++r.start[std::size_t(ids[i]) + 1];
    }
    for (int64_t e = 0; e < experts; ++e) r.start[std::size_t(e) + 1] += r.start[std::size_t(e)];
    r.pair.resize(std::size_t(r.start[std::size_t(experts)]));
    for (int64_t i = 0; i < pairs; ++i) {  // counts up `start`, which is moved back below
        if (ids[i] < 0) continue;
        const int64_t row = r.start[std::size_t(ids[i])]++;
        r.pair[std::size_t(row)] = int32_t(i), r.row[std::size_t(i)] = int32_t(row);
    }
    for (int64_t e = experts; e > 0; --e) r.start[std::size_t(e)] = r.start[std::size_t(e) - 1];
    r.start[0] = 0;
    return true;
}

// Cuts the work of one projection so that the weights of a unit fit the level-2 cache and all threads finish together.
// `panels` of an expert are divided; each stands for `bytes` of weights.
inline void cut_experts(const Routing& r, int64_t panels, int64_t bytes, int threads, std::vector<ExpertUnit>& units) {
    const int64_t experts = int64_t(r.start.size()) - 1;
    int64_t blocks = 0;
    for (int64_t e = 0; e < experts; ++e) {
        blocks += ceil_div(r.start[std::size_t(e) + 1] - r.start[std::size_t(e)], kExpertRows);
    }
    units.clear();
    if (!blocks) return;
    int64_t ranges = ceil_div(panels * bytes, kWeightBudget);
    if (threads > 1 && ranges * blocks < 8 * threads) ranges = ceil_div(8 * threads, blocks);
    if (ranges > panels) ranges = panels;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t end = r.start[std::size_t(e) + 1];
        for (int64_t row = r.start[std::size_t(e)]; row < end; row += kExpertRows) {
            for (int64_t i = 0; i < ranges; ++i) {
                const int64_t panel = panels * i / ranges, rows = end - row < kExpertRows ? end - row : kExpertRows;
                units.push_back({e, row, rows, panel, panels * (i + 1) / ranges - panel});
            }
        }
    }
}

// Tokens at a time, so that hidden values and outputs of their experts stay within a budget.
inline int64_t experts_batch(const ExpertsCall& c) {
    const int64_t tokens = kExpertsBudget / (c.top_k * (c.inner() + c.width()) * int64_t(sizeof(float)));
    return tokens < kExpertsBatch ? kExpertsBatch : tokens;
}

inline ExpertsPlan make_experts_plan(ExpertsCall& c, int threads, Routing& routing) {
    ExpertsPlan p{};
    // What is set says that there is an input transform; `place_experts` puts the hidden values in its place.
    c.down.x = c.gate_up.x, c.down.x_stride = c.inner(), c.down.x_dtype = kFloat32;
    const int64_t bits = c.rows() * c.inner() * c.width() * (2 * c.gate_up.z.planes + c.down.z.planes);
    p.threads = threads < 0 ? -threads : bits / 128 < kSerialCost ? 1 : threads < 1 ? 1 : threads;
    p.gate_up = make_plan(c.gate_up, -p.threads, false);
    p.down = make_plan(c.down, -p.threads, false);
    p.gate_up_chunk = chunk_of(c.gate_up, p.gate_up);
    p.down_chunk = chunk_of(c.down, p.down);
    p.routing = &routing;
    cut_experts(routing, c.half(), 2 * c.gate_up.z.panel_bytes(), p.threads, routing.gate_up);
    cut_experts(routing, c.down.z.panels(), c.down.z.panel_bytes(), p.threads, routing.down);
    return p;
}

inline ExpertsScratch place_experts_scratch(const ExpertsCall& c, const ExpertsPlan& p, Arena& arena) {
    const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const Sizes &a = c.gate_up.z, &b = c.down.z;
    const int64_t first = p.gate_up_chunk, second = p.down_chunk;
    ExpertsScratch s{};
    s.tables.entries = arena.array<uint8_t>(larger(first * p.gate_up.digits * a.k(), second * p.down.digits * b.k()) /
                                            kColumns * kTableBytes);
    s.tables.abs_sum = arena.array<int32_t>(larger(first * a.blocks, second * b.blocks));
    s.scale = arena.array<float>(larger(first * a.blocks, second * b.blocks));
    s.u = arena.array<float>(larger(first * a.rank, second * b.rank));
    s.y = arena.array<float>(first * 2 * c.half() * kRows);
    return s;
}

// Points the arrays of the plan, and those between the two transforms and the products, into the arena.
inline std::size_t place_experts(ExpertsCall& c, ExpertsPlan& p, Arena arena) {
    p.shares = arena.array<Share>(p.threads);
    if (arena.base) std::memset(static_cast<void*>(p.shares), 0, std::size_t(p.threads) * sizeof(Share));
    p.hidden = arena.array<float>(c.rows() * c.inner());
    p.y = arena.array<float>(c.rows() * c.width());
    if (arena.base) c.down.x = p.hidden;
    const std::pair<Call*, Plan*> sides[] = {{&c.gate_up, &p.gate_up}, {&c.down, &p.down}};
    for (const auto& [call, plan] : sides) {
        call->q = arena.array<int8_t>(call->m * call->z.k());
        call->scale = arena.array<float>(call->m * call->z.blocks);
        call->u = arena.array<float>(call->m * call->z.rank);
        arena.used += place(*call, *plan, Arena{arena.base ? arena.base + arena.used : nullptr, 0});
    }
    Arena measure{nullptr, 0};
    place_experts_scratch(c, p, measure);
    p.scratch_bytes = int64_t(measure.used);
    p.scratch = arena.array<char>(p.threads * p.scratch_bytes);
    return arena.used;
}

}  // namespace bwla
