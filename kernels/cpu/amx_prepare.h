// The input transform for many tokens with AVX-512, used by the AMX variant: 16 tokens at a time, one in each
// lane, so that all lanes are in use whatever the factors of the rotation, and the codes of 64 columns come
// out as one tile.
//
// Every value is computed by the same operations in the same order as in rotate.h, quantize.h and low_rank.h,
// so both give the same codes, scales and u bit for bit.

constexpr int64_t kProjectRows = 16;  // rows of low_rank_a that one unit of work covers

// Pointers to the rows of 16 tokens from `token` on. Only `count` of them exist: the last one is repeated.
struct TokenRows {
    const char* row[kTileTokens];
    int64_t bytes;  // of an element

    TokenRows(const Call& c, int64_t token, int64_t count, int64_t column)
        : bytes(c.x_dtype == kFloat32 ? 4 : 2) {
        for (int64_t t = 0; t < kTileTokens; ++t) {
            const int64_t at = (token + (t < count ? t : count - 1)) * c.x_stride + column;
            row[t] = static_cast<const char*>(c.x) + at * bytes;
        }
    }
};

// Transposes 16 rows of four 32-bit elements. from[i] has rows i, 4 + i, 8 + i and 12 + i, to[j] element j of
// all rows.
static inline void transpose_parts(const __m512i (&from)[4], __m512i (&to)[4]) {
    const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
    const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
    to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
    to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
}

// Loads 16 bytes of each of 16 rows, in the order that transpose_parts expects.
static inline void load_parts(const char* const* row, int64_t at, __m512i (&parts)[4]) {
    const auto part = [&](int t) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[t] + at)); };
    UNROLL (i, 4) {
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(i)), part(4 + i), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(8 + i)), part(12 + i), 1);
        parts[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
}

// Loads n columns, a multiple of 32, as x [n, 16 tokens] in float32.
static NOINLINE void load_columns(const Call& c, const TokenRows& from, int64_t n, float* x) {
    __m512i parts[4], columns[4];
    if (c.x_dtype == kBFloat16) {
        const __m512i upper = _mm512_set1_epi32(int32_t(0xFFFF0000u));
        for (int64_t j = 0; j < n; j += 8, x += 8 * kTileTokens) {
            load_parts(from.row, j * 2, parts);
            transpose_parts(parts, columns);  // an element is a pair of bfloat16
            UNROLL (i, 4) {
                _mm512_store_si512(x + 2 * i * kTileTokens, _mm512_slli_epi32(columns[i], 16));
                _mm512_store_si512(x + (2 * i + 1) * kTileTokens, _mm512_and_si512(columns[i], upper));
            }
        }
        return;
    }
    alignas(64) float values[kTileTokens][16];
    const char* converted[kTileTokens];
    for (int64_t t = 0; t < kTileTokens; ++t) converted[t] = reinterpret_cast<const char*>(values[t]);
    for (int64_t j = 0; j < n; j += 4, x += 4 * kTileTokens) {
        if (c.x_dtype == kFloat16 && j % 16 == 0) {
            for (int64_t t = 0; t < kTileTokens; ++t) {
                store(values[t], load_fp16(reinterpret_cast<const uint16_t*>(from.row[t]) + j));
            }
        }
        if (c.x_dtype == kFloat16) {
            load_parts(converted, j % 16 * 4, parts);
        } else {
            load_parts(from.row, j * 4, parts);
        }
        transpose_parts(parts, columns);
        UNROLL (i, 4) _mm512_store_si512(x + i * kTileTokens, columns[i]);
    }
}

// c[i, j] = sum_k a[i + k * a_step] * b[j, k] for all i and j; an element of b and c is a vector of 16
// tokens, and their strides count such elements.
struct TokenProduct {
    const float* a;
    int64_t a_step, rows;
    const float* b;
    int64_t b_column, b_step, columns, depth;
    float* c;
    int64_t c_row, c_column;
};

template <int Rows, int Columns>
static NOINLINE void token_strip(const TokenProduct& p, int64_t row, int64_t column) {
    V sum[Rows][Columns];
    UNROLL (i, Rows)
        UNROLL (j, Columns) sum[i][j] = zero();
    const float *a = p.a + row, *b = p.b + column * p.b_column * kLanes;
    for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_step * kLanes) {
        V value[Columns];
        UNROLL (j, Columns) value[j] = load(b + j * p.b_column * kLanes);
        UNROLL (i, Rows) {
            const V factor = set1(a[i]);
            UNROLL (j, Columns) sum[i][j] = fma(factor, value[j], sum[i][j]);
        }
    }
    float* to = p.c + (row * p.c_row + column * p.c_column) * kLanes;
    UNROLL (i, Rows)
        UNROLL (j, Columns) store(to + (i * p.c_row + j * p.c_column) * kLanes, sum[i][j]);
}

