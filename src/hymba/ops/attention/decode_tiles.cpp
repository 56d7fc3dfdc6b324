// Attention of one query a row on the matrix unit, as in decoding: keys and values are read from memory once, for all heads
// that share them. parts.h says how parts of a row are merged; here a part is PART slots of the buffer. Scores and sums are
// float. Vectors would take longer than memory.
#include "decode_tiles.h"

using namespace hymba;

#if defined(HYMBA_AMX)
namespace {

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
    const Attention& d;
    const int64_t parts = (d.slots + PART - 1) / PART;  // of a row
    const int64_t key_floats = padded(d.key_width), value_floats = padded(d.value_width);
    const int64_t shared = d.heads / d.groups;  // heads of a group
    const int64_t result = value_floats + 2;    // floats of a head's part
    const int64_t segments = (parts + SEGMENT - 1) / SEGMENT;  // of a row
    const float scale = 1.0f / std::sqrt(static_cast<float>(d.key_width));
    const Scratch<uint64_t> sights{d.rows * parts};  // of every part: a bit for each slot that its row's query sees

    bool suits() const {
        return std::is_same_v<Q, bf16> && shared <= tiles::MOST_SHARED && d.key_width % tiles::BLOCK == 0 &&
               d.value_width % tiles::BLOCK == 0 && amx::usable();
    }

    void run() const {
        Scratch<int64_t> tasks(d.rows * segments), starts(d.rows + 1);
        const auto see = [&](int64_t row, int64_t part) { return sights[row * parts + part] = look(row, part); };
        const int64_t count = list_segments(d.rows, parts, see, tasks, starts), stride = d.heads * result;
        const int64_t runs = d.threads < count ? d.threads : count;  // of neighboring segments, so that memory streams
        Scratch<float> results(count * stride);
        parallel_for(runs, static_cast<int>(runs), [&](int64_t i) {
            const int64_t first = count * i / runs, last = count * (i + 1) / runs;
            attend_run(tasks + first, last - first, results + first * stride);
        });
        write_rows<T, Q>(d, results, starts, result);
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

    // Writes the `result` of every head for each of neighboring segments.
    void attend_run(const int64_t* tasks, int64_t count, float* to) const {
        const int64_t row = tasks[count - 1] / segments, end = (tasks[count - 1] % segments + 1) * SEGMENT;
        Scratch<uint32_t> queries(d.groups * d.key_width / 2 * 16);
        Run run{row * parts + (end < parts ? end : parts), queries};
        tiles::configure(shared);
        for (int64_t i = 0; i < count; ++i) attend_segment(tasks[i], run, to + i * d.heads * result);
        tiles::release();
    }

    void attend_segment(int64_t task, Run& run, float* to) const {
        const int64_t row = task / segments, first = task % segments * SEGMENT, stride = d.heads * result;
        const int64_t last = first + SEGMENT < parts ? first + SEGMENT : parts;
        Scratch<float> results(SEGMENT * stride);
        int64_t count = 0;
        for (int64_t part = first; part < last; ++part)
            if (sights[row * parts + part]) attend(row, part, run, results + count++ * stride);
        for (int64_t h = 0; h < d.heads; ++h) merge(results + h * result, count, stride, result, to + h * result);
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

    // ---- A part, over all slots; those that are not seen weigh nothing and their values are not read ----

    // The keys or values of the first part after `part` of all rows in which something is seen, in so many steps.
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

    // Writes the results of all heads for a part of which something is seen.
    void attend(int64_t row, int64_t part, Run& run, float* results) const {
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

    // Writes the weighted sums of all heads, and prefetches what comes next meanwhile. Columns are paired one step before
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
};

template <class T>
bool decode(const Attention& d) {
    const Decoder<bf16, T> decoder{d};
    if (!decoder.suits()) return false;
    decoder.run();
    return true;
}

}  // namespace
#endif

bool hymba::decode_with_tiles([[maybe_unused]] const Attention& d) {
#if defined(HYMBA_AMX)
    if (d.steps == 1 && d.dtype == 1) return d.k_scales ? decode<int8_t>(d) : decode<bf16>(d);
#endif
    return false;
}
