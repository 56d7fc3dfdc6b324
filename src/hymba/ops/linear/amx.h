// The matrix units for 3 to 16 rows of activations: sixteen outputs of weights, as they lie in memory, are one operand
// and the activations the other, so that the products cost less than reading the weights whatever the number of rows.
//
// Integer activations of 16 bits go in as two of 8, 256 · high + low, each in its own product.
#pragma once

#include "kernels.h"

#if defined(HYMBA_AVX512) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define HYMBA_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hymba {
namespace amx {
namespace {

constexpr int OUTPUTS = 32;     // of one block: two tiles of weights
constexpr int ROWS = 16;        // of activations at most
constexpr int64_t AHEAD = 512;  // bytes that weights are called for before they are needed

// Whether the processor has the units and the kernel lets us use them; asked once.
inline bool usable() {
    static const bool answer = [] {
        unsigned a, b, c, d;
        constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return answer;
}

// Tiles 0 and 1 hold weights, 2 and 3 activations, 4 to 7 sums (output, row).
HYMBA_AMX inline void configure(int64_t rows) {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t lines[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes[tile] = static_cast<uint16_t>(tile < 2 ? 64 : 4 * rows);
        config.lines[tile] = 16;
    }
    _tile_loadconfig(&config);
}

// Calls for the line AHEAD of `at` in each of the block's outputs, or in the next block's where this one's end is near.
HYMBA_INLINE void prefetch(const char* weights, int64_t bytes, int64_t at) {
    const char* from = weights + at + AHEAD + (at + AHEAD < bytes ? 0 : (OUTPUTS - 1) * bytes);
    for (int n = 0; n < OUTPUTS; ++n) __builtin_prefetch(from + n * bytes, 0, 2);
}

// The words of rows x (rows, words) turned to (words, rows), as the second operand is stored.
inline void turn(const char* x, int64_t rows, int64_t words, uint32_t* to) {
    for (int64_t i = 0; i < words; ++i)
        for (int64_t m = 0; m < rows; ++m) std::memcpy(to + i * rows + m, x + (m * words + i) * 4, 4);
}

// sums (OUTPUTS, ROWS) = bf16 weights (OUTPUTS, in) · activations, turned; `in` is a multiple of 32.
HYMBA_AMX inline void multiply(const bf16* weights, const uint32_t* x, int64_t in, int64_t rows, float* sums) {
    const char* w = reinterpret_cast<const char*>(weights);
    const int64_t bytes = 2 * in;
    configure(rows);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t at = 0; at < bytes; at += 64, x += 16 * rows) {
        prefetch(w, bytes, at);
        _tile_loadd(2, x, 4 * rows);
        _tile_loadd(0, w + at, bytes);
        _tile_dpbf16ps(4, 0, 2);
        _tile_loadd(1, w + at + 16 * bytes, bytes);
        _tile_dpbf16ps(5, 1, 2);
    }
    _tile_stored(4, sums, 4 * ROWS);
    _tile_stored(5, sums + 16 * ROWS, 4 * ROWS);
    _tile_release();
}

// sums (2, OUTPUTS, ROWS) = int8 weights (OUTPUTS, in) · high bytes of the activations, and · low ones; both turned.
HYMBA_AMX inline void multiply(const int8_t* weights, const uint32_t* high, const uint32_t* low, int64_t in,
                               int64_t rows, int32_t* sums) {
    const char* w = reinterpret_cast<const char*>(weights);
    configure(rows);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t at = 0; at < in; at += 64, high += 16 * rows, low += 16 * rows) {
        prefetch(w, in, at);
        _tile_loadd(2, high, 4 * rows);
        _tile_loadd(3, low, 4 * rows);
        _tile_loadd(0, w + at, in);
        _tile_dpbssd(4, 0, 2);
        _tile_dpbssd(6, 0, 3);
        _tile_loadd(1, w + at + 16 * in, in);
        _tile_dpbssd(5, 1, 2);
        _tile_dpbssd(7, 1, 3);
    }
    _tile_stored(4, sums, 4 * ROWS);
    _tile_stored(5, sums + 16 * ROWS, 4 * ROWS);
    _tile_stored(6, sums + 32 * ROWS, 4 * ROWS);
    _tile_stored(7, sums + 48 * ROWS, 4 * ROWS);
    _tile_release();
}

// sums (OUTPUTS, ROWS) = 4-bit weights (OUTPUTS, in) · activations, high and low bytes turned. A group of 64 inputs is
// one product; its sums are scaled and added in float. `scales` holds a block's, (OUTPUTS, groups).
HYMBA_AMX inline void multiply(const uint8_t* weights, const bf16* scales, const uint32_t* high, const uint32_t* low,
                               int64_t groups, int64_t rows, float* sums) {
    alignas(64) int8_t values[OUTPUTS * 64];
    alignas(64) int32_t products[4 * 16 * ROWS] = {};
    const char* w = reinterpret_cast<const char*>(weights);
    const __m256i mask = _mm256_set1_epi8(15);
    const __m512i eight = _mm512_set1_epi8(8);
    configure(rows);
    for (int64_t g = 0; g < groups; ++g, high += 16 * rows, low += 16 * rows) {
        if (g % 2 == 0) prefetch(w, groups * 32, g * 32);
        for (int n = 0; n < OUTPUTS; ++n) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + (n * groups + g) * 32));
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
            const __m512i halves =
                _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, mask)), second, 1);
            _mm512_store_si512(values + n * 64, _mm512_sub_epi8(halves, eight));
        }
        _tile_zero(4);
        _tile_zero(5);
        _tile_zero(6);
        _tile_zero(7);
        _tile_loadd(2, high, 4 * rows);
        _tile_loadd(3, low, 4 * rows);
        _tile_loadd(0, values, 64);
        _tile_loadd(1, values + 16 * 64, 64);
        _tile_dpbssd(4, 0, 2);
        _tile_dpbssd(6, 0, 3);
        _tile_dpbssd(5, 1, 2);
        _tile_dpbssd(7, 1, 3);
        _tile_stored(4, products, 4 * ROWS);
        _tile_stored(5, products + 16 * ROWS, 4 * ROWS);
        _tile_stored(6, products + 32 * ROWS, 4 * ROWS);
        _tile_stored(7, products + 48 * ROWS, 4 * ROWS);
        for (int n = 0; n < OUTPUTS; ++n) {
            const __m512i top = _mm512_slli_epi32(_mm512_load_si512(products + n * ROWS), 8);
            const __m512i whole = _mm512_add_epi32(top, _mm512_load_si512(products + (OUTPUTS + n) * ROWS));
            const __m512 scale = _mm512_set1_ps(widen(scales[n * groups + g]));
            const __m512 before = g ? _mm512_load_ps(sums + n * ROWS) : _mm512_setzero_ps();
            _mm512_store_ps(sums + n * ROWS, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, before));
        }
    }
    _tile_release();
}

}  // namespace
}  // namespace amx
}  // namespace hymba
#endif
