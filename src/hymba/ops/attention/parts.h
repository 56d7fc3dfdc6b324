// What the attention kernels of cpu.cpp (vectors) and decode_tiles.cpp (the matrix unit) share.
//
// A part is PART places of one row. A head's result of a part is its largest score, the sum of its weights relative to
// that, and the values weighted so. Parts are merged into segments and segments into rows, always the same ones in the
// same order, so that neither the number of threads, nor that of rows, nor the size of the buffer changes a bit.
#pragma once

#include "../native/kernels.h"

namespace hymba {

// As native.py fills it. Strides count elements; heads and their widths are dense. Keys and values are of `dtype`, or of
// 8 bits where they have scales.
struct Attention {
    int64_t rows, steps, heads, groups, slots, key_width, value_width, window, num_meta, dtype, threads;
    int64_t q_row, q_step, k_row, k_slot, v_row, v_slot, positions_row;
    int64_t k_scales_row, k_scales_slot, v_scales_row, v_scales_slot;
    const void *q, *k, *v;                           // (rows, steps or slots, heads or groups, width)
    const bf16 *k_scales, *v_scales;                 // (rows, slots, groups)
    const int64_t *query_positions, *key_positions;  // (rows, steps), (rows, slots)
    void* out;                                       // (rows, steps, heads, value_width)
};

// Runs what suits the matrix unit, one query a row of bf16, and returns whether it did (decode_tiles.cpp).
bool decode_with_tiles(const Attention& d);

namespace {

constexpr int PART = 64;    // places
constexpr int SEGMENT = 2;  // parts
constexpr int FLOATS = LANES<float>;
constexpr int PAIR = 2 * FLOATS;  // stored values taken together: one load of bf16

inline int64_t padded(int64_t width) { return (width + PAIR - 1) / PAIR * PAIR; }

struct Pair {
    Vec<float> first, second;
};

// PAIR stored values as they come, but of bf16 the even ones and then the odd ones.
HYMBA_INLINE Pair load_pair(const float* from) { return {load(from), load(from + FLOATS)}; }
HYMBA_INLINE Pair load_pair(const bf16* from) {
    UintVec both;
    std::memcpy(&both, from, sizeof both);
    return {reinterpret_cast<Vec<float>>(both << 16), reinterpret_cast<Vec<float>>(both & 0xffff0000u)};
}
// GCC 12 takes long ways with __builtin_convertvector of bytes.
HYMBA_INLINE IntVec load_bytes(const int8_t* from) {
#if defined(HYMBA_AVX512)
    return reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(HYMBA_AVX2)
    return reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    typedef int8_t Bytes __attribute__((vector_size(FLOATS)));
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, IntVec);
#endif
}
HYMBA_INLINE Pair load_pair(const int8_t* from) {
    return {__builtin_convertvector(load_bytes(from), Vec<float>),
            __builtin_convertvector(load_bytes(from + FLOATS), Vec<float>)};
}
template <class T>
HYMBA_INLINE Pair load_pair(const T* from, int64_t count) {
    if (count >= PAIR) return load_pair(from);
    T copy[PAIR] = {};
    std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(T));
    return load_pair(copy);
}

// Where load_pair puts entry i of PAIR, and the pair with its entries in order again.
template <class T>
HYMBA_INLINE int64_t place(int64_t i) {
    return std::is_same_v<T, bf16> ? i % 2 * FLOATS + i / 2 : i;
}
template <class T>
HYMBA_INLINE Pair ordered(Pair x) {
    if constexpr (std::is_same_v<T, bf16>) return {interleave_low(x.first, x.second), interleave_high(x.first, x.second)};
    return x;
}

