// Products with few rows of activations, as in decoding: every weight is read from memory once, for all rows together.
//
// Formats of the weights, all output by output:
//   bf16: (out, in).
//   int8: (out, in), and one float scale an output.
//   int4: groups of 64 inputs in 32 bytes, (out, ⌈in/64⌉ · 32), and one bf16 scale a group, (out, ⌈in/64⌉). Byte j of a
//         group holds input j in its low four bits and input 32 + j in its high four; v stands for (v − 8) · scale.
//
// bf16 weights are widened to float beside float activations. Integer weights meet activations rounded to 16-bit
// integers under one scale a row: finer than bf16 unless a row's largest value is hundreds of times its typical one, at
// the speed of 8 bits as long as memory is what limits. Their sums are exact until the scales enter.
//
// An output is summed in the same order whatever the number of threads, and of rows, until the matrix units (amx.h) take
// over: then int8 stays the same bit for bit, and the others to the rounding of a float sum.
#include "amx.h"
#include "kernels.h"

namespace hymba {
namespace {

constexpr int CHUNK = 64;     // inputs taken together, and an int4 group
constexpr int N = 4;          // outputs taken together: as many streams of weights
constexpr int OUTPUTS = 32;   // of one task
constexpr int FLOATS = LANES<float>;
constexpr float LARGEST = 127 * 256;  // of activations as integers: they come apart into two signed bytes
constexpr int MOST_ROWS = VECTOR_BYTES == 64 ? 4 : 2;  // rows taken together: N · MOST_ROWS sums stay in registers

typedef int16_t ShortVec __attribute__((vector_size(VECTOR_BYTES / 2)));

struct Weights {
    const void* data;
    const void* scales;
    int64_t in, out;
};

// The call's activations as the kernels want them, zero from `in` to `width`, a multiple of CHUNK.
struct Activations {
    int64_t rows, width;
    const float* floats;      // (rows, width), in each 2 · FLOATS the even ones first
    const int16_t* integers;  // (rows, width)
    const float* scales;      // (rows,) of the integers
    const IntVec* offsets;    // (rows, width / CHUNK) −8 · sum of each CHUNK of the integers, spread over the lanes
};

template <class X>
HYMBA_INLINE X load_as(const void* from) {
    X x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The row of output n + c. Behind the last output the last stands in, and what it gives is dropped.
template <class T>
HYMBA_INLINE const T* row_of(const void* data, int64_t stride, const Weights& w, int64_t n, int c) {
    return static_cast<const T*>(data) + (n + c < w.out ? n + c : w.out - 1) * stride;
}

// The sums of the lanes of N vectors, each always in the same order.
template <class V, class X>
HYMBA_INLINE void sum_lanes_of(const V (&v)[N], X (&out)[N]) {
    const V ab = interleave_low(v[0], v[1]) + interleave_high(v[0], v[1]);
    const V cd = interleave_low(v[2], v[3]) + interleave_high(v[2], v[3]);
    const Vec<double> x = reinterpret_cast<Vec<double>>(ab), y = reinterpret_cast<Vec<double>>(cd);
    const V abcd = reinterpret_cast<V>(interleave_low(x, y)) + reinterpret_cast<V>(interleave_high(x, y));
    typedef X Four __attribute__((vector_size(sizeof out)));
    Four parts[FLOATS / N];
    std::memcpy(parts, &abcd, sizeof parts);
    for (int i = 1; i < FLOATS / N; ++i) parts[0] += parts[i];
    std::memcpy(out, parts, sizeof out);
}

// Calls chunk(rows, at, k) for each CHUNK of inputs k in [begin, end): the weights rows[c][at …], zeros behind the end.
template <class W, class Chunk>
HYMBA_INLINE void each_chunk(const W* const (&rows)[N], int64_t ahead, int64_t begin, int64_t end, const Chunk& chunk) {
    int64_t k = begin;
    for (; k + CHUNK <= end; k += CHUNK) {
        for (int c = 0; c < N; ++c)
            for (int i = 0; i < CHUNK; i += 64 / static_cast<int>(sizeof(W)))
                __builtin_prefetch(rows[c] + k + i + ahead, 0, 2);
        chunk(rows, k, k);
    }
    if (k == end) return;
    W tail[N][CHUNK] = {};
    for (int c = 0; c < N; ++c) std::memcpy(tail[c], rows[c] + k, static_cast<size_t>(end - k) * sizeof(W));
    const W* const tails[N] = {tail[0], tail[1], tail[2], tail[3]};
    chunk(tails, 0, k);
}

// ---- bf16 ----------------------------------------------------------------------------------------------------------

struct Bfloat {
    static constexpr bool INTEGERS = false;
    static constexpr int AMX_ROWS = 2;  // from which the matrix units are faster
    static int64_t bytes(int64_t in) { return 2 * in; }

#if defined(HYMBA_AMX)
    static void multiply(const Weights& w, const char* weights, int64_t, int, const uint32_t* x, const uint32_t*,
                         int64_t rows, float (&out)[OUTPUTS][amx::ROWS]) {
        amx::multiply(reinterpret_cast<const bf16*>(weights), x, w.in, rows, out[0]);
    }
#endif

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][N]) {
        const bf16* rows[N];
        for (int c = 0; c < N; ++c) rows[c] = row_of<bf16>(w.data, w.in, w, n, c);
        const float* a = x.floats + m * x.width;
        Vec<float> sums[M][N] = {};
        each_chunk(rows, N * w.in, 0, w.in, [&](const bf16* const(&rows)[N], int64_t at, int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int i = 0; i < CHUNK; i += 2 * FLOATS) {
                Vec<float> even[N], odd[N];
#pragma GCC unroll 8
                for (int c = 0; c < N; ++c) {
                    const UintVec pair = load_as<UintVec>(rows[c] + at + i);
                    even[c] = reinterpret_cast<Vec<float>>(pair << 16);
                    odd[c] = reinterpret_cast<Vec<float>>(pair & 0xffff0000u);
                }
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r) {
                    const Vec<float> first = load(a + r * x.width + k + i);
                    const Vec<float> second = load(a + r * x.width + k + i + FLOATS);
#pragma GCC unroll 8
                    for (int c = 0; c < N; ++c) sums[r][c] = sums[r][c] + even[c] * first;
#pragma GCC unroll 8
                    for (int c = 0; c < N; ++c) sums[r][c] = sums[r][c] + odd[c] * second;
                }
            }
        });
        for (int r = 0; r < M; ++r) sum_lanes_of(sums[r], out[r]);
    }
};

