// Attention of one query a row, as in decoding: keys and values are read from memory once, for all heads that share them.
//
// A task takes PART slots of one row. It lists the keys that the query sees, scores them for all heads, takes each
// head's softmax over the part, and weighs the values; the parts of a row are put together at the end, always in the
// same order, so that the number of threads changes nothing. Scores and sums are float.
#include "kernels.h"

using namespace hymba;

// As native.py fills it. Strides count elements; heads and their widths are dense.
struct Decode {
    int64_t rows, heads, groups, slots, key_width, value_width, window, num_meta, dtype, threads;
    int64_t q_row, k_row, k_slot, v_row, v_slot, positions_row;
    const void *q, *k, *v;                             // (rows, heads or slots × groups, width)
    const int64_t *query_positions, *key_positions;  // (rows), (rows, slots)
    void* out;                                         // (rows, heads, value_width)
};

namespace {

constexpr int PART = 128;  // slots of a task
constexpr int KEYS = 4;    // scored together
constexpr int HEADS = 5;   // that share a read of a value, at most
constexpr int FLOATS = LANES<float>;
constexpr int PAIR = 2 * FLOATS;  // stored values taken together: one load of bf16

int64_t padded(int64_t width) { return (width + PAIR - 1) / PAIR * PAIR; }

struct Pair {
    Vec<float> first, second;
};

// PAIR stored values: floats as they come, bf16 the even ones and then the odd ones.
HYMBA_INLINE Pair load_pair(const float* from) { return {load(from), load(from + FLOATS)}; }
HYMBA_INLINE Pair load_pair(const bf16* from) {
    UintVec both;
    std::memcpy(&both, from, sizeof both);
    return {reinterpret_cast<Vec<float>>(both << 16), reinterpret_cast<Vec<float>>(both & 0xffff0000u)};
}
template <class T>
HYMBA_INLINE Pair load_pair(const T* from, int64_t count) {
    if (count >= PAIR) return load_pair(from);
    T copy[PAIR] = {};
    std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(T));
    return load_pair(copy);
}

// Puts PAIR floats that load_pair has arranged for T back in order, scaled.
template <class T>
HYMBA_INLINE void restore(const float* from, float scale, float* to) {
    constexpr int STEP = std::is_same_v<T, bf16> ? 2 : 1, SECOND = std::is_same_v<T, bf16> ? 1 : FLOATS;
    for (int i = 0; i < FLOATS; ++i) {
        to[i * STEP] = from[i] * scale;
        to[i * STEP + SECOND] = from[FLOATS + i] * scale;
    }
}

template <class T>
struct Decoder {
    const Decode& d;
    const int64_t parts = (d.slots + PART - 1) / PART;
    const int64_t key_floats = padded(d.key_width), value_floats = padded(d.value_width);
    const int64_t shared = d.heads / d.groups;  // heads of a group
    const int64_t result = value_floats + 2;    // floats of a head's part: largest score, sum of weights, weighed values

    void run() const {
        Scratch<float> results(d.rows * parts * d.heads * result);
        parallel_for(d.rows * parts, static_cast<int>(d.threads), [&](int64_t task) {
            attend(task / parts, task % parts, results + task * d.heads * result);
        });
        parallel_for(d.rows, static_cast<int>(d.threads), [&](int64_t row) {
            for (int64_t h = 0; h < d.heads; ++h)
                merge(results + (row * parts * d.heads + h) * result,
                      static_cast<T*>(d.out) + (row * d.heads + h) * d.value_width);
        });
    }

