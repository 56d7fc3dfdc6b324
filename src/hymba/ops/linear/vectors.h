// What the kernels of few rows (cpu.cpp) and of many rows (many_rows.h) share: constants, integer weights, and how
// activations are prepared.
#pragma once

#include "weights.h"

namespace hymba {
namespace {

constexpr int QUAD = 4;               // outputs whose lanes are summed together
constexpr int OUTPUTS = 32;           // outputs written together
constexpr int FLOATS = LANES<float>;
constexpr float LARGEST = 127 * 256;  // of activations as integers: they come apart into two signed bytes

typedef int16_t ShortVec __attribute__((vector_size(VECTOR_BYTES / 2)));

// The row of output n + c. Behind the last output the last stands in, and what it gives is dropped.
template <class T>
HYMBA_INLINE const T* row_of(const void* data, int64_t stride, const Weights& w, int64_t n, int c) {
    return static_cast<const T*>(data) + (n + c < w.out ? n + c : w.out - 1) * stride;
}

HYMBA_INLINE void prefetch(const void* at, int64_t bytes) {
    __builtin_prefetch(static_cast<const char*>(at) + bytes, 0, 2);
}

// ---- Integer weights -----------------------------------------------------------------------------------------------

// Thirty-two weights as 16-bit integers, and the sums of their products with activations.
struct Shorts {
#if defined(HYMBA_AVX512)
    __m512i v;
    static HYMBA_INLINE Shorts widened(const int16_t* w) { return {load_as<__m512i>(w)}; }
    static HYMBA_INLINE Shorts bytes(const int8_t* w) { return {_mm512_cvtepi8_epi16(load_as<__m256i>(w))}; }
    static HYMBA_INLINE void nibbles(const uint8_t* w, Shorts& low, Shorts& high) {
        const __m512i both = _mm512_cvtepu8_epi16(load_as<__m256i>(w));
        low.v = _mm512_and_si512(both, _mm512_set1_epi16(15));
        high.v = _mm512_srli_epi16(both, 4);
    }
    HYMBA_INLINE IntVec dot(IntVec sum, Shorts x) const {
        return reinterpret_cast<IntVec>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), v, x.v));
    }
#elif defined(HYMBA_AVX2)
    __m256i v[2];
    static HYMBA_INLINE Shorts widened(const int16_t* w) { return {{load_as<__m256i>(w), load_as<__m256i>(w + 16)}}; }
    static HYMBA_INLINE Shorts bytes(const int8_t* w) {
        return {{_mm256_cvtepi8_epi16(load_as<__m128i>(w)), _mm256_cvtepi8_epi16(load_as<__m128i>(w + 16))}};
    }
    static HYMBA_INLINE void nibbles(const uint8_t* w, Shorts& low, Shorts& high) {
        for (int i = 0; i < 2; ++i) {
            const __m256i both = _mm256_cvtepu8_epi16(load_as<__m128i>(w + 16 * i));
            low.v[i] = _mm256_and_si256(both, _mm256_set1_epi16(15));
            high.v[i] = _mm256_srli_epi16(both, 4);
        }
    }
    HYMBA_INLINE IntVec dot(IntVec sum, Shorts x) const {
        sum = sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(v[0], x.v[0]));
        return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(v[1], x.v[1]));
    }
#else
    int16_t v[32];
    static HYMBA_INLINE Shorts widened(const int16_t* w) { return load_as<Shorts>(w); }
    static HYMBA_INLINE Shorts bytes(const int8_t* w) {
        Shorts s;
        for (int i = 0; i < 32; ++i) s.v[i] = w[i];
        return s;
    }
    static HYMBA_INLINE void nibbles(const uint8_t* w, Shorts& low, Shorts& high) {
        for (int i = 0; i < 32; ++i) {
            low.v[i] = w[i] & 15;
            high.v[i] = w[i] >> 4;
        }
    }
    HYMBA_INLINE IntVec dot(IntVec sum, const Shorts& x) const {
        for (int i = 0; i < 32; i += FLOATS)
            sum = sum + __builtin_convertvector(load_as<ShortVec>(v + i), IntVec) *
                            __builtin_convertvector(load_as<ShortVec>(x.v + i), IntVec);
        return sum;
    }
