// Table lookup without vector instructions; see lut_vbmi.h for what an entry is.
static int32_t build_tables(const int8_t* q, int64_t steps, uint8_t* tables, int64_t stride) {
    int32_t total = 0;
    for (int64_t c = 0; c < steps; ++c) {
        for (int64_t group = 0; group < 8; ++group, q += 4) {
            uint8_t* entries = tables + c * stride + 16 * group;
            for (int i = 0; i < 16; ++i) {
                int sum = 0;
                for (int b = 0; b < 4; ++b) {
                    const int part = (i >> b & 1) ? q[b] : -q[b];
                    sum += part > 0 ? part : 0;
                }
                entries[i] = uint8_t(sum);
            }
            for (int b = 0; b < 4; ++b) total += q[b] < 0 ? -q[b] : q[b];
        }
    }
    return total;
}

template <int T, int S>
static void accumulate(const uint8_t* const* panels, const uint8_t* tables, int64_t steps, int64_t ahead,
                       int32_t* sums) {
    (void)ahead;
    std::memset(sums, 0, sizeof(int32_t) * S * T * kRows);
    for (int64_t c = 0; c < steps; ++c, tables += T * kTableBytes) {
        for (int64_t r = 0; r < S * kRows; ++r) {
            const int64_t row = r % kRows;
            const uint8_t* signs =
                panels[r / kRows] + c * kStepBytes + 2 * (row % 32) + row / 32;  // Order::kByteMajor
            const unsigned bits[4] = {signs[0], signs[64], signs[128], signs[192]};
            for (int t = 0; t < T; ++t) {
                const uint8_t* table = tables + t * kTableBytes;
                int32_t sum = 0;
                for (int i = 0; i < 4; ++i)
                    sum += table[16 * i + (bits[i] & 15)] + table[64 + 16 * i + (bits[i] >> 4)];
                sums[(r / kRows * T + t) * kRows + row] += sum;
            }
        }
    }
}
