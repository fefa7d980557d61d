// Float vectors of 4 lanes in the compiler's portable vector extension: any processor (see vector_avx512.h
// for what each function promises).
typedef float V __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kStripVectors = 2;

static inline V zero() { return V{0, 0, 0, 0}; }
static inline V set1(float a) { return V{a, a, a, a}; }
static inline V load_n(const float* p, int64_t n) {
    V a = zero();
    std::memcpy(&a, p, std::size_t(n) * sizeof(float));
    return a;
}
static inline V load(const float* p) { return load_n(p, kLanes); }
static inline void store_n(float* p, V a, int64_t n) { std::memcpy(p, &a, std::size_t(n) * sizeof(float)); }
static inline void store(float* p, V a) { store_n(p, a, kLanes); }
static inline V mul(V a, V b) { return a * b; }
static inline V add(V a, V b) { return a + b; }
static inline V fma(V a, V b, V c) { return a * b + c; }
static inline V div(V a, V b) { return a / b; }
static inline V clamp(V a, float low, float high) {
    a = a > set1(low) ? a : set1(low);
    return a < set1(high) ? a : set1(high);
}
static inline V power_of_two(V n) {
    const VI whole = VI{int32_t(n[0]), int32_t(n[1]), int32_t(n[2]), int32_t(n[3])};
    const VI exponent = (whole + 127) << 23;
    V a;
    std::memcpy(&a, &exponent, sizeof(a));
    return a;
}
static inline V negate(V a) { return -a; }
static inline V sign_of(V a) { return a >= zero() ? set1(1.0f) : set1(-1.0f); }
static inline V where_positive(V a, V b) { return a > zero() ? b : zero(); }
static inline uint32_t nonzero_lanes(V a) {
    return uint32_t((a[0] != 0) | (a[1] != 0) << 1 | (a[2] != 0) << 2 | (a[3] != 0) << 3);
}
static inline uint32_t positive_lanes(V a) {
    return uint32_t((a[0] > 0) | (a[1] > 0) << 1 | (a[2] > 0) << 2 | (a[3] > 0) << 3);
}
static inline V signed_lanes(V a, uint32_t some, uint32_t positive) {
    V result;
    for (int i = 0; i < kLanes; ++i) result[i] = (some >> i & 1) ? ((positive >> i & 1) ? a[i] : -a[i]) : 0.0f;
    return result;
}
static inline float reduce_add(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }

static inline VI int_zero() { return VI{0, 0, 0, 0}; }
static inline VI magnitude(V a, VI high) {
    VI bits;
    std::memcpy(&bits, &a, sizeof(bits));
    bits &= 0x7FFFFFFF;
    return bits > high ? bits : high;
}
static inline int32_t reduce_max(VI a) {
    int32_t high = a[0];
    for (int i = 1; i < kLanes; ++i) high = a[i] > high ? a[i] : high;
    return high;
}
static inline VI load_int(const int32_t* p) {
    VI a;
    std::memcpy(&a, p, sizeof(a));
    return a;
}
static inline void store_int_n(int32_t* p, VI a, int64_t n) {
    std::memcpy(p, &a, std::size_t(n) * sizeof(int32_t));
}
static inline VI twice_minus(VI a, int32_t b) { return 2 * a - b; }
static inline VI times4_plus(VI a, VI b) { return 4 * a + b; }
static inline V to_float(VI a) { return V{float(a[0]), float(a[1]), float(a[2]), float(a[3])}; }

static inline void store_codes(int8_t* p, V a, V s, float limit) {
    for (int i = 0; i < kLanes; ++i) {
        float code = a[i] / s[i];
        code = code > -limit ? code : -limit;
        code = code < limit ? code : limit;
        p[i] = int8_t(__builtin_lrintf(code));
    }
}

static inline float from_bits(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, sizeof(a));
    return a;
}
static inline uint32_t to_bits(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof(bits));
    return bits;
}
static inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7FFFu;
    if (rest >= 0x7C00u) return from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13);  // infinity, NaN
    if (rest < 0x400u) {  // subnormal: rest * 2^-24
        const float a = float(rest) * 0x1p-24f;
        return sign ? -a : a;
    }
    return from_bits(sign | ((rest << 13) + (112u << 23)));
}
static inline uint16_t float_to_half(float a) {
    const uint32_t bits = to_bits(a), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (rest >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // rounds to 2^16 or more
    if (rest < 0x38800000u) {                                  // subnormal: the addition rounds to 2^-24
        return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f)));
    }
    return uint16_t(sign | ((rest + 0xFFFu + (rest >> 13 & 1u) - (112u << 23)) >> 13));
}
static inline V load_bf16(const uint16_t* p) {
    return V{from_bits(uint32_t(p[0]) << 16), from_bits(uint32_t(p[1]) << 16),
             from_bits(uint32_t(p[2]) << 16), from_bits(uint32_t(p[3]) << 16)};
}
static inline V load_fp16(const uint16_t* p) {
    return V{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
static inline void store_bf16(uint16_t* p, V a) {
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t bits = to_bits(a[i]);
        p[i] = uint16_t((a[i] != a[i] ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    }
}
static inline void store_fp16(uint16_t* p, V a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a[i]);
}
static inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