#endif
    HYMBA_INLINE IntVec dot(IntVec sum, const int16_t* x) const { return dot(sum, widened(x)); }
};

#if defined(HYMBA_AVX512)
// Takes integers apart, 256 · high + low.
HYMBA_INLINE void split(const int16_t* x, int64_t width, int8_t* high, int8_t* low) {
    for (int64_t k = 0; k < width; k += 32) {
        const __m512i v = load_as<__m512i>(x + k);
        const __m256i tops = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8));
        const __m256i rest = _mm512_cvtepi16_epi8(v);
        std::memcpy(high + k, &tops, sizeof tops);
        std::memcpy(low + k, &rest, sizeof rest);
    }
}
#endif

// As many groups of 4-bit weights as fill a vector, eight too large each, and their sums of products with activations;
// a lane's products are of one group. `arrange` puts the activations as the weights lie.
struct Groups {
#if defined(HYMBA_AVX512)
    static constexpr int COUNT = 2;
    __m512i low, high;
    HYMBA_INLINE Groups(const uint8_t* w, bool both) {
        const __m512i v = both ? load_as<__m512i>(w) : _mm512_zextsi256_si512(load_as<__m256i>(w));
        low = _mm512_and_si512(v, _mm512_set1_epi8(15));
        high = _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
    }
    // The products with the activations' high bytes, and 256 of them to one with their low bytes.
    HYMBA_INLINE IntVec dot(const int16_t* x) const {
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, load_as<__m512i>(x));
        sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, high, load_as<__m512i>(x + 32)), 8);
        sum = _mm512_dpbusd_epi32(sum, low, load_as<__m512i>(x + 64));
        return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(sum, high, load_as<__m512i>(x + 96)));
    }
    // Each group's scale in its lanes.
    static HYMBA_INLINE Vec<float> spread(Vec<float> scales, int g) {
        const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(g)), scales);
    }
    static void arrange(int16_t* x, int64_t width) {
        for (int64_t k = 0; k < width; k += 2 * CHUNK) {
            int8_t bytes[4 * CHUNK];
            for (int i = 0; i < 4; ++i) {
                int8_t* to = bytes + 32 * (i / 2 + i % 2 * 2);
                split(x + k + 32 * i, 32, to, to + 2 * CHUNK);
            }
            std::memcpy(x + k, bytes, sizeof bytes);
        }
    }
    // The weights as 16-bit integers, even bytes before odd ones and low halves before high ones; activations to match.
    static HYMBA_INLINE void unpack(const uint8_t* w, bool both, int16_t* to) {
        const __m512i v = both ? load_as<__m512i>(w) : _mm512_zextsi256_si512(load_as<__m256i>(w));
        const __m512i four = _mm512_set1_epi16(15);
        const __m512i parts[4] = {_mm512_and_si512(v, four), _mm512_and_si512(_mm512_srli_epi16(v, 8), four),
                                  _mm512_and_si512(_mm512_srli_epi16(v, 4), four), _mm512_srli_epi16(v, 12)};
        std::memcpy(to, parts, sizeof parts);
    }
    static void arrange_unpacked(int16_t* x, int64_t width) {
        alignas(64) int16_t indices[32];
        for (int16_t i = 0; i < 32; ++i) indices[i] = static_cast<int16_t>(2 * i);
        const __m512i even = load_as<__m512i>(indices), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
        for (int64_t k = 0; k < width; k += 2 * CHUNK) {
            __m512i v[4];  // the halves of a group, and those of the next
            std::memcpy(v, x + k, sizeof v);
            const __m512i to[4] = {_mm512_permutex2var_epi16(v[0], even, v[2]), _mm512_permutex2var_epi16(v[0], odd, v[2]),
                                   _mm512_permutex2var_epi16(v[1], even, v[3]), _mm512_permutex2var_epi16(v[1], odd, v[3])};
            std::memcpy(x + k, to, sizeof to);
        }
    }
