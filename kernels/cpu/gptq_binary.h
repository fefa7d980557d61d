// One-bit GPTQ: error feedback chooses the signs column by column, then coordinate descent flips single
// signs.
//
// Each lane of a vector is one row of the weight, so rows decide their signs independently. A tile of kLanes
// rows walks through the columns in strips of kLanes columns. A strip first receives the updates of all
// earlier decisions, which is a matrix product with kLanes accumulators in registers, and then decides its
// columns one after the other. The part of H (or of the factor) that a strip needs is copied once and serves
// all candidates of a unit. In coordinate descent only columns in which some row of the tile flipped its sign
// take part in the product.

constexpr int kStrip = kLanes;

// acc[i] += sum_j b[j * stride + i] * x_j for the vectors x_j at x.
static inline void accumulate(V (&acc)[kStrip], const float* b, int64_t stride, const float* x,
                              int64_t count) {
    V sum[kStrip];
    UNROLL (i, kStrip) sum[i] = acc[i];
    for (int64_t j = 0; j < count; ++j, b += stride, x += kLanes) {
        const V value = load(x);
        UNROLL (i, kStrip) sum[i] = fma(set1(b[i]), value, sum[i]);
    }
    UNROLL (i, kStrip) acc[i] = sum[i];
}

// The same over the rows of b that `columns` names.
static inline void accumulate_some(V (&acc)[kStrip], const float* b, int64_t stride, const int32_t* columns,
                                   const float* x, int64_t count) {
    V sum[kStrip];
    UNROLL (i, kStrip) sum[i] = acc[i];
    for (int64_t j = 0; j < count; ++j, x += kLanes) {
        const V value = load(x);
        const float* row = b + columns[j] * stride;
        UNROLL (i, kStrip) sum[i] = fma(set1(row[i]), value, sum[i]);
    }
    UNROLL (i, kStrip) acc[i] = sum[i];
}

// Figures of each row of a candidate: scale a, w H s, s H s, and the error (w - a s) H (w - a s), at first
// less w H w.
enum RowFigure { kScale, kDots, kNorms, kError };

struct GptqUnit {
    const GptqCall& c;
    GptqScratch s;
    int64_t tiles, matrix;  // elements of a candidate's matrix

    GptqUnit(const GptqCall& call, const GptqScratch& scratch, int64_t count)
        : c(call), s(scratch), tiles(count), matrix(call.k * kLanes) {}

    int64_t candidates() const { return tiles * c.scale_count; }
    float* row(int64_t candidate, RowFigure name) const {
        return s.rows + (candidate * kRowFigures + name) * kLanes;
    }
    // Where column j of a candidate is in `matrices`, and that of its tile.
    float* of_candidate(float* matrices, int64_t candidate, int64_t j) const {
        return matrices + candidate * matrix + j * kLanes;
    }
    float* of_tile(float* matrices, int64_t candidate, int64_t j) const {
        return of_candidate(matrices, candidate / c.scale_count, j);
    }

    // Transpose the rows from `first` on; rows beyond the weight are zero.
    void read(int64_t first) const {
        for (int64_t tile = 0; tile < tiles; ++tile, first += kLanes) {
            const int64_t rows = c.n - first < kLanes ? c.n - first : kLanes;
            float *w = of_candidate(s.weight, tile, 0), *wh = of_candidate(s.weight_hessian, tile, 0);
            if (rows < kLanes) {
                std::memset(w, 0, std::size_t(matrix) * sizeof(float));
                std::memset(wh, 0, std::size_t(matrix) * sizeof(float));
            }
            for (int64_t r = 0; r < rows; ++r) {
                const float *from = c.weight + (first + r) * c.k,
                            *from_hessian = c.weight_hessian + (first + r) * c.k;
                for (int64_t j = 0; j < c.k; ++j)
                    w[j * kLanes + r] = from[j], wh[j * kLanes + r] = from_hessian[j];
            }
            float mean[kLanes];
            for (int64_t r = 0; r < kLanes; ++r) mean[r] = r < rows ? c.mean[first + r] : 1.0f;
            for (int64_t i = 0; i < c.scale_count; ++i) {
                store(row(tile * c.scale_count + i, kScale), mul(set1(c.scale_factors[i]), load(mean)));
            }
        }
    }

    void write(int64_t first) const {
        for (int64_t tile = 0; tile < tiles; ++tile, first += kLanes) {
            const int64_t rows = c.n - first < kLanes ? c.n - first : kLanes,
                          candidate = tile * c.scale_count;
            const float* sign = of_candidate(s.sign, candidate, 0);
            for (int64_t r = 0; r < rows; ++r) {
                float* to = c.sign + (first + r) * c.k;
                for (int64_t j = 0; j < c.k; ++j) to[j] = sign[j * kLanes + r];
                c.scale[first + r] = row(candidate, kScale)[r];
                c.error[first + r] = row(candidate, kError)[r];
            }
        }
    }

