// The rotation of one block, (L^T X) R: two products of small matrices, in strips of rows held in registers.
// In this order a row of the result needs one row of L^T X only, so threads can share a block by rows without
// waiting for each other.
//
// Every output is one chain of fused multiply-adds in ascending order, whatever the strip, so results do not
// depend on the number of threads or tokens.

// Rows [0, Rows) of C[i, j] = sum_k A[i * a_row + k * a_step] * B[k * b_row + j] for Vectors * kLanes
// columns. B has whole vectors; of C's last one, `tail` lanes are written.
template <int Rows, int Vectors>
static NOINLINE void strip(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                           int64_t depth, float* c, int64_t c_row, int64_t tail) {
    V sum[Rows][Vectors];
    UNROLL (i, Rows)
        UNROLL (j, Vectors) sum[i][j] = zero();
    for (int64_t k = 0; k < depth; ++k) {
        V row[Vectors];
        UNROLL (j, Vectors) row[j] = load(b + j * kLanes);
        UNROLL (i, Rows) {
            const V factor = set1(a[i * a_row]);
            UNROLL (j, Vectors) sum[i][j] = fma(factor, row[j], sum[i][j]);
        }
        a += a_step;
        b += b_row;
    }
    UNROLL (i, Rows) {
        UNROLL (j, Vectors - 1) store(c + i * c_row + j * kLanes, sum[i][j]);
        float* last = c + i * c_row + (Vectors - 1) * kLanes;
        if (tail == kLanes) {
            store(last, sum[i][Vectors - 1]);
        } else {
            store_n(last, sum[i][Vectors - 1], tail);
        }
    }
}

struct Product {
    const float* a;
    int64_t a_row, a_step;
    const float* b;
    int64_t b_row, depth;
    float* c;
    int64_t c_row, columns;
};

template <int Rows>
static void product_rows(const Product& p, int64_t row) {
    const int64_t vectors = ceil_div(p.columns, kLanes), passes = ceil_div(vectors, kStripVectors);
    const float* a = p.a + row * p.a_row;
    float* c = p.c + row * p.c_row;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = pass * vectors / passes, end = (pass + 1) * vectors / passes;
        const int64_t left = p.columns - (end - 1) * kLanes, tail = left < kLanes ? left : kLanes,
                      at = begin * kLanes;
        switch (end - begin) {
#define BWLA_STRIP(count) \
    strip<Rows, count>(a, p.a_row, p.a_step, p.b + at, p.b_row, p.depth, c + at, p.c_row, tail)
            case 1: BWLA_STRIP(1); break;
            case 2: BWLA_STRIP(2); break;
#if BWLA_STRIP_VECTORS > 2
            case 3: BWLA_STRIP(3); break;
            case 4: BWLA_STRIP(4); break;
            case 5: BWLA_STRIP(5); break;
#endif
#undef BWLA_STRIP
        }
    }
}

static void product(const Product& p, int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) product_rows<4>(p, row);
    for (; row + 2 <= end; row += 2) product_rows<2>(p, row);
    for (; row < end; ++row) product_rows<1>(p, row);
}

// Rows [begin, end) of half = L^T X, and of rotated = half R. `x` is [n1, n2] and readable for a vector
// beyond; `half` and `rotated` point to row `begin`.
static void rotate_rows(const Call& c, int64_t g, const float* x, int64_t begin, int64_t end, float* half,
                        float* rotated) {
    const Sizes& z = c.z;
    product({c.left(g) + begin, 1, z.n1, x, z.n2, z.n1, half, z.padded(), z.padded()}, 0, end - begin);
    product({half, z.padded(), 1, c.right(g), z.padded(), z.n2, rotated, z.n2, z.n2}, 0, end - begin);
}
