// Products with many rows of activations, as in prefill, with the same result bit for bit as with few rows (cpu.cpp).
//
// A tile is MANY_ROWS rows. A panel is a stretch of outputs whose weights fit the second-level cache; integer weights
// are widened to 16 bits once a panel. A tile is multiplied with a panel one block of inputs at a time, so short that
// the tile's block stays in the first-level cache while the panel's weights come by. What each lane has summed is kept
// from one block to the next, so that blocks change no order of additions.
#pragma once

#include "vectors.h"

namespace hymba {
namespace {

constexpr int MANY_ROWS = VECTOR_BYTES == 64 ? 6 : 2;  // the sums of a tile and QUAD outputs stay in registers
constexpr int SHORTS = 32;                             // 16-bit integers taken together
constexpr int64_t BLOCK_BYTES = 20 << 10;              // of a tile's block of inputs
constexpr int64_t PANEL_BYTES = 256 << 10;             // of a panel's weights

// A tile's activations. Floats and bf16 lie vector by vector, all rows of each: those of even number in order, and then
// those of odd number. 16-bit integers lie SHORTS by SHORTS, all rows of each.
struct Tile {
    const char* vectors;
    const float* scales;   // (MANY_ROWS,) of integers
    const float* offsets;  // (MANY_ROWS, chunks) as in Activations
    int64_t chunks, number;

    template <class A>
    HYMBA_INLINE const A* at(int64_t vector) const {
        return reinterpret_cast<const A*>(vectors + vector * MANY_ROWS * VECTOR_BYTES);
    }
};

// Copies row r of a tile, of floats or bf16, to where the tile has it.
inline void put_halves(const void* row, int64_t bytes, int r, char* tile) {
    const int64_t count = bytes / VECTOR_BYTES;
    for (int64_t v = 0; v < count; ++v)
        std::memcpy(tile + ((v % 2 * (count / 2) + v / 2) * MANY_ROWS + r) * VECTOR_BYTES,
                    static_cast<const char*>(row) + v * VECTOR_BYTES, VECTOR_BYTES);
}

// The same of 16-bit integers.
inline void put_shorts(const int16_t* row, int64_t count, int r, char* tile) {
    for (int64_t k = 0; k < count; k += SHORTS)
        std::memcpy(tile + (k * MANY_ROWS + r * SHORTS) * 2, row + k, SHORTS * sizeof(int16_t));
}

// Calls block(begin, end) for blocks of [0, count), about equal, multiples of `unit` and at most `most`.
template <class Block>
void each_block(int64_t count, int64_t most, int64_t unit, const Block& block) {
    const int64_t blocks = (count + most - 1) / most;
    const int64_t size = ((count + blocks - 1) / blocks + unit - 1) / unit * unit;
    for (int64_t begin = 0; begin < count; begin += size) block(begin, begin + size < count ? begin + size : count);
}

// ---- Sums of floats ------------------------------------------------------------------------------------------------

// How a format's weights meet activations: STEP inputs take one vector of activations to each of two sums, `first`
// (HALF 0) and `second` (HALF 1). `weight` reads the vector of weights that belongs to it.
struct FloatSteps {
    typedef float Weight;
    typedef float Activation;
    static constexpr int STEP = 2 * FLOATS;
    template <int HALF>
    static HYMBA_INLINE Vec<float> weight(const float* w) {
        return load(w + HALF * FLOATS);
    }
    static HYMBA_INLINE Vec<float> add(Vec<float> sum, Vec<float> w, const float* x) { return sum + w * load(x); }
};

struct PartedSteps {
    typedef bf16 Weight;
    typedef float Activation;
    static constexpr int STEP = 2 * FLOATS;
    template <int HALF>
    static HYMBA_INLINE Vec<float> weight(const bf16* w) {
        const UintVec pairs = load_as<UintVec>(w);
        return reinterpret_cast<Vec<float>>(HALF ? pairs & 0xffff0000u : pairs << 16);
    }
    static HYMBA_INLINE Vec<float> add(Vec<float> sum, Vec<float> w, const float* x) { return sum + w * load(x); }
};

#if defined(HYMBA_BF16_DOT)
struct DotSteps {
    typedef bf16 Weight;
    typedef bf16 Activation;
    static constexpr int STEP = CHUNK;
    template <int HALF>
    static HYMBA_INLINE __m512bh weight(const bf16* w) {
        return load_as<__m512bh>(w + HALF * 32);
    }
    static HYMBA_INLINE Vec<float> add(Vec<float> sum, __m512bh w, const bf16* x) {
        return reinterpret_cast<Vec<float>>(
            _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), w, load_as<__m512bh>(x)));
    }
};
#endif

