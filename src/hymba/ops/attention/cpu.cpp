// Attention of one query a row, as in decoding: keys and values are read from memory once, for all heads that share them.
//
// A part is PART slots of one row: its keys are scored for all heads, each head takes its softmax over the part, and the
// values are weighed. Parts are put together in segments and segments in rows, always the same ones in the same order,
// so that the number of threads changes nothing. Scores and sums are float. Where there is a matrix unit it scores and
// weighs (decode_tiles.h): vectors would take longer than memory.
#include "decode_tiles.h"

using namespace hymba;

// As native.py fills it. Strides count elements; heads and their widths are dense. Keys and values are of `dtype`, or of
// 8 bits where they have scales.
struct Decode {
    int64_t rows, heads, groups, slots, key_width, value_width, window, num_meta, dtype, threads;
    int64_t q_row, k_row, k_slot, v_row, v_slot, positions_row, k_scales_row, k_scales_slot, v_scales_row, v_scales_slot;
    const void *q, *k, *v;                             // (rows, heads or slots × groups, width)
    const bf16 *k_scales, *v_scales;                   // (rows, slots, groups)
    const int64_t *query_positions, *key_positions;  // (rows), (rows, slots)
    void* out;                                         // (rows, heads, value_width)
};

namespace {

constexpr int PART = 64;      // slots
constexpr int SEGMENTS = 64;  // of all rows together, unless they would be longer than
constexpr int LONGEST = 16;   // parts
constexpr int KEYS = 4;       // scored together
constexpr int HEADS = 5;      // that share a read of a value, at most
constexpr int FLOATS = LANES<float>;
constexpr int PAIR = 2 * FLOATS;  // stored values taken together: one load of bf16

int64_t padded(int64_t width) { return (width + PAIR - 1) / PAIR * PAIR; }

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
HYMBA_INLINE Pair load_pair(const int8_t* from) {
    typedef int8_t Bytes __attribute__((vector_size(FLOATS)));
    Bytes halves[2];
    std::memcpy(halves, from, sizeof halves);
    const IntVec first = __builtin_convertvector(halves[0], IntVec), second = __builtin_convertvector(halves[1], IntVec);
    return {__builtin_convertvector(first, Vec<float>), __builtin_convertvector(second, Vec<float>)};
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

// Memory that is read soon, called for a few lines at a time; behind the end it does no harm.
struct Ahead {
    const char* at;
    int64_t lines;  // of a step

    HYMBA_INLINE void step() {
        for (int64_t i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// Q is the dtype of queries and outputs, T that of keys and values.
template <class Q, class T>
struct Decoder {
    const Decode& d;
    const int64_t parts = (d.slots + PART - 1) / PART;  // of a row
    const int64_t key_floats = padded(d.key_width), value_floats = padded(d.value_width);
    const int64_t shared = d.heads / d.groups;  // heads of a group
    const int64_t result = value_floats + 2;    // floats of a head's part: largest score, sum of weights, weighed values
    const int64_t length = segment_parts();
    const int64_t segments = (parts + length - 1) / length;  // of a row
    const float scale = 1.0f / std::sqrt(static_cast<float>(d.key_width));
    const bool tiled = suits_tiles();

    int64_t segment_parts() const {
        const int64_t wanted = d.rows * parts / SEGMENTS;
        return wanted < 1 ? 1 : wanted < LONGEST ? wanted : LONGEST;
    }

    bool suits_tiles() const {
#if defined(HYMBA_AMX)
        return std::is_same_v<Q, bf16> && shared <= tiles::MOST_SHARED && d.key_width % tiles::BLOCK == 0 &&
               d.value_width % tiles::BLOCK == 0 && amx::usable();
#else
        return false;
#endif
    }

    void run() const {
        const int64_t tasks = d.rows * segments, stride = d.heads * result;
        const int64_t runs = d.threads < tasks ? d.threads : tasks;  // of neighbouring segments, so that memory streams
        Scratch<float> results(tasks * stride);
        parallel_for(runs, static_cast<int>(runs), [&](int64_t i) {
            begin_run();
            for (int64_t task = tasks * i / runs; task < tasks * (i + 1) / runs; ++task)
                attend_segment(task / segments, task % segments, results + task * stride);
            end_run();
        });
        parallel_for(d.rows, static_cast<int>(d.threads), [&](int64_t row) {
            Scratch<float> whole(result);
            for (int64_t h = 0; h < d.heads; ++h) {
                merge(results + row * segments * stride + h * result, segments, whole);
                write(whole, static_cast<Q*>(d.out) + (row * d.heads + h) * d.value_width);
            }
        });
    }

    // Writes the `result` of every head for one segment of a row.
    void attend_segment(int64_t row, int64_t segment, float* to) const {
        const int64_t first = segment * length, count = first + length < parts ? length : parts - first;
        if (count == 1) return attend(row, first, to);
        const int64_t stride = d.heads * result;
        Scratch<float> results(count * stride);
        for (int64_t part = 0; part < count; ++part) attend(row, first + part, results + part * stride);
        for (int64_t h = 0; h < d.heads; ++h) merge(results + h * result, count, to + h * result);
    }

    // The same for one part.
    void attend(int64_t row, int64_t part, float* results) const {
        int64_t seen[PART];
        const int count = list_visible(row, part, seen);
        if (!count) {
            for (int64_t h = 0; h < d.heads; ++h) results[h * result + 1] = 0;
        } else if (tiled) {
            attend_tiles(row, part, seen, count, results);
        } else {
            attend_vectors(row, seen, count, results);
        }
    }

    // Collects the slots of a part that the row's query sees; returns how many.
    int list_visible(int64_t row, int64_t part, int64_t* seen) const {
        const int64_t query = d.query_positions[row], end = (part + 1) * PART < d.slots ? (part + 1) * PART : d.slots;
        const int64_t* positions = d.key_positions + row * d.positions_row;
        int count = 0;
        for (int64_t slot = part * PART; slot < end; ++slot) {
            const int64_t key = positions[slot];
            seen[count] = slot;
            count += key >= 0 && key <= query && (query - key <= d.window || key < d.num_meta);
        }
        return count;
    }

    const T* keys_at(int64_t row, int64_t slot) const {
        return static_cast<const T*>(d.k) + row * d.k_row + slot * d.k_slot;
    }
    const T* values_at(int64_t row, int64_t slot) const {
        return static_cast<const T*>(d.v) + row * d.v_row + slot * d.v_slot;
    }
    float key_scale(int64_t row, int64_t slot, int64_t group) const {
        return widen(d.k_scales[row * d.k_scales_row + slot * d.k_scales_slot + group]);
    }
    float value_scale(int64_t row, int64_t slot, int64_t group) const {
        return widen(d.v_scales[row * d.v_scales_row + slot * d.v_scales_slot + group]);
    }

    // ---- With vectors, over the slots that are seen ----

    void attend_vectors(int64_t row, const int64_t* seen, int count, float* results) const {
        const T* keys[PART + KEYS];
        const T* values[PART];
        for (int j = 0; j < count; ++j) {
            keys[j] = keys_at(row, seen[j]);
            values[j] = values_at(row, seen[j]);
        }
        for (int i = 0; i < KEYS; ++i) keys[count + i] = keys[count - 1];  // stands in behind the end
        Scratch<float> queries(d.heads * key_floats), weights(d.heads * PART);
        arrange_queries(row, queries);
        for (int j = 0; j < count; j += KEYS) score(keys + j, values + j, count - j, queries, weights + j);
        for (int64_t h = 0; h < d.heads; ++h) {
            if (d.k_scales)
                for (int j = 0; j < count; ++j) weights[h * PART + j] *= key_scale(row, seen[j], h / shared);
            softmax(weights + h * PART, count, results + h * result);
            if (d.v_scales)
                for (int j = 0; j < count; ++j) weights[h * PART + j] *= value_scale(row, seen[j], h / shared);
        }
        for (int64_t h = 0, take; h < d.heads; h += take) {
            const int64_t rest = shared - h % shared;
            take = rest < HEADS ? rest : HEADS;
            const int64_t column = h / shared * d.value_width;
            float* out = results + h * result + 2;
            switch (take) {
                case 1: weigh<1>(values, column, count, weights + h * PART, out); break;
                case 2: weigh<2>(values, column, count, weights + h * PART, out); break;
                case 3: weigh<3>(values, column, count, weights + h * PART, out); break;
                case 4: weigh<4>(values, column, count, weights + h * PART, out); break;
                default: weigh<HEADS>(values, column, count, weights + h * PART, out);
            }
        }
    }

    void arrange_queries(int64_t row, float* to) const {
        const Q* q = static_cast<const Q*>(d.q) + row * d.q_row;
        std::memset(to, 0, static_cast<size_t>(d.heads * key_floats) * sizeof(float));
        for (int64_t h = 0; h < d.heads; ++h)
            for (int64_t i = 0; i < d.key_width; ++i)
                to[h * key_floats + i / PAIR * PAIR + place<T>(i % PAIR)] = widen(q[h * d.key_width + i]) * scale;
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

    // ---- With the matrix unit, over all slots; those that are not seen weigh nothing and their values are not read ----

#if defined(HYMBA_AMX)
    void begin_run() const {
        if (tiled) tiles::configure(shared);
    }
    void end_run() const {
        if (tiled) tiles::release();
    }

    void attend_tiles(int64_t row, int64_t part, const int64_t* seen, int count, float* results) const {
        const int64_t first = part * PART, slots = first + PART < d.slots ? PART : d.slots - first;
        uint64_t mask = 0;
        for (int j = 0; j < count; ++j) mask |= uint64_t{1} << (seen[j] - first);
        Ahead keys = ahead(keys_at(row, first + PART), d.k_slot), values = ahead(values_at(row, first + PART), d.v_slot);
        Scratch<float> weights(shared * PART);
        for (int64_t g = 0; g < d.groups; ++g) {
            float* to = results + g * shared * result;
            score_tiles(row, first, slots, g, mask, weights);
            for (int64_t h = 0; h < shared; ++h)
                softmax(weights + h * PART, static_cast<int>(padded(slots)), to + h * result);
            if (mask == ~uint64_t{0})
                weigh_tiles<true>(row, first, slots, g, mask, weights, keys, values, to + 2);
            else
                weigh_tiles<false>(row, first, slots, g, mask, weights, keys, values, to + 2);
        }
    }

    // The next part's keys or values, in as many steps as weigh_tiles takes with this one.
    Ahead ahead(const T* from, int64_t stride) const {
        const int64_t steps = d.groups * (d.value_width / tiles::BLOCK) * PART / 2;
        const int64_t lines = PART * stride * static_cast<int64_t>(sizeof(T)) / 64;
        return {reinterpret_cast<const char*>(from), (lines + steps - 1) / steps};
    }

    // Writes the scores (shared, PART) of one group; −∞ where a slot is not seen.
    void score_tiles(int64_t row, int64_t first, int64_t slots, int64_t g, uint64_t mask, float* scores) const {
        Scratch<uint32_t> queries(d.key_width / 2 * 16);
        std::memset(queries, 0, static_cast<size_t>(d.key_width) * 32);
        const Q* q = static_cast<const Q*>(d.q) + row * d.q_row + g * shared * d.key_width;
        if constexpr (std::is_same_v<Q, bf16>)
            for (int64_t h = 0; h < shared; ++h) tiles::turn_query<T>(q + h * d.key_width, d.key_width, queries + h);
        Scratch<float> block(tiles::BLOCK * 16), factors(PART);
        Scratch<T> tail(tiles::BLOCK * d.key_width);
        for (int64_t j = 0; j < slots; ++j) factors[j] = d.k_scales ? scale * key_scale(row, first + j, g) : scale;
        for (int64_t at = 0; at < slots; at += tiles::BLOCK) {
            const T* keys = keys_at(row, first + at) + g * d.key_width;
            int64_t stride = d.k_slot;
            if (slots - at < tiles::BLOCK) {
                for (int64_t j = 0; j < slots - at; ++j)
                    std::memcpy(tail + j * d.key_width, keys + j * stride, d.key_width * sizeof(T));
                keys = tail;
                stride = d.key_width;
            }
            if constexpr (!std::is_same_v<T, float>) tiles::score(keys, stride, d.key_width, queries, block);
            for (int half = 0; half < 2; ++half) {
                Vec<float> x[16];
                for (int j = 0; j < 16; ++j) x[j] = load(block + (half * 16 + j) * 16);
                rotate<16>(x, 4);
                const int64_t column = at + half * 16;
                const Vec<float> factor = load(factors + column);
                for (int64_t h = 0; h < shared; ++h)
                    store(scores + h * PART + column,
                          _mm512_mask_mul_ps(splat(-INFINITY), static_cast<__mmask16>(mask >> column), x[h], factor));
            }
        }
    }

    // Writes the weighed sums of one group's heads, and calls for what comes next meanwhile.
    template <bool ALL>
    void weigh_tiles(int64_t row, int64_t first, int64_t slots, int64_t g, uint64_t mask, float* weights,
                     Ahead& next_keys, Ahead& next_values, float* sums) const {
        constexpr int BLOCK = tiles::BLOCK;
        const int64_t blocks = (slots + BLOCK - 1) / BLOCK;
        Scratch<bf16> halves(blocks * 2 * shared * BLOCK);
        Scratch<uint32_t> values(blocks * 16 * BLOCK);
        if (d.v_scales) {
            Scratch<float> factors(PART);
            for (int64_t j = 0; j < slots; ++j) factors[j] = value_scale(row, first + j, g);
            for (int64_t h = 0; h < shared; ++h)
                for (int64_t j = 0; j < slots; ++j) weights[h * PART + j] *= factors[j];
        }
        for (int64_t h = 0; h < shared; ++h)
            for (int64_t j = 0; j < blocks * BLOCK; j += 16) {
                bf16* upper = halves + (j / BLOCK * 2 * shared + h) * BLOCK + j % BLOCK;
                const Vec<float> weight = load(weights + h * PART + j);
                store(upper, weight);
                store(upper + shared * BLOCK, weight - load(upper));
            }
        for (int64_t column = 0; column < d.value_width; column += BLOCK) {
            const T* from = values_at(row, first) + g * d.value_width + column;
            for (int64_t j = 0; j < blocks * BLOCK; j += 2) {
                const T *a = from + j * d.v_slot, *b = a + d.v_slot;
                if constexpr (!std::is_same_v<T, float>)
                    tiles::pair_values(a, b, ALL || (mask >> j & 1), ALL || (mask >> (j + 1) & 1), values + j / 2 * BLOCK);
                next_keys.step();
                next_values.step();
            }
            tiles::weigh(halves, values, blocks, shared, sums + column, result);
        }
    }
#else
    void begin_run() const {}
    void end_run() const {}
    void attend_tiles(int64_t, int64_t, const int64_t*, int, float*) const {}
#endif

    // ---- For both ----

    // Turns `count` scores into weights relative to the largest; writes that score and the weights' sum.
    static void softmax(float* scores, int count, float* to) {
        for (int j = count; j % FLOATS; ++j) scores[j] = -INFINITY;
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
        to[0] = largest;
        to[1] = sum_lanes<float>(sum);
    }

    // Puts the results of one head together.
    void merge(const float* results, int64_t count, float* to) const {
        const int64_t stride = d.heads * result;
        float largest = -INFINITY, sum = 0;
        for (int64_t p = 0; p < count; ++p)
            if (results[p * stride + 1] != 0 && results[p * stride] > largest) largest = results[p * stride];
        std::memset(to, 0, static_cast<size_t>(result) * sizeof(float));
        for (int64_t p = 0; p < count; ++p) {
            const float* part = results + p * stride;
            if (!(part[1] != 0)) continue;
            const float weight = std::exp(part[0] - largest);
            sum += weight * part[1];
            for (int64_t i = 2; i < result; ++i) to[i] += weight * part[i];
        }
        to[0] = largest;
        to[1] = sum;
    }

    // Writes a head's output; zeros if the query saw nothing.
    void write(const float* whole, Q* out) const {
        const float factor = whole[1] != 0 ? 1 / whole[1] : 0;
        Scratch<float> entries(value_floats);
        for (int64_t i = 0; i < value_floats; i += PAIR) {
            const Pair x = ordered<T>({load(whole + 2 + i), load(whole + 2 + i + FLOATS)});
            store(entries + i, x.first * factor);
            store(entries + i + FLOATS, x.second * factor);
        }
        for (int64_t i = 0; i < d.value_width; i += FLOATS) {
            const int64_t rest = d.value_width - i;
            store(out + i, load(entries + i), rest < FLOATS ? static_cast<int>(rest) : FLOATS);
        }
    }
};

}  // namespace

// One query a row, with the mask of ops/attention: dtype is 0 for float, 1 for bf16; window INT64_MAX for none.
HYMBA_API void hymba_decode_attention(const Decode* d) {
    if (d->dtype == 1 && d->k_scales)
        Decoder<bf16, int8_t>{*d}.run();
    else if (d->dtype == 1)
        Decoder<bf16, bf16>{*d}.run();
    else if (d->k_scales)
        Decoder<float, int8_t>{*d}.run();
    else
        Decoder<float, float>{*d}.run();
}
