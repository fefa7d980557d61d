// The packed layer: how a layer's tensors lie in memory, in the order in which the kernel reads them.
//
//     rotation_left    float32 [G][n1][n1]
//     rotation_right   float32 [G][n2][n2 rounded up to 16], padded with zeros
//     column_scale     float32 [K]
//     low_rank_a       bfloat16 [ceil(r/4)][K/32][4][32]: four rows side by side, one stream for a group of
//     them panels           [ceil(N/64)]
//
// each part padded to 64 bytes; a grouped layer has none of them. A panel holds 64 output rows, the last one padded
// with zeros:
//
//     signs            of each plane K/32 steps of 256 bytes, 4 columns to a nibble: an index into a table of 16 sums
//     weight_scale     64 float32 for each plane
//     low_rank_b       bfloat16 [r][64]
//
// or, in a grouped layer, for each plane and block its signs and their 64 scales, float32,
//
// so that a matrix-vector product reads all of it once, in order. A step covers 32 columns. Byte i (0..3) of
// a row has columns 4i..4i+3 in its low nibble and 16+4i..16+4i+3 in its high nibble. The 256 bytes of a step
// come in one of two orders, by what the lookup instruction can address:
//
//     kRowMajor     [64 rows][4 bytes]: 4 neighbouring bytes belong to one row, which vpdpbusd adds up
//     (vpermb) kByteMajor    [4 bytes][64 rows]: all bytes of a register use the same table (vpshufb); row r
//     < 32 at byte 2r,
//                   row 32 + r at byte 2r + 1, so that 16-bit sums of even and odd bytes come out in order
#pragma once

#include <cstdint>
#include <cstring>

namespace bwla {

constexpr int64_t kRows = 64;     // rows of a panel
constexpr int64_t kColumns = 32;  // columns of a step
constexpr int64_t kStepBytes = 256;
constexpr int64_t kTableBytes = 128;  // tables of one step and token: 8 groups of 4 columns, 16 entries each
constexpr int kMaxTile = 4;           // digits of codes that one pass over a panel serves
constexpr int64_t kMaxPlanes = 4;  // binary planes of a layer
constexpr int64_t kGroup = 4;         // rows of low_rank_a side by side

enum class Order { kRowMajor, kByteMajor };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Sizes {
    int64_t n, blocks, n1, n2, rank, planes;  // blocks: rotation groups of n1 x n2 columns
    bool grouped;  // no input transform, and a weight scale for each row, plane and block

    int64_t width() const { return n1 * n2; }
    int64_t k() const { return blocks * n1 * n2; }
    int64_t padded() const { return round_up(n2, 16); }  // n2 in whole vectors of any variant
    int64_t panels() const { return ceil_div(n, kRows); }
    int64_t tiles() const { return ceil_div(width(), 64); }  // AMX tiles that cover the columns of a group
    bool valid() const {
        return n > 0 && blocks > 0 && n1 > 0 && n2 > 0 && rank >= 0 && planes >= 1 && planes <= kMaxPlanes &&
               (n1 * n2) % kColumns == 0 && !(grouped && (rank || n1 != 1));
    }

    int64_t scale_blocks() const { return grouped ? blocks : 1; }  // weight scales of a row and plane
    bool single_scale() const { return planes == 1 && !grouped; }  // a row has one, at the end of its panel

    // Offsets in bytes.
    int64_t right_at() const { return grouped ? 0 : round_up(blocks * n1 * n1 * 4, 64); }
    int64_t column_scale_at() const { return grouped ? 0 : right_at() + blocks * n2 * padded() * 4; }
    int64_t low_rank_a_at() const { return grouped ? 0 : column_scale_at() + k() * 4; }
    int64_t panels_at() const { return low_rank_a_at() + ceil_div(rank, kGroup) * kGroup * k() * 2; }
    int64_t block_bytes() const { return width() / kColumns * kStepBytes + (grouped ? kRows * 4 : 0); }
    int64_t sign_bytes() const { return planes * blocks * block_bytes(); }  // with the scales of a grouped layer
    int64_t scale_bytes() const { return grouped ? 0 : planes * kRows * 4; }
    // Of a step of a panel, over all planes.
    int64_t step_at(int64_t step) const {
        const int64_t steps = width() / kColumns;
        return step / steps * block_bytes() + step % steps * kStepBytes;
    }
    // Of the scales of a plane and block of a panel.
    int64_t scale_at(int64_t plane, int64_t block) const {
        return grouped ? (plane * blocks + block + 1) * block_bytes() - kRows * 4 : sign_bytes() + plane * kRows * 4;
    }
    int64_t panel_bytes() const { return sign_bytes() + scale_bytes() + rank * kRows * 2; }
    int64_t bytes() const { return panels_at() + panels() * panel_bytes(); }
};

struct Panel {
    const uint8_t* signs;
    const float* scale;  // of a layer that is not grouped
    const uint16_t* low_rank;

