// Products with few rows of activations, as in decoding: every weight is read from memory once, for all rows together.
// weights.h has the formats.
//
// bf16 weights are widened to float beside float activations. Integer weights meet activations rounded to 16-bit
// integers under one scale a row: finer than bf16 unless a row's largest value is hundreds of times its typical one, at
// the speed of 8 bits as long as memory is what limits. Their sums are exact until the scales enter.
//
// One row reads its weights as one stream, output after output, for that is how memory is fastest. Where `in` is not a
// multiple of CHUNK, the last chunk of weights reaches back over the one before, and the activations there are zero.
//
// The result of a row is the same bit for bit whatever the number of threads and of rows: the weight's format and shape
// and the processor alone decide in which order an output is summed. Only int8, whose sums are exact, changes from
// vectors to the matrix units (amx.h) with the number of rows.
#include "amx.h"
#include "weights.h"

namespace hymba {
namespace {

constexpr int QUAD = 4;               // outputs whose lanes are summed together
constexpr int OUTPUTS = 32;           // outputs written together
constexpr int FLOATS = LANES<float>;
constexpr int64_t AHEAD = 8192;       // bytes that a single stream is called for before it is needed
constexpr float LARGEST = 127 * 256;  // of activations as integers: they come apart into two signed bytes
// Rows taken together: the sums stay in registers. Many rows take the larger tile, few would leave it half empty.
constexpr int FEW_ROWS = VECTOR_BYTES == 64 ? 4 : 2, MANY_ROWS = VECTOR_BYTES == 64 ? 6 : 2;
constexpr int64_t MANY = 17, TOGETHER = 768;  // rows; those whose activations are arranged at a time

template <int M>
constexpr int STREAMS = M == 1 ? 1 : 2;  // outputs read together, for M rows

typedef int16_t ShortVec __attribute__((vector_size(VECTOR_BYTES / 2)));

// The call's activations as the kernels want them, of `width` values each: chunks_of(in) chunks, made even in number.
struct Activations {
    int64_t rows, width;
    const float* floats;      // (rows, width); beside bf16 weights the even ones first in each 2 · FLOATS
    const bf16* halves;       // (rows, width)
    const int16_t* integers;  // (rows, width)
    const float* scales;      // (rows,) of the integers
    const float* offsets;     // (rows, width / CHUNK) −8 · sum of each CHUNK of the integers
};

#if defined(HYMBA_AMX)
// The same for the matrix units.
struct Turned {
    int64_t width;           // 4, 8 or 16: the rows and zeros behind them
    const char* first;       // bf16 or high bytes, turned
    const char* second;      // low bytes, turned
    const float* scales;     // (width,) of the integers
    const int32_t* offsets;  // (chunks, width)
};
#endif

// The row of output n + c. Behind the last output the last stands in, and what it gives is dropped.
template <class T>
HYMBA_INLINE const T* row_of(const void* data, int64_t stride, const Weights& w, int64_t n, int c) {
    return static_cast<const T*>(data) + (n + c < w.out ? n + c : w.out - 1) * stride;
}

HYMBA_INLINE void prefetch(const void* at, int64_t bytes) {
    __builtin_prefetch(static_cast<const char*>(at) + bytes, 0, 2);
}

// Calls chunk(rows, at, k) for each CHUNK of inputs k in [begin, end), a multiple of CHUNK or `in`: its weights are
// rows[c][at …], and those that the chunk before has had meet zeros.
template <class W, int S, class Chunk>
HYMBA_INLINE void each_chunk(const W* const (&rows)[S], int64_t in, int64_t begin, int64_t end, const Chunk& chunk) {
    const int64_t ahead = S == 1 ? AHEAD : S * in * static_cast<int64_t>(sizeof(W));
    int64_t k = begin;
    for (; k + CHUNK <= end; k += CHUNK) {
        for (int c = 0; c < S; ++c)
            for (int i = 0; i < CHUNK; i += 64 / static_cast<int>(sizeof(W))) prefetch(rows[c] + k + i, ahead);
        chunk(rows, k, k);
    }
    if (k == end) return;
    if (in >= CHUNK) return chunk(rows, in - CHUNK, k);
    W copies[S][CHUNK] = {};
    const W* ends[S];
    for (int c = 0; c < S; ++c) {
        std::memcpy(copies[c] + CHUNK - in, rows[c], static_cast<size_t>(in) * sizeof(W));
        ends[c] = copies[c];
    }
    chunk(ends, 0, k);
}

// What a kernel reads of the activations.
enum class Reads { floats, parted, halves, integers };

// ---- float ---------------------------------------------------------------------------------------------------------

struct Float {
    static constexpr Reads READS = Reads::floats;
    static constexpr bool ALIGNED_LEFT = false;
    static constexpr int AMX_ROWS = 0;  // the matrix units do not multiply floats
    static int64_t bytes(int64_t in) { return 4 * in; }

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][QUAD]) {
        constexpr int S = STREAMS<M>;
        const float* a = x.floats + m * x.width;
        Vec<float> sums[M][QUAD];
        for (int q = 0; q < QUAD; q += S) {
            const float* rows[S];
            for (int c = 0; c < S; ++c) rows[c] = row_of<float>(w.data, w.in, w, n, q + c);
            Vec<float> first[M][S] = {}, second[M][S] = {};
            each_chunk(rows, w.in, 0, w.in, [&](const float* const(&rows)[S], int64_t at, int64_t k)
                                                __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int i = 0; i < CHUNK; i += 2 * FLOATS)
#pragma GCC unroll 8
                    for (int c = 0; c < S; ++c) {
                        const Vec<float> v = load(rows[c] + at + i), u = load(rows[c] + at + i + FLOATS);
#pragma GCC unroll 8
                        for (int r = 0; r < M; ++r) {
                            first[r][c] += v * load(a + r * x.width + k + i);
                            second[r][c] += u * load(a + r * x.width + k + i + FLOATS);
                        }
                    }
            });
            for (int r = 0; r < M; ++r)
                for (int c = 0; c < S; ++c) sums[r][q + c] = first[r][c] + second[r][c];
        }
        for (int r = 0; r < M; ++r) sum_lanes_of(sums[r], out[r]);
    }
};

