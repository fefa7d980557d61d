// One call of the 8-bit head (reference implementation: kernels/head.py), and the codes of its tokens.
// Nothing here depends on the instruction set.
#pragma once

#include "plan.h"

namespace bwla {

constexpr float kHeadCodeMax = 127 * 256 + 127;
constexpr int64_t kHeadRows = 32;  // rows of one unit of work: with 8,192 columns they fit the level-2 cache

struct HeadCall {
    const int8_t* weight;    // [n, k]
    const float* scale;      // [n]
    const int32_t* row_sum;  // [n], sum of each row of weight
    int64_t n, k, m;
    const void* x;  // [m, k], rows x_stride elements apart
    int64_t x_stride;
    int32_t x_dtype;
    void* out;  // [m, n], of the dtype of x
};

// What a call keeps in the workspace: the codes of its tokens, 16 bits each, as one array or as two planes of
// bytes; k padded to whole vectors.
struct HeadPlan {
    Share* shares;    // one for each thread
    float* scale;     // [m]
    char* codes;      // [m, 2 padded]
    float* floats;    // [threads, padded]
    int64_t padded;

    int16_t* whole(int64_t token) const { return reinterpret_cast<int16_t*>(codes) + token * padded; }
    uint8_t* high(int64_t token) const { return reinterpret_cast<uint8_t*>(codes) + 2 * token * padded; }
    uint8_t* low(int64_t token) const { return high(token) + padded; }
};

// Points the plan's arrays into the arena, which measures where its base is null.
inline HeadPlan place_head(const HeadCall& c, int threads, Arena& arena) {
    HeadPlan p{};
    p.padded = ceil_div(c.k, 64) * 64;
    p.shares = arena.array<Share>(threads);
    p.scale = arena.array<float>(c.m);
    p.codes = arena.array<char>(2 * c.m * p.padded);
    p.floats = arena.array<float>(threads * p.padded);
    return p;
}

}  // namespace bwla