// ---- Integers ------------------------------------------------------------------------------------------------------

// Thirty-two weights as 16-bit integers, and the sums of their products with activations.
struct Shorts {
#if defined(HYMBA_AVX512)
    __m512i v;
    static HYMBA_INLINE Shorts bytes(const int8_t* w) { return {_mm512_cvtepi8_epi16(load_as<__m256i>(w))}; }
    static HYMBA_INLINE void nibbles(const uint8_t* w, Shorts& low, Shorts& high) {
        const __m512i both = _mm512_cvtepu8_epi16(load_as<__m256i>(w));
        low.v = _mm512_and_si512(both, _mm512_set1_epi16(15));
        high.v = _mm512_srli_epi16(both, 4);
    }
    HYMBA_INLINE IntVec dot(IntVec sum, const int16_t* x) const {
        return reinterpret_cast<IntVec>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), v, load_as<__m512i>(x)));
    }
#elif defined(HYMBA_AVX2)
    __m256i v[2];
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
    HYMBA_INLINE IntVec dot(IntVec sum, const int16_t* x) const {
        sum = sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(v[0], load_as<__m256i>(x)));
        return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(v[1], load_as<__m256i>(x + 16)));
    }
#else
    int16_t v[32];
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
    HYMBA_INLINE IntVec dot(IntVec sum, const int16_t* x) const {
        for (int i = 0; i < 32; i += FLOATS)
            sum = sum + __builtin_convertvector(load_as<ShortVec>(v + i), IntVec) *
                            __builtin_convertvector(load_as<ShortVec>(x + i), IntVec);
        return sum;
    }