template <class Steps>
class FloatPanel {
    using W = typename Steps::Weight;
    using A = typename Steps::Activation;
    static constexpr int LANES_OF_A = VECTOR_BYTES / static_cast<int>(sizeof(A));

  public:
    static constexpr int64_t WEIGHT_BYTES = sizeof(W);

    FloatPanel(const Weights& w, int64_t begin, int64_t end)
        : w_(w), begin_(begin), quads_((end - begin + QUAD - 1) / QUAD), sums_(2 * quads_ * SUMS),
          results_(quads_ * MANY_ROWS * QUAD) {}

    void multiply(const Tile& x) {
        constexpr int64_t MOST = BLOCK_BYTES / (MANY_ROWS * static_cast<int64_t>(sizeof(A))) * 2 / CHUNK * CHUNK;
        each_block(chunks_of(w_.in) * CHUNK, MOST, CHUNK, [&](int64_t from, int64_t to) {
            for (int64_t q = 0; q < quads_; ++q) add<0>(x, q, from, to);
            for (int64_t q = 0; q < quads_; ++q) add<1>(x, q, from, to);
        });
    }

    void finish(int64_t n, const Tile&, float (&out)[MANY_ROWS][QUAD]) const {
        std::memcpy(out, results_ + (n - begin_) * MANY_ROWS, sizeof out);
    }

  private:
    static constexpr int64_t SUMS = MANY_ROWS * QUAD * FLOATS;
    float* sums(int half, int64_t quad) const { return sums_ + (half * quads_ + quad) * SUMS; }

    // Adds the products of inputs `from` to `to` to one half's sums of a quad.
    template <int HALF>
    void add(const Tile& x, int64_t quad, int64_t from, int64_t to) const {
        const int64_t whole = w_.in / CHUNK * CHUNK, back = CHUNK - (w_.in - whole);
        const int64_t vectors = x.chunks * CHUNK / LANES_OF_A;
        const W* rows[QUAD];
        for (int c = 0; c < QUAD; ++c) rows[c] = row_of<W>(w_.data, w_.in, w_, begin_ + quad * QUAD, c);
        float* kept = sums(HALF, quad);
        Vec<float> s[MANY_ROWS][QUAD] = {};
        if (from)
            for (int r = 0; r < MANY_ROWS; ++r)
                for (int c = 0; c < QUAD; ++c) s[r][c] = load(kept + (r * QUAD + c) * FLOATS);
        // The first tiles call for the next panel's weights, one output of each quad at a time.
        const W* next = x.number < QUAD ? rows[0] + (quads_ * QUAD + x.number) * w_.in : nullptr;
        const A* a = x.at<A>(HALF * (vectors / 2) + from / Steps::STEP);
        for (int64_t k = from; k < to; k += Steps::STEP, a += MANY_ROWS * LANES_OF_A) {
            if (next) __builtin_prefetch(next + k + HALF * Steps::STEP / 2, 0, 2);
            const int64_t at = k < whole ? k : k - back;  // the last chunk of weights reaches back
            decltype(Steps::template weight<HALF>(rows[0])) v[QUAD];
#pragma GCC unroll 4
            for (int c = 0; c < QUAD; ++c) v[c] = Steps::template weight<HALF>(rows[c] + at);
#pragma GCC unroll 8
            for (int r = 0; r < MANY_ROWS; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < QUAD; ++c) s[r][c] = Steps::add(s[r][c], v[c], a + r * LANES_OF_A);
        }
        if (HALF && to >= w_.in) return add_first(s, quad);
        for (int r = 0; r < MANY_ROWS; ++r)
            for (int c = 0; c < QUAD; ++c) store(kept + (r * QUAD + c) * FLOATS, s[r][c]);
    }

    // Adds the first half's sums to the second's, and all lanes.
    HYMBA_INLINE void add_first(const Vec<float> (&second)[MANY_ROWS][QUAD], int64_t quad) const {
        const float* first = sums(0, quad);
        for (int r = 0; r < MANY_ROWS; ++r) {
            Vec<float> both[QUAD];
            for (int c = 0; c < QUAD; ++c) both[c] = load(first + (r * QUAD + c) * FLOATS) + second[r][c];
            sum_lanes_of(both, results_ + (quad * MANY_ROWS + r) * QUAD);
        }
    }

