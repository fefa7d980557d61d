// One call of the one-bit GPTQ kernel (kernels/gptq_binary.py is its reference), and how its rows are
// divided. Nothing here depends on the instruction set.
#pragma once

#include "plan.h"

namespace bwla {

constexpr int kMaxScales = 8;
constexpr int64_t kHotBytes = int64_t(1)
                              << 20;  // of one matrix of all candidates: it is read again for every strip
constexpr int64_t kMinTiles = 2, kMaxTiles = 4;  // tiles of a unit

struct GptqCall {
    const float* weight;          // W [n, k]
    const float* weight_hessian;  // W H [n, k]
    const float* hessian;         // H [k, k], symmetric
    const float* factor;  // upper Cholesky factor of H's inverse [k, k]; null: start from the weight's signs
    const float* mean;    // mean magnitude of each row [n]
    float scale_factors[kMaxScales];  // initial scales in units of that mean
    int32_t scale_count;              // of the initial scales; 1 where `factor` is null
    int32_t sweeps;                   // of coordinate descent
    int32_t refine_all;  // descend from every initial scale; otherwise from the best one of each row
    int64_t n, k;
    float* sign;   // out [n, k], -1 or +1
    float* scale;  // out [n]
    float* error;  // out [n]: (w - a s) H (w - a s)^T
};

// The unit of work of a thread is a few tiles of `lanes` rows. A candidate is one initial scale of one tile
// and has the number tile * scale_count + scale. A strip of H is copied once for all candidates of a unit.
struct GptqScratch {
    float *weight, *weight_hessian;  // [tiles][k][lanes], transposed
    float *sign, *errors,
        *sign_hessian;               // [candidates][k][lanes]: signs, GPTQ's negative errors, signs times H
    float *old_changes, *changes;    // [candidates][k][lanes]: what the last and this sweep added to signs
    int32_t *old_columns, *columns;  // [candidates][k]: the columns of those changes, ascending
    int32_t *old_counts, *counts;    // [candidates]: the number of those columns
    float* strip;                    // [k][lanes]: some columns of H or of the factor
    float* rows;                     // [candidates][kRowFigures][lanes]
};

constexpr int64_t kRowFigures = 4;

inline int64_t gptq_tiles(const GptqCall& c, int64_t lanes) {
    int64_t tiles = kHotBytes / (c.k * lanes * int64_t(sizeof(float)) * c.scale_count);
    tiles = tiles < kMinTiles ? kMinTiles : tiles > kMaxTiles ? kMaxTiles : tiles;
    const int64_t all = ceil_div(c.n, lanes);
    return tiles < all ? tiles : all;
}

inline GptqScratch place_gptq(const GptqCall& c, int64_t tiles, int64_t lanes, Arena& arena) {
    GptqScratch s{};
    const int64_t candidates = tiles * c.scale_count, matrix = c.k * lanes;
    s.weight = arena.array<float>(tiles * matrix);
    s.weight_hessian = arena.array<float>(tiles * matrix);
    s.sign = arena.array<float>(candidates * matrix);
    s.errors = arena.array<float>(candidates * matrix);
    s.sign_hessian = arena.array<float>(candidates * matrix);
    s.changes = arena.array<float>(candidates * matrix);
    s.old_changes = s.errors;  // not needed any more once coordinate descent begins
    s.old_columns = arena.array<int32_t>(candidates * c.k);
    s.columns = arena.array<int32_t>(candidates * c.k);
    s.old_counts = arena.array<int32_t>(candidates);
    s.counts = arena.array<int32_t>(candidates);
    s.strip = arena.array<float>(c.k * lanes);
    s.rows = arena.array<float>(candidates * kRowFigures * lanes);
    return s;
}

}  // namespace bwla