// ---- bf16 ----------------------------------------------------------------------------------------------------------

struct Bfloat {
    static constexpr Reads READS = Reads::parted;
    static constexpr bool ALIGNED_LEFT = false;
    static constexpr int AMX_ROWS = 1;  // from which the matrix units serve
    static int64_t bytes(int64_t in) { return 2 * in; }

#if defined(HYMBA_AMX)
    static void multiply(const Weights&, const amx::Block& b, int64_t, const Turned& x,
                         float (&out)[OUTPUTS][amx::ROWS]) {
        amx::multiply_bf16(b, x.first, x.width, out[0]);
    }
#endif

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][QUAD]) {
        constexpr int S = STREAMS<M>;
        const float* a = x.floats + m * x.width;
        Vec<float> sums[M][QUAD];
        for (int q = 0; q < QUAD; q += S) {
            const bf16* rows[S];
            for (int c = 0; c < S; ++c) rows[c] = row_of<bf16>(w.data, w.in, w, n, q + c);
            Vec<float> even[M][S] = {}, odd[M][S] = {};
            each_chunk(rows, w.in, 0, w.in, [&](const bf16* const(&rows)[S], int64_t at, int64_t k)
                                                __attribute__((always_inline)) {
#pragma GCC unroll 8
                for (int i = 0; i < CHUNK; i += 2 * FLOATS) {
                    UintVec pairs[S];
#pragma GCC unroll 8
                    for (int c = 0; c < S; ++c) pairs[c] = load_as<UintVec>(rows[c] + at + i);
#pragma GCC unroll 8
                    for (int r = 0; r < M; ++r) {
                        const float* from = a + r * x.width + k + i;
#pragma GCC unroll 8
                        for (int c = 0; c < S; ++c) {
                            even[r][c] += reinterpret_cast<Vec<float>>(pairs[c] << 16) * load(from);
                            odd[r][c] += reinterpret_cast<Vec<float>>(pairs[c] & 0xffff0000u) * load(from + FLOATS);
                        }
                    }
                }
            });
            for (int r = 0; r < M; ++r)
                for (int c = 0; c < S; ++c) sums[r][q + c] = even[r][c] + odd[r][c];
        }
        for (int r = 0; r < M; ++r) sum_lanes_of(sums[r], out[r]);
    }
};