    const Weights& w_;
    const int64_t begin_, quads_;
    const Scratch<float> sums_;     // (2, quads, MANY_ROWS, QUAD, FLOATS)
    const Scratch<float> results_;  // (quads, MANY_ROWS, QUAD)
};

// ---- Sums of integers ----------------------------------------------------------------------------------------------

// Sums are exact, so their order is free: a block ends as soon as four lanes together might pass 2^31.
class Int8Panel {
  public:
    static constexpr int64_t WEIGHT_BYTES = sizeof(int16_t);

    Int8Panel(const Weights& w, int64_t begin, int64_t end)
        : w_(w), begin_(begin), quads_((end - begin + QUAD - 1) / QUAD), inputs_(chunks_of(w.in) * CHUNK),
          weights_(quads_ * QUAD * inputs_), totals_(quads_ * MANY_ROWS * QUAD) {
        const int64_t whole = w.in / CHUNK * CHUNK, back = CHUNK - (w.in - whole);
        for (int64_t q = 0; q < quads_; ++q)
            for (int c = 0; c < QUAD; ++c) {
                const int8_t* from = row_of<int8_t>(w.data, w.in, w, begin + q * QUAD, c);
                int16_t* to = weights_ + (q * inputs_ * QUAD + c * SHORTS);
                for (int64_t k = 0; k < inputs_; k += SHORTS) {
                    const int8_t* at = from + (k < whole ? k : k - back);
                    for (int i = 0; i < SHORTS; ++i) to[k * QUAD + i] = at[i];
                }
            }
    }

    void multiply(const Tile& x) {
        constexpr int64_t SAFE = 128 * FLOATS, FITS = BLOCK_BYTES / (MANY_ROWS * 2) / CHUNK * CHUNK;
        std::memset(totals_, 0, static_cast<size_t>(quads_ * MANY_ROWS * QUAD) * sizeof(double));
        each_block(inputs_, SAFE < FITS ? SAFE : FITS, CHUNK, [&](int64_t from, int64_t to) {
            for (int64_t q = 0; q < quads_; ++q) add(x, q, from, to);
        });
    }

    void finish(int64_t n, const Tile& x, float (&out)[MANY_ROWS][QUAD]) const {
        const double* totals = totals_ + (n - begin_) * MANY_ROWS;
        for (int r = 0; r < MANY_ROWS; ++r)
            for (int c = 0; c < QUAD; ++c)
                out[r][c] =
                    static_cast<float>(totals[r * QUAD + c] * *row_of<float>(w_.scales, 1, w_, n, c)) * x.scales[r];
    }

  private:
    void add(const Tile& x, int64_t quad, int64_t from, int64_t to) const {
        const int16_t *w = weights_ + (quad * inputs_ + from) * QUAD, *end = w + (to - from) * QUAD;
        const int16_t* a = reinterpret_cast<const int16_t*>(x.vectors) + from * MANY_ROWS;
        IntVec sums[MANY_ROWS][QUAD] = {};
        for (; w < end; w += QUAD * SHORTS, a += MANY_ROWS * SHORTS) {
            Shorts v[QUAD];
#pragma GCC unroll 4
            for (int c = 0; c < QUAD; ++c) v[c] = Shorts::widened(w + c * SHORTS);
#pragma GCC unroll 8
            for (int r = 0; r < MANY_ROWS; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < QUAD; ++c) sums[r][c] = v[c].dot(sums[r][c], a + r * SHORTS);
        }
        double* totals = totals_ + quad * MANY_ROWS * QUAD;
        for (int r = 0; r < MANY_ROWS; ++r) add_fours(sums[r], totals + r * QUAD);
    }

    // Adds the sums of each vector's lanes, of which four together do not overflow.
    static HYMBA_INLINE void add_fours(const IntVec (&v)[QUAD], double* totals) {
        const IntVec ab = interleave_low(v[0], v[1]) + interleave_high(v[0], v[1]);
        const IntVec cd = interleave_low(v[2], v[3]) + interleave_high(v[2], v[3]);
        const Vec<double> x = reinterpret_cast<Vec<double>>(ab), y = reinterpret_cast<Vec<double>>(cd);
        const IntVec abcd = reinterpret_cast<IntVec>(interleave_low(x, y)) + reinterpret_cast<IntVec>(interleave_high(x, y));
        typedef int32_t Four __attribute__((vector_size(16)));
        typedef double Doubles __attribute__((vector_size(32)));
        Four parts[VECTOR_BYTES / 16];
        std::memcpy(parts, &abcd, sizeof parts);
        Doubles sum = load_as<Doubles>(totals);
        for (int i = 0; i < VECTOR_BYTES / 16; ++i) sum += __builtin_convertvector(parts[i], Doubles);
        std::memcpy(totals, &sum, sizeof sum);
    }

