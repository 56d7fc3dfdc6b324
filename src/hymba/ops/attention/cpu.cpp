// Attention with vectors, for any number of queries a row: one in decoding, a chunk's in prefill, with the same arithmetic.
//
// Keys are taken in the order of their positions, whatever slots they lie in, and a part (parts.h) is PART consecutive
// positions. What a query sees of a part is scored for every head, weighted by a softmax over the part, and merged with
// the other parts' results. So an output depends bit for bit on the query, on the keys and values that it sees and on
// their positions, and on nothing else: not on the other queries of the call, nor on how a text was cut into calls.
#include "parts.h"

using namespace hymba;

namespace {

constexpr int KEYS = 4;   // scored together
constexpr int HEADS = 5;  // that share a read of a key or a value, at most
constexpr int TILE = 16;  // queries whose results are kept together
constexpr int ROWS = 4;   // queries' heads scored together against widened keys
constexpr int64_t MOST_POSITIONS = 1 << 22;

int64_t last_position(const Attention& d) {
    int64_t last = -1;
    for (int64_t i = 0; i < d.rows * d.steps; ++i) last = d.query_positions[i] > last ? d.query_positions[i] : last;
    return last;
}

// Bits 0 … n − 1.
HYMBA_INLINE uint64_t lowest(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Q is the dtype of queries and outputs, T that of keys and values.
template <class Q, class T>
struct Vectors {
    const Attention& d;
    const int64_t key_floats = padded(d.key_width), value_floats = padded(d.value_width);
    const int64_t shared = d.heads / d.groups;  // heads of a group
    const int64_t result = value_floats + 2;    // floats of a head's part
    const int64_t positions = last_position(d) + 1, parts = (positions + PART - 1) / PART;
    const int64_t segments = (parts + SEGMENT - 1) / SEGMENT;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d.key_width));
    const Scratch<int32_t> slots{d.rows * parts * PART};  // of each position, −1 if there is no key
    const Scratch<uint64_t> present{d.rows * parts};      // of each part, a bit for each position that has a key

