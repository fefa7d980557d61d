// The steps of the sign search: error feedback within a block of columns, and one sweep of coordinate descent.
//
// Each lane of a vector is one row of the weight, so rows decide independently. A tile of kLanes rows walks through the
// columns in strips of kLanes columns. A strip first receives the updates of decisions in other strips, which is a
// matrix product with kLanes accumulators in registers, and then decides its columns one after the other. In coordinate
// descent only columns in which some row of the tile flipped its sign take part in the product.

constexpr int kStrip = kLanes;

// acc[i] += sum_j b[j * stride + i] * x_j for the vectors x_j at x.
static inline void accumulate(V (&acc)[kStrip], const float* b, int64_t stride, const float* x, int64_t count) {
    V sum[kStrip];
    UNROLL (i, kStrip) sum[i] = acc[i];
    for (int64_t j = 0; j < count; ++j, b += stride, x += kLanes) {
        const V value = load(x);
        UNROLL (i, kStrip) sum[i] = fma(set1(b[i]), value, sum[i]);
    }
    UNROLL (i, kStrip) acc[i] = sum[i];
}

// The same for the changes of `count` flips and a strip of H, b [columns][kStrip].
static inline void accumulate_flips(V (&acc)[kStrip], const float* b, const Flip* flips, int64_t count) {
    V sum[kStrip];
    UNROLL (i, kStrip) sum[i] = acc[i];
    for (int64_t j = 0; j < count; ++j) {
        const float* row = b + int64_t(flips[j].column) * kStrip;
        prefetch_near(b + int64_t(flips[j + 8 < count ? j + 8 : j].column) * kStrip);
        const V value = signed_lanes(set1(2.0f), flips[j].rows, flips[j].positive);
        UNROLL (i, kStrip) sum[i] = fma(set1(row[i]), value, sum[i]);
    }
    UNROLL (i, kStrip) acc[i] = sum[i];
}

// The same for all flips that a strip has still to see. Those of its own columns in the last sweep leave the ring.
static inline void receive(V (&acc)[kStrip], const float* strip, int64_t first, Flips& flips) {
    while (flips.count && int64_t(flips.first().column) >= first && int64_t(flips.first().column) < first + kStrip)
        flips.pop();
    const int64_t whole = flips.columns - flips.front, ahead = flips.count < whole ? flips.count : whole;
    accumulate_flips(acc, strip, flips.ring + flips.front, ahead);
    accumulate_flips(acc, strip, flips.ring, flips.count - ahead);
}

// Adds the changes of a tile in one column to its flips; returns whether there are any.
static inline bool push_flips(Flips& flips, int64_t column, V change) {
    const uint32_t flipped = nonzero_lanes(change);
    if (flipped) flips.push({uint32_t(column), uint16_t(flipped), uint16_t(positive_lanes(change))});
    return flipped != 0;
}

// Copies kStrip columns of H. H is symmetric: they are read as rows, in long streams.
static inline void copy_strip(const SignStep& c, int64_t first, float* strip) {
    const float* const rows = c.matrix + first * c.columns;
    for (int64_t j = 0; j < c.columns; ++j) {
        UNROLL (i, kStrip) strip[j * kStrip + i] = rows[i * c.columns + j];
    }
}

// A tile: up to kLanes rows of one candidate.
struct SignTile {
    const SignStep& c;
    int64_t rows, at, pitch;  // rows of the tile; offset of its first row in [C, N]; elements from column to column
    const float* target;      // the tile's in the first column

    SignTile(const SignStep& call, int64_t tile) : c(call), pitch(call.candidates * call.n) {
        const int64_t tiles = ceil_div(c.n, kLanes), first = tile % tiles * kLanes;
        rows = c.n - first < kLanes ? c.n - first : kLanes;
        at = tile / tiles * c.n + first;
        target = c.target + first;
    }