    const Weights& w_;
    const int64_t begin_, quads_, inputs_;
    const Scratch<int16_t> weights_;  // (quads, inputs / SHORTS, QUAD, SHORTS)
    const Scratch<double> totals_;    // (quads, MANY_ROWS, QUAD)
};

// ---- Sums of groups ------------------------------------------------------------------------------------------------

class Int4Panel {
    static constexpr int TOGETHER = 2;                     // outputs
    static constexpr int STEP = Groups::COUNT * CHUNK;     // inputs
    static constexpr int PARTS = STEP / SHORTS;
    static constexpr int64_t SUMS = MANY_ROWS * QUAD * FLOATS;

  public:
    static constexpr int64_t WEIGHT_BYTES = sizeof(int16_t);

    Int4Panel(const Weights& w, int64_t begin, int64_t end)
        : w_(w), begin_(begin), quads_((end - begin + QUAD - 1) / QUAD), groups_(chunks_of(w.in)),
          steps_((groups_ + Groups::COUNT - 1) / Groups::COUNT), weights_(quads_ * QUAD * steps_ * STEP),
          scales_(quads_ * QUAD * steps_ * FLOATS), sums_(quads_ * SUMS) {
        for (int64_t n = 0; n < quads_ * QUAD; ++n) unpack(n);
    }

    void multiply(const Tile& x) {
        constexpr int64_t UNIT = FLOATS, FITS = BLOCK_BYTES / (MANY_ROWS * 2) / CHUNK / UNIT * UNIT;
        each_block(groups_, FITS > 0 ? FITS : UNIT, UNIT, [&](int64_t from, int64_t to) {
            for (int64_t n = 0; n < quads_ * QUAD; n += TOGETHER) add(x, n, from, to);
        });
    }

    void finish(int64_t n, const Tile& x, float (&out)[MANY_ROWS][QUAD]) const {
        const float* from = sums_ + (n - begin_) / QUAD * SUMS;
        for (int r = 0; r < MANY_ROWS; ++r) {
            Vec<float> sums[QUAD];
            for (int c = 0; c < QUAD; ++c) sums[c] = load(from + (c * MANY_ROWS + r) * FLOATS);
            sum_lanes_of(sums, out[r]);
            for (int c = 0; c < QUAD; ++c) out[r][c] *= x.scales[r];
        }
    }

  private:
    // Widens the weights of output begin + n, and spreads its scales over the lanes of their groups.
    void unpack(int64_t n) {
        const uint8_t* from = row_of<uint8_t>(w_.data, groups_ * 32, w_, begin_ + n, 0);
        const bf16* scales = row_of<bf16>(w_.scales, groups_, w_, begin_ + n, 0);
        int16_t* to = weights_ + (n / TOGETHER * steps_ * TOGETHER + n % TOGETHER) * STEP;
        for (int64_t begin = 0; begin < groups_; begin += FLOATS) {
            const int count = static_cast<int>(groups_ - begin < FLOATS ? groups_ - begin : FLOATS);
            const Vec<float> some = load(scales + begin, count);
            for (int g = 0; g < count; g += Groups::COUNT) {
                const int64_t step = (begin + g) / Groups::COUNT;
                Groups::unpack(from + (begin + g) * 32, g + 1 < count, to + step * TOGETHER * STEP);
                store(scales_ + (n * steps_ + step) * FLOATS, Groups::spread(some, g));
            }
        }
    }

