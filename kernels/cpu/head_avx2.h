// Dot products of R int8 rows with the 16-bit codes of T tokens: sign-extend, multiply pairs into 32 bits.
constexpr bool kHeadPlanes = false;
constexpr int64_t kExactColumns = 4096;  // 512 products of at most 32,639 * 127 in each of 8 lanes: below 2^31

static inline int64_t add_lanes(__m256i a) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a);
    int64_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    return sum;
}

template <int R, int T>
static NOINLINE void head_dots(const HeadCall& c, const HeadPlan& plan, int64_t row, int64_t token,
                               int64_t* total) {
    const int8_t* weights = c.weight + row * c.k;
    const int64_t whole = c.k / 16 * 16;
    UNROLL (i, R * T) total[i] = 0;
    for (int64_t begin = 0; begin < whole; begin += kExactColumns) {
        const int64_t end = begin + kExactColumns < whole ? begin + kExactColumns : whole;
        __m256i sums[R * T];
        UNROLL (i, R * T) sums[i] = _mm256_setzero_si256();
        for (int64_t k = begin; k < end; k += 16) {
            UNROLL (r, R) {
                prefetch_far(weights + (R + r) * c.k + k);
                const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + r * c.k + k));
                const __m256i w = _mm256_cvtepi8_epi16(bytes);
                UNROLL (t, T) {
                    const int16_t* q = plan.whole(token + t) + k;
                    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
                    sums[r * T + t] = _mm256_add_epi32(sums[r * T + t], _mm256_madd_epi16(w, code));
                }
            }
        }
        UNROLL (i, R * T) total[i] += add_lanes(sums[i]);
    }
    for (int64_t k = whole; k < c.k; ++k) {
        for (int i = 0; i < R * T; ++i) {
            total[i] += int32_t(weights[i / T * c.k + k]) * plan.whole(token + i % T)[k];
        }
    }
}