    // Writes the `result` of every head for one part of a row's slots.
    void attend(int64_t row, int64_t part, float* results) const {
        const T* seen_keys[PART + KEYS];
        const T* seen_values[PART];
        const int count = list_visible(row, part, seen_keys, seen_values);
        if (!count) {
            for (int64_t h = 0; h < d.heads; ++h) results[h * result + 1] = 0;
            return;
        }
        Scratch<float> queries(d.heads * key_floats), weights(d.heads * PART);
        arrange_queries(row, queries);
        for (int j = 0; j < count; j += KEYS) score(seen_keys + j, seen_values + j, count - j, queries, weights + j);
        for (int64_t h = 0; h < d.heads; ++h) softmax(weights + h * PART, count, results + h * result);
        for (int64_t h = 0, take; h < d.heads; h += take) {
            const int64_t rest = shared - h % shared;
            take = rest < HEADS ? rest : HEADS;
            const int64_t column = h / shared * d.value_width;
            float* out = results + h * result + 2;
            switch (take) {
                case 1: weigh<1>(seen_values, column, count, weights + h * PART, out); break;
                case 2: weigh<2>(seen_values, column, count, weights + h * PART, out); break;
                case 3: weigh<3>(seen_values, column, count, weights + h * PART, out); break;
                case 4: weigh<4>(seen_values, column, count, weights + h * PART, out); break;
                default: weigh<HEADS>(seen_values, column, count, weights + h * PART, out);
            }
        }
    }

    // Collects the slots that the row's query sees; returns how many. The last key stands in behind the end.
    int list_visible(int64_t row, int64_t part, const T** keys, const T** values) const {
        const int64_t query = d.query_positions[row], end = (part + 1) * PART < d.slots ? (part + 1) * PART : d.slots;
        const int64_t* positions = d.key_positions + row * d.positions_row;
        int count = 0;
        for (int64_t slot = part * PART; slot < end; ++slot) {
            const int64_t key = positions[slot];
            if (key < 0 || key > query || (query - key > d.window && key >= d.num_meta)) continue;
            keys[count] = static_cast<const T*>(d.k) + row * d.k_row + slot * d.k_slot;
            values[count++] = static_cast<const T*>(d.v) + row * d.v_row + slot * d.v_slot;
        }
        for (int i = 0; i < KEYS && count; ++i) keys[count + i] = keys[count - 1];
        return count;
    }

    void arrange_queries(int64_t row, float* to) const {
        const T* q = static_cast<const T*>(d.q) + row * d.q_row;
        const float scale = 1.0f / std::sqrt(static_cast<float>(d.key_width));
        for (int64_t h = 0; h < d.heads; ++h) {
            for (int64_t i = 0; i < key_floats; i += PAIR) {
                const Pair pair = load_pair(q + h * d.key_width + i, d.key_width - i);
                store(to + h * key_floats + i, pair.first * scale);
                store(to + h * key_floats + i + FLOATS, pair.second * scale);
            }
        }
    }

    // Scores KEYS keys for every head, and calls for their values, which are read next.
    void score(const T* const* keys, const T* const* values, int count, const float* queries, float* scores) const {
        const int64_t value_bytes = d.groups * d.value_width * static_cast<int64_t>(sizeof(T));
        for (int j = 0; j < KEYS && j < count; ++j)
            for (int64_t at = 0; at < value_bytes; at += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(values[j]) + at, 0, 2);
        for (int64_t g = 0; g < d.groups; ++g)
            for (int64_t h = g * shared; h < (g + 1) * shared; h += HEADS) {
                const int64_t rest = (g + 1) * shared - h;
                if (rest >= HEADS)
                    score_heads<HEADS>(keys, g * d.key_width, queries + h * key_floats, scores + h * PART);
                else
                    for (int64_t i = h; i < h + rest; ++i)
                        score_heads<1>(keys, g * d.key_width, queries + i * key_floats, scores + i * PART);
            }
    }

    template <int R>
    HYMBA_INLINE void score_heads(const T* const* keys, int64_t column, const float* queries, float* scores) const {
        Vec<float> sums[R][KEYS] = {};
        for (int64_t i = 0; i < key_floats; i += PAIR) {
            Pair k[KEYS];
#pragma GCC unroll 4
            for (int j = 0; j < KEYS; ++j) k[j] = load_pair(keys[j] + column + i, d.key_width - i);
#pragma GCC unroll 5
            for (int r = 0; r < R; ++r) {
                const Vec<float> first = load(queries + r * key_floats + i);
                const Vec<float> second = load(queries + r * key_floats + i + FLOATS);
#pragma GCC unroll 4
                for (int j = 0; j < KEYS; ++j) sums[r][j] = sums[r][j] + k[j].first * first + k[j].second * second;
            }
        }
#pragma GCC unroll 5
        for (int r = 0; r < R; ++r) store_sums(sums[r], scores + r * PART);
    }