template <int Columns>
static void token_columns(const TokenProduct& p, int64_t column) {
    int64_t row = 0;
    for (; row + 12 <= p.rows; row += 12) token_strip<12, Columns>(p, row, column);
    if (row + 8 <= p.rows) token_strip<8, Columns>(p, row, column), row += 8;
    if (row + 4 <= p.rows) token_strip<4, Columns>(p, row, column), row += 4;
    for (; row < p.rows; ++row) token_strip<1, Columns>(p, row, column);
}

static void token_product(const TokenProduct& p) {
    int64_t column = 0;
    for (; column + 2 <= p.columns; column += 2) token_columns<2>(p, column);
    if (column < p.columns) token_columns<1>(p, column);
}

// a / s, correctly rounded as a division instruction rounds it, which takes twice as long. y is 1 / s,
// correctly rounded. One Newton step leaves an error below one unit in the last place, and from such a value
// another step gives the correctly rounded quotient (Markstein, IBM Journal of Research and Development
// 34(1), 1990), unless an intermediate result is subnormal or infinite.
static inline V quotient(V a, V s, V y) {
    const V first = mul(a, y);
    const V second = fma(_mm512_fnmadd_ps(first, s, a), y, first);
    return fma(_mm512_fnmadd_ps(second, s, a), y, second);
}

// Quantizes x_hat [n, 16 tokens] to tiles of codes. `scale` has the scale of each token. `Usual`: all scales
// are far from the limits of the exponent, as `quotient` needs; where x_hat is so small that it is wrong even
// so, the code is 0.
template <bool Usual>
static NOINLINE void quantize_tokens(const float* x_hat, int64_t n, V scale, int bits, int8_t* tiles) {
    const V limit = set1(float((1 << (bits - 1)) - 1)), least = negate(limit),
            inverse = div(set1(1.0f), scale);
    const __mmask16 any_code = _mm512_cmp_ps_mask(scale, zero(), _CMP_NEQ_UQ);
    const __m512i by_token =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const auto code = [&](int64_t column) {
        const V a = load(x_hat + column * kLanes);
        const V q =
            _mm512_min_ps(_mm512_max_ps(Usual ? quotient(a, scale, inverse) : div(a, scale), least), limit);
        return _mm512_maskz_cvtps_epi32(any_code, q);
    };
    for (int64_t begin = 0; begin < n; begin += kTileColumns, tiles += kTileBytes) {
        __m512i row[16];
        UNROLL (part, 4) {
            __m512i four[4], columns[4];
            UNROLL (i, 4) {
                const int64_t at = begin + 16 * part + 4 * i;
                four[i] = _mm512_setzero_si512();
                if (at >= n) continue;
                const __m512i low = _mm512_packs_epi32(code(at), code(at + 1));
                const __m512i high = _mm512_packs_epi32(code(at + 2), code(at + 3));
                four[i] = _mm512_shuffle_epi8(_mm512_packs_epi16(low, high), by_token);
            }
            transpose_parts(four, columns);  // columns[i]: 16 codes each of tokens i, 4 + i, 8 + i and 12 + i
            UNROLL (i, 4) row[4 * part + i] = columns[i];
        }
        UNROLL (i, 4) {  // the same tokens, all 64 columns
            const __m512i a = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x44);
            const __m512i b = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xEE);
            const __m512i c = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x44);
            const __m512i d = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xEE);
            int8_t* to = tiles + i * kTileColumns;
            _mm512_store_si512(to, _mm512_shuffle_i32x4(a, c, 0x88));
            _mm512_store_si512(to + 4 * kTileColumns, _mm512_shuffle_i32x4(a, c, 0xDD));
            _mm512_store_si512(to + 8 * kTileColumns, _mm512_shuffle_i32x4(b, d, 0x88));
            _mm512_store_si512(to + 12 * kTileColumns, _mm512_shuffle_i32x4(b, d, 0xDD));
        }
    }
}

// Computes the codes and scales of rotation group g for 16 tokens of a batch, of which `count` exist.
static NOINLINE void prepare_tokens(const Call& c, const Plan& plan, const Batch& batch,
                                    const Scratch& scratch, int64_t token, int64_t count, int64_t g) {
    const Sizes& z = c.z;
    const int64_t width = z.width(), first = batch.first + token;
    float *x = scratch.lanes, *half = x + width * kLanes;
    load_columns(c, TokenRows(c, first, count, g * width), width, x);
    token_product({c.left(g), z.n1, z.n1, x, 1, z.n2, z.n2, z.n1, half, z.n2, 1});
    token_product({c.right(g), z.padded(), z.n2, half, z.n2, 1, z.n1, z.n2, x, 1, z.n2});
    const float* column_scale = c.column_scale() + g * width;
    VI high = int_zero();
    for (int64_t j = 0; j < width; ++j) {
        const V value = mul(load(x + j * kLanes), set1(column_scale[j]));
        store(x + j * kLanes, value);
        high = magnitude(value, high);
    }
    const V scale = mul(_mm512_castsi512_ps(high), set1(plan.step));
    _mm256_storeu_ps(&scale_of(c, plan, first, g), _mm512_castps512_ps256(scale));
    _mm256_storeu_ps(&scale_of(c, plan, first + kEpilogueTokens, g), _mm512_extractf32x8_ps(scale, 1));
    const __mmask16 usual = _mm512_cmp_ps_mask(scale, set1(0x1p-60f), _CMP_GE_OQ) &
                            _mm512_cmp_ps_mask(scale, set1(0x1p60f), _CMP_LE_OQ);
    int8_t* tiles = tile_codes(c, plan, token, g, 0);
    if (usual == 0xFFFF) {
        quantize_tokens<true>(x, width, scale, c.bits, tiles);
    } else {
        quantize_tokens<false>(x, width, scale, c.bits, tiles);
    }
}

