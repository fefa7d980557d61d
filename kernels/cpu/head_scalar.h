// Dot products of R int8 rows with the 16-bit codes of T tokens: plain C++, any processor.
constexpr bool kHeadPlanes = false;

template <int R, int T>
static void head_dots(const HeadCall& c, const HeadPlan& plan, int64_t row, int64_t token, int64_t* total) {
    for (int r = 0; r < R; ++r) {
        const int8_t* weights = c.weight + (row + r) * c.k;
        for (int t = 0; t < T; ++t) {
            const int16_t* q = plan.whole(token + t);
            int64_t sum = 0;
            for (int64_t i = 0; i < c.k; ++i) sum += int32_t(weights[i]) * q[i];
            total[r * T + t] = sum;
        }
    }
}
