// Dot products of R int8 rows with the 16-bit codes of T tokens: two 8-bit dot products, 64 columns a step.
//
// A code is 256 high + low, low in [0, 255] and high in [-128, 127]. VNNI multiplies unsigned by signed bytes,
// so high + 128 is stored, and 128 times the row's sum is taken off at the end. 32 bits hold each plane's sum
// up to 65,536 columns: 255 * 127 * 65,536 < 2^31.
constexpr bool kHeadPlanes = true;

template <int R, int T>
static NOINLINE void head_dots(const HeadCall& c, const HeadPlan& plan, int64_t row, int64_t token,
                               int64_t* total) {
    const int8_t* weights = c.weight + row * c.k;
    __m512i high[R * T], low[R * T];
    UNROLL (i, R * T) high[i] = low[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < c.k; k += 64) {
        const __mmask64 inside = c.k - k >= 64 ? ~__mmask64(0) : (__mmask64(1) << (c.k - k)) - 1;
        UNROLL (r, R) {
            prefetch_far(weights + (R + r) * c.k + k);
            const __m512i w = _mm512_maskz_loadu_epi8(inside, weights + r * c.k + k);
            UNROLL (t, T) {
                const __m512i upper = _mm512_loadu_si512(plan.high(token + t) + k);
                const __m512i lower = _mm512_loadu_si512(plan.low(token + t) + k);
                high[r * T + t] = _mm512_dpbusd_epi32(high[r * T + t], upper, w);
                low[r * T + t] = _mm512_dpbusd_epi32(low[r * T + t], lower, w);
            }
        }
    }
    UNROLL (i, R * T) {
        const int64_t upper = int64_t(_mm512_reduce_add_epi32(high[i])) - 128 * int64_t(c.row_sum[row + i / T]);
        total[i] = 256 * upper + _mm512_reduce_add_epi32(low[i]);
    }
}
