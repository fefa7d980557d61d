// Tables for the byte-shuffle variants (AVX-512BW and AVX2), two groups of 4 columns at a time; see
// lut_vbmi.h for what an entry is.

struct alignas(32) TablePatterns {
    uint8_t index[4][32];
    constexpr TablePatterns() : index() {
        for (int b = 0; b < 4; ++b) {
            for (int i = 0; i < 32; ++i) {
                const int column = i / 16 * 4 + b;  // the 8 positive parts lie before the 8 negative ones
                index[b][i] = uint8_t((i >> b & 1) ? column : 8 + column);
            }
        }
    }
};

static int32_t build_tables(const int8_t* q, int64_t steps, uint8_t* tables, int64_t stride) {
    static constexpr TablePatterns patterns;
    __m256i pattern[4];
    UNROLL (b, 4) {
        pattern[b] = _mm256_load_si256(reinterpret_cast<const __m256i*>(patterns.index[b]));
    }
    __m128i total = _mm_setzero_si128();
    const __m128i none = _mm_setzero_si128();
    for (int64_t c = 0; c < steps; ++c) {
        UNROLL (pair, 4) {
            const __m128i codes =
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + c * kColumns + 8 * pair));
            const __m128i positive = _mm_max_epi8(codes, none);
            const __m128i negative = _mm_max_epi8(_mm_sub_epi8(none, codes), none);
            const __m128i parts = _mm_unpacklo_epi64(positive, negative);
            total = _mm_add_epi64(total, _mm_sad_epu8(parts, none));
            const __m256i both = _mm256_broadcastsi128_si256(parts);
            __m256i entries = _mm256_shuffle_epi8(both, pattern[0]);
            UNROLL (b, 3) {
                entries = _mm256_add_epi8(entries, _mm256_shuffle_epi8(both, pattern[b + 1]));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + c * stride + 32 * pair), entries);
        }
    }
    return _mm_cvtsi128_si32(_mm_add_epi64(total, _mm_unpackhi_epi64(total, total)));
}

// A 16-bit lane gathers the bytes of rows r (even byte) and 32 + r (odd byte): one sum of whole lanes, one of
// the odd bytes alone, and the even ones are the difference. Each pair of lookups adds at most 248, so 64
// steps of 4 fit.
constexpr int64_t kStepsPerFlush = 64;
