// Float vectors of 8 lanes (see vector_avx512.h for what each function promises).
typedef __m256 V;
typedef __m256i VI;
constexpr int kLanes = 8;
constexpr int kStripVectors =
    2;  // 4 rows x 2 vectors: 8 accumulators, 2 operands and a broadcast in 16 registers

static inline VI first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline V zero() { return _mm256_setzero_ps(); }
static inline V set1(float a) { return _mm256_set1_ps(a); }
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline V load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
static inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
static inline void store_n(float* p, V a, int64_t n) { _mm256_maskstore_ps(p, first(n), a); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V clamp(V a, float low, float high) { return _mm256_min_ps(_mm256_max_ps(a, set1(low)), set1(high)); }
static inline V power_of_two(V n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V negate(V a) { return _mm256_xor_ps(a, set1(-0.0f)); }
static inline V sign_of(V a) {
    return _mm256_blendv_ps(set1(-1.0f), set1(1.0f), _mm256_cmp_ps(a, zero(), _CMP_GE_OQ));
}
static inline V where_positive(V a, V b) { return _mm256_and_ps(_mm256_cmp_ps(a, zero(), _CMP_GT_OQ), b); }
static inline uint32_t nonzero_lanes(V a) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_NEQ_UQ))); }
static inline uint32_t positive_lanes(V a) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_GT_OQ))); }
static inline V lanes_of(uint32_t bits) {
    const VI each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), each), each));
}
static inline V signed_lanes(V a, uint32_t some, uint32_t positive) {
    return _mm256_and_ps(lanes_of(some), _mm256_blendv_ps(negate(a), a, lanes_of(positive)));
}
static inline float reduce_add(V a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline VI int_zero() { return _mm256_setzero_si256(); }
static inline VI magnitude(V a, VI high) {
    return _mm256_max_epi32(high, _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF)));
}
static inline int32_t reduce_max(VI a) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
static inline VI load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const VI*>(p)); }
static inline void store_int_n(int32_t* p, VI a, int64_t n) { _mm256_maskstore_epi32(p, first(n), a); }
static inline VI twice_minus(VI a, int32_t b) {
    return _mm256_sub_epi32(_mm256_slli_epi32(a, 1), _mm256_set1_epi32(b));
}
static inline VI times4_plus(VI a, VI b) { return _mm256_add_epi32(_mm256_slli_epi32(a, 2), b); }
static inline V to_float(VI a) { return _mm256_cvtepi32_ps(a); }

static inline void store_codes(int8_t* p, V a, V s, float limit) {
    const V code = _mm256_min_ps(_mm256_max_ps(_mm256_div_ps(a, s), set1(-limit)), set1(limit));
    const VI whole = _mm256_cvtps_epi32(code);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

static inline V load_bf16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline V load_fp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store_bf16(uint16_t* p, V a) {
    const VI bits = _mm256_castps_si256(a);
    const VI odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const VI rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const VI quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const VI nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const VI high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
static inline void store_fp16(uint16_t* p, V a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
static inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