#endif
};

struct Int8 {
    static constexpr bool INTEGERS = true;
    static constexpr int AMX_ROWS = 3;
    static int64_t bytes(int64_t in) { return in; }

#if defined(HYMBA_AMX)
    static void multiply(const Weights& w, const char* weights, int64_t n, int count, const uint32_t* high,
                         const uint32_t* low, int64_t rows, float (&out)[OUTPUTS][amx::ROWS]) {
        alignas(64) int32_t sums[2][OUTPUTS][amx::ROWS];
        amx::multiply(reinterpret_cast<const int8_t*>(weights), high, low, w.in, rows, sums[0][0]);
        for (int c = 0; c < count; ++c) {
            const float scale = static_cast<const float*>(w.scales)[n + c];
            for (int64_t m = 0; m < rows; ++m)
                out[c][m] = static_cast<float>((256.0 * sums[0][c][m] + sums[1][c][m]) * scale);
        }
    }
#endif
    // 256 products a lane, each at most 128 · LARGEST, stay below 2^31.
    static constexpr int64_t BLOCK = 256 * FLOATS;

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][N]) {
        const int8_t* rows[N];
        for (int c = 0; c < N; ++c) rows[c] = row_of<int8_t>(w.data, w.in, w, n, c);
        const int16_t* a = x.integers + m * x.width;
        double totals[M][N] = {};
        for (int64_t begin = 0; begin < w.in; begin += BLOCK) {
            const int64_t end = begin + BLOCK < w.in ? begin + BLOCK : w.in;
            IntVec sums[M][N] = {};
            each_chunk(rows, N * w.in, begin, end, [&](const int8_t* const(&rows)[N], int64_t at, int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int i = 0; i < CHUNK; i += 32) {
                    Shorts pieces[N];
#pragma GCC unroll 8
                    for (int c = 0; c < N; ++c) pieces[c] = Shorts::bytes(rows[c] + at + i);
#pragma GCC unroll 8
                    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
                        for (int c = 0; c < N; ++c) sums[r][c] = pieces[c].dot(sums[r][c], a + r * x.width + k + i);
                }
            });
            for (int r = 0; r < M; ++r) add_exactly(sums[r], totals[r]);
        }
        for (int r = 0; r < M; ++r)
            for (int c = 0; c < N; ++c)
                out[r][c] = static_cast<float>(totals[r][c] * *row_of<float>(w.scales, 1, w, n, c)) * x.scales[m + r];
    }

    // The lanes' sum may pass 2^31, that of their upper or lower halves does not; doubles hold the total exactly.
    static HYMBA_INLINE void add_exactly(const IntVec (&sums)[N], double (&totals)[N]) {
        const IntVec upper[N] = {sums[0] >> 16, sums[1] >> 16, sums[2] >> 16, sums[3] >> 16};
        const IntVec lower[N] = {sums[0] & 0xffff, sums[1] & 0xffff, sums[2] & 0xffff, sums[3] & 0xffff};
        int32_t high[N], low[N];
        sum_lanes_of(upper, high);
        sum_lanes_of(lower, low);
        for (int c = 0; c < N; ++c) totals[c] += 65536.0 * high[c] + low[c];
    }
};