#if defined(HYMBA_BF16_DOT)
// The same with products of bf16 pairs (VDPBF16PS), where the processor has them.
struct BfloatDot {
    static constexpr Reads READS = Reads::halves;
    static constexpr bool ALIGNED_LEFT = false;
    static int64_t bytes(int64_t in) { return 2 * in; }

    static bool usable() {
        static const bool answer = __builtin_cpu_supports("avx512bf16");
        return answer;
    }

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][QUAD]) {
        constexpr int S = STREAMS<M>;
        const bf16* a = x.halves + m * x.width;
        Vec<float> sums[M][QUAD];
        for (int q = 0; q < QUAD; q += S) {
            const bf16* rows[S];
            for (int c = 0; c < S; ++c) rows[c] = row_of<bf16>(w.data, w.in, w, n, q + c);
            __m512 first[M][S] = {}, second[M][S] = {};
            each_chunk(rows, w.in, 0, w.in, [&](const bf16* const(&rows)[S], int64_t at, int64_t k)
                                                __attribute__((always_inline)) {
                __m512bh low[S], high[S];
#pragma GCC unroll 8
                for (int c = 0; c < S; ++c) {
                    low[c] = load_as<__m512bh>(rows[c] + at);
                    high[c] = load_as<__m512bh>(rows[c] + at + 32);
                }
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r) {
                    const __m512bh u = load_as<__m512bh>(a + r * x.width + k);
                    const __m512bh v = load_as<__m512bh>(a + r * x.width + k + 32);
#pragma GCC unroll 8
                    for (int c = 0; c < S; ++c) {
                        first[r][c] = _mm512_dpbf16_ps(first[r][c], low[c], u);
                        second[r][c] = _mm512_dpbf16_ps(second[r][c], high[c], v);
                    }
                }
            });
            for (int r = 0; r < M; ++r)
                for (int c = 0; c < S; ++c) sums[r][q + c] = reinterpret_cast<Vec<float>>(first[r][c] + second[r][c]);
        }
        for (int r = 0; r < M; ++r) sum_lanes_of(sums[r], out[r]);
    }
};
#endif

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
    static constexpr Reads READS = Reads::integers;
    static constexpr bool ALIGNED_LEFT = false;
    static constexpr int AMX_ROWS = 3;
    static int64_t bytes(int64_t in) { return in; }

#if defined(HYMBA_AMX)
    static void multiply(const Weights& w, const amx::Block& b, int64_t n, const Turned& x,
                         float (&out)[OUTPUTS][amx::ROWS]) {
        alignas(64) int32_t sums[2][OUTPUTS][amx::ROWS] = {};
        amx::multiply_int8(b, x.first, x.second, x.width, sums[0][0]);
        for (int c = 0; c < OUTPUTS; ++c) {
            const double scale = static_cast<const float*>(w.scales)[n + c];
            for (int m = 0; m < amx::ROWS; ++m)
                out[c][m] = static_cast<float>((256.0 * sums[0][c][m] + sums[1][c][m]) * scale);
        }
    }
