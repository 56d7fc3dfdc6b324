// The matrix unit in decoding: a group's query heads are one operand, 16 keys or 32 values of it, as they lie in memory,
// the other. Products of bf16 are exact and sums are float; weights go in as two bf16, so that they lose nothing.
#pragma once

#include "../native/amx.h"
#include "parts.h"

#if defined(HYMBA_AMX)
namespace hymba {
namespace tiles {
namespace {

constexpr int BLOCK = 32;       // slots, and columns of values, of one product
constexpr int MOST_SHARED = 8;  // query heads of a group: with two rows each they fill a tile

// Tiles 0 and 1 hold keys or values, 2 queries, 3 and 4 scores, 5 weights, 6 and 7 weighed sums.
HYMBA_AMX inline void configure(int64_t shared) {
    amx::Shapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, tile >= 5 ? 2 * shared : 16, amx::LINE);
    amx::configure(shapes);
}

using amx::release;

HYMBA_INLINE UintVec words(const void* from) {
    UintVec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
HYMBA_INLINE void put(uint32_t* to, UintVec x) { std::memcpy(to, &x, sizeof x); }

HYMBA_INLINE UintVec float_bits(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<UintVec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

// The upper halves of the words of `a` and `b`: small integers as float become bf16 without loss.
HYMBA_INLINE UintVec upper_halves(UintVec a, UintVec b) { return (a >> 16) | (b & 0xffff0000u); }

// Arranges a query head as the second operand, a column of 16: word i of 32 entries is entries 2i and 2i + 1, or i and
// 16 + i beside integer keys, which are widened in that order.
template <class T>
void turn_query(const bf16* q, int64_t width, uint32_t* column) {
    constexpr bool integer = std::is_same_v<T, int8_t>;
    for (int64_t i = 0; i < width / 2; ++i) {
        const int64_t first = integer ? i / 16 * 32 + i % 16 : 2 * i;
        column[i * 16] = q[first].bits | static_cast<uint32_t>(q[first + (integer ? 16 : 1)].bits) << 16;
    }
}

// scores (BLOCK, 16) = keys, `stride` entries apart, · queries, turned.
HYMBA_AMX inline void score(const bf16* keys, int64_t stride, int64_t width, const uint32_t* queries, float* scores) {
    amx::settle(queries);
    _tile_zero(3);
    _tile_zero(4);
    for (int64_t i = 0; i < width; i += BLOCK) {
        _tile_loadd(2, queries + i / 2 * 16, 64);
        _tile_loadd(0, keys + i, 2 * stride);
        _tile_dpbf16ps(3, 0, 2);
        _tile_loadd(1, keys + 16 * stride + i, 2 * stride);
        _tile_dpbf16ps(4, 1, 2);
    }
    _tile_stored(3, scores, 64);
    _tile_stored(4, scores + 256, 64);
}
inline void score(const int8_t* keys, int64_t stride, int64_t width, const uint32_t* queries, float* scores) {
    Scratch<uint32_t> wide(BLOCK * width / 2);
    for (int j = 0; j < BLOCK; ++j)
        for (int64_t i = 0; i < width; i += BLOCK) {
            const int8_t* from = keys + j * stride + i;
            put(wide + (j * width + i) / 2, upper_halves(float_bits(from), float_bits(from + 16)));
        }
    score(reinterpret_cast<const bf16*>(static_cast<uint32_t*>(wide)), width, width, queries, scores);
}

// BLOCK columns of two slots' values, entry by entry side by side; a slot that is not seen counts as zero.
HYMBA_INLINE void pair_values(const bf16* a, const bf16* b, bool sees_a, bool sees_b, uint32_t* to) {
    const UintVec x = sees_a ? words(a) : UintVec{}, y = sees_b ? words(b) : UintVec{};
    put(to, (x & 0xffffu) | (y << 16));
    put(to + 16, upper_halves(x, y));
}
HYMBA_INLINE void pair_values(const int8_t* a, const int8_t* b, bool sees_a, bool sees_b, uint32_t* to) {
    for (int half = 0; half < 2; ++half) {
        const UintVec x = sees_a ? float_bits(a + half * 16) : UintVec{};
        const UintVec y = sees_b ? float_bits(b + half * 16) : UintVec{};
        put(to + half * 16, upper_halves(x, y));
    }
}

// sums (shared, BLOCK), `stride` floats apart = weights · values for `blocks` blocks. Weights are (blocks, 2 shared,
// BLOCK) bf16, all heads' upper parts and then their lower ones; values are paired, (blocks, 16, BLOCK) words.
HYMBA_AMX inline void weigh(const bf16* weights, const uint32_t* values, int64_t blocks, int64_t shared, float* sums,
                            int64_t stride) {
    alignas(64) float both[2][2 * MOST_SHARED * 16];
    amx::settle(weights);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < blocks; ++i) {
        _tile_loadd(5, weights + i * 2 * shared * BLOCK, 64);
        _tile_loadd(0, values + i * 16 * BLOCK, 128);
        _tile_dpbf16ps(6, 5, 0);
        _tile_loadd(1, values + i * 16 * BLOCK + 16, 128);
        _tile_dpbf16ps(7, 5, 1);
    }
    _tile_stored(6, both[0], 64);
    _tile_stored(7, both[1], 64);
    for (int64_t h = 0; h < shared; ++h)
        for (int half = 0; half < 2; ++half)
            store(sums + h * stride + half * 16, load(both[half] + h * 16) + load(both[half] + (shared + h) * 16));
}

}  // namespace
}  // namespace tiles
}  // namespace hymba
#endif