    Panel(const uint8_t* packed, const Sizes& z, int64_t index) {
        signs = packed + z.panels_at() + index * z.panel_bytes();
        scale = reinterpret_cast<const float*>(signs + z.sign_bytes());
        low_rank = reinterpret_cast<const uint16_t*>(signs + z.sign_bytes() + z.scale_bytes());
    }
};

struct Tensors {
    const int32_t* words;        // weight_packed [n, planes, k / 32]
    const float* scale;          // weight_scale [n, planes, scale_blocks]
    const uint16_t* low_rank_b;  // bfloat16 [n, rank]; this and low_rank_a null for rank 0
    const float* left;           // [blocks, n1, n1]
    const float* right;          // [blocks, n2, n2]
    const float* column_scale;   // [k]
    const uint16_t* low_rank_a;  // bfloat16 [rank, k]
};

// Nibble j of a word goes to the low (j < 4) or high half of byte j % 4.
inline uint32_t interleave_nibbles(uint32_t word) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
        bytes |= ((word >> (4 * i) & 15u) | (word >> (16 + 4 * i) & 15u) << 4) << (8 * i);
    }
    return bytes;
}

// Byte i of row r in a step of 256 bytes.
inline int64_t byte_at(Order order, int64_t r, int64_t i) {
    return order == Order::kRowMajor ? 4 * r + i : 64 * i + 2 * (r % 32) + r / 32;
}

inline void pack_panel(const Tensors& from, const Sizes& z, Order order, int64_t panel, uint8_t* packed) {
    uint8_t* out = packed + z.panels_at() + panel * z.panel_bytes();
    const int64_t steps = z.k() / kColumns, first = panel * kRows,
                  rows = z.n - first < kRows ? z.n - first : kRows;
    std::memset(out, 0, std::size_t(z.panel_bytes()));
    for (int64_t c = 0; c < z.planes * steps; ++c) {
        uint8_t* step = out + z.step_at(c);
        for (int64_t r = 0; r < rows; ++r) {
            const uint32_t bytes = interleave_nibbles(uint32_t(from.words[(first + r) * z.planes * steps + c]));
            for (int64_t i = 0; i < 4; ++i) {
                step[byte_at(order, r, i)] = uint8_t(bytes >> (8 * i));
            }
        }
    }
    uint16_t* low_rank = reinterpret_cast<uint16_t*>(out + z.sign_bytes() + z.scale_bytes());
    const float* from_scale = from.scale + first * z.planes * z.scale_blocks();
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < z.planes; ++p) {
            for (int64_t g = 0; g < z.scale_blocks(); ++g) {
                reinterpret_cast<float*>(out + z.scale_at(p, g))[r] = *from_scale++;
            }
        }
        for (int64_t j = 0; j < z.rank; ++j)
            low_rank[j * kRows + r] = from.low_rank_b[(first + r) * z.rank + j];
    }
}

// The rows of a panel in the rotated basis, the sum over the planes of scale * sign: float32 [rows][k].
inline void unpack_panel(const uint8_t* packed, const Sizes& z, Order order, int64_t panel, float* weight) {
    const Panel from(packed, z, panel);
    const int64_t steps = z.k() / kColumns, first = panel * kRows,
                  rows = z.n - first < kRows ? z.n - first : kRows;
    std::memset(weight, 0, std::size_t(rows * z.k()) * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < z.planes; ++p) {
            for (int64_t c = 0; c < steps; ++c) {
                const int64_t block = z.grouped ? c * kColumns / z.width() : 0;
                const float scale = reinterpret_cast<const float*>(from.signs + z.scale_at(p, block))[r];
                const uint8_t* step = from.signs + z.step_at(p * steps + c);
                uint32_t word = 0;  // the inverse of interleave_nibbles
                for (int i = 0; i < 4; ++i) {
                    const uint32_t byte = step[byte_at(order, r, i)];
                    word |= (byte & 15u) << (4 * i) | (byte >> 4) << (16 + 4 * i);
                }
                float* out = weight + r * z.k() + c * kColumns;
                for (int j = 0; j < kColumns; ++j) out[j] += (word >> j & 1u) ? scale : -scale;
            }
        }
    }
}

inline void pack_input_side(const Tensors& from, const Sizes& z, uint8_t* packed) {
    std::memset(packed, 0, std::size_t(z.panels_at()));
    if (z.grouped) return;
    std::memcpy(packed, from.left, std::size_t(z.blocks * z.n1 * z.n1) * sizeof(float));
    float* right = reinterpret_cast<float*>(packed + z.right_at());
    for (int64_t row = 0; row < z.blocks * z.n2; ++row) {
        std::memcpy(right + row * z.padded(), from.right + row * z.n2, std::size_t(z.n2) * sizeof(float));
    }
    std::memcpy(packed + z.column_scale_at(), from.column_scale, std::size_t(z.k()) * sizeof(float));
    uint16_t* a = reinterpret_cast<uint16_t*>(packed + z.low_rank_a_at());
    for (int64_t j = 0; j < z.rank; ++j) {
        for (int64_t c = 0; c < z.k(); c += kColumns) {
            uint16_t* to = a + j / kGroup * kGroup * z.k() + c * kGroup + j % kGroup * kColumns;
            std::memcpy(to, from.low_rank_a + j * z.k() + c, kColumns * sizeof(uint16_t));
        }
    }
}

}  // namespace bwla
