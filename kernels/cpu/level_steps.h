// The steps of the search for several planes (kernels/sign_search/levels.py has the reference implementations).
//
// As in sign_steps.h, each lane of a vector is one row of the weight. The signs of all planes in a column are chosen
// together: of the row's 2^P levels the one nearest to the wanted value.

// b where gain > 0, else a; both exactly.
static inline V replace(V gain, V a, V b) {
    return add(where_positive(gain, b), add(a, negate(where_positive(gain, a))));
}

template <int P>
struct LevelTile {
    const SignStep& c;
    int64_t rows, at, pitch;  // rows of the tile; its first row; elements from column to column
    V scale[P];

    LevelTile(const SignStep& call, int64_t tile) : c(call), at(tile * kLanes), pitch(P * call.n) {
        rows = c.n - at < kLanes ? c.n - at : kLanes;
        UNROLL (p, P) scale[p] = get(c.scale + p * c.n + at);
    }

    V get(const float* from) const { return load_n(from, rows); }
    void put(float* to, V value) const { store_n(to, value, rows); }
    float* cell(float* matrices, int64_t column, int p) const { return matrices + column * pitch + p * c.n + at; }
    V target(int64_t column) const { return get(c.target + column * c.n + at); }

    // Replaces `signs` in the lanes in which another level is nearer to `wanted` than `best`, a squared distance.
    void nearest(V wanted, V best, V (&signs)[P]) const {
        for (int code = 0; code < 1 << P; ++code) {
            V rest = wanted;
            UNROLL (p, P) rest = fma(set1(code >> p & 1 ? -1.0f : 1.0f), scale[p], rest);
            const V distance = mul(rest, rest), gain = add(best, negate(distance));
            best = replace(gain, best, distance);
            UNROLL (p, P) signs[p] = replace(gain, signs[p], set1(code >> p & 1 ? 1.0f : -1.0f));
        }
    }

    struct Sums {
        V dots[P], norms[P][P];
    };
    Sums sums() const {
        Sums s;
        for (int p = 0; p < P; ++p) {
            s.dots[p] = get(c.dots + p * c.n + at);
            for (int r = 0; r < P; ++r) s.norms[p][r] = get(c.norms + (p * P + r) * c.n + at);
        }
        return s;
    }
    void put(const Sums& s) const {
        for (int p = 0; p < P; ++p) {
            put(c.dots + p * c.n + at, s.dots[p]);
            for (int r = 0; r < P; ++r) put(c.norms + (p * P + r) * c.n + at, s.norms[p][r]);
        }
    }

    // Error feedback in the columns of a block.
    void choose() const {
        float signs[P][kMaxBlock * kLanes];
        Sums s = sums();
        V acc[P][kStrip];
        for (int64_t strip = 0; strip < c.columns; strip += kStrip) {
            for (int p = 0; p < P; ++p) {
                for (int i = 0; i < kStrip; ++i) acc[p][i] = get(cell(c.product, strip + i, p));
                accumulate(acc[p], c.matrix + strip, c.columns, signs[p], strip);
            }
            for (int i = 0; i < kStrip; ++i) {
                const int64_t j = strip + i;
                const float* factor = c.matrix + j * c.columns + strip;
                const V wanted = target(j), pivot = set1(c.pivots[j]);
                V rest = wanted, chosen[P], q[P];
                UNROLL (p, P) rest = fma(negate(scale[p]), acc[p][i], rest);
                UNROLL (p, P) chosen[p] = set1(-1.0f);
                nearest(rest, set1(3.4e38f), chosen);
                for (int p = 0; p < P; ++p) {
                    q[p] = add(acc[p][i], chosen[p]);
                    store(signs[p] + j * kLanes, chosen[p]);
                    put(cell(c.sign, j, p), chosen[p]);
                    for (int later = i + 1; later < kStrip; ++later)
                        acc[p][later] = fma(set1(factor[later]), chosen[p], acc[p][later]);
                }
                for (int p = 0; p < P; ++p) {
                    const V weighted = mul(pivot, q[p]);
                    s.dots[p] = fma(weighted, wanted, s.dots[p]);
                    for (int r = 0; r < P; ++r) s.norms[p][r] = fma(weighted, q[r], s.norms[p][r]);
                }
            }
        }
        put(s);
    }