struct Int4 {
    static constexpr bool INTEGERS = true;
    static constexpr int AMX_ROWS = 5;
    static int64_t bytes(int64_t in) { return in / 2; }

#if defined(HYMBA_AMX)
    static void multiply(const Weights& w, const char* weights, int64_t n, int count, const uint32_t* high,
                         const uint32_t* low, int64_t rows, float (&out)[OUTPUTS][amx::ROWS]) {
        const int64_t groups = w.in / CHUNK;
        const bf16* stored = static_cast<const bf16*>(w.scales) + n * groups;
        Scratch<bf16> copy(count < OUTPUTS ? OUTPUTS * groups : 0);
        if (count < OUTPUTS) {
            std::memset(copy, 0, static_cast<size_t>(OUTPUTS * groups) * sizeof(bf16));
            std::memcpy(copy, stored, static_cast<size_t>(count * groups) * sizeof(bf16));
            stored = copy;
        }
        amx::multiply(reinterpret_cast<const uint8_t*>(weights), stored, high, low, groups, rows, out[0]);
    }
#endif
    static constexpr int BLOCK = 64;  // groups whose scales are widened together

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][N]) {
        const int64_t groups = x.width / CHUNK;
        const uint8_t* rows[N];
        for (int c = 0; c < N; ++c) rows[c] = row_of<uint8_t>(w.data, groups * 32, w, n, c);
        Vec<float> sums[M][N] = {};
        for (int64_t begin = 0; begin < groups; begin += BLOCK) {
            const int count = static_cast<int>(groups - begin < BLOCK ? groups - begin : BLOCK);
            float scales[N][BLOCK];
            for (int c = 0; c < N; ++c)
                widen_scales(row_of<bf16>(w.scales, groups, w, n, c) + begin, count, scales[c]);
            for (int g = 0; g < count; ++g) {
                const int16_t* a = x.integers + m * x.width + (begin + g) * CHUNK;
                Shorts low[N], high[N];
#pragma GCC unroll 8
                for (int c = 0; c < N; ++c) __builtin_prefetch(rows[c] + (begin + g) * 32 + N * groups * 32, 0, 2);
#pragma GCC unroll 8
                for (int c = 0; c < N; ++c) Shorts::nibbles(rows[c] + (begin + g) * 32, low[c], high[c]);
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < N; ++c) {
                        const int16_t* from = a + r * x.width;
                        // Four bits hold 8 more than is meant, which the offset takes off again.
                        IntVec sum = x.offsets[(m + r) * groups + begin + g];
                        sum = high[c].dot(low[c].dot(sum, from), from + 32);
                        sums[r][c] = sums[r][c] + __builtin_convertvector(sum, Vec<float>) * scales[c][g];
                    }
            }
        }
        for (int r = 0; r < M; ++r) {
            sum_lanes_of(sums[r], out[r]);
            for (int c = 0; c < N; ++c) out[r][c] *= x.scales[m + r];
        }
    }

    static HYMBA_INLINE void widen_scales(const bf16* stored, int count, float* to) {
        int g = 0;
        for (; g + FLOATS <= count; g += FLOATS) store(to + g, load(stored + g));
        if (g < count && count >= FLOATS) store(to + count - FLOATS, load(stored + count - FLOATS));
        if (count < FLOATS)
            for (; g < count; ++g) to[g] = widen(stored[g]);
    }
};

// ---- Activations ---------------------------------------------------------------------------------------------------

// Copies x to `to`, zeros behind `in`; returns the largest magnitude, NaN if any value is infinite or NaN.
template <class T>
float widen_row(const T* x, int64_t in, int64_t width, float* to) {
    Vec<float> largest = {}, check = {};
    for (int64_t k = 0; k < width; k += FLOATS) {
        const Vec<float> v = k + FLOATS <= in ? load(x + k) : load(x + k, in > k ? static_cast<int>(in - k) : 0);
        const Vec<float> size = v < 0 ? -v : v;
        largest = size > largest ? size : largest;
        check += v * 0.0f;
        store(to + k, v);
    }
    float most = 0;
    for (int i = 0; i < FLOATS; ++i) most = largest[i] > most ? largest[i] : most;
    return most + sum_lanes<float>(check);
}