    // Copy rows [0, end) of columns [at, at + kStrip) of a matrix [k, k].
    void copy_strip(const float* from, int64_t at, int64_t end) const {
        for (int64_t j = 0; j < end; ++j) {
            prefetch_far(from + (j + 16) * c.k + at);
            store(s.strip + j * kStrip, load(from + j * c.k + at));
        }
    }

    // Choose signs by error feedback at the initial scales.
    void gptq_signs() const {
        for (int64_t at = 0; at < c.k; at += kStrip) {
            copy_strip(c.factor, at, at + kStrip);
            for (int64_t candidate = 0; candidate < candidates(); ++candidate) gptq_strip(candidate, at);
        }
    }

    void gptq_strip(int64_t candidate, int64_t at) const {
        const float* w = of_tile(s.weight, candidate, at);
        float *errors = of_candidate(s.errors, candidate, 0), *sign = of_candidate(s.sign, candidate, at);
        const V scale = load(row(candidate, kScale));
        V acc[kStrip];
        UNROLL (i, kStrip) acc[i] = load(w + i * kLanes);
        accumulate(acc, s.strip, kStrip, errors, at);
        for (int i = 0; i < kStrip; ++i) {
            const float* factor = s.strip + (at + i) * kStrip;
            const V chosen = sign_of(acc[i]);
            // The negative error, so that it is added.
            const V error = div(fma(scale, chosen, negate(acc[i])), set1(factor[i]));
            store(sign + i * kLanes, chosen);
            store(errors + (at + i) * kLanes, error);
            for (int later = i + 1; later < kStrip; ++later)
                acc[later] = fma(set1(factor[later]), error, acc[later]);
        }
    }

    void weight_signs() const {
        for (int64_t candidate = 0; candidate < candidates(); ++candidate) {
            const float* w = of_tile(s.weight, candidate, 0);
            float* sign = of_candidate(s.sign, candidate, 0);
            for (int64_t i = 0; i < matrix; i += kLanes) store(sign + i, sign_of(load(w + i)));
        }
    }

    // Fit the scale of each row by least squares from its dots and norms.
    void fit_row_scale(int64_t candidate) const {
        const V dots = load(row(candidate, kDots)), norms = load(row(candidate, kNorms));
        const V scale = max(div(dots, norms), set1(1.17549435e-38f));
        store(row(candidate, kScale), scale);
        store(row(candidate, kError), fma(scale, mul(scale, norms), mul(set1(-2.0f), mul(scale, dots))));
    }

    // Compute signs times H for every `stride`-th candidate, and fit the scales.
    void fit_row_scales(int64_t stride) const {
        for (int64_t candidate = 0; candidate < candidates(); candidate += stride) {
            store(row(candidate, kDots), zero());
            store(row(candidate, kNorms), zero());
        }
        for (int64_t at = 0; at < c.k; at += kStrip) {
            copy_strip(c.hessian, at, c.k);
            for (int64_t candidate = 0; candidate < candidates(); candidate += stride) {
                const float *sign = of_candidate(s.sign, candidate, 0),
                            *wh = of_tile(s.weight_hessian, candidate, at);
                float* sign_hessian = of_candidate(s.sign_hessian, candidate, at);
                V acc[kStrip], dots = load(row(candidate, kDots)), norms = load(row(candidate, kNorms));
                UNROLL (i, kStrip) acc[i] = zero();
                accumulate(acc, s.strip, kStrip, sign, c.k);
                for (int i = 0; i < kStrip; ++i) {
                    const V chosen = load(sign + (at + i) * kLanes);
                    store(sign_hessian + i * kLanes, acc[i]);
                    dots = fma(chosen, load(wh + i * kLanes), dots);
                    norms = fma(chosen, acc[i], norms);
                }
                store(row(candidate, kDots), dots);
                store(row(candidate, kNorms), norms);
            }
        }
        for (int64_t candidate = 0; candidate < candidates(); candidate += stride) fit_row_scale(candidate);
    }

    // Sweep one strip of one candidate: bring its signs times H up to date, then flip each sign that lowers
    // the error.
    void sweep_strip(int64_t candidate, int64_t at, const float* b, int64_t stride, int64_t old_first) const {
        float *sign_hessian = of_candidate(s.sign_hessian, candidate, at),
              *sign = of_candidate(s.sign, candidate, at), *changes = of_candidate(s.changes, candidate, 0);
        const float* wh = of_tile(s.weight_hessian, candidate, at);
        const int32_t* old_columns = s.old_columns + candidate * c.k;
        int32_t *columns = s.columns + candidate * c.k, count = s.counts[candidate];
        const V scale = load(row(candidate, kScale));
        V acc[kStrip], dots = load(row(candidate, kDots)), norms = load(row(candidate, kNorms));
        UNROLL (i, kStrip) acc[i] = load(sign_hessian + i * kLanes);
        accumulate_some(acc, b, stride, old_columns + old_first,
                        of_candidate(s.old_changes, candidate, old_first),
                        s.old_counts[candidate] - old_first);
        accumulate_some(acc, b, stride, columns, changes, count);
        for (int i = 0; i < kStrip; ++i) {
            const float* local = c.hessian + (at + i) * c.k + at;
            const V from = load(sign + i * kLanes), dot = load(wh + i * kLanes), diagonal = set1(local[i]);
            const V gradient = fma(scale, acc[i], negate(dot));
            const V change =
                where_positive(fma(from, gradient, negate(mul(scale, diagonal))), mul(set1(-2.0f), from));
            if (!any(change)) continue;
            store(sign + i * kLanes, add(from, change));
            dots = fma(change, dot, dots);
            norms = fma(change, fma(change, diagonal, mul(set1(2.0f), acc[i])), norms);
            UNROLL (other, kStrip) acc[other] = fma(set1(local[other]), change, acc[other]);
            columns[count] = int32_t(at + i);
            store(changes + count++ * kLanes, change);
        }
        UNROLL (i, kStrip) store(sign_hessian + i * kLanes, acc[i]);
        store(row(candidate, kDots), dots);
        store(row(candidate, kNorms), norms);
        s.counts[candidate] = count;
    }

