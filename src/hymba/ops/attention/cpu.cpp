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

// Memory that is read soon, called for a few lines at a time, and no nearer than the second-level cache: the first has
// few places for lines under way, and what is computed meanwhile needs them.
struct Ahead {
    const char* at;
    int64_t lines, step;  // still to come, and of a step

    HYMBA_INLINE void call() {
        const int64_t count = step < lines ? step : lines;
        for (int64_t i = 0; i < count; ++i, at += 64) __builtin_prefetch(at, 0, 2);
        lines -= count;
    }
};

// What a thread keeps from one part to the next.
struct Run {
    int64_t end;        // parts of all rows before which its last one lies
    uint32_t* queries;  // arranged for the matrix unit
    int64_t row = -1;   // whose queries they are
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
    const Scratch<uint64_t> sights{d.rows * parts};  // of every part: a bit for each slot that its row's query sees

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
        Scratch<int64_t> tasks(d.rows * segments), starts(d.rows + 1);
        const int64_t count = list_tasks(tasks, starts), stride = d.heads * result;
        const int64_t runs = d.threads < count ? d.threads : count;  // of neighbouring segments, so that memory streams
        Scratch<float> results(count * stride);
        parallel_for(runs, static_cast<int>(runs), [&](int64_t i) {
            const int64_t first = count * i / runs, last = count * (i + 1) / runs;
            attend_run(tasks + first, last - first, results + first * stride);
        });
        parallel_for(d.rows, static_cast<int>(d.threads), [&](int64_t row) {
            Scratch<float> whole(result);
            for (int64_t h = 0; h < d.heads; ++h) {
                merge(results + starts[row] * stride + h * result, starts[row + 1] - starts[row], whole);
                write(whole, static_cast<Q*>(d.out) + (row * d.heads + h) * d.value_width);
            }
        });
    }

    // Looks at all positions; lists the segments in which something is seen, and where each row begins in that list.
    int64_t list_tasks(int64_t* tasks, int64_t* starts) const {
        int64_t count = 0;
        for (int64_t row = 0; row < d.rows; ++row) {
            starts[row] = count;
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t task = row * segments + part / length;
                const uint64_t sight = sights[row * parts + part] = look(row, part);
                if (sight && (count == starts[row] || tasks[count - 1] != task)) tasks[count++] = task;
            }
        }
        starts[d.rows] = count;
        return count;
    }

    // Which slots of a part the row's query sees, a bit each.
    uint64_t look(int64_t row, int64_t part) const {
        const int64_t query = d.query_positions[row], slots = part_slots(part);
        const int64_t* positions = d.key_positions + row * d.positions_row + part * PART;
        const auto sees = [&](int64_t key) {
            return static_cast<uint64_t>((key >= 0) & (key <= query) & ((query - key <= d.window) | (key < d.num_meta)));
        };
        uint64_t sight = 0;
        if (slots == PART)
            for (int j = 0; j < PART; ++j) sight |= sees(positions[j]) << j;
        else
            for (int64_t j = 0; j < slots; ++j) sight |= sees(positions[j]) << j;
        return sight;
    }

    int64_t part_slots(int64_t part) const { return (part + 1) * PART < d.slots ? PART : d.slots - part * PART; }

    // Writes the `result` of every head for each of neighbouring segments.
    void attend_run(const int64_t* tasks, int64_t count, float* to) const {
        const int64_t row = tasks[count - 1] / segments, behind = (tasks[count - 1] % segments + 1) * length;
        Scratch<uint32_t> queries(tiled ? d.groups * d.key_width / 2 * 16 : 0);
        Run run{row * parts + (behind < parts ? behind : parts), queries};
        begin_run();
        for (int64_t i = 0; i < count; ++i) attend_segment(tasks[i], run, to + i * d.heads * result);
        end_run();
    }

    void attend_segment(int64_t task, Run& run, float* to) const {
        const int64_t row = task / segments, first = task % segments * length, stride = d.heads * result;
        const int64_t last = first + length < parts ? first + length : parts;
        if (length == 1) return attend(row, first, run, to);
        Scratch<float> results(length * stride);
        int64_t count = 0;
        for (int64_t part = first; part < last; ++part)
            if (sights[row * parts + part]) attend(row, part, run, results + count++ * stride);
        for (int64_t h = 0; h < d.heads; ++h) merge(results + h * result, count, to + h * result);
    }

    // The same for one part of which something is seen.
    void attend(int64_t row, int64_t part, Run& run, float* results) const {
        if (tiled) return attend_tiles(row, part, run, results);
        int64_t seen[PART];
        int count = 0;
        for (uint64_t rest = sights[row * parts + part]; rest; rest &= rest - 1)
            seen[count++] = part * PART + __builtin_ctzll(rest);
        attend_vectors(row, seen, count, results);
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
        for (int r = 0; r < R; ++r) sum_lanes_of(sums[r], scores + r * PART);
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

    // The keys or values of the first part behind `part` of all rows in which something is seen, in so many steps.
    Ahead ahead(const void* from, int64_t row_stride, int64_t stride, int64_t width, int64_t part, const Run& run,
                int64_t steps) const {
        do ++part;
        while (part < run.end && !sights[part]);
        if (part >= run.end) return {nullptr, 0, 0};
        const uint64_t sight = sights[part];
        const int64_t first = __builtin_ctzll(sight), last = PART - 1 - __builtin_clzll(sight);
        const int64_t entries = (last - first) * stride + d.groups * width;
        const int64_t at = part / parts * row_stride + (part % parts * PART + first) * stride;
        const int64_t lines = (entries * static_cast<int64_t>(sizeof(T)) + 63) / 64;
        return {reinterpret_cast<const char*>(static_cast<const T*>(from) + at), lines, (lines + steps - 1) / steps};
    }

    void attend_tiles(int64_t row, int64_t part, Run& run, float* results) const {
        const int64_t slots = part_slots(part), blocks = (slots + tiles::BLOCK - 1) / tiles::BLOCK;
        const int64_t now = row * parts + part;
        if (run.row != row) turn_queries(row, run);
        // Memory is called for in every stage: it would idle in those that do not, and be waited for in the others.
        Ahead keys = ahead(d.k, d.k_row, d.k_slot, d.key_width, now, run, d.groups * blocks + d.heads);
        Scratch<float> weights(d.heads * PART);
        score_tiles(row, part, run.queries, keys, weights);
        for (int64_t h = 0; h < d.heads; ++h) {
            softmax(weights + h * PART, static_cast<int>(padded(slots)), results + h * result);
            keys.call();
        }
        Scratch<bf16> halves(d.groups * blocks * 2 * shared * tiles::BLOCK);
        const int64_t pairs = d.groups * (d.value_width / tiles::BLOCK) * blocks * (tiles::BLOCK / 2);
        const int64_t steps = d.heads * blocks * (tiles::BLOCK / 16) + pairs;
        Ahead values = ahead(d.v, d.v_row, d.v_slot, d.value_width, now, run, steps);
        split_weights(row, part, weights, values, halves);
        if (sights[now] == ~uint64_t{0})
            weigh_tiles<true>(row, part, halves, values, results + 2);
        else
            weigh_tiles<false>(row, part, halves, values, results + 2);
    }

    void turn_queries(int64_t row, Run& run) const {
        run.row = row;
        std::memset(run.queries, 0, static_cast<size_t>(d.groups * d.key_width) * 32);
        const Q* q = static_cast<const Q*>(d.q) + row * d.q_row;
        if constexpr (std::is_same_v<Q, bf16>)
            for (int64_t h = 0; h < d.heads; ++h)
                tiles::turn_query<T>(q + h * d.key_width, d.key_width,
                                     run.queries + h / shared * d.key_width * 8 + h % shared);
    }

    // Writes the scores (heads, PART); −∞ where a slot is not seen. All products come first: the unit's are long under
    // way, and those of one block need not wait for what vectors make of the one before.
    void score_tiles(int64_t row, int64_t part, const uint32_t* queries, Ahead& next, float* scores) const {
        const int64_t first = part * PART, slots = part_slots(part);
        Scratch<float> products(d.groups * PART * 16);
        Scratch<T> tail(tiles::BLOCK * d.key_width);
        for (int64_t at = 0; at < slots; at += tiles::BLOCK)
            for (int64_t g = 0; g < d.groups; ++g) {
                const T* keys = keys_at(row, first + at) + g * d.key_width;
                int64_t stride = d.k_slot;
                if (slots - at < tiles::BLOCK) {
                    for (int64_t j = 0; j < slots - at; ++j)
                        std::memcpy(tail + j * d.key_width, keys + j * stride, d.key_width * sizeof(T));
                    keys = tail;
                    stride = d.key_width;
                }
                if constexpr (!std::is_same_v<T, float>)
                    tiles::score(keys, stride, d.key_width, queries + g * d.key_width * 8,
                                 products + (g * PART + at) * 16);
                next.call();
            }
        Scratch<float> factors(PART);
        for (int64_t g = 0; g < d.groups; ++g) {
            for (int64_t j = 0; j < slots; ++j) factors[j] = d.k_scales ? scale * key_scale(row, first + j, g) : scale;
            turn_scores(products + g * PART * 16, slots, factors, sights[row * parts + part],
                        scores + g * shared * PART);
        }
    }

    // Products (slots, 16) of one group times factors (slots), as scores (shared, PART).
    void turn_scores(const float* products, int64_t slots, const float* factors, uint64_t sight, float* scores) const {
        for (int64_t at = 0; at < padded(slots); at += 16) {
            Vec<float> x[16];
            for (int j = 0; j < 16; ++j) x[j] = load(products + (at + j) * 16);
            rotate<16>(x, 4);
            const Vec<float> factor = load(factors + at);
            for (int64_t h = 0; h < shared; ++h)
                store(scores + h * PART + at,
                      _mm512_mask_mul_ps(splat(-INFINITY), static_cast<__mmask16>(sight >> at), x[h], factor));
        }
    }

    // Splits weights (heads, PART) in two bf16 that add up to them, (groups, blocks, 2 shared, BLOCK).
    void split_weights(int64_t row, int64_t part, float* weights, Ahead& next, bf16* halves) const {
        constexpr int BLOCK = tiles::BLOCK;
        const int64_t first = part * PART, slots = part_slots(part), blocks = (slots + BLOCK - 1) / BLOCK;
        Scratch<float> factors(PART);
        for (int64_t g = 0; g < d.groups; ++g, halves += blocks * 2 * shared * BLOCK) {
            if (d.v_scales)
                for (int64_t j = 0; j < slots; ++j) factors[j] = value_scale(row, first + j, g);
            for (int64_t h = 0; h < shared; ++h, weights += PART) {
                if (d.v_scales)
                    for (int64_t j = 0; j < slots; ++j) weights[j] *= factors[j];
                for (int64_t j = 0; j < blocks * BLOCK; j += 16) {
                    bf16* upper = halves + (j / BLOCK * 2 * shared + h) * BLOCK + j % BLOCK;
                    const Vec<float> weight = load(weights + j);
                    store(upper, weight);
                    store(upper + shared * BLOCK, weight - load(upper));
                    next.call();
                }
            }
        }
    }

    // Writes the weighed sums of all heads, and calls for what comes next meanwhile. Columns are paired one step before
    // they are multiplied: the unit reads from the cache, not from what is on its way there.
    template <bool ALL>
    void weigh_tiles(int64_t row, int64_t part, const bf16* halves, Ahead next, float* sums) const {
        constexpr int BLOCK = tiles::BLOCK;
        const int64_t blocks = (part_slots(part) + BLOCK - 1) / BLOCK, columns = d.value_width / BLOCK;
        const uint64_t sight = sights[row * parts + part];
        Scratch<uint32_t> values(2 * blocks * 16 * BLOCK);
        for (int64_t i = 0; i <= d.groups * columns; ++i) {
            if (i < d.groups * columns) {
                const T* from = values_at(row, part * PART) + i * BLOCK;
                uint32_t* to = values + i % 2 * blocks * 16 * BLOCK;
                for (int64_t j = 0; j < blocks * BLOCK; j += 2, to += BLOCK) {
                    const T *a = from + j * d.v_slot, *b = a + d.v_slot;
                    if constexpr (!std::is_same_v<T, float>)
                        tiles::pair_values(a, b, ALL || (sight >> j & 1), ALL || (sight >> (j + 1) & 1), to);
                    next.call();
                }
            }
            if (i == 0) continue;
            const int64_t g = (i - 1) / columns, column = (i - 1) % columns * BLOCK;
            tiles::weigh(halves + g * blocks * 2 * shared * BLOCK, values + (i - 1) % 2 * blocks * 16 * BLOCK, blocks,
                         shared, sums + g * shared * result + column, result);
        }
    }
#else
    void begin_run() const {}
    void end_run() const {}
    void attend_tiles(int64_t, int64_t, Run&, float*) const {}
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

    // Puts the results of one head together.
    void merge(const float* results, int64_t count, float* to) const {
        const int64_t stride = d.heads * result;
        Scratch<float> weights(count + FLOATS);
        float largest = -INFINITY, sum = 0;
        for (int64_t p = 0; p < count; ++p) {
            weights[p] = results[p * stride];
            largest = weights[p] > largest ? weights[p] : largest;
        }
        for (int64_t p = 0; p < count; p += FLOATS) store(weights + p, exp(load(weights + p) - largest));
        for (int64_t p = 0; p < count; ++p) sum += weights[p] * results[p * stride + 1];
        for (int64_t i = 2; i < result; i += PAIR) {
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