// Turns `count` scores into weights relative to the largest; writes that score and the weights' sum.
inline void softmax(float* scores, int count, float* to) {
    for (int j = count; j % FLOATS; ++j) scores[j] = -INFINITY;
    Vec<float> most = load(scores), sum = {};
    for (int j = FLOATS; j < count; j += FLOATS) {
        const Vec<float> s = load(scores + j);
        most = s > most ? s : most;
    }
    // Every round halves the number of different lanes: in the end all hold the largest, and all the sum.
    for (int round = 1; round < FLOATS; round *= 2) {
        const Vec<float> low = interleave_low(most, most), high = interleave_high(most, most);
        most = low > high ? low : high;
    }
    for (int j = 0; j < count; j += FLOATS) {
        const Vec<float> weight = exp(load(scores + j) - most);
        store(scores + j, weight);
        sum += weight;
    }
    for (int round = 1; round < FLOATS; round *= 2) sum = interleave_low(sum, sum) + interleave_high(sum, sum);
    to[0] = most[0];
    to[1] = sum[0];
}

// Merges `count` results of one head, `stride` floats apart and `size` long, into one.
inline void merge(const float* results, int64_t count, int64_t stride, int64_t size, float* to) {
    Scratch<float> weights(count + FLOATS);
    float largest = -INFINITY, sum = 0;
    for (int64_t p = 0; p < count; ++p) {
        weights[p] = results[p * stride];
        largest = weights[p] > largest ? weights[p] : largest;
    }
    for (int64_t p = 0; p < count; p += FLOATS) store(weights + p, exp(load(weights + p) - largest));
    for (int64_t p = 0; p < count; ++p) sum += weights[p] * results[p * stride + 1];
    for (int64_t i = 2; i < size; i += PAIR) {
        Vec<float> first = {}, second = {};
        for (int64_t p = 0; p < count; ++p) {
            const float* from = results + p * stride + i;
            first += load(from) * weights[p];
            second += load(from + FLOATS) * weights[p];
        }
        store(to + i, first);
        store(to + i + FLOATS, second);
    }
    to[0] = largest;
    to[1] = sum;
}

// Writes a head's output from its merged result, whose values lie as load_pair of T gives them; zeros if nothing was seen.
template <class T, class Q>
void write(const float* whole, int64_t width, Q* out) {
    const float factor = whole[1] != 0 ? 1 / whole[1] : 0;
    Scratch<float> entries(padded(width));
    for (int64_t i = 0; i < padded(width); i += PAIR) {
        const Pair x = ordered<T>({load(whole + 2 + i), load(whole + 2 + i + FLOATS)});
        store(entries + i, x.first * factor);
        store(entries + i + FLOATS, x.second * factor);
    }
    for (int64_t i = 0; i < width; i += FLOATS)
        store(out + i, load(entries + i), width - i < FLOATS ? static_cast<int>(width - i) : FLOATS);
}

// Lists the segments (row · segments of a row + segment) with a part for which seen(row, part) is not 0, and where each row
// begins in that list; returns their number. Every part is asked for once, in order.
template <class Seen>
int64_t list_segments(int64_t rows, int64_t parts, const Seen& seen, int64_t* tasks, int64_t* starts) {
    const int64_t segments = (parts + SEGMENT - 1) / SEGMENT;
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
        starts[row] = count;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t task = row * segments + part / SEGMENT;
            if (seen(row, part) && (count == starts[row] || tasks[count - 1] != task)) tasks[count++] = task;
        }
    }
    starts[rows] = count;
    return count;
}

// Merges the results (segments, heads, size) of each row, one query a row, and writes the outputs.
template <class T, class Q>
void write_rows(const Attention& d, const float* results, const int64_t* starts, int64_t size) {
    const int64_t stride = d.heads * size;
    parallel_for(d.rows, static_cast<int>(d.threads), [&](int64_t row) {
        Scratch<float> whole(size);
        for (int64_t h = 0; h < d.heads; ++h) {
            merge(results + starts[row] * stride + h * size, starts[row + 1] - starts[row], stride, size, whole);
            write<T>(whole, d.value_width, static_cast<Q*>(d.out) + (row * d.heads + h) * d.value_width);
        }
    });
}

}  // namespace
}  // namespace hymba