#endif

    // 512 products a lane, each at most 128 · LARGEST, stay below 2^31.
    static constexpr int64_t BLOCK = 512 * FLOATS;

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][QUAD]) {
        double totals[M][QUAD] = {};
        for (int64_t begin = 0; begin < w.in; begin += BLOCK) {
            const int64_t end = begin + BLOCK < w.in ? begin + BLOCK : w.in;
            IntVec sums[M][QUAD];
            for (int q = 0; q < QUAD; q += STREAMS<M>) add_up<M>(w, n, q, x, m, begin, end, sums);
            for (int r = 0; r < M; ++r) add_exactly(sums[r], totals[r]);
        }
        for (int r = 0; r < M; ++r)
            for (int c = 0; c < QUAD; ++c)
                out[r][c] = static_cast<float>(totals[r][c] * *row_of<float>(w.scales, 1, w, n, c)) * x.scales[m + r];
    }

    // The sums of outputs n + q and, if STREAMS, n + q + 1 over the inputs from `begin` to `end`.
    template <int M>
    static HYMBA_INLINE void add_up(const Weights& w, int64_t n, int q, const Activations& x, int64_t m, int64_t begin,
                                    int64_t end, IntVec (&sums)[M][QUAD]) {
        constexpr int S = STREAMS<M>;
        const int16_t* a = x.integers + m * x.width;
        const int8_t* rows[S];
        for (int c = 0; c < S; ++c) rows[c] = row_of<int8_t>(w.data, w.in, w, n, q + c);
        IntVec first[M][S] = {}, second[M][S] = {};
        each_chunk(rows, w.in, begin, end, [&](const int8_t* const(&rows)[S], int64_t at, int64_t k)
                                               __attribute__((always_inline)) {
            Shorts low[S], high[S];
#pragma GCC unroll 8
            for (int c = 0; c < S; ++c) {
                low[c] = Shorts::bytes(rows[c] + at);
                high[c] = Shorts::bytes(rows[c] + at + 32);
            }
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < S; ++c) {
                    first[r][c] = low[c].dot(first[r][c], a + r * x.width + k);
                    second[r][c] = high[c].dot(second[r][c], a + r * x.width + k + 32);
                }
        });
        for (int r = 0; r < M; ++r)
            for (int c = 0; c < S; ++c) sums[r][q + c] = first[r][c] + second[r][c];
    }

    // The lanes' sum may pass 2^31, that of their upper or lower halves does not; doubles hold the total exactly.
    static HYMBA_INLINE void add_exactly(const IntVec (&sums)[QUAD], double (&totals)[QUAD]) {
        const IntVec upper[QUAD] = {sums[0] >> 16, sums[1] >> 16, sums[2] >> 16, sums[3] >> 16};
        const IntVec lower[QUAD] = {sums[0] & 0xffff, sums[1] & 0xffff, sums[2] & 0xffff, sums[3] & 0xffff};
        int32_t high[QUAD], low[QUAD];
        sum_lanes_of(upper, high);
        sum_lanes_of(lower, low);
        for (int c = 0; c < QUAD; ++c) totals[c] += 65536.0 * high[c] + low[c];
    }
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
#else
    static constexpr int COUNT = 1;
    Shorts low, high;
    HYMBA_INLINE Groups(const uint8_t* w, bool) { Shorts::nibbles(w, low, high); }
    HYMBA_INLINE IntVec dot(const int16_t* x) const { return high.dot(low.dot(IntVec{}, x), x + 32); }
    static HYMBA_INLINE Vec<float> spread(Vec<float> scales, int g) { return splat(scales[g]); }
    static void arrange(int16_t*, int64_t) {}
#endif
};

struct Int4 {
    static constexpr Reads READS = Reads::integers;
    static constexpr bool ALIGNED_LEFT = true;
    static constexpr int AMX_ROWS = 1;
    static int64_t bytes(int64_t in) { return chunks_of(in) * CHUNK / 2; }

#if defined(HYMBA_AMX)
    static void multiply(const Weights& w, const amx::Block& b, int64_t n, const Turned& x,
                         float (&out)[OUTPUTS][amx::ROWS]) {
        const int64_t groups = chunks_of(w.in);
        for (int c = 0; c < OUTPUTS; c += 16)
            amx::multiply_int4(b.weights + c * b.bytes, static_cast<const bf16*>(w.scales) + (n + c) * groups, x.first,
                               x.second, x.offsets, groups, x.width, out[c]);
    }
#endif

    template <int M>
    static void tile(const Weights& w, int64_t n, const Activations& x, int64_t m, float (&out)[M][QUAD]) {
        Vec<float> sums[M][QUAD];
        for (int q = 0; q < QUAD; q += STREAMS<M>) add_up<M>(w, n, q, x, m, sums);
        for (int r = 0; r < M; ++r) {
            sum_lanes_of(sums[r], out[r]);
            for (int c = 0; c < QUAD; ++c) out[r][c] *= x.scales[m + r];
        }
    }

