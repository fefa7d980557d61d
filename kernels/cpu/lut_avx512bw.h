// Table lookup with AVX-512BW: vpshufb looks up one byte of each of 64 rows in a single 16-entry table. For
// the arguments see lut_vbmi.h.
template <int T, int S>
static NOINLINE void accumulate(const uint8_t* const* panels, const uint8_t* tables, int64_t steps,
                                int64_t ahead, int32_t* sums) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t done = 0; done < steps; done += kStepsPerFlush) {
        const int64_t end = steps < done + kStepsPerFlush ? steps : done + kStepsPerFlush;
        __m512i all[S][T], odd[S][T];
        UNROLL (s, S)
            UNROLL (t, T) all[s][t] = odd[s][t] = _mm512_setzero_si512();
        for (int64_t c = done; c < end; ++c) {
            UNROLL (i, 4)
                UNROLL (s, S) {
                    const uint8_t* signs = panels[s] + c * kStepBytes + 64 * i;
                    prefetch_far(signs + ahead);
                    const __m512i bits = _mm512_loadu_si512(signs);
                    const __m512i low = _mm512_and_si512(bits, nibble);
                    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bits, 4), nibble);
                    UNROLL (t, T) {
                        const __m128i* table = reinterpret_cast<const __m128i*>(tables + t * kTableBytes) + i;
                        const __m512i a = _mm512_broadcast_i32x4(_mm_loadu_si128(table));
                        const __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128(table + 4));
                        const __m512i pair =
                            _mm512_add_epi8(_mm512_shuffle_epi8(a, low), _mm512_shuffle_epi8(b, high));
                        all[s][t] = _mm512_add_epi16(all[s][t], pair);
                        odd[s][t] = _mm512_add_epi16(odd[s][t], _mm512_srli_epi16(pair, 8));
                    }
                }
            tables += T * kTableBytes;
        }
        UNROLL (s, S)
            UNROLL (t, T) {
                const __m512i even = _mm512_sub_epi16(all[s][t], _mm512_slli_epi16(odd[s][t], 8));
                const __m256i quarter[4] = {_mm512_castsi512_si256(even), _mm512_extracti64x4_epi64(even, 1),
                                            _mm512_castsi512_si256(odd[s][t]),
                                            _mm512_extracti64x4_epi64(odd[s][t], 1)};
                UNROLL (i, 4) {
                    int32_t* at = sums + (s * T + t) * kRows + 16 * i;
                    const __m512i wide = _mm512_cvtepu16_epi32(quarter[i]);
                    _mm512_storeu_si512(at, done ? _mm512_add_epi32(_mm512_loadu_si512(at), wide) : wide);
                }
            }
    }
}
