// Quantised matrices written out in bf16 or float, for products with many rows of activations.
#include "weights.h"

namespace hymba {
namespace {

constexpr int OUTPUTS = 16;  // of one task
constexpr int FLOATS = LANES<float>;

typedef int16_t ShortVec __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int8_t ByteVec __attribute__((vector_size(VECTOR_BYTES / 4)));

HYMBA_INLINE Vec<float> whole(const int8_t* values) {
#if defined(HYMBA_AVX512)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(values)));
#else
    const ShortVec half = __builtin_convertvector(load_as<ByteVec>(values), ShortVec);  // GCC needs the step
    return __builtin_convertvector(__builtin_convertvector(half, IntVec), Vec<float>);
#endif
}

// Writes `count` ≤ CHUNK of `values`, scaled.
template <class T>
HYMBA_INLINE void scale_some(const int8_t* values, float scale, T* out, int64_t count) {
    int8_t copy[CHUNK] = {};
    std::memcpy(copy, values, static_cast<size_t>(count));
    for (int i = 0; i < count; i += FLOATS)
        store(out + i, whole(copy + i) * scale, count - i < FLOATS ? static_cast<int>(count - i) : FLOATS);
}

// Stores past the caches where the place allows: what is written is a whole matrix, and lines that are only written need
// not be read first.
template <class V>
HYMBA_INLINE void store_past(void* to, V x) {
#if defined(HYMBA_AVX512)
    static_assert(sizeof x == 64);
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
        return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(x));
#endif
    std::memcpy(to, &x, sizeof x);
}

// A vector of bf16 pairs' worth of scaled values. Finite ones alone: the check for NaN that store() makes is left out.
HYMBA_INLINE void store_finite(float* to, Vec<float> x, Vec<float> y) {
    store_past(to, x);
    store_past(to + FLOATS, y);
}
HYMBA_INLINE void store_finite(bf16* to, Vec<float> x, Vec<float> y) {
#if defined(HYMBA_AVX512)
    const auto round = [](Vec<float> v) __attribute__((always_inline)) {
        const UintVec bits = reinterpret_cast<UintVec>(v);
        return reinterpret_cast<__m512i>(bits + 0x7fffu + ((bits >> 16) & 1u));
    };
    static constexpr struct Odd {  // the upper halves of both, one vector behind the other
        uint16_t at[32];
        constexpr Odd() : at() {
            for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(2 * i + 1);
        }
    } odd;
    const __m512i both = _mm512_permutex2var_epi16(round(x), load_as<__m512i>(odd.at), round(y));
    store_past(to, both);
#else
    store(to, x);
    store(to + FLOATS, y);
#endif
}

template <class T>
void widen8(const int8_t* values, float scale, int64_t in, T* out) {
    int64_t k = 0;
    for (; k + CHUNK <= in; k += CHUNK)
#pragma GCC unroll 8
        for (int i = 0; i < CHUNK; i += 2 * FLOATS)
            store_finite(out + k + i, whole(values + k + i) * scale, whole(values + k + i + FLOATS) * scale);
    scale_some(values + k, scale, out + k, in - k);
}

template <class T>
HYMBA_INLINE void widen_group(const uint8_t* halves, bf16 scale, T* out) {
    int8_t values[CHUNK];
    for (int i = 0; i < CHUNK / 2; ++i) {
        values[i] = static_cast<int8_t>((halves[i] & 15) - 8);
        values[CHUNK / 2 + i] = static_cast<int8_t>((halves[i] >> 4) - 8);
    }
    for (int i = 0; i < CHUNK; i += 2 * FLOATS)
        store_finite(out + i, whole(values + i) * widen(scale), whole(values + i + FLOATS) * widen(scale));
}

#if defined(HYMBA_AVX512)
// A group has but sixteen values: they are rounded once and then looked up.
HYMBA_INLINE void widen_group(const uint8_t* halves, bf16 scale, bf16* out) {
    const Vec<float> steps = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const __m512i table = _mm512_castsi256_si512(reinterpret_cast<__m256i>(narrow(steps * widen(scale))));
    const __m512i both = _mm512_cvtepu8_epi16(load_as<__m256i>(halves));
    const __m512i low = _mm512_permutexvar_epi16(_mm512_and_si512(both, _mm512_set1_epi16(15)), table);
    const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table);
    store_past(out, low);
    store_past(out + CHUNK / 2, high);
}
#endif

template <class T>
void widen4(const uint8_t* values, const bf16* scales, int64_t in, T* out) {
    int64_t k = 0;
    for (; k + CHUNK <= in; k += CHUNK) widen_group(values + k / 2, scales[k / CHUNK], out + k);
    if (k == in) return;
    T last[CHUNK];
    widen_group(values + k / 2, scales[k / CHUNK], last);
    std::memcpy(out + k, last, static_cast<size_t>(in - k) * sizeof(T));
}

template <class T>
void dequantize(int bits, const Weights& w, T* out, int threads) {
    const int64_t groups = chunks_of(w.in);
    parallel_for((w.out + OUTPUTS - 1) / OUTPUTS, threads, [&](int64_t task) {
        const int64_t end = (task + 1) * OUTPUTS < w.out ? (task + 1) * OUTPUTS : w.out;
        for (int64_t n = task * OUTPUTS; n < end; ++n) {
            if (bits == 8)
                widen8(static_cast<const int8_t*>(w.data) + n * w.in, static_cast<const float*>(w.scales)[n], w.in,
                       out + n * w.in);
            else
                widen4(static_cast<const uint8_t*>(w.data) + n * groups * CHUNK / 2,
                       static_cast<const bf16*>(w.scales) + n * groups, w.in, out + n * w.in);
        }
#if defined(HYMBA_AVX512)
        _mm_sfence();  // other threads read what went past the caches
#endif
    });
}

}  // namespace
}  // namespace hymba

// Writes the matrix (outputs, in) that an 8- or 4-bit weight stands for, in bf16 or float.
HYMBA_API void hymba_dequantize(int bits, const void* weight, const void* scales, int bf16_out, void* out, int64_t in,
                                int64_t outputs, int threads) {
    using namespace hymba;
    const Weights w{weight, scales, in, outputs};
    if (bf16_out)
        dequantize(bits, w, static_cast<bf16*>(out), threads);
    else
        dequantize(bits, w, static_cast<float*>(out), threads);
}