// Even inputs before odd ones within each 2 · FLOATS, as a pair of bf16 weights in 32 bits comes apart.
void part(const float* x, int64_t width, float* to) {
    for (int64_t k = 0; k < width; k += 2 * FLOATS)
        for (int i = 0; i < FLOATS; ++i) {
            to[k + i] = x[k + 2 * i];
            to[k + FLOATS + i] = x[k + 2 * i + 1];
        }
}

// Rounds a row to integers under one scale, and returns that: NaN, as all outputs shall be, if the row is not finite.
float quantize(const float* x, float largest, int64_t width, int16_t* to, IntVec* offsets) {
    const float inverse = largest > 1e-30f ? LARGEST / largest : 0.0f;
    const float magic = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to an integer
    for (int64_t g = 0; g * CHUNK < width; ++g) {
        IntVec sum = {};
        for (int64_t k = g * CHUNK; k < (g + 1) * CHUNK; k += FLOATS) {
            const Vec<float> rounded = load(x + k) * inverse + magic;
            const IntVec n = reinterpret_cast<IntVec>(rounded) - reinterpret_cast<IntVec>(splat(magic));
            const auto shorts = __builtin_convertvector(n, ShortVec);
            std::memcpy(to + k, &shorts, sizeof shorts);
            sum += n;
        }
        offsets[g] = -8 * sum;
    }
    return largest / LARGEST;
}

// ---- Driver --------------------------------------------------------------------------------------------------------

// Outputs n … n + N − 1 of every row, M rows at a time: the next M find the same weights in the first-level cache.
template <class Format, int M>
void run(const Weights& w, int64_t n, const Activations& x, int64_t rows, float* out) {
    for (int64_t m = 0; m < rows; m += M) {
        float sums[M][N];
        Format::template tile<M>(w, n, x, m, sums);
        for (int r = 0; r < M && m + r < rows; ++r)
            for (int c = 0; c < N && n + c < w.out; ++c) out[(m + r) * OUTPUTS + c] = sums[r][c];
    }
}

// Calls block(n, count, sums) for the outputs n … n + count − 1, OUTPUTS at a time, and writes the sums (rows, OUTPUTS)
// that it leaves. Each thread gets a few stretches of outputs, long enough for its prefetches to be its own.
template <class T, class Block>
void each_block(const Weights& w, T* out, const float* bias, int64_t rows, int threads, const Block& block) {
    const int64_t blocks = (w.out + OUTPUTS - 1) / OUTPUTS, wanted = threads > 1 ? 6 * threads : 1;
    const int64_t tasks = blocks < wanted ? blocks : wanted;
    parallel_for(tasks, threads, [&](int64_t task) {
        Scratch<float> sums(rows * OUTPUTS);
        for (int64_t i = blocks * task / tasks; i < blocks * (task + 1) / tasks; ++i) {
            const int64_t n = i * OUTPUTS;
            const int count = static_cast<int>(w.out - n < OUTPUTS ? w.out - n : OUTPUTS);
            block(n, count, sums);
            for (int64_t m = 0; m < rows; ++m)
                for (int c = 0; c < count; c += FLOATS) {
                    const int lanes = count - c < FLOATS ? count - c : FLOATS;
                    Vec<float> y = load(sums + m * OUTPUTS + c, lanes);
                    if (bias) y += load(bias + n + c, lanes);
                    store(out + m * w.out + n + c, y, lanes);
                }
        }
    });
}

