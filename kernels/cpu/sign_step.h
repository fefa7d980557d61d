// The steps of the sign search (kernels/sign_search/steps.py has the reference implementations), and how their rows are
// divided. All arrays are float32; a vector of rows of the weight is contiguous. Nothing here depends on the
// instruction set.
#pragma once

#include "plan.h"

namespace bwla {

constexpr int64_t kMaxBlock = 256;  // columns of a block of error feedback
constexpr int64_t kMostColumns = int64_t(1) << 24;

struct SignStep {
    const float* target;  // [columns, n]
    float* product;       // [columns, candidates, n]
    const float* matrix;  // [columns, columns]: the factor M, or H, which is symmetric
    const float* pivots;  // [columns]; error feedback only
    const float* scale;   // [candidates, n]
    float* sign;          // [columns, candidates, n]
    float* change;        // [columns, candidates, n]; coordinate descent only, else null
    float *dots, *norms;  // [candidates, n]
    int64_t columns, candidates, n;
    // 0: the candidates are binary weights. Else the planes of a single candidate: they take the place of the
    // candidates in all shapes, and `norms` is [planes, planes, n].
    int64_t planes;

    int64_t tiles(int64_t lanes) const { return (planes ? 1 : candidates) * ceil_div(n, lanes); }
    int64_t rings(int64_t lanes) const { return tiles(lanes) * (planes ? planes : 1); }
};

// The flips of a tile of rows in one column: whether a row flipped its sign, and whether the sign is now positive.
struct Flip {
    uint32_t column;
    uint16_t rows, positive;
};

// The flips of a tile that its strips have still to see, in the order of their columns: a ring, because those of the
// last sweep leave it at the front as those of this sweep enter at the back. A column is in it at most once.
struct Flips {
    Flip* ring;  // [columns]
    int64_t front, count, columns;

    const Flip& first() const { return ring[front]; }
    void pop() { front = front + 1 < columns ? front + 1 : 0, --count; }
    void push(const Flip& flip) {
        const int64_t end = front + count++;
        ring[end < columns ? end : end - columns] = flip;
    }
};

struct SignScratch {
    Share* shares;  // one for each thread; error feedback
    Flips* flips;   // one for each tile and plane; coordinate descent
    float* strips;  // [threads][columns][lanes]: some columns of H; coordinate descent
};

inline SignScratch place_signs(const SignStep& c, int64_t lanes, int threads, Arena& arena) {
    SignScratch s{};
    s.shares = arena.array<Share>(threads);
    if (!c.change) return s;
    const int64_t count = c.rings(lanes);
    s.flips = arena.array<Flips>(count);
    Flip* const rings = arena.array<Flip>(count * c.columns);
    s.strips = arena.array<float>(threads * c.columns * lanes);
    for (int64_t i = 0; s.flips && i < count; ++i) s.flips[i] = {rings + i * c.columns, 0, 0, c.columns};
    return s;
}

}  // namespace bwla