// Returns the sums of 16 vectors, each in the order of reduce_add, and leaves `a` undefined.
static inline V reduce_many(V (&a)[16]) {
    UNROLL (i, 8) {
        a[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xEE));
    }
    UNROLL (i, 4) {
        a[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
    }
    __m512d d[4];
    UNROLL (i, 4) d[i] = _mm512_castps_pd(a[i]);
    UNROLL (i, 2) {
        a[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(d[i], d[i + 2])),
                   _mm512_castpd_ps(_mm512_unpackhi_pd(d[i], d[i + 2])));
    }
    const V sum = add(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xDD));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, sum);
}

// Computes u of 8 tokens, of which `count` exist, for kProjectRows rows of low_rank_a from `begin` on.
static NOINLINE void project_tokens(const Call& c, const Plan& plan, int64_t token, int64_t count,
                                    int64_t begin) {
    constexpr int T = kEpilogueTokens;
    constexpr int64_t kChunk = 512;
    alignas(64) float x[T][kChunk];
    alignas(64) float partial[kProjectRows / 2][2 * T][kLanes];
    const int64_t k = c.z.k(), end = begin + kProjectRows < c.z.rank ? begin + kProjectRows : c.z.rank;
    for (int64_t at = 0; at < k; at += kChunk) {
        const int64_t columns = k - at < kChunk ? k - at : kChunk;
        for (int64_t t = 0; t < T; ++t) {
            convert(c.x_dtype, c.x, (token + (t < count ? t : count - 1)) * c.x_stride + at, x[t], columns);
        }
        for (int64_t row = begin; row < end; row += 2) {
            V sum[2 * T];
            auto& kept = partial[(row - begin) / 2];
            UNROLL (i, 2 * T) sum[i] = at ? load(kept[i]) : zero();
            const uint16_t* a =
                c.low_rank_a() + row / kGroup * kGroup * k + at * kGroup + row % kGroup * kColumns;
            for (int64_t j = 0; j < columns; j += kColumns, a += kGroup * kColumns) {
                for (int64_t lane = 0; lane < kColumns; lane += kLanes) {
                    const V first = load_bf16(a + lane), second = load_bf16(a + kColumns + lane);
                    UNROLL (t, T) {
                        const V value = load(x[t] + j + lane);
                        sum[t] = fma(value, first, sum[t]);
                        sum[T + t] = fma(value, second, sum[T + t]);
                    }
                }
            }
            if (at + kChunk < k) {
                UNROLL (i, 2 * T) store(kept[i], sum[i]);
                continue;
            }
            store_n(&u_of(c, plan, token, row), reduce_many(sum), row + 1 < end ? 2 * T : T);
        }
    }
}

// Computes the codes, scales and u of a batch. All of them are visible to all threads on return.
static void prepare_lanes(const Call& c, const Plan& plan, const Batch& batch, const Scratch& scratch,
                          Team& team) {
    const int64_t tiles = ceil_div(batch.tokens, kTileTokens), across = ceil_div(c.z.rank, kProjectRows);
    const int64_t projections = ceil_div(batch.tokens, kEpilogueTokens) * across;
    for (Units unit(plan.shares, Split(projections + tiles * c.z.blocks, team), team); unit.next();) {
        if (unit.item() < projections) {
            const int64_t token = unit.item() / across * kEpilogueTokens, left = batch.tokens - token;
            project_tokens(c, plan, batch.first + token, left < kEpilogueTokens ? left : kEpilogueTokens,
                           unit.item() % across * kProjectRows);
            continue;
        }
        const int64_t item = unit.item() - projections, g = item % c.z.blocks;
        const int64_t token = item / c.z.blocks * kTileTokens;
        const int64_t count = batch.tokens - token < kTileTokens ? batch.tokens - token : kTileTokens;
        if (count >= kLaneTokens) {
            prepare_tokens(c, plan, batch, scratch, token, count, g);
            continue;
        }
        for (int64_t t = 0; t < count; ++t) {
            prepare_block(c, plan, batch, scratch, (token + t) * c.z.blocks + g);
        }
    }
    team.barrier();
}