    // Returns whether the kernel serves: no two keys of a row stand at the same position.
    bool run() const {
        std::atomic<bool> unique{true};
        parallel_rows(d.rows, d.slots, 1 << 15, static_cast<int>(d.threads), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                if (!find_slots(row)) unique = false;
        });
        if (!unique) return false;
        d.steps == 1 ? run_decode() : run_prefill();
        return true;
    }

    // ---- What is seen --------------------------------------------------------------------------------------------------

    bool find_slots(int64_t row) const {
        const int64_t* from = d.key_positions + row * d.positions_row;
        int32_t* to = slots + row * parts * PART;
        uint64_t* bits = present + row * parts;
        for (int64_t i = 0; i < parts * PART; ++i) to[i] = -1;
        bool unique = true;
        for (int64_t first = 0; first < d.slots; first += PART) {
            const int64_t count = d.slots - first < PART ? d.slots - first : PART, start = from[first];
            int64_t gaps = 0;
            for (int64_t j = 0; j < count; ++j) gaps |= from[first + j] - start - j;
            if (!gaps && start >= 0 && start + count <= positions) {  // neighbors in the buffer and in the text
                int32_t taken = -1;
                for (int64_t j = 0; j < count; ++j) taken &= to[start + j];
                unique &= taken == -1;
                for (int64_t j = 0; j < count; ++j) to[start + j] = static_cast<int32_t>(first + j);
                continue;
            }
            for (int64_t j = 0; j < count; ++j) {
                const int64_t position = from[first + j];
                if (position < 0 || position >= positions) continue;
                unique &= to[position] == -1;
                to[position] = static_cast<int32_t>(first + j);
            }
        }
        for (int64_t part = 0; part < parts; ++part) {
            uint64_t seen = 0;
            for (int j = 0; j < PART; ++j) seen |= static_cast<uint64_t>(to[part * PART + j] >= 0) << j;
            bits[part] = seen;
        }
        return unique;
    }

    // Which positions of a part a row's query sees, a bit each.
    uint64_t sight(int64_t row, int64_t query, int64_t part) const {
        if (query < 0) return 0;
        const int64_t base = part * PART;
        const uint64_t near = d.window < query - base ? ~lowest(query - d.window - base) : ~uint64_t{0};
        return present[row * parts + part] & lowest(query - base + 1) & (near | lowest(d.num_meta - base));
    }

    // The keys and values of a part, in order; where there is none, those of another stand in.
    struct Places {
        const T *keys[PART], *values[PART];
        const int32_t* slots;
    };

    void find_places(int64_t row, int64_t part, Places& to) const {
        to.slots = slots + (row * parts + part) * PART;
        const int64_t other = to.slots[__builtin_ctzll(present[row * parts + part])];
        for (int j = 0; j < PART; ++j) {
            const int64_t slot = to.slots[j] < 0 ? other : to.slots[j];
            to.keys[j] = static_cast<const T*>(d.k) + row * d.k_row + slot * d.k_slot;
            to.values[j] = static_cast<const T*>(d.v) + row * d.v_row + slot * d.v_slot;
        }
    }

    // ---- One query a row -----------------------------------------------------------------------------------------------

    // The segments of all rows are tasks, and a thread takes neighboring ones, so that memory streams.
    void run_decode() const {
        Scratch<int64_t> tasks(d.rows * segments), starts(d.rows + 1);
        const auto seen = [&](int64_t row, int64_t part) { return sight(row, d.query_positions[row], part); };
        const int64_t count = list_segments(d.rows, parts, seen, tasks, starts), stride = d.heads * result;
        const int64_t runs = d.threads < count ? d.threads : count;
        Scratch<float> results(count * stride);
        parallel_for(runs, static_cast<int>(runs), [&](int64_t i) {
            Scratch<float> queries(d.heads * key_floats);
            int64_t arranged = -1;
            for (int64_t at = count * i / runs; at < count * (i + 1) / runs; ++at) {
                const int64_t row = tasks[at] / segments;
                if (arranged != row) arrange_queries(row, 0, 0, d.heads, queries);
                arranged = row;
                attend_segment(row, tasks[at] % segments, queries, results + at * stride);
            }
        });
        write_rows<T, Q>(d, results, starts, result);
    }

    void attend_segment(int64_t row, int64_t segment, const float* queries, float* to) const {
        const int64_t stride = d.heads * result, last = (segment + 1) * SEGMENT;
        Scratch<float> results(SEGMENT * stride);
        int64_t count = 0;
        for (int64_t part = segment * SEGMENT; part < last && part < parts; ++part) {
            const uint64_t seen = sight(row, d.query_positions[row], part);
            if (!seen) continue;
            Places places;
            find_places(row, part, places);
            attend(row, places, seen, queries, 0, d.groups, results + count++ * stride);
        }
        for (int64_t h = 0; h < d.heads; ++h) merge(results + h * result, count, stride, result, to + h * result);
    }

    // ---- Many queries a row --------------------------------------------------------------------------------------------

    // A task is TILE queries and the heads of one group: keys and values are widened once for all of them.
    void run_prefill() const {
        const int64_t tiles = (d.steps + TILE - 1) / TILE;
        parallel_for(d.rows * d.groups * tiles, static_cast<int>(d.threads), [&](int64_t i) {
            const int64_t first = i % tiles * TILE, group = i / tiles % d.groups, row = i / tiles / d.groups;
            attend_tile(row, group, first, first + TILE < d.steps ? TILE : d.steps - first);
        });
    }

    // A part's keys and values of one group as floats, as load_pair gives them, and their scales.
    struct Widened {
        Scratch<float> keys;    // (key_floats, PART)
        Scratch<float> values;  // (value_floats / PAIR, PART, PAIR)
        Scratch<float> key_scales, value_scales;
        explicit Widened(const Vectors& a)
            : keys(a.key_floats * PART), values(a.value_floats * PART), key_scales(PART), value_scales(PART) {}
    };

    void widen_part(int64_t row, int64_t group, const Places& places, const Widened& to) const {
        for (int64_t i = 0; i < key_floats; i += PAIR)
            for (int j = 0; j < PART; j += FLOATS) {
                Vec<float> first[FLOATS], second[FLOATS];
#pragma GCC unroll 16
                for (int k = 0; k < FLOATS; ++k) {
                    const Pair x = load_pair(places.keys[j + k] + group * d.key_width + i, d.key_width - i);
                    first[k] = x.first;
                    second[k] = x.second;
                }
                rotate<FLOATS>(first, __builtin_ctz(FLOATS));
                rotate<FLOATS>(second, __builtin_ctz(FLOATS));
                for (int k = 0; k < FLOATS; ++k) {
                    store(to.keys + (i + k) * PART + j, first[k]);
                    store(to.keys + (i + FLOATS + k) * PART + j, second[k]);
                }
            }
        for (int64_t i = 0; i < value_floats; i += PAIR)
            for (int j = 0; j < PART; ++j) {
                const Pair x = load_pair(places.values[j] + group * d.value_width + i, d.value_width - i);
                store(to.values + i * PART + j * PAIR, x.first);
                store(to.values + i * PART + j * PAIR + FLOATS, x.second);
            }
        if (d.k_scales) widen_scales(d.k_scales, row * d.k_scales_row + group, d.k_scales_slot, places, to.key_scales);
        if (d.v_scales) widen_scales(d.v_scales, row * d.v_scales_row + group, d.v_scales_slot, places, to.value_scales);
    }

    void widen_scales(const bf16* scales, int64_t start, int64_t stride, const Places& places, float* to) const {
        for (int j = 0; j < PART; ++j) {
            const int64_t slot = places.slots[j];
            to[j] = slot < 0 ? 0 : hymba::widen(scales[start + slot * stride]);
        }
    }

    void attend_tile(int64_t row, int64_t group, int64_t first, int64_t count) const {
        const int64_t* query = d.query_positions + row * d.steps + first;
        const int64_t head = group * shared, stride = shared * result, rows = (count * shared + ROWS - 1) / ROWS * ROWS;
        Scratch<float> queries(rows * key_floats), weights(rows * PART), pair(TILE * SEGMENT * stride);
        Scratch<float> results(count * segments * stride), whole(result);
        const Widened widened(*this);
        int64_t merged[TILE] = {};  // segments of each query
        std::memset(queries, 0, static_cast<size_t>(rows * key_floats) * sizeof(float));
        for (int64_t t = 0; t < count; ++t)
            arrange_queries(row, first + t, head, shared, queries + t * shared * key_floats);
        for (int64_t segment = 0; segment < segments; ++segment) {
            int64_t attended[TILE] = {};  // parts of each query
            for (int64_t part = segment * SEGMENT; part < (segment + 1) * SEGMENT && part < parts; ++part) {
                uint64_t seen[TILE] = {}, any = 0;
                float* to[TILE] = {};
                for (int64_t t = 0; t < count; ++t) {
                    seen[t] = present[row * parts + part] ? sight(row, query[t], part) : 0;
                    if (seen[t]) to[t] = pair + (t * SEGMENT + attended[t]++) * stride;
                    any |= seen[t];
                }
                if (!any) continue;
                Places places;
                find_places(row, part, places);
                widen_part(row, group, places, widened);
                attend_part(widened, seen, count, queries, weights, to);
            }
            for (int64_t t = 0; t < count; ++t) {
                if (!attended[t]) continue;
                float* to = results + (t * segments + merged[t]++) * stride;
                for (int64_t h = 0; h < shared; ++h)
                    merge(pair + t * SEGMENT * stride + h * result, attended[t], stride, result, to + h * result);
            }
        }
        for (int64_t t = 0; t < count; ++t)
            for (int64_t h = 0; h < shared; ++h) {
                merge(results + t * segments * stride + h * result, merged[t], stride, result, whole);
                const int64_t at = ((row * d.steps + first + t) * d.heads + head + h) * d.value_width;
                write<T>(whole, d.value_width, static_cast<Q*>(d.out) + at);
            }
    }

    // Writes the results of each query that sees something of a part, at to[t], as `attend` does for one.
    void attend_part(const Widened& x, const uint64_t* seen, int64_t count, const float* queries, float* weights,
                     float* const* to) const {
        int64_t begin = count * shared, end = 0;  // rows of queries that see something
        for (int64_t t = 0; t < count; ++t) {
            if (seen[t] && begin > t * shared) begin = t * shared;
            if (seen[t]) end = (t + 1) * shared;
        }
        for (int64_t r = begin / ROWS * ROWS; r < end; r += ROWS)
            score_rows(x.keys, queries + r * key_floats, weights + r * PART);
        int at[TILE][PART], seen_count[TILE];
        for (int64_t t = 0; t < count; ++t) {
            seen_count[t] = 0;
            for (uint64_t rest = seen[t]; rest; rest &= rest - 1) at[t][seen_count[t]++] = __builtin_ctzll(rest);
            for (int64_t h = 0; h < shared && seen[t]; ++h)
                weight_row(x, seen[t], at[t], seen_count[t], weights + (t * shared + h) * PART, to[t] + h * result);
        }
        for (int64_t i = 0; i < value_floats; i += 2 * PAIR)
            for (int64_t t = 0; t < count; ++t) {
                if (!seen[t]) continue;
                const float* of = weights + t * shared * PART;
                const float* values = x.values + i * PART;
                if (i + PAIR < value_floats)
                    weigh_heads<2>(values, at[t], seen_count[t], of, to[t] + 2 + i);
                else
                    weigh_heads<1>(values, at[t], seen_count[t], of, to[t] + 2 + i);
            }
    }

    // Scores ROWS rows against all keys. A vector holds one lane of sums of `score_heads`, of as many keys as it has
    // lanes; they are added in the order of sum_lanes_of.
    void score_rows(const float* keys, const float* queries, float* scores) const {
        constexpr int QUARTER = FLOATS / 4;
        for (int j = 0; j < PART; j += 2 * FLOATS) {
            Vec<float> totals[ROWS][2];
            for (int lane = 0; lane < QUARTER; ++lane) {
                Vec<float> a[ROWS][2] = {}, b[ROWS][2] = {}, c[ROWS][2] = {};
                add_lane(keys + j, queries, lane, a);
                add_lane(keys + j, queries, lane + 2 * QUARTER, b);
                for (int r = 0; r < ROWS; ++r)
                    for (int k = 0; k < 2; ++k) {
                        a[r][k] += b[r][k];
                        b[r][k] = Vec<float>{};
                    }
                add_lane(keys + j, queries, lane + QUARTER, b);
                add_lane(keys + j, queries, lane + 3 * QUARTER, c);
                for (int r = 0; r < ROWS; ++r)
                    for (int k = 0; k < 2; ++k) {
                        a[r][k] += b[r][k] + c[r][k];
                        totals[r][k] = lane ? totals[r][k] + a[r][k] : a[r][k];
                    }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int k = 0; k < 2; ++k) store(scores + r * PART + j + k * FLOATS, totals[r][k]);
        }
    }

    HYMBA_INLINE void add_lane(const float* keys, const float* queries, int lane, Vec<float> (&sums)[ROWS][2]) const {
        for (int64_t i = lane; i < key_floats; i += PAIR) {
            const float *first = keys + i * PART, *second = first + FLOATS * PART;
            const Vec<float> k[4] = {load(first), load(first + FLOATS), load(second), load(second + FLOATS)};
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const float x = queries[r * key_floats + i], y = queries[r * key_floats + i + FLOATS];
                sums[r][0] = sums[r][0] + k[0] * x + k[2] * y;
                sums[r][1] = sums[r][1] + k[1] * x + k[3] * y;
            }
        }
    }

    // Turns a head's scores into weights of what is seen, one behind the other.
    void weight_row(const Widened& x, uint64_t seen, const int* at, int count, float* of, float* to) const {
        if (d.k_scales)
            for (int j = 0; j < PART; j += FLOATS) store(of + j, load(of + j) * load(x.key_scales + j));
        for (uint64_t unseen = ~seen; unseen; unseen &= unseen - 1) of[__builtin_ctzll(unseen)] = -INFINITY;
        softmax(of, PART, to);
        if (d.v_scales)
            for (int j = 0; j < PART; j += FLOATS) store(of + j, load(of + j) * load(x.value_scales + j));
        if (count < PART)
            for (int j = 0; j < count; ++j) of[j] = of[at[j]];
    }

    // The weighted sums of P · PAIR columns of the values, for the heads of one query.
    template <int P>
    void weigh_heads(const float* values, const int* at, int count, const float* weights, float* out) const {
        for (int64_t h = 0, take; h < shared; h += take) {
            take = shared - h < HEADS ? shared - h : HEADS;
            const float* of = weights + h * PART;
            float* to = out + h * result;
            switch (take) {
                case 1: weigh_columns<1, P>(values, at, count, of, to); break;
                case 2: weigh_columns<2, P>(values, at, count, of, to); break;
                case 3: weigh_columns<3, P>(values, at, count, of, to); break;
                case 4: weigh_columns<4, P>(values, at, count, of, to); break;
                default: weigh_columns<HEADS, P>(values, at, count, of, to);
            }
        }
    }

    template <int R, int P>
    void weigh_columns(const float* values, const int* at, int count, const float* weights, float* out) const {
        Vec<float> sums[R][2 * P] = {};
        for (int j = 0; j < count; ++j) {
            Vec<float> v[2 * P];
#pragma GCC unroll 4
            for (int p = 0; p < 2 * P; ++p) v[p] = load(values + (p / 2 * PART + at[j]) * PAIR + p % 2 * FLOATS);
#pragma GCC unroll 5
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int p = 0; p < 2 * P; ++p) sums[r][p] = sums[r][p] + v[p] * weights[r * PART + j];
        }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < 2 * P; ++p) store(out + r * result + p * FLOATS, sums[r][p]);
    }

    // ---- A query and a part --------------------------------------------------------------------------------------------

    // Writes queries (heads, key_floats) of one step, scaled and arranged as load_pair gives keys.
    void arrange_queries(int64_t row, int64_t step, int64_t head, int64_t count, float* to) const {
        const Q* q = static_cast<const Q*>(d.q) + row * d.q_row + step * d.q_step + head * d.key_width;
        std::memset(to, 0, static_cast<size_t>(count * key_floats) * sizeof(float));
        for (int64_t h = 0; h < count; ++h)
            for (int64_t i = 0; i < d.key_width; ++i)
                to[h * key_floats + i / PAIR * PAIR + place<T>(i % PAIR)] = widen(q[h * d.key_width + i]) * scale;
    }

    // Writes the results (heads, result) of the heads of groups `begin` … `end` − 1 for what a query sees of a part.
    void attend(int64_t row, const Places& places, uint64_t seen, const float* queries, int64_t begin, int64_t end,
                float* results) const {
        const int64_t heads = (end - begin) * shared;
        Scratch<float> weights(heads * PART);
        for (int j = 0; j < PART; j += KEYS)
            if (seen >> j & lowest(KEYS)) score(places, j, begin, end, queries, weights + j);
        for (int64_t h = 0; h < heads; ++h) {
            float* of = weights + h * PART;
            const int64_t group = begin + h / shared;
            if (d.k_scales) scale_by(d.k_scales, row * d.k_scales_row + group, d.k_scales_slot, places, seen, of);
            for (uint64_t unseen = ~seen; unseen; unseen &= unseen - 1) of[__builtin_ctzll(unseen)] = -INFINITY;
            softmax(of, PART, results + h * result);
            if (d.v_scales) scale_by(d.v_scales, row * d.v_scales_row + group, d.v_scales_slot, places, seen, of);
        }
        const T* values[PART];
        int at[PART], count = 0;
        for (uint64_t rest = seen; rest; rest &= rest - 1) {
            at[count] = __builtin_ctzll(rest);
            values[count] = places.values[at[count]];
            ++count;
        }
        for (int64_t h = 0, take; h < heads; h += take) {
            const int64_t rest = shared - h % shared, column = (begin + h / shared) * d.value_width;
            take = rest < HEADS ? rest : HEADS;
            float *of = weights + h * PART, *out = results + h * result + 2;
            if (count < PART)  // what is not seen is left out, whatever its memory holds
                for (int64_t r = 0; r < take; ++r)
                    for (int j = 0; j < count; ++j) of[r * PART + j] = of[r * PART + at[j]];
            switch (take) {
                case 1: weigh<1>(values, column, count, of, out); break;
                case 2: weigh<2>(values, column, count, of, out); break;
                case 3: weigh<3>(values, column, count, of, out); break;
                case 4: weigh<4>(values, column, count, of, out); break;
                default: weigh<HEADS>(values, column, count, of, out);
            }
        }
    }

    // Multiplies what is seen by the scales of 8-bit keys or values.
    void scale_by(const bf16* scales, int64_t start, int64_t stride, const Places& places, uint64_t seen, float* x) const {
        for (uint64_t rest = seen; rest; rest &= rest - 1) {
            const int j = __builtin_ctzll(rest);
            x[j] *= widen(scales[start + places.slots[j] * stride]);
        }
    }

    // Scores KEYS keys from place `j` on, and calls for their values, which are read next.
    void score(const Places& places, int j, int64_t begin, int64_t end, const float* queries, float* scores) const {
        const int64_t bytes = (end - begin) * d.value_width * static_cast<int64_t>(sizeof(T));
        for (int i = j; i < j + KEYS; ++i)
            for (int64_t at = 0; at < bytes; at += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(places.values[i] + begin * d.value_width) + at, 0, 2);
        for (int64_t h = 0, take; h < (end - begin) * shared; h += take) {
            const int64_t rest = shared - h % shared, column = (begin + h / shared) * d.key_width;
            take = rest < HEADS ? rest : HEADS;
            const float* of = queries + h * key_floats;
            switch (take) {
                case 1: score_heads<1>(places.keys + j, column, of, scores + h * PART); break;
                case 2: score_heads<2>(places.keys + j, column, of, scores + h * PART); break;
                case 3: score_heads<3>(places.keys + j, column, of, scores + h * PART); break;
                case 4: score_heads<4>(places.keys + j, column, of, scores + h * PART); break;
                default: score_heads<HEADS>(places.keys + j, column, of, scores + h * PART);
            }
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

    // The weighted sums of the values at `column` for R heads of one group.
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
};

}  // namespace

// Attention with the mask of ops/attention, without documents: dtype is 0 for float, 1 for bf16; window INT64_MAX for none.
// Returns 0 if the keys of a row stand at positions that the kernel does not serve; nothing is written then.
HYMBA_API int hymba_attention(const Attention* d) {
    if (decode_with_tiles(*d)) return 1;
    if (last_position(*d) >= MOST_POSITIONS) return 0;
    if (d->dtype == 1 && d->k_scales) return Vectors<bf16, int8_t>{*d}.run();
    if (d->dtype == 1) return Vectors<bf16, bf16>{*d}.run();
    if (d->k_scales) return Vectors<float, int8_t>{*d}.run();
    return Vectors<float, float>{*d}.run();
}