    static HYMBA_INLINE void store_sums(const Vec<float> (&v)[KEYS], float* to) {
        typedef Vec<double> Doubles;
        typedef float Four __attribute__((vector_size(16)));
        const Vec<float> ab = interleave_low(v[0], v[1]) + interleave_high(v[0], v[1]);
        const Vec<float> cd = interleave_low(v[2], v[3]) + interleave_high(v[2], v[3]);
        const Doubles x = reinterpret_cast<Doubles>(ab), y = reinterpret_cast<Doubles>(cd);
        const Vec<float> abcd =
            reinterpret_cast<Vec<float>>(interleave_low(x, y)) + reinterpret_cast<Vec<float>>(interleave_high(x, y));
        Four parts[FLOATS / KEYS];
        std::memcpy(parts, &abcd, sizeof parts);
        for (int i = 1; i < FLOATS / KEYS; ++i) parts[0] += parts[i];
        std::memcpy(to, parts, sizeof parts[0]);
    }

    // Turns `count` scores into weights relative to the largest; writes that score and the weights' sum.
    static void softmax(float* scores, int count, float* result) {
        for (int j = count; j % FLOATS; ++j) scores[j] = -1e30f;
        Vec<float> most = load(scores), sum = {};
        for (int j = FLOATS; j < count; j += FLOATS) {
            const Vec<float> s = load(scores + j);
            most = s > most ? s : most;
        }
        float largest = most[0];
        for (int i = 1; i < FLOATS; ++i) largest = most[i] > largest ? most[i] : largest;
        for (int j = 0; j < count; j += FLOATS) {
            const Vec<float> weight = exp(load(scores + j) - largest);
            store(scores + j, weight);
            sum += weight;
        }
        result[0] = largest;
        result[1] = sum_lanes<float>(sum);
    }

    // The weighed sums of the values at `column` for R heads of one group.
    template <int R>
    void weigh(const T* const* values, int64_t column, int count, const float* weights, float* out) const {
        for (int64_t i = 0; i < value_floats; i += PAIR) {
            Vec<float> first[R] = {}, second[R] = {};
            for (int j = 0; j < count; ++j) {
                const Pair v = load_pair(values[j] + column + i, d.value_width - i);
#pragma GCC unroll 5
                for (int r = 0; r < R; ++r) {
                    first[r] = first[r] + v.first * weights[r * PART + j];
                    second[r] = second[r] + v.second * weights[r * PART + j];
                }
            }
#pragma GCC unroll 5
            for (int r = 0; r < R; ++r) {
                store(out + r * result + i, first[r]);
                store(out + r * result + i + FLOATS, second[r]);
            }
        }
    }

    // Puts a head's parts together; zeros if the query saw nothing.
    void merge(const float* results, T* out) const {
        const int64_t stride = d.heads * result;
        float largest = -INFINITY, sum = 0;
        for (int64_t p = 0; p < parts; ++p)
            if (results[p * stride + 1] > 0 && results[p * stride] > largest) largest = results[p * stride];
        Scratch<float> total(value_floats);
        std::memset(total, 0, static_cast<size_t>(value_floats) * sizeof(float));
        for (int64_t p = 0; p < parts; ++p) {
            const float* part = results + p * stride;
            if (!(part[1] != 0)) continue;
            const float weight = std::exp(part[0] - largest);
            sum += weight * part[1];
            for (int64_t i = 0; i < value_floats; ++i) total[i] += weight * part[2 + i];
        }
        const float scale = sum != 0 ? 1 / sum : 0;
        Scratch<float> ordered(value_floats);
        for (int64_t i = 0; i < value_floats; i += PAIR) restore<T>(total + i, scale, ordered + i);
        for (int64_t i = 0; i < d.value_width; i += FLOATS) {
            const int64_t rest = d.value_width - i;
            store(out + i, load(ordered + i), rest < FLOATS ? static_cast<int>(rest) : FLOATS);
        }
    }
};

}  // namespace

// One query a row, with the mask of ops/attention: dtype is 0 for float, 1 for bf16; window INT64_MAX for none.
HYMBA_API void hymba_decode_attention(const Decode* d) {
    if (d->dtype == 1)
        Decoder<bf16>{*d}.run();
    else
        Decoder<float>{*d}.run();
}
