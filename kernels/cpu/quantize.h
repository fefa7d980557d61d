// Elementwise steps of the input transform: conversion, column scale and maximum, codes, digits.

static void convert(int32_t dtype, const void* from, int64_t offset, float* to, int64_t n) {
    if (dtype == kFloat32) {
        std::memcpy(to, static_cast<const float*>(from) + offset, std::size_t(n) * sizeof(float));
        return;
    }
    const uint16_t* at = static_cast<const uint16_t*>(from) + offset;
    int64_t i = 0;
    if (dtype == kBFloat16) {
        for (; i + kLanes <= n; i += kLanes) store(to + i, load_bf16(at + i));
    } else {
        for (; i + kLanes <= n; i += kLanes) store(to + i, load_fp16(at + i));
    }
    if (i < n) {
        uint16_t last[kLanes] = {};
        std::memcpy(last, at + i, std::size_t(n - i) * sizeof(uint16_t));
        store_n(to + i, dtype == kBFloat16 ? load_bf16(last) : load_fp16(last), n - i);
    }
}

static V load_any(int32_t dtype, const void* from, int64_t at, int64_t n) {
    float values[kLanes] = {};
    convert(dtype, from, at, values, n);
    return load(values);
}

// x_hat *= column_scale; returns the bits of max|x_hat|.
static int32_t scale_columns(float* x_hat, const float* column_scale, int64_t n) {
    VI high = int_zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const V a = mul(load(x_hat + i), load(column_scale + i));
        store(x_hat + i, a);
        high = magnitude(a, high);
    }
    if (i < n) {
        const V a = mul(load_n(x_hat + i, n - i), load_n(column_scale + i, n - i));
        store_n(x_hat + i, a, n - i);
        high = magnitude(a, high);
    }
    return reduce_max(high);
}

// Returns the bits of max|x|; n is a multiple of 32.
static int32_t largest_magnitude(const float* x, int64_t n) {
    VI high = int_zero();
    for (int64_t i = 0; i < n; i += kLanes) high = magnitude(load(x + i), high);
    return reduce_max(high);
}

static float block_scale(int32_t magnitude_bits, float step) {
    float high;
    std::memcpy(&high, &magnitude_bits, sizeof(high));
    return high * step;
}

// q = clamp(round_half_even(x_hat / scale)); n is a multiple of 32.
static void quantize(const float* x_hat, int64_t n, float scale, int bits, int8_t* q) {
    if (scale == 0.0f) {
        std::memset(q, 0, std::size_t(n));
        return;
    }
    const float limit = float((1 << (bits - 1)) - 1);
    const V s = set1(scale);
    for (int64_t i = 0; i < n; i += kLanes) store_codes(q + i, load(x_hat + i), s, limit);
}

// Tables of columns [begin, begin + n) of one token of a batch; returns sum|q|.
static int32_t token_tables(const Call& c, const Plan& plan, const Tiles& tiles, int64_t token, int64_t begin,
                            int64_t n, const int8_t* q, uint8_t* entries) {
    const int64_t tile = tiles.of(token), first = tiles.begin(tile),
                  stride = tiles.tokens_of(tile) * plan.digits * kTableBytes;
    entries += first * plan.digits * (c.z.k() / kColumns) * kTableBytes;  // the tile
    entries +=
        begin / kColumns * stride + (token - first) * plan.digits * kTableBytes;  // the step and the token
    if (plan.digits == 1) return build_tables(q, n / kColumns, entries, stride);
    int32_t total = 0;
    for (int64_t i = 0; i < n; i += kPieceColumns) {
        int8_t high[kPieceColumns],
            low[kPieceColumns];  // both digits keep the sign, so |q| = 4 |high| + |low|
        const int64_t count = n - i < kPieceColumns ? n - i : kPieceColumns;
        for (int64_t j = 0; j < count; ++j) {
            high[j] = int8_t(q[i + j] / 4);
            low[j] = int8_t(q[i + j] - 4 * high[j]);
        }
        uint8_t* at = entries + i / kColumns * stride;
        total += 4 * build_tables(high, count / kColumns, at, stride);
        total += build_tables(low, count / kColumns, at + kTableBytes, stride);
    }
    return total;
}