    template <int M>
    static HYMBA_INLINE void add_up(const Weights& w, int64_t n, int q, const Activations& x, int64_t m,
                                    Vec<float> (&out)[M][QUAD]) {
        constexpr int S = STREAMS<M>;
        const int64_t groups = chunks_of(w.in), ahead = S == 1 ? AHEAD : S * groups * 32;
        const uint8_t* rows[S];
        for (int c = 0; c < S; ++c) rows[c] = row_of<uint8_t>(w.data, groups * 32, w, n, q + c);
        Vec<float> sums[M][S] = {};
        for (int64_t begin = 0; begin < groups; begin += FLOATS) {
            const int count = static_cast<int>(groups - begin < FLOATS ? groups - begin : FLOATS);
            Vec<float> scales[S];
            for (int c = 0; c < S; ++c) {
                scales[c] = load(row_of<bf16>(w.scales, groups, w, n, q + c) + begin, count);
                // Four bits hold 8 more than is meant, which the offset takes off again.
                for (int r = 0; r < M; ++r)
                    sums[r][c] += scales[c] * load(x.offsets + (m + r) * x.width / CHUNK + begin, count);
            }
            for (int g = 0; g < count; g += Groups::COUNT)
                for (int c = 0; c < S; ++c) {
                    const uint8_t* from = rows[c] + (begin + g) * 32;
                    prefetch(from, ahead);
                    const Groups values(from, g + 1 < count);
                    const Vec<float> scale = Groups::spread(scales[c], g);
#pragma GCC unroll 8
                    for (int r = 0; r < M; ++r) {
                        const int16_t* a = x.integers + (m + r) * x.width + (begin + g) * CHUNK;
                        sums[r][c] += __builtin_convertvector(values.dot(a), Vec<float>) * scale;
                    }
                }
        }
        for (int r = 0; r < M; ++r)
            for (int c = 0; c < S; ++c) out[r][q + c] = sums[r][c];
    }
};

// ---- Activations ---------------------------------------------------------------------------------------------------

// Copies a row to `to` as floats, zeros behind it up to `width`. What is more than whole chunks comes at the start of
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

#if defined(HYMBA_AMX)
// Puts the upper half of every second group first, as amx::unpack does with the weights.
void swap_second_groups(char* high, char* low, int64_t width) {
    for (char* x : {high, low})
        for (int64_t k = CHUNK; k < width; k += 2 * CHUNK) {
            const __m512i v = load_as<__m512i>(x + k);
            const __m512i turned = _mm512_shuffle_i64x2(v, v, 0x4e);
            std::memcpy(x + k, &turned, sizeof turned);
        }
}
#endif

// ---- Driver --------------------------------------------------------------------------------------------------------

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

// Outputs begin … end − 1 of every row, M rows at a time. Few rows find the same weights in the first-level cache; of many,
// a tile's activations stay there while the weights come from the second level.
template <class Format, int M, class T>
void run(const Weights& w, int64_t begin, int64_t end, const Activations& x, int64_t rows, const float* bias, T* out) {
    const int64_t block = rows < MANY ? rows : M;  // rows whose outputs are written together
    Scratch<float> sums((block + M) * OUTPUTS);
    for (int64_t first = 0; first < rows; first += block) {
        const int64_t height = rows - first < block ? rows - first : block;
        for (int64_t n = begin; n < end; n += OUTPUTS) {
            const int count = static_cast<int>(end - n < OUTPUTS ? end - n : OUTPUTS);
            for (int c = 0; c < count; c += QUAD)
                for (int64_t m = 0; m < height; m += M) {
                    float tile[M][QUAD];
                    Format::template tile<M>(w, n + c, x, first + m, tile);
                    for (int r = 0; r < M; ++r) std::memcpy(sums + (m + r) * OUTPUTS + c, tile[r], sizeof tile[r]);
                }
            write(w, sums, n, count, height, bias, out + first * w.out);
        }
    }
}

// Calls some(begin, end) for stretches of outputs, each long enough to be worth a visit and begun at a multiple
// of QUAD; a small matrix is left to one thread, which is done before others are awake. Of many rows a stretch of weights
// is read again and again, and has to fit the second-level cache.
template <class Some>
void share_out(const Weights& w, int64_t bytes, int64_t rows, int threads, const Some& some) {
    constexpr int64_t ALONE = 1 << 16, TASK = 1 << 17, MOST = 8;  // bytes, bytes, tasks a thread
    const int64_t total = w.out * bytes, quads = (w.out + QUAD - 1) / QUAD;
    if (total * (rows + 3) / 4 < ALONE) threads = 1;
    int64_t tasks = (total / TASK + threads - 1) / threads;
    tasks = threads * (tasks < 1 ? 1 : tasks < MOST || rows >= MANY ? tasks : MOST);
    if (tasks > quads) tasks = quads;
    parallel_stretches(tasks, threads, [&](int64_t task) {
        const int64_t end = quads * (task + 1) / tasks * QUAD;
        some(quads * task / tasks * QUAD, end < w.out ? end : w.out);
    });
}