#else
    static constexpr int COUNT = 1;
    Shorts low, high;
    HYMBA_INLINE Groups(const uint8_t* w, bool) { Shorts::nibbles(w, low, high); }
    HYMBA_INLINE IntVec dot(const int16_t* x) const { return high.dot(low.dot(IntVec{}, x), x + 32); }
    static HYMBA_INLINE Vec<float> spread(Vec<float> scales, int g) { return splat(scales[g]); }
    static void arrange(int16_t*, int64_t) {}
    static HYMBA_INLINE void unpack(const uint8_t* w, bool, int16_t* to) {
        for (int i = 0; i < 32; ++i) {
            to[i] = w[i] & 15;
            to[32 + i] = w[i] >> 4;
        }
    }
    static void arrange_unpacked(int16_t*, int64_t) {}
#endif
};

// ---- Activations ---------------------------------------------------------------------------------------------------

// Copies a row to `to` as floats, zeros after it up to `width`. What is more than whole chunks comes at the start of
// the last chunk or, unless `left`, at its end. Returns the largest magnitude, NaN if any value is infinite or NaN.
template <class T>
float widen_row(const T* x, int64_t in, int64_t width, bool left, float* to) {
    const int64_t whole = in / CHUNK * CHUNK, shift = left || whole == in ? 0 : whole + CHUNK - in;
    Vec<float> largest = {}, check = {};
    std::memset(to + whole, 0, static_cast<size_t>(width - whole) * sizeof(float));
    for (int64_t k = 0; k < in; k += FLOATS) {
        const int lanes = in - k < FLOATS ? static_cast<int>(in - k) : FLOATS;
        const Vec<float> v = load(x + k, lanes), size = v < 0 ? -v : v;
        largest = size > largest ? size : largest;
        check += v * 0.0f;
        store(to + k + (k < whole ? 0 : shift), v, lanes);
    }
    float most = 0;
    for (int i = 0; i < FLOATS; ++i) most = largest[i] > most ? largest[i] : most;
    return most + sum_lanes<float>(check);
}

// Even inputs before odd ones within each 2 · FLOATS, as a pair of bf16 weights in 32 bits comes apart.
void part(float* x, int64_t width) {
    for (int64_t k = 0; k < width; k += 2 * FLOATS) {
        float even[FLOATS], odd[FLOATS];
        for (int i = 0; i < FLOATS; ++i) {
            even[i] = x[k + 2 * i];
            odd[i] = x[k + 2 * i + 1];
        }
        std::memcpy(x + k, even, sizeof even);
        std::memcpy(x + k + FLOATS, odd, sizeof odd);
    }
}

// Rounds a row to integers under one scale, and returns that: NaN, as all outputs shall be, if the row is not finite.
float quantize(const float* x, float largest, int64_t width, int16_t* to, float* offsets) {
    const float inverse = largest > 1e-30f ? LARGEST / largest : 0.0f;
    const float magic = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to an integer
    for (int64_t g = 0; g * CHUNK < width; ++g) {
        Vec<float> sum = {};
        for (int64_t k = g * CHUNK; k < (g + 1) * CHUNK; k += FLOATS) {
            const Vec<float> rounded = load(x + k) * inverse + magic;
            const IntVec n = reinterpret_cast<IntVec>(rounded) - reinterpret_cast<IntVec>(splat(magic));
            const auto shorts = __builtin_convertvector(n, ShortVec);
            std::memcpy(to + k, &shorts, sizeof shorts);
            sum += rounded - magic;
        }
        offsets[g] = -8 * sum_lanes<float>(sum);
    }
    return largest / LARGEST;
}

// Writes outputs n … n + count − 1 of every row, from sums (rows, OUTPUTS).
template <class T>
void write(const Weights& w, const float* sums, int64_t n, int count, int64_t rows, const float* bias, T* out) {
    for (int64_t m = 0; m < rows; ++m)
        for (int c = 0; c < count; c += FLOATS) {
            const int lanes = count - c < FLOATS ? count - c : FLOATS;
            Vec<float> y = load(sums + m * OUTPUTS + c, lanes);
            if (bias) y += load(bias + n + c, lanes);
            store(out + m * w.out + n + c, y, lanes);
        }
}

}  // namespace
}  // namespace hymba
