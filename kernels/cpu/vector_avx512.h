// Float vectors of 16 lanes. Loads and stores need no alignment; `_n` variants touch only the first n lanes.
typedef __m512 V;
constexpr int kLanes = 16;
constexpr int kStripVectors = 5;  // accumulators of a rotation strip: 4 rows x 5 vectors

static inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1u); }
static inline V zero() { return _mm512_setzero_ps(); }
static inline V set1(float a) { return _mm512_set1_ps(a); }
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
static inline void store_n(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// Adds the upper half of the lanes to the lower half until one is left. Written out because amx_prepare.h depends on
// the order.
static inline float reduce_add(V a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
// NaN becomes `low`.
static inline V clamp(V a, float low, float high) { return _mm512_min_ps(_mm512_max_ps(a, set1(low)), set1(high)); }
// 2^n of whole numbers n from -126 to 127.
static inline V power_of_two(V n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
static inline V negate(V a) { return _mm512_xor_ps(a, set1(-0.0f)); }
// -1 where a < 0, else 1.
static inline V sign_of(V a) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_GE_OQ), set1(-1.0f), set1(1.0f));
}
// b where a > 0, else 0.
static inline V where_positive(V a, V b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_GT_OQ), b); }
// A bit for each lane: those that are not 0, those above 0.
static inline uint32_t nonzero_lanes(V a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_NEQ_UQ); }
static inline uint32_t positive_lanes(V a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_GT_OQ); }
// In the lanes of `some` a where `positive`, else -a; 0 in the others.
static inline V signed_lanes(V a, uint32_t some, uint32_t positive) {
    return _mm512_maskz_mov_ps(__mmask16(some), _mm512_mask_blend_ps(__mmask16(positive), negate(a), a));
}

// Bits of |a|: as integers they order like the floats, and NaN is above everything, so a maximum keeps it.
static inline __m512i magnitude(V a, __m512i high) {
    return _mm512_max_epi32(high, _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF)));
}
typedef __m512i VI;
static inline VI int_zero() { return _mm512_setzero_si512(); }
static inline int32_t reduce_max(VI a) { return _mm512_reduce_max_epi32(a); }
static inline VI load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline void store_int_n(int32_t* p, VI a, int64_t n) { _mm512_mask_storeu_epi32(p, first(n), a); }
static inline VI twice_minus(VI a, int32_t b) {
    return _mm512_sub_epi32(_mm512_slli_epi32(a, 1), _mm512_set1_epi32(b));
}
static inline VI times4_plus(VI a, VI b) { return _mm512_add_epi32(_mm512_slli_epi32(a, 2), b); }
static inline V to_float(VI a) { return _mm512_cvtepi32_ps(a); }

// round_half_even(a / s) limited to +-limit; NaN becomes -limit.
static inline void store_codes(int8_t* p, V a, V s, float limit) {
    V code = _mm512_min_ps(_mm512_max_ps(_mm512_div_ps(a, s), set1(-limit)), set1(limit));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)));
}

static inline V load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline V load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_bf16(uint16_t* p, V a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
static inline void store_fp16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
static inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
