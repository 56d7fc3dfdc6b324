// Products with few rows of activations, as in decoding: every weight is read from memory once, for all rows together.
// weights.h has the formats, many_rows.h what multiplies many rows.
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
#include "many_rows.h"
#include "vectors.h"

namespace hymba {
namespace {

constexpr int64_t AHEAD = 8192;  // bytes that a single stream is called for before it is needed
constexpr int FEW_ROWS = VECTOR_BYTES == 64 ? 4 : 2;  // taken together, with the sums in registers
constexpr int64_t MANY = 17, TOGETHER = 768;          // rows; those whose activations are arranged at a time

template <int M>
constexpr int STREAMS = M == 1 ? 1 : 2;  // outputs read together, for M rows

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
    using Panel = FloatPanel<FloatSteps>;
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
    using Panel = FloatPanel<PartedSteps>;
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
    using Panel = FloatPanel<DotSteps>;
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

struct Int8 {
    using Panel = Int8Panel;
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

struct Int4 {
    using Panel = Int4Panel;
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

// Outputs begin … end − 1 of every row, M rows at a time: those after the first find the weights in the first-level cache.
template <class Format, int M, class T>
void run(const Weights& w, int64_t begin, int64_t end, const Activations& x, int64_t rows, const float* bias, T* out) {
    Scratch<float> sums((rows + M) * OUTPUTS);
    for (int64_t n = begin; n < end; n += OUTPUTS) {
        const int count = static_cast<int>(end - n < OUTPUTS ? end - n : OUTPUTS);
        for (int c = 0; c < count; c += QUAD)
            for (int64_t m = 0; m < rows; m += M) {
                float tile[M][QUAD];
                Format::template tile<M>(w, n + c, x, m, tile);
                for (int r = 0; r < M; ++r) std::memcpy(sums + (m + r) * OUTPUTS + c, tile[r], sizeof tile[r]);
            }
        write(w, sums, n, count, rows, bias, out);
    }
}

// Calls some(begin, end) for stretches of outputs, each long enough to be worth a visit and begun at a multiple
// of QUAD; a small matrix is left to one thread, which is done before others are awake.
template <class Some>
void share_out(const Weights& w, int64_t bytes, int64_t rows, int threads, const Some& some) {
    constexpr int64_t ALONE = 1 << 16, TASK = 1 << 17, MOST = 8;  // bytes, bytes, tasks a thread
    const int64_t total = w.out * bytes, quads = (w.out + QUAD - 1) / QUAD;
    if (total * (rows + 3) / 4 < ALONE) threads = 1;
    int64_t tasks = (total / TASK + threads - 1) / threads;
    tasks = threads * (tasks < 1 ? 1 : tasks < MOST ? tasks : MOST);
    if (tasks > quads) tasks = quads;
    parallel_stretches(tasks, threads, [&](int64_t task) {
        const int64_t end = quads * (task + 1) / tasks * QUAD;
        some(quads * task / tasks * QUAD, end < w.out ? end : w.out);
    });
}

// Brings a row of `width` floats into the form that Format reads: in place or, if it is not floats, in `halves` or
// `integers` and `offsets`. Returns its scale.
template <class Format>
float arrange_row(float* floats, float largest, int64_t width, bf16* halves, int16_t* integers, float* offsets) {
    if (Format::READS == Reads::integers) return quantize(floats, largest, width, integers, offsets);
    if (Format::READS == Reads::parted) part(floats, width);
    if (Format::READS == Reads::halves)
        for (int64_t k = 0; k < width; k += FLOATS) store(halves + k, load(floats + k));
    return 1;
}

template <class Format, class T>
void linear_of_few(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
    constexpr Reads READS = Format::READS;
    constexpr bool WIDE = READS == Reads::floats || READS == Reads::parted;
    const int together = rows == 1 ? 1 : rows == 2 ? 2 : FEW_ROWS;
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
            scales[m] = arrange_row<Format>(row, largest, width, halves + m * width, integers + m * width,
                                            offsets + m * chunks);
            if (std::is_same_v<Format, Int4>) Groups::arrange(integers + m * width, width);
        }
    });
    const Activations a{all, width, floats, halves, integers, scales, offsets};
    share_out(w, Format::bytes(w.in), rows, threads, [&](int64_t begin, int64_t end) {
        if (together == 1) run<Format, 1>(w, begin, end, a, rows, bias, out);
        if (together == 2) run<Format, 2>(w, begin, end, a, rows, bias, out);
        if (together == FEW_ROWS && FEW_ROWS > 2) run<Format, FEW_ROWS>(w, begin, end, a, rows, bias, out);
    });
}

// Takes CHUNK inputs or more.
template <class Format, class T>
void linear_of_many(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
    constexpr Reads READS = Format::READS;
    constexpr int64_t SIZE = READS == Reads::halves || READS == Reads::integers ? 2 : 4;
    const int64_t chunks = (chunks_of(w.in) + 1) / 2 * 2, width = chunks * CHUNK;
    const int64_t all = (rows + MANY_ROWS - 1) / MANY_ROWS * MANY_ROWS;  // the rest fill the last tile up
    Scratch<char> vectors(all * width * SIZE);
    Scratch<float> scales(all), offsets(all * chunks);
    parallel_rows(all, width, 1 << 17, threads, [&](int64_t begin, int64_t end) {
        Scratch<float> floats(width);
        Scratch<bf16> halves(width);
        Scratch<int16_t> integers(width);
        for (int64_t m = begin; m < end; ++m) {
            const float largest = widen_row(x + (m < rows ? m : 0) * w.in, w.in, width, Format::ALIGNED_LEFT, floats);
            scales[m] = arrange_row<Format>(floats, largest, width, halves, integers, offsets + m * chunks);
            if (std::is_same_v<Format, Int4>) Groups::arrange_unpacked(integers, width);
            const int r = static_cast<int>(m % MANY_ROWS);
            char* tile = vectors + (m - r) * width * SIZE;
            const void* row = READS == Reads::halves ? static_cast<const void*>(halves) : floats;
            READS == Reads::integers ? put_shorts(integers, width, r, tile) : put_halves(row, width * SIZE, r, tile);
        }
    });
    share_panels<typename Format::Panel>(w, threads, [&](int64_t begin, int64_t end) {
        const auto tile_at = [&](int64_t m) {
            return Tile{vectors + m * width * SIZE, scales + m, offsets + m * chunks, chunks, m / MANY_ROWS};
        };
        multiply_panel<typename Format::Panel>(w, begin, end, rows, tile_at, bias, out);
    });
}

template <class Format, class T>
void linear_by_vectors(const Weights& w, const T* x, T* out, const float* bias, int64_t rows, int threads) {
    if (rows >= MANY && w.in >= CHUNK)
        linear_of_many<Format>(w, x, out, bias, rows, threads);
    else
        linear_of_few<Format>(w, x, out, bias, rows, threads);
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