// Takes up to TOGETHER rows.
template <class Format, class T>
void linear_by_vectors(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
    constexpr Reads READS = Format::READS;
    constexpr bool WIDE = READS == Reads::floats || READS == Reads::parted;
    const int together = rows == 1 ? 1 : rows == 2 ? 2 : rows < MANY ? FEW_ROWS : MANY_ROWS;
    const int64_t chunks = (chunks_of(w.in) + 1) / 2 * 2, width = chunks * CHUNK;
    const int64_t all = (rows + together - 1) / together * together;  // the rest fill the last tile up
    Scratch<float> floats(WIDE ? all * width : 0), scales(all), offsets(all * chunks);
    Scratch<bf16> halves(READS == Reads::halves ? all * width : 0);
    Scratch<int16_t> integers(READS == Reads::integers ? all * width : 0);
    parallel_rows(all, width, 1 << 17, threads, [&](int64_t begin, int64_t end) {
        Scratch<float> narrow(WIDE ? 0 : width);
        for (int64_t m = begin; m < end; ++m) {
            float* row = WIDE ? floats + m * width : narrow;
            const float largest = widen_row(x + (m < rows ? m : 0) * w.in, w.in, width, Format::ALIGNED_LEFT, row);
            if (READS == Reads::integers)
                scales[m] = quantize(row, largest, width, integers + m * width, offsets + m * chunks);
            if (READS == Reads::parted) part(row, width);
            if (READS == Reads::halves)
                for (int64_t k = 0; k < width; k += FLOATS) store(halves + m * width + k, load(row + k));
            if (std::is_same_v<Format, Int4>) Groups::arrange(integers + m * width, width);
        }
    });
    const Activations a{all, width, floats, halves, integers, scales, offsets};
    share_out(w, Format::bytes(w.in), rows, threads, [&](int64_t begin, int64_t end) {
        if (together == 1) run<Format, 1>(w, begin, end, a, rows, bias, out);
        if (together == 2) run<Format, 2>(w, begin, end, a, rows, bias, out);
        if (together == FEW_ROWS && FEW_ROWS > 2) run<Format, FEW_ROWS>(w, begin, end, a, rows, bias, out);
        if (together == MANY_ROWS && MANY_ROWS > 2) run<Format, MANY_ROWS>(w, begin, end, a, rows, bias, out);
    });
}

#if defined(HYMBA_AMX)
// Calls use(Turned) with the activations made ready for the matrix units.
template <class Format, class T, class Use>
void turned(const Weights& w, const T* x, int64_t rows, const Use& use) {
    constexpr bool INTEGERS = Format::READS == Reads::integers;
    const int64_t width = rows <= 4 ? 4 : rows <= 8 ? 8 : 16, chunks = (chunks_of(w.in) + 1) / 2 * 2;
    const int64_t count = chunks * CHUNK, bytes = count * (INTEGERS ? 1 : 2);
    Scratch<char> high(rows * bytes), low(rows * bytes), first(width * bytes), second(width * bytes);
    Scratch<float> row(count), scales(width), sums(chunks);
    Scratch<int32_t> offsets(chunks * width);
    Scratch<int16_t> integers(count);
    std::memset(offsets, 0, static_cast<size_t>(chunks * width) * sizeof(int32_t));
    for (int64_t m = 0; m < rows; ++m) {
        if (std::is_same_v<T, bf16> && !INTEGERS && w.in == count) {
            std::memcpy(high + m * bytes, x + m * w.in, static_cast<size_t>(bytes));
            continue;
        }
        const float largest = widen_row(x + m * w.in, w.in, count, Format::ALIGNED_LEFT, row);
        if (INTEGERS) {
            scales[m] = quantize(row, largest, count, integers, sums);
            split(integers, count, reinterpret_cast<int8_t*>(high + m * bytes),
                  reinterpret_cast<int8_t*>(low + m * bytes));
            if (largest == largest)  // else the scale is NaN and so is the row
                for (int64_t g = 0; g < chunks; ++g) offsets[g * width + m] = static_cast<int32_t>(sums[g]);
        } else {
            bf16* to = reinterpret_cast<bf16*>(high + m * bytes);
            for (int64_t k = 0; k < count; k += FLOATS) store(to + k, load(row + k));
        }
    }
    if (std::is_same_v<Format, Int4>)
        for (int64_t m = 0; m < rows; ++m) swap_second_groups(high + m * bytes, low + m * bytes, count);
    amx::turn(high, rows, bytes / 4, width, first);
    if (INTEGERS) amx::turn(low, rows, bytes / 4, width, second);
    use(Turned{width, first, second, scales, offsets});
}

