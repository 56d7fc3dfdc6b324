// The matrix units for up to 16 rows of activations: sixteen outputs of weights, as they lie in memory, are one operand
// and the activations the other, so that the products cost less than reading the weights whatever the number of rows.
//
// Integer activations of 16 bits go in as two of 8, 256 · high + low, each in its own product.
#pragma once

#include "../native/amx.h"
#include "weights.h"

#if defined(HYMBA_AMX)
namespace hymba {
namespace amx {
namespace {

constexpr int OUTPUTS = 32;               // of one block: two tiles of weights
constexpr int ROWS = 16;                  // of activations at most
constexpr int64_t MOST_INPUTS = 1 << 16;  // so that sums of integers' products stay below 2^31
constexpr int64_t AHEAD = 512;            // bytes that weights are called for before they are needed

// Tiles 0 and 1 hold weights, 2 and 3 activations, 4 to 7 sums (output, row).
HYMBA_AMX inline void configure(int64_t rows) {
    Shapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, 16, tile < 2 ? LINE : 4 * rows);
    configure(shapes);
}

// The units, made ready for a number of rows and given back at the end of the scope.
struct Unit {
    explicit Unit(int64_t rows) { configure(rows); }
    Unit(const Unit&) = delete;
    ~Unit() { release(); }
};

// Calls for the line AHEAD of `at` in each of COUNT outputs, or in the next ones where the end of these is near.
template <int COUNT>
HYMBA_INLINE void prefetch(const char* weights, int64_t bytes, int64_t at) {
    const char* from = weights + at + AHEAD + (at + AHEAD < bytes ? 0 : (COUNT - 1) * bytes);
#pragma GCC unroll 32
    for (int n = 0; n < COUNT; ++n) __builtin_prefetch(from + n * bytes, 0, 2);
}

// Where step `s` of a row of weights begins. The steps of the last chunk end with the row.
HYMBA_INLINE int64_t place(int64_t s, int64_t whole, int64_t steps, int64_t bytes) {
    return s < whole ? s * LINE : bytes - (steps - s) * LINE;
}

// Turns rows ≤ ROWS x (rows, words) to (words, width), as the second operand is stored; the width is 4, 8 or 16.
template <int WIDTH>
void turn(const char* x, int64_t rows, int64_t words, char* to) {
    for (int64_t i = 0; i < words; i += LANES<float>) {
        Vec<float> lines[WIDTH] = {};
        for (int64_t m = 0; m < rows; ++m) std::memcpy(&lines[m], x + (m * words + i) * 4, sizeof lines[m]);
        store_square<WIDTH>(reinterpret_cast<float*>(to) + i * WIDTH, lines);
    }
}
inline void turn(const char* x, int64_t rows, int64_t words, int64_t width, char* to) {
    if (width == 4) return turn<4>(x, rows, words, to);
    if (width == 8) return turn<8>(x, rows, words, to);
    turn<16>(x, rows, words, to);
}

// A block of weights that lie `bytes` apart, how many steps of a line they take, and how many before the last chunk.
struct Block {
    const char* weights;
    int64_t bytes, steps, whole;
};

// sums (OUTPUTS, ROWS) = bf16 weights · activations, turned.
HYMBA_AMX inline void multiply_bf16(const Block& b, const char* x, int64_t rows, float* sums) {
    const int64_t step = 16 * 4 * rows;
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t s = 0; s < b.steps; ++s, x += step) {
        const char* w = b.weights + place(s, b.whole, b.steps, b.bytes);
        prefetch<OUTPUTS>(b.weights, b.bytes, s * LINE);
        _tile_loadd(2, x, 4 * rows);
        _tile_loadd(0, w, b.bytes);
        _tile_dpbf16ps(4, 0, 2);
        _tile_loadd(1, w + 16 * b.bytes, b.bytes);
        _tile_dpbf16ps(5, 1, 2);
    }
    _tile_stored(4, sums, 4 * ROWS);
    _tile_stored(5, sums + 16 * ROWS, 4 * ROWS);
}

// sums (2, OUTPUTS, ROWS) = int8 weights · high bytes of the activations, and · low ones; both turned.
HYMBA_AMX inline void multiply_int8(const Block& b, const char* high, const char* low, int64_t rows, int32_t* sums) {
    const int64_t step = 16 * 4 * rows;
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t s = 0; s < b.steps; ++s, high += step, low += step) {
        const char* w = b.weights + place(s, b.whole, b.steps, b.bytes);
        prefetch<OUTPUTS>(b.weights, b.bytes, s * LINE);
        _tile_loadd(2, high, 4 * rows);
        _tile_loadd(3, low, 4 * rows);
        _tile_loadd(0, w, b.bytes);
        _tile_dpbssd(4, 0, 2);
        _tile_dpbssd(6, 0, 3);
        _tile_loadd(1, w + 16 * b.bytes, b.bytes);
        _tile_dpbssd(5, 1, 2);
        _tile_dpbssd(7, 1, 3);
    }
    _tile_stored(4, sums, 4 * ROWS);
    _tile_stored(5, sums + 16 * ROWS, 4 * ROWS);
    _tile_stored(6, sums + 32 * ROWS, 4 * ROWS);
    _tile_stored(7, sums + 48 * ROWS, 4 * ROWS);
}

