// The 8-bit head: int8 rows times 16-bit dynamic codes, summed exactly. Needs a variant's head_dots.

// One token's row of x as codes and their scale; `values` has room for the row.
static void encode_token(const HeadCall& c, const HeadPlan& plan, float* values, int64_t token) {
    convert(c.x_dtype, c.x, token * c.x_stride, values, c.k);
    for (int64_t i = c.k; i < plan.padded; ++i) values[i] = 0.0f;
    VI high = int_zero();
    for (int64_t i = 0; i < plan.padded; i += kLanes) high = magnitude(load(values + i), high);
    const float scale = plan.scale[token] = block_scale(reduce_max(high), float(1.0 / kHeadCodeMax));
    for (int64_t i = 0; i < plan.padded; ++i) {
        float code = scale == 0.0f ? 0.0f : values[i] / scale;
        code = code > -kHeadCodeMax ? code : -kHeadCodeMax;
        code = code < kHeadCodeMax ? code : kHeadCodeMax;
        const int32_t q = int32_t(__builtin_lrintf(code));
        if (kHeadPlanes) {
            plan.high(token)[i] = uint8_t((q >> 8) + 128);
            plan.low(token)[i] = uint8_t(q & 255);
        } else {
            plan.whole(token)[i] = int16_t(q);
        }
    }
}

// Rows [begin, end) of one unit times T tokens.
template <int T>
static void head_tile(const HeadCall& c, const HeadPlan& plan, int64_t begin, int64_t end, int64_t token) {
    constexpr int kRowsAtOnce = T == 1 ? 4 : T == 4 ? 2 : 1;  // what the registers hold
    float y[T][kHeadRows];
    int64_t total[kRowsAtOnce * T], row = begin;
    const auto finish = [&](int rows) {
        for (int r = 0; r < rows; ++r, ++row) {
            for (int t = 0; t < T; ++t) {
                y[t][row - begin] = float(total[r * T + t]) * (plan.scale[token + t] * c.scale[row]);
            }
        }
    };
    while (row + kRowsAtOnce <= end) {
        head_dots<kRowsAtOnce, T>(c, plan, row, token, total);
        finish(kRowsAtOnce);
    }
    while (row < end) {
        head_dots<1, T>(c, plan, row, token, total);
        finish(1);
    }
    for (int t = 0; t < T; ++t) {
        for (int64_t r = 0; r < end - begin; r += kLanes) {
            const int64_t count = end - begin - r < kLanes ? end - begin - r : kLanes;
            store_output(c.x_dtype, c.out, (token + t) * c.n + begin + r, load(y[t] + r), count);
        }
    }
}

// Everything that one thread of the team does for a call.
static void run_head(const HeadCall& c, const HeadPlan& plan, Team& team) {
    for (Units unit(plan.shares, Split(c.m, team), team); unit.next();) {
        encode_token(c, plan, plan.floats + team.id * plan.padded, unit.item());
    }
    team.barrier();
    for (Units unit(plan.shares, Split(ceil_div(c.n, kHeadRows), team), team); unit.next();) {
        const int64_t begin = unit.item() * kHeadRows, end = begin + kHeadRows < c.n ? begin + kHeadRows : c.n;
        int64_t token = 0;
        for (; token + 8 <= c.m; token += 8) head_tile<8>(c, plan, begin, end, token);
        for (; token + 4 <= c.m; token += 4) head_tile<4>(c, plan, begin, end, token);
        for (; token < c.m; ++token) head_tile<1>(c, plan, begin, end, token);
    }
}