    // Sweep every `stride`-th candidate and fit its scales after each sweep. Signs times H of a strip before
    // a flip are updated only when the next sweep reaches that strip. A candidate is done after a sweep
    // without flips.
    void coordinate_descent(int64_t stride) {
        std::memset(s.counts, 0, std::size_t(candidates()) * sizeof(int32_t));
        for (int32_t sweep = 0; sweep < c.sweeps; ++sweep) {
            std::swap(s.columns, s.old_columns);
            std::swap(s.changes, s.old_changes);
            std::swap(s.counts, s.old_counts);
            std::memset(s.counts, 0, std::size_t(candidates()) * sizeof(int32_t));
            int64_t old_first[kMaxTiles * kMaxScales] = {}, flips = 0;
            for (int64_t at = 0; at < c.k; at += kStrip) {
                int64_t listed = 0;
                for (int64_t candidate = 0; candidate < candidates(); candidate += stride) {
                    const int32_t *old = s.old_columns + candidate * c.k, count = s.old_counts[candidate];
                    while (old_first[candidate] < count && old[old_first[candidate]] < at + kStrip)
                        ++old_first[candidate];
                    listed += count - old_first[candidate] + s.counts[candidate];
                }
                const bool copied = listed > c.k;
                if (copied) copy_strip(c.hessian, at, c.k);
                const float* b = copied ? s.strip : c.hessian + at;
                for (int64_t candidate = 0; candidate < candidates(); candidate += stride) {
                    if (sweep && !s.old_counts[candidate]) continue;
                    sweep_strip(candidate, at, b, copied ? kStrip : c.k, old_first[candidate]);
                }
            }
            for (int64_t candidate = 0; candidate < candidates(); candidate += stride) {
                if (s.counts[candidate]) fit_row_scale(candidate);
                flips += s.counts[candidate];
            }
            if (!flips) return;
        }
    }

    // Move, row by row, the candidate with the smallest error to the tile's first one.
    void keep_best() const {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * c.scale_count;
            for (int64_t candidate = first + 1; candidate < first + c.scale_count; ++candidate) {
                const V gain = add(load(row(first, kError)), negate(load(row(candidate, kError))));
                for (float* matrices : {s.sign, s.sign_hessian}) {
                    float *to = of_candidate(matrices, first, 0),
                          *from = of_candidate(matrices, candidate, 0);
                    for (int64_t i = 0; i < matrix; i += kLanes) {
                        store(to + i, blend_positive(gain, load(from + i), load(to + i)));
                    }
                }
                for (const RowFigure name : {kScale, kDots, kNorms, kError}) {
                    store(row(first, name),
                          blend_positive(gain, load(row(candidate, name)), load(row(first, name))));
                }
            }
        }
    }

    void search() {
        if (c.factor) {
            gptq_signs();
        } else {
            weight_signs();
        }
        fit_row_scales(1);
        if (c.refine_all) coordinate_descent(1);
        keep_best();
        if (!c.refine_all) coordinate_descent(c.scale_count);
        fit_row_scales(c.scale_count);  // exactly, after so many small changes
        for (int64_t candidate = 0; candidate < candidates(); candidate += c.scale_count) {
            const float *w = of_tile(s.weight, candidate, 0), *wh = of_tile(s.weight_hessian, candidate, 0);
            V power = zero();
            for (int64_t i = 0; i < matrix; i += kLanes) power = fma(load(w + i), load(wh + i), power);
            store(row(candidate, kError), add(load(row(candidate, kError)), power));
        }
    }
};

// The work of one thread of the team in a call.
static void run_gptq(const GptqCall& c, const GptqScratch* scratch, Share* shares, int64_t tiles,
                     Team& team) {
    const int64_t rows = tiles * kLanes;
    for (Units unit(shares, Split(ceil_div(c.n, rows), team), team); unit.next();) {
        const int64_t first = unit.item() * rows, left = ceil_div(c.n - first, kLanes);
        GptqUnit work(c, scratch[team.id], left < tiles ? left : tiles);
        work.read(first);
        work.search();
        work.write(first);
    }
}
