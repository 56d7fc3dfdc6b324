// Products of blocks on the matrix unit, and how their operands are arranged.
//
// The first operand is stored in panels (rows, 32) of bf16; the second in words of two bf16 that are multiplied in the
// same step, (depth / 2, columns). Sums are float.
#pragma once

#include "../native/amx.h"

#if defined(HYMBA_AMX)
namespace hymba {
namespace {

constexpr int SIDE = 32;  // keys of a block, columns of a stripe: two tiles

inline int64_t padded(int64_t count) { return (count + SIDE - 1) / SIDE * SIDE; }

// ---- Tiles ---------------------------------------------------------------------------------------------------------

HYMBA_AMX inline void configure() {
    amx::Shapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, amx::LINE);
    amx::configure(shapes);
}

using amx::release;

// c (m, n) = or += Σ a[i] (m, 32) · rows 16i… of b; m and n are multiples of 32, `b_row` and `c_row` count words.
HYMBA_AMX inline void multiply(const bf16* const* a, int64_t panels, const uint32_t* b, int64_t b_row, float* c, int64_t c_row,
                        int64_t m, int64_t n, bool add) {
    amx::settle(b);
    for (int64_t j = 0; j < n; j += SIDE)
        for (int64_t i = 0; i < m; i += SIDE) {
            float *top = c + i * c_row + j, *bottom = top + 16 * c_row;
            if (add) {
                _tile_loadd(0, top, 4 * c_row);
                _tile_loadd(1, top + 16, 4 * c_row);
                _tile_loadd(2, bottom, 4 * c_row);
                _tile_loadd(3, bottom + 16, 4 * c_row);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t p = 0; p < panels; ++p) {
                _tile_loadd(4, a[p] + i * SIDE, 64);
                _tile_loadd(6, b + 16 * p * b_row + j, 4 * b_row);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + 16 * p * b_row + j + 16, 4 * b_row);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a[p] + (i + 16) * SIDE, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, top, 4 * c_row);
            _tile_stored(1, top + 16, 4 * c_row);
            _tile_stored(2, bottom, 4 * c_row);
            _tile_stored(3, bottom + 16, 4 * c_row);
        }
}

// ---- Operands, each from SIDE rows of `width` bf16, a multiple of 32 -------------------------------------------------

HYMBA_INLINE UintVec words(const void* from) {
    UintVec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
HYMBA_INLINE void put(void* to, UintVec x) { std::memcpy(to, &x, sizeof x); }

// 16 entries of two rows, entry by entry side by side.
HYMBA_INLINE UintVec side_by_side(const bf16* a, const bf16* b) {
    HalfVec x, y;
    std::memcpy(&x, a, sizeof x);
    std::memcpy(&y, b, sizeof y);
    return __builtin_convertvector(x, UintVec) | (__builtin_convertvector(y, UintVec) << 16);
}

// Rounded to bf16, side by side.
HYMBA_INLINE UintVec side_by_side(Vec<float> a, Vec<float> b) {
    const UintVec x = reinterpret_cast<UintVec>(a) + 0x8000u, y = reinterpret_cast<UintVec>(b) + 0x8000u;
    return (x >> 16) | (y & 0xffff0000u);
}

// First operand, depth `width`: (width / 32) panels of SIDE rows.
inline void to_panels(const bf16* rows, int64_t width, bf16* to) {
    for (int64_t i = 0; i < width; i += SIDE)
        for (int r = 0; r < SIDE; ++r) put(to + (i + r) * SIDE, words(rows + r * width + i));
}

// First operand, depth SIDE: one panel of `width` rows.
inline void to_turned_panel(const bf16* rows, int64_t width, bf16* to) {
    for (int64_t i = 0; i < width; i += 16) {
        UintVec x[16];
        for (int r = 0; r < 16; ++r) x[r] = side_by_side(rows + 2 * r * width + i, rows + (2 * r + 1) * width + i);
        rotate<16>(x, 4);
        for (int c = 0; c < 16; ++c) put(to + (i + c) * SIDE, x[c]);
    }
}

// Second operand, depth `width`: (width / 2) rows of SIDE words, `stride` apart.
inline void to_turned_words(const bf16* rows, int64_t width, int64_t stride, uint32_t* to) {
    for (int64_t i = 0; i < width / 2; i += 16)
        for (int half = 0; half < 2; ++half) {
            UintVec x[16];
            for (int r = 0; r < 16; ++r) x[r] = words(rows + (half * 16 + r) * width + 2 * i);
            rotate<16>(x, 4);
            for (int c = 0; c < 16; ++c) put(to + (i + c) * stride + half * 16, x[c]);
        }
}

// Second operand, depth SIDE: 16 rows of `width` words; row r holds rows r and r + 16.
inline void to_words(const bf16* rows, int64_t width, uint32_t* to) {
    for (int r = 0; r < 16; ++r)
        for (int64_t i = 0; i < width; i += 16)
            put(to + r * width + i, side_by_side(rows + r * width + i, rows + (r + 16) * width + i));
}

}  // namespace
}  // namespace hymba
#endif