template <class Format, class T>
void linear_by_tiles(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
    constexpr bool INTEGERS = Format::READS == Reads::integers;
    const int64_t bytes = Format::bytes(w.in), lines = CHUNK * (INTEGERS ? 1 : 2) / amx::LINE;
    turned<Format>(w, x, rows, [&](const Turned& a) {
        share_out(w, bytes, rows, threads, [&](int64_t begin, int64_t end) {
            amx::Unit unit(a.width);
            alignas(64) float block[OUTPUTS][amx::ROWS];
            Scratch<float> sums(rows * OUTPUTS);
            for (int64_t n = begin; n < end; n += OUTPUTS) {
                const int count = static_cast<int>(end - n < OUTPUTS ? end - n : OUTPUTS);
                const int64_t from = n < w.out - OUTPUTS ? n : w.out - OUTPUTS;  // a whole block, if need be further up
                const amx::Block b{static_cast<const char*>(w.data) + from * bytes, bytes, chunks_of(w.in) * lines,
                                   w.in / CHUNK * lines};
                Format::multiply(w, b, from, a, block);
                for (int64_t m = 0; m < rows; ++m)
                    for (int c = 0; c < count; ++c)
                        sums[m * OUTPUTS + c] = block[n - from + c][m] * (INTEGERS ? a.scales[m] : 1);
                write(w, sums, n, count, rows, bias, out);
            }
        });
    });
}
#endif

template <class Format, class T>
void linear(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
#if defined(HYMBA_AMX)
    if constexpr (Format::AMX_ROWS > 0) {
        const bool fits = w.out >= OUTPUTS && w.in <= amx::MOST_INPUTS && (Format::ALIGNED_LEFT || w.in >= CHUNK);
        if (rows >= Format::AMX_ROWS && fits && amx::usable()) {
            for (int64_t m = 0; m < rows; m += amx::ROWS)
                linear_by_tiles<Format>(w, x + m * w.in, out + m * w.out, bias,
                                        rows - m < amx::ROWS ? rows - m : amx::ROWS, threads);
            return;
        }
    }
#endif
    for (int64_t m = 0; m < rows; m += TOGETHER) {
        const int64_t count = rows - m < TOGETHER ? rows - m : TOGETHER;
        const T* from = x + m * w.in;
        T* to = out + m * w.out;
#if defined(HYMBA_BF16_DOT)
        if constexpr (std::is_same_v<Format, Bfloat>)
            if (BfloatDot::usable()) {
                linear_by_vectors<BfloatDot>(w, from, to, bias, count, threads);
                continue;
            }
#endif
        linear_by_vectors<Format>(w, from, to, bias, count, threads);
    }
}

}  // namespace
}  // namespace hymba

// out (rows, outputs) = x (rows, in) · weightᵀ + bias. `bits` is 32, 16, 8 or 4 a weight; `scales` is null for 32 and 16,
// `bias` (outputs,) or null. x and out are both bf16, with 16, 8 or 4 bits, or both float, with 32, 8 or 4. Everything is
// contiguous.
HYMBA_API void hymba_linear(int bits, const void* weight, const void* scales, const float* bias, const void* x,
                            int bf16_x, void* out, int64_t rows, int64_t in, int64_t outputs, int threads) {
    using namespace hymba;
    const Weights w{weight, scales, in, outputs};
    const auto run = [&](auto type) {
        using T = decltype(type);
        const T* from = static_cast<const T*>(x);
        T* to = static_cast<T*>(out);
        if (bits == 8) linear<Int8>(w, from, to, bias, rows, threads);
        if (bits == 4) linear<Int4>(w, from, to, bias, rows, threads);
        if constexpr (std::is_same_v<T, bf16>)
            if (bits == 16) linear<Bfloat>(w, from, to, bias, rows, threads);
        if constexpr (std::is_same_v<T, float>)
            if (bits == 32) linear<Float>(w, from, to, bias, rows, threads);
    };
    bf16_x ? run(bf16{}) : run(float{});
}