    // Coordinate descent in a strip of columns from `first` on; `strip` [columns][kStrip] is that of H, `flips` are
    // those of the planes.
    void descend(int64_t first, const float* strip, Flips* flips) const {
        V acc[P][kStrip];
        for (int p = 0; p < P; ++p) {
            for (int i = 0; i < kStrip; ++i) acc[p][i] = get(cell(c.product, first + i, p));
            receive(acc[p], strip, first, flips[p]);
        }
        Sums s = sums();
        for (int i = 0; i < kStrip; ++i) {
            const int64_t j = first + i;
            const float* local = strip + j * kStrip;
            const V dot = target(j), diagonal = set1(local[i]);
            V gradient = negate(dot), value = zero(), from[P], signs[P], change[P];
            UNROLL (p, P) {
                gradient = fma(scale[p], acc[p][i], gradient);
                signs[p] = from[p] = get(cell(c.sign, j, p));
                value = fma(scale[p], from[p], value);
            }
            const V step = div(gradient, diagonal);
            nearest(add(value, negate(step)), mul(step, step), signs);
            uint32_t any = 0;
            UNROLL (p, P) {
                change[p] = add(signs[p], negate(from[p]));
                put(cell(c.change, j, p), change[p]);
                any |= nonzero_lanes(change[p]);
            }
            if (!any) continue;
            for (int p = 0; p < P; ++p) {
                put(cell(c.sign, j, p), signs[p]);
                s.dots[p] = fma(change[p], dot, s.dots[p]);
                for (int r = 0; r < P; ++r) {
                    const V both = fma(change[p], fma(diagonal, change[r], acc[r][i]), mul(change[r], acc[p][i]));
                    s.norms[p][r] = add(s.norms[p][r], both);
                }
            }
            for (int p = 0; p < P; ++p) {
                if (!push_flips(flips[p], j, change[p])) continue;
                UNROLL (other, kStrip) acc[p][other] = fma(set1(local[other]), change[p], acc[p][other]);
            }
        }
        put(s);
        for (int p = 0; p < P; ++p) {
            for (int i = 0; i < kStrip; ++i) put(cell(c.product, first + i, p), acc[p][i]);
        }
    }
};

template <int P>
static void run_levels(const SignStep& c, const SignScratch& scratch, Team& team) {
    if (!c.change) {
        for (Units unit(scratch.shares, Split(c.tiles(kLanes), team), team); unit.next();) {
            LevelTile<P>(c, unit.item()).choose();
        }
        return;
    }
    const Split split(c.tiles(kLanes), team);
    const int64_t begin = split.begin(team.id), end = split.begin(team.id + 1);
    float* const strip = scratch.strips + team.id * c.columns * kStrip;
    for (int64_t j = 0; j < c.columns; ++j) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const LevelTile<P> levels(c, tile);
            for (int p = 0; p < P; ++p) {
                push_flips(scratch.flips[tile * P + p], j, levels.get(levels.cell(c.change, j, p)));
            }
        }
    }
    for (int64_t first = 0; first < c.columns; first += kStrip) {
        copy_strip(c, first, strip);
        for (int64_t tile = begin; tile < end; ++tile) {
            LevelTile<P>(c, tile).descend(first, strip, scratch.flips + tile * P);
        }
    }
}

// The work of one thread of the team in a step of the sign search.
static void run_signs(const SignStep& c, const SignScratch& scratch, Team& team) {
    switch (c.planes) {
        case 2: return run_levels<2>(c, scratch, team);
        case 3: return run_levels<3>(c, scratch, team);
        case 4: return run_levels<4>(c, scratch, team);
    }
    if (c.change) {
        sweep_signs(c, scratch, team);
    } else {
        choose_signs(c, scratch, team);
    }
}