    V get(const float* from) const { return load_n(from, rows); }
    void put(float* to, V value) const { store_n(to, value, rows); }
    V get(const float* matrices, int64_t column) const { return get(matrices + column * pitch + at); }
    void put(float* matrices, int64_t column, V value) const { put(matrices + column * pitch + at, value); }

    // Error feedback in the columns of a block.
    void choose() const {
        float signs[kMaxBlock * kLanes];
        const V scale = get(c.scale + at);
        V dots = get(c.dots + at), norms = get(c.norms + at), acc[kStrip];
        for (int64_t strip = 0; strip < c.columns; strip += kStrip) {
            for (int i = 0; i < kStrip; ++i) acc[i] = get(c.product, strip + i);
            accumulate(acc, c.matrix + strip, c.columns, signs, strip);
            for (int i = 0; i < kStrip; ++i) {
                const int64_t j = strip + i;
                const float* factor = c.matrix + j * c.columns + strip;
                const V p = get(target + j * c.n), chosen = sign_of(fma(negate(scale), acc[i], p)),
                        q = add(acc[i], chosen), weighted = mul(set1(c.pivots[j]), q);
                dots = fma(weighted, p, dots);
                norms = fma(weighted, q, norms);
                store(signs + j * kLanes, chosen);
                put(c.sign, j, chosen);
                for (int later = i + 1; later < kStrip; ++later)
                    acc[later] = fma(set1(factor[later]), chosen, acc[later]);
            }
        }
        put(c.dots + at, dots);
        put(c.norms + at, norms);
    }

    // Coordinate descent in a strip of columns from `first` on; `strip` [columns][kStrip] is that of H.
    void flip(int64_t first, const float* strip, Flips& flips) const {
        V acc[kStrip];
        for (int i = 0; i < kStrip; ++i) acc[i] = get(c.product, first + i);
        receive(acc, strip, first, flips);
        const V scale = get(c.scale + at);
        V dots = get(c.dots + at), norms = get(c.norms + at);
        for (int i = 0; i < kStrip; ++i) {
            const int64_t j = first + i;
            const float* local = strip + j * kStrip;
            const V from = get(c.sign, j), dot = get(target + j * c.n), diagonal = set1(local[i]),
                    gradient = fma(scale, acc[i], negate(dot)),
                    gain = fma(from, gradient, negate(mul(scale, diagonal))),
                    change = where_positive(gain, mul(set1(-2.0f), from));
            put(c.change, j, change);
            if (!push_flips(flips, j, change)) continue;
            put(c.sign, j, add(from, change));
            dots = fma(change, dot, dots);
            norms = fma(change, fma(change, diagonal, mul(set1(2.0f), acc[i])), norms);
            UNROLL (other, kStrip) acc[other] = fma(set1(local[other]), change, acc[other]);
        }
        put(c.dots + at, dots);
        put(c.norms + at, norms);
        for (int i = 0; i < kStrip; ++i) put(c.product, first + i, acc[i]);
    }
};

// The work of one thread of the team in error feedback.
static void choose_signs(const SignStep& c, const SignScratch& scratch, Team& team) {
    for (Units unit(scratch.shares, Split(c.tiles(kLanes), team), team); unit.next();) {
        SignTile(c, unit.item()).choose();
    }
}

// The work of one thread in a sweep. All its tiles use a strip of H before it goes on to the next.
static void sweep_signs(const SignStep& c, const SignScratch& scratch, Team& team) {
    const Split split(c.tiles(kLanes), team);
    const int64_t begin = split.begin(team.id), end = split.begin(team.id + 1);
    float* const strip = scratch.strips + team.id * c.columns * kStrip;
    for (int64_t j = 0; j < c.columns; ++j) {
        for (int64_t tile = begin; tile < end; ++tile) {
            push_flips(scratch.flips[tile], j, SignTile(c, tile).get(c.change, j));
        }
    }
    for (int64_t first = 0; first < c.columns; first += kStrip) {
        copy_strip(c, first, strip);
        for (int64_t tile = begin; tile < end; ++tile) SignTile(c, tile).flip(first, strip, scratch.flips[tile]);
    }
}
