// Table lookup with AVX2: vpshufb looks up one byte of each of 32 rows in a single 16-entry table. For the
// arguments see lut_vbmi.h.

// Half of the rows (those whose bytes lie at `half` of each 64) for steps [done, end), which fit the 16-bit
// sums.
template <int T, int S>
static void accumulate_half(const uint8_t* const* panels, const uint8_t* tables, int64_t done, int64_t end,
                            int64_t ahead, int64_t half, int32_t* sums) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i all[S][T], odd[S][T];
    UNROLL (s, S)
        UNROLL (t, T) all[s][t] = odd[s][t] = _mm256_setzero_si256();
    for (int64_t c = done; c < end; ++c) {
        UNROLL (i, 4)
            UNROLL (s, S) {
                const uint8_t* signs = panels[s] + c * kStepBytes + 64 * i + 32 * half;
                if (half == 0) prefetch_far(signs + ahead);
                const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(signs));
                const __m256i low = _mm256_and_si256(bits, nibble);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble);
                UNROLL (t, T) {
                    const __m128i* table =
                        reinterpret_cast<const __m128i*>(tables + (c * T + t) * kTableBytes) + i;
                    const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
                    const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128(table + 4));
                    const __m256i pair =
                        _mm256_add_epi8(_mm256_shuffle_epi8(a, low), _mm256_shuffle_epi8(b, high));
                    all[s][t] = _mm256_add_epi16(all[s][t], pair);
                    odd[s][t] = _mm256_add_epi16(odd[s][t], _mm256_srli_epi16(pair, 8));
                }
            }
    }
    UNROLL (s, S)
        UNROLL (t, T) {
            const __m256i even = _mm256_sub_epi16(all[s][t], _mm256_slli_epi16(odd[s][t], 8));
            const __m128i quarter[4] = {_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1),
                                        _mm256_castsi256_si128(odd[s][t]),
                                        _mm256_extracti128_si256(odd[s][t], 1)};
            UNROLL (i, 4) {
                int32_t* row = sums + (s * T + t) * kRows + 16 * half + 32 * (i / 2) + 8 * (i % 2);
                __m256i* at = reinterpret_cast<__m256i*>(row);
                const __m256i wide = _mm256_cvtepu16_epi32(quarter[i]);
                _mm256_storeu_si256(at, done ? _mm256_add_epi32(_mm256_loadu_si256(at), wide) : wide);
            }
        }
}

template <int T, int S>
static NOINLINE void accumulate(const uint8_t* const* panels, const uint8_t* tables, int64_t steps,
                                int64_t ahead, int32_t* sums) {
    for (int64_t done = 0; done < steps; done += kStepsPerFlush) {
        const int64_t end = steps < done + kStepsPerFlush ? steps : done + kStepsPerFlush;
        accumulate_half<T, S>(panels, tables, done, end, ahead, 0, sums);  // rows 0..15 and 32..47
        accumulate_half<T, S>(panels, tables, done, end, ahead, 1, sums);
    }
}