// Takes two groups of sixteen outputs' 4-bit weights apart, to bytes (2, 16, 64): of the second group the upper half of
// the inputs first. They are eight too large. Without a second group it is zeros.
HYMBA_INLINE void unpack(const char* weights, int64_t bytes, bool both, char* to) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 16
    for (int n = 0; n < 16; ++n) {
        const char* from = weights + n * bytes;
        const __m512i v = both ? load_as<__m512i>(from) : _mm512_zextsi256_si512(load_as<__m256i>(from));
        const __m512i low = _mm512_and_si512(v, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        const __m512i turned = _mm512_shuffle_i64x2(high, high, 0x4e);
        _mm512_store_si512(to + n * LINE, _mm512_mask_blend_epi64(0xf0, low, turned));
        _mm512_store_si512(to + (16 + n) * LINE, _mm512_mask_blend_epi64(0xf0, turned, low));
    }
}

// products (2, 2, 16, ROWS) = two groups' unpacked weights · high bytes and · low bytes of the activations. The sums
// with low bytes start from `offsets` (2, rows).
HYMBA_AMX inline void multiply_groups(const char* values, const char* high, const char* low, const int32_t* offsets,
                                      int64_t rows, int32_t* products) {
    settle(values);
    _tile_zero(4);
    _tile_zero(6);
    _tile_loadd(5, offsets, 0);
    _tile_loadd(7, offsets + rows, 0);
    _tile_loadd(0, values, LINE);
    _tile_loadd(2, high, 4 * rows);
    _tile_loadd(3, low, 4 * rows);
    _tile_dpbusd(4, 0, 2);
    _tile_dpbusd(5, 0, 3);
    _tile_loadd(1, values + 16 * LINE, LINE);
    _tile_loadd(2, high + LINE * rows, 4 * rows);
    _tile_loadd(3, low + LINE * rows, 4 * rows);
    _tile_dpbusd(6, 1, 2);
    _tile_dpbusd(7, 1, 3);
    _tile_stored(4, products, 4 * ROWS);
    _tile_stored(5, products + 16 * ROWS, 4 * ROWS);
    _tile_stored(6, products + 32 * ROWS, 4 * ROWS);
    _tile_stored(7, products + 48 * ROWS, 4 * ROWS);
}

// Adds two groups' products to the sums of sixteen outputs; `scales` (16, stride) holds theirs.
HYMBA_INLINE void add_scaled(const int32_t* products, const float* scales, int64_t stride, __m512 (&sums)[16]) {
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g)
#pragma GCC unroll 16
        for (int n = 0; n < 16; ++n) {
            const int32_t* from = products + (32 * g + n) * ROWS;
            const __m512i top = _mm512_slli_epi32(_mm512_load_si512(from), 8);
            const __m512i whole = _mm512_add_epi32(top, _mm512_load_si512(from + 16 * ROWS));
            sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scales[n * stride + g]), sums[n]);
        }
}

// sums (16, ROWS) = 4-bit weights · activations, high and low bytes turned, in groups (and zeros to an even number of
// them). `scales` (16, groups) are bf16, `offsets` (even number of groups, rows) −8 · sum of each group of activations.
HYMBA_AMX inline void multiply_int4(const char* weights, const bf16* scales, const char* high, const char* low,
                                    const int32_t* offsets, int64_t groups, int64_t rows, float* out) {
    const int64_t pairs = (groups + 1) / 2, bytes = groups * 32, stride = (groups + 15) / 16 * 16;
    alignas(64) char values[2][2 * 16 * LINE];
    alignas(64) int32_t products[2][4 * 16 * ROWS];
    Scratch<float> wide(16 * stride);
    for (int n = 0; n < 16; ++n)
        for (int64_t g = 0; g < groups; g += 16)
            store(wide + n * stride + g,
                  load(scales + n * groups + g, groups - g < 16 ? static_cast<int>(groups - g) : 16));
    __m512 sums[16];
    for (int n = 0; n < 16; ++n) sums[n] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs + 2; ++p) {  // a pair is unpacked, one before it multiplied, and one before added
        if (p < pairs) {
            prefetch<16>(weights, bytes, p * LINE);
            unpack(weights + p * LINE, bytes, 2 * p + 1 < groups, values[p % 2]);
        }
        if (p > 1) add_scaled(products[p % 2], wide + 2 * (p - 2), stride, sums);
        if (p > 0 && p <= pairs) {
            const int64_t at = 2 * (p - 1) * rows;
            multiply_groups(values[1 - p % 2], high + at * LINE, low + at * LINE, offsets + at, rows, products[1 - p % 2]);
        }
    }
    for (int n = 0; n < 16; ++n) _mm512_store_ps(out + n * ROWS, sums[n]);
}

}  // namespace
}  // namespace amx
}  // namespace hymba
#endif
