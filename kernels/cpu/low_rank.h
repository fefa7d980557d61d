// u = x A^T in float32, in the basis of the original x.

// u[t, j] for T tokens and a group of rows of A; each is kLanes running sums over the columns, added up at
// the end.
template <int T>
static NOINLINE void project(const Call& c, const Plan& plan, int64_t token, int64_t group) {
    constexpr int64_t kChunk = 512;
    float x[T][kChunk];
    V sum[T][kGroup];
    UNROLL (t, T)
        UNROLL (j, kGroup) sum[t][j] = zero();
    const int64_t k = c.z.k();
    const uint16_t* a = c.low_rank_a() + group * kGroup * k;
    for (int64_t begin = 0; begin < k; begin += kChunk) {
        const int64_t count = k - begin < kChunk ? k - begin : kChunk;
        for (int t = 0; t < T; ++t) convert(c.x_dtype, c.x, (token + t) * c.x_stride + begin, x[t], count);
        for (int64_t i = 0; i < count; i += kColumns, a += kGroup * kColumns) {
            UNROLL (j, kGroup) prefetch_far(a + j * kColumns + kReadAhead / 4);
            for (int64_t lane = 0; lane < kColumns; lane += kLanes) {
                V factor[kGroup];
                UNROLL (j, kGroup) factor[j] = load_bf16(a + j * kColumns + lane);
                UNROLL (t, T) {
                    const V value = load(x[t] + i + lane);
                    UNROLL (j, kGroup) sum[t][j] = fma(value, factor[j], sum[t][j]);
                }
            }
        }
    }
    for (int64_t j = 0; j < kGroup && group * kGroup + j < c.z.rank; ++j) {
        for (int t = 0; t < T; ++t)
            u_of(c, plan, token + t, group * kGroup + j) = reduce_add(sum[t][j]);
    }
}

constexpr int64_t kProjectTokens = kLanes == 16 ? 4 : 2;  // what the registers hold

static int64_t project_units(const Call& c, int64_t tokens) {
    return ceil_div(tokens, kProjectTokens) * ceil_div(c.z.rank, kGroup);
}

static void project_unit(const Call& c, const Plan& plan, int64_t first, int64_t tokens, int64_t unit) {
    const int64_t groups = ceil_div(c.z.rank, kGroup), token = first + unit / groups * kProjectTokens;
    const int64_t end = first + tokens, group = unit % groups;
    if (token + kProjectTokens <= end) {
        project<kProjectTokens>(c, plan, token, group);
    } else {
        for (int64_t t = token; t < end; ++t) project<1>(c, plan, t, group);
    }
}
