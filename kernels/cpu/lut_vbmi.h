// Table lookup with AVX-512 VBMI and VNNI: vpermb looks up 64 bytes in four 16-entry tables at once.
//
// A table of a group of 4 columns has, for each of the 16 patterns of their sign bits, sum(bit ? q : 0) - sum
// of the negative q: an unsigned byte, at most 4 * 31 = 124 for 6-bit codes, so two lookups add up in a byte
// and vpdpbusd sums the four bytes of a row. With S the total over all groups, sum(sign * q) = 2 S - sum|q|:
// for q >= 0 an entry counts q where the bit is set, for q < 0 it counts |q| where it is not.
//
// That low-bit products can be looked up by byte shuffles is T-MAC's idea (arXiv 2407.00088).

struct alignas(64) TablePatterns {
    uint8_t index[4][64];
    constexpr TablePatterns() : index() {
        for (int b = 0; b < 4; ++b) {
            for (int i = 0; i < 64; ++i) {
                const int column = i / 16 * 4 + b;  // the 32 positive parts lie before the 32 negative ones
                index[b][i] = uint8_t((i >> b & 1) ? column : 32 + column);
            }
        }
    }
};

// Builds the tables of q[0 .. 32 steps): step c at tables + c * stride. Returns sum|q|.
static int32_t build_tables(const int8_t* q, int64_t steps, uint8_t* tables, int64_t stride) {
    static constexpr TablePatterns patterns;
    __m512i low[4], high[4];
    UNROLL (b, 4) {
        low[b] = _mm512_load_si512(patterns.index[b]);
        high[b] = _mm512_add_epi8(low[b], _mm512_set1_epi8(16));
    }
    __m512i total = _mm512_setzero_si512();
    const __m256i none = _mm256_setzero_si256();
    for (int64_t c = 0; c < steps; ++c) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + c * kColumns));
        const __m256i positive = _mm256_max_epi8(codes, none);
        const __m256i negative = _mm256_max_epi8(_mm256_sub_epi8(none, codes), none);
        const __m512i parts = _mm512_inserti64x4(_mm512_castsi256_si512(positive), negative, 1);
        total = _mm512_add_epi64(total, _mm512_sad_epu8(parts, _mm512_setzero_si512()));
        __m512i a = _mm512_permutexvar_epi8(low[0], parts), b = _mm512_permutexvar_epi8(high[0], parts);
        UNROLL (i, 3) {
            a = _mm512_add_epi8(a, _mm512_permutexvar_epi8(low[i + 1], parts));
            b = _mm512_add_epi8(b, _mm512_permutexvar_epi8(high[i + 1], parts));
        }
        _mm512_storeu_si512(tables + c * stride, a);
        _mm512_storeu_si512(tables + c * stride + 64, b);
    }
    return int32_t(_mm512_reduce_add_epi64(total));
}

// sums[s][t][row] = total of the table entries of T digits of codes, whose tables lie side by side, and the 64
// rows of each of S panels. A thread that reads the weights from memory walks S panels at once (the S
// sequential streams keep more of the memory busy than one) and asks for the lines `ahead` bytes further on.
template <int T, int S>
static NOINLINE void accumulate(const uint8_t* const* panels, const uint8_t* tables, int64_t steps,
                                int64_t ahead, int32_t* sums) {
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    const __m512i group =
        _mm512_set1_epi32(0x30201000);  // byte i of a row uses table i: bits 4 and 5 of the index
    const uint8_t* signs[S];
    __m512i total[S][T][4];
    UNROLL (s, S) {
        signs[s] = panels[s];
        UNROLL (t, T)
            UNROLL (r, 4) total[s][t][r] = _mm512_setzero_si512();
    }
    for (int64_t c = 0; c < steps; ++c) {
        __m512i low[T], high[T];  // tables of the two nibbles of a byte
        UNROLL (t, T) {
            low[t] = _mm512_loadu_si512(tables + t * kTableBytes);
            high[t] = _mm512_loadu_si512(tables + t * kTableBytes + 64);
        }
        UNROLL (r, 4)
            UNROLL (s, S) {
                prefetch_far(signs[s] + ahead + 64 * r);
                const __m512i bits = _mm512_loadu_si512(signs[s] + 64 * r);
                const __m512i shifted = _mm512_srli_epi16(bits, 4);
                const __m512i a =
                    _mm512_ternarylogic_epi32(bits, nibble, group, 0xEA);  // (bits & nibble) | group
                const __m512i b = _mm512_ternarylogic_epi32(shifted, nibble, group, 0xEA);
                UNROLL (t, T) {
                    const __m512i pair = _mm512_add_epi8(_mm512_permutexvar_epi8(a, low[t]),
                                                         _mm512_permutexvar_epi8(b, high[t]));
                    total[s][t][r] = _mm512_dpbusd_epi32(total[s][t][r], pair, ones);
                }
            }
        UNROLL (s, S) signs[s] += kStepBytes;
        tables += T * kTableBytes;
    }
    UNROLL (s, S)
        UNROLL (t, T)
            UNROLL (r, 4) {
                _mm512_storeu_si512(sums + (s * T + t) * kRows + 16 * r, total[s][t][r]);
            }
}