#if defined(HYMBA_AMX)
// The same by the matrix units, where `in` is a multiple of CHUNK and there are not more rows than they take.
template <class Format, class T>
void linear_amx(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
    const int64_t in = w.in, words = in * (Format::INTEGERS ? 1 : 2) / 4, bytes = Format::bytes(in);
    Scratch<uint32_t> first(rows * words), second(rows * words);
    Scratch<float> scales(rows);
    if constexpr (Format::INTEGERS) {
        Scratch<float> row(in);
        Scratch<int16_t> integers(in);
        Scratch<IntVec> offsets(in / CHUNK);
        Scratch<int8_t> high(rows * in), low(rows * in);
        for (int64_t m = 0; m < rows; ++m) {
            scales[m] = quantize(row, widen_row(x + m * in, in, in, row), in, integers, offsets);
            for (int64_t k = 0; k < in; ++k) {
                high[m * in + k] = static_cast<int8_t>((integers[k] + 128) >> 8);
                low[m * in + k] = static_cast<int8_t>(integers[k]);
            }
        }
        amx::turn(reinterpret_cast<const char*>(static_cast<int8_t*>(high)), rows, words, first);
        amx::turn(reinterpret_cast<const char*>(static_cast<int8_t*>(low)), rows, words, second);
    } else {
        amx::turn(reinterpret_cast<const char*>(x), rows, words, first);
    }
    each_block(w, out, bias, rows, threads, [&](int64_t n, int count, float* sums) {
        const char* weights = static_cast<const char*>(w.data) + n * bytes;
        Scratch<char> copy(count < OUTPUTS ? OUTPUTS * bytes : 0);
        if (count < OUTPUTS) {  // the tiles are full: zeros stand behind the last output
            std::memcpy(copy, weights, static_cast<size_t>(count * bytes));
            std::memset(copy + count * bytes, 0, static_cast<size_t>((OUTPUTS - count) * bytes));
            weights = copy;
        }
        alignas(64) float block[OUTPUTS][amx::ROWS];
        Format::multiply(w, weights, n, count, first, second, rows, block);
        for (int64_t m = 0; m < rows; ++m)
            for (int c = 0; c < count; ++c) sums[m * OUTPUTS + c] = block[c][m] * (Format::INTEGERS ? scales[m] : 1);
    });
}
#endif

template <class Format, class T>
void linear(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
#if defined(HYMBA_AMX)
    if constexpr (Format::INTEGERS || std::is_same_v<T, bf16>)
        if (rows >= Format::AMX_ROWS && rows <= amx::ROWS && w.in % CHUNK == 0 && amx::usable())
            return linear_amx<Format>(w, x, out, bias, rows, threads);
#endif
    const int together = rows == 1 ? 1 : rows == 2 ? 2 : MOST_ROWS;
    const int64_t width = (w.in + CHUNK - 1) / CHUNK * CHUNK, all = (rows + together - 1) / together * together;
    const int64_t groups = width / CHUNK;
    Scratch<float> row(width), floats(Format::INTEGERS ? 0 : all * width), scales(all);
    Scratch<IntVec> offsets(all * groups);
    Scratch<int16_t> integers(Format::INTEGERS ? all * width : 0);
    for (int64_t m = 0; m < all; ++m) {
        const bool real = m < rows;  // the rest fill the last tile up
        const float largest = widen_row(real ? x + m * w.in : x, real ? w.in : 0, width, row);
        if (Format::INTEGERS)
            scales[m] = quantize(row, largest, width, integers + m * width, offsets + m * groups);
        else
            part(row, width, floats + m * width);
    }
    const Activations a{all, width, floats, integers, scales, offsets};
    each_block(w, out, bias, rows, threads, [&](int64_t n, int count, float* sums) {
        for (int c = 0; c < count; c += N) {
            if (together == 1) run<Format, 1>(w, n + c, a, rows, sums + c);
            if (together == 2) run<Format, 2>(w, n + c, a, rows, sums + c);
            if (together > 2) run<Format, MOST_ROWS>(w, n + c, a, rows, sums + c);
        }
    });
}

template <class Format>
void linear(const Weights& w, int bf16_x, const void* x, void* out, const float* bias, int64_t rows, int threads) {
    if (bf16_x)
        linear<Format>(w, static_cast<const bf16*>(x), static_cast<bf16*>(out), bias, rows, threads);
    else
        linear<Format>(w, static_cast<const float*>(x), static_cast<float*>(out), bias, rows, threads);
}