    // Adds the products of groups `from` to `to` to the sums of TOGETHER outputs.
    void add(const Tile& x, int64_t n, int64_t from, int64_t to) const {
        float* kept = sums_ + n * MANY_ROWS * FLOATS;
        Vec<float> sums[TOGETHER][MANY_ROWS] = {};
        if (from)
            for (int c = 0; c < TOGETHER; ++c)
                for (int r = 0; r < MANY_ROWS; ++r) sums[c][r] = load(kept + (c * MANY_ROWS + r) * FLOATS);
        for (int64_t begin = from; begin < to; begin += FLOATS) {
            const int count = static_cast<int>(to - begin < FLOATS ? to - begin : FLOATS);
            for (int c = 0; c < TOGETHER; ++c) {
                const Vec<float> scales = load(row_of<bf16>(w_.scales, groups_, w_, begin_ + n, c) + begin, count);
                for (int r = 0; r < MANY_ROWS; ++r)
                    sums[c][r] += scales * load(x.offsets + r * x.chunks + begin, count);
            }
            for (int g = 0; g < count; g += Groups::COUNT) add_step(x, n, (begin + g) / Groups::COUNT, sums);
        }
        for (int c = 0; c < TOGETHER; ++c)
            for (int r = 0; r < MANY_ROWS; ++r) store(kept + (c * MANY_ROWS + r) * FLOATS, sums[c][r]);
    }

    HYMBA_INLINE void add_step(const Tile& x, int64_t n, int64_t step, Vec<float> (&sums)[TOGETHER][MANY_ROWS]) const {
        const int16_t* w = weights_ + (n * steps_ + step * TOGETHER) * STEP;
        const int16_t* a = reinterpret_cast<const int16_t*>(x.vectors) + step * STEP * MANY_ROWS;
        Shorts v[TOGETHER][PARTS];
        Vec<float> scales[TOGETHER];
#pragma GCC unroll 2
        for (int c = 0; c < TOGETHER; ++c) {
            scales[c] = load(scales_ + ((n + c) * steps_ + step) * FLOATS);
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; ++p) v[c][p] = Shorts::widened(w + c * STEP + p * SHORTS);
        }
#pragma GCC unroll 8
        for (int r = 0; r < MANY_ROWS; ++r) {
            IntVec dots[TOGETHER] = {};
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; ++p) {
                const Shorts u = Shorts::widened(a + (p * MANY_ROWS + r) * SHORTS);
#pragma GCC unroll 2
                for (int c = 0; c < TOGETHER; ++c) dots[c] = u.dot(dots[c], v[c][p]);
            }
#pragma GCC unroll 2
            for (int c = 0; c < TOGETHER; ++c) sums[c][r] += __builtin_convertvector(dots[c], Vec<float>) * scales[c];
        }
    }

    const Weights& w_;
    const int64_t begin_, quads_, groups_, steps_;
    const Scratch<int16_t> weights_;  // (outputs / TOGETHER, steps, TOGETHER, STEP)
    const Scratch<float> scales_;     // (outputs, steps, FLOATS)
    const Scratch<float> sums_;       // (outputs, MANY_ROWS, FLOATS)
};

// ---- Driver --------------------------------------------------------------------------------------------------------

// Calls some(begin, end) for panels of outputs that start at multiples of QUAD.
template <class Panel, class Some>
void share_panels(const Weights& w, int threads, const Some& some) {
    const int64_t quads = (w.out + QUAD - 1) / QUAD, bytes = w.in * QUAD * Panel::WEIGHT_BYTES;
    int64_t panels = (quads * bytes + PANEL_BYTES - 1) / PANEL_BYTES;
    panels = (panels + threads - 1) / threads * threads;
    if (panels > quads) panels = quads;
    parallel_stretches(panels, threads, [&](int64_t panel) {
        const int64_t end = quads * (panel + 1) / panels * QUAD;
        some(quads * panel / panels * QUAD, end < w.out ? end : w.out);
    });
}

// Outputs begin … end − 1 of every row.
template <class Panel, class T, class TileAt>
void multiply_panel(const Weights& w, int64_t begin, int64_t end, int64_t rows, const TileAt& tile_at, const float* bias,
                    T* out) {
    Panel panel(w, begin, end);
    Scratch<float> sums(MANY_ROWS * OUTPUTS);
    for (int64_t m = 0; m < rows; m += MANY_ROWS) {
        const Tile tile = tile_at(m);
        const int64_t height = rows - m < MANY_ROWS ? rows - m : MANY_ROWS;
        panel.multiply(tile);
        for (int64_t n = begin; n < end; n += OUTPUTS) {
            const int count = static_cast<int>(end - n < OUTPUTS ? end - n : OUTPUTS);
            for (int c = 0; c < count; c += QUAD) {
                float quad[MANY_ROWS][QUAD];
                panel.finish(n + c, tile, quad);
                for (int r = 0; r < MANY_ROWS; ++r) std::memcpy(sums + r * OUTPUTS + c, quad[r], sizeof quad[r]);
            }
            write(w, sums, n, count, height, bias, out + m * w.out);
        }
    }
}

}  // namespace
}  // namespace hymba