// ---- Dequantisation ------------------------------------------------------------------------------------------------

// Writes a row of the matrix, given that value(k, bytes) puts CHUNK of its values from k on, and scale(k) says theirs.
template <class T, class Value, class Scale>
HYMBA_INLINE void dequantize_row(int64_t in, T* out, const Value& value, const Scale& scale) {
    typedef int8_t Bytes __attribute__((vector_size(FLOATS)));
    for (int64_t k = 0; k < in; k += CHUNK) {
        int8_t values[CHUNK];
        value(k, values);
        const float factor = scale(k);
        for (int i = 0; i < CHUNK && k + i < in; i += FLOATS) {
            const ShortVec half = __builtin_convertvector(load_as<Bytes>(values + i), ShortVec);  // GCC needs the step
            const IntVec whole = __builtin_convertvector(half, IntVec);
            const int64_t rest = in - k - i;
            store(out + k + i, __builtin_convertvector(whole, Vec<float>) * factor,
                  rest < FLOATS ? static_cast<int>(rest) : FLOATS);
        }
    }
}

template <class T>
void dequantize(int bits, const Weights& w, T* out, int threads) {
    const int64_t groups = (w.in + CHUNK - 1) / CHUNK;
    const int8_t* bytes = static_cast<const int8_t*>(w.data);
    const auto eight = [&](int64_t n) {
        const int8_t* row = bytes + n * w.in;
        const auto value = [&](int64_t k, int8_t* to) __attribute__((always_inline)) {
            if (k + CHUNK <= w.in)
                std::memcpy(to, row + k, CHUNK);
            else
                std::memcpy(to, row + k, static_cast<size_t>(w.in - k));
        };
        const float scale = static_cast<const float*>(w.scales)[n];
        dequantize_row(w.in, out + n * w.in, value, [&](int64_t) { return scale; });
    };
    const auto four = [&](int64_t n) {
        const auto value = [&](int64_t k, int8_t* to) __attribute__((always_inline)) {
            const int8_t* halves = bytes + (n * groups * CHUNK + k) / 2;
            for (int i = 0; i < CHUNK / 2; ++i) {
                to[i] = static_cast<int8_t>((halves[i] & 15) - 8);
                to[CHUNK / 2 + i] = static_cast<int8_t>((halves[i] >> 4 & 15) - 8);
            }
        };
        const bf16* scales = static_cast<const bf16*>(w.scales) + n * groups;
        dequantize_row(w.in, out + n * w.in, value, [&](int64_t k) { return widen(scales[k / CHUNK]); });
    };
    parallel_for((w.out + OUTPUTS - 1) / OUTPUTS, threads, [&](int64_t task) {
        const int64_t end = (task + 1) * OUTPUTS < w.out ? (task + 1) * OUTPUTS : w.out;
        for (int64_t n = task * OUTPUTS; n < end; ++n) bits == 8 ? eight(n) : four(n);
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

// out (rows, outputs) = x (rows, in) · weightᵀ + bias. `bits` is 16, 8 or 4 a weight; `scales` is null for 16, `bias`
// (outputs,) or null. x and out are both bf16 or both float. Everything is contiguous.
HYMBA_API void hymba_linear(int bits, const void* weight, const void* scales, const float* bias, const void* x,
                            int bf16_x, void* out, int64_t rows, int64_t in, int64_t outputs, int threads) {
    using namespace hymba;
    const Weights w{weight, scales, in, outputs};
    if (bits == 16) linear<Bfloat>(w, bf16_x, x, out, bias, rows, threads);
    if (bits == 8) linear<Int8>(w, bf16_x, x, out, bias, rows, threads);
    if (bits == 4) linear<Int4>(w, bf16_x, x, out, bias, rows, threads);
}
