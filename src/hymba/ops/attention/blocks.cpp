// Attention of many queries, forward and backward, on the matrix unit: blocks of 32 keys against blocks of columns, a
// column being one query of one head, so that all heads of a group share its keys. Blocks that no query sees are left
// out, blocks that all see are not masked. Scores lie (key, column): a softmax is vectors of 16 columns, lane by lane.
//
// Sums are float; weights enter products as bf16. The softmax runs with a maximum that may be stale by 2^STALE (arXiv
// 1805.02867, 2205.14135), the backward pass recomputes the weights.
#include "block_tiles.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 complains about its own AVX-512 header

using namespace hymba;

// As native.py fills it. Strides count elements; heads and their widths are dense, positions and documents too. Keys and
// values are bf16, or of 8 bits where they have scales. Gradients are dense.
struct Blocks {
    int64_t rows, steps, slots, heads, groups, key_width, value_width, window, num_meta, threads;
    int64_t q_row, q_step, k_row, k_slot, v_row, v_slot, k_scales_row, k_scales_slot, v_scales_row, v_scales_slot;
    const bf16* q;                                             // (rows, steps, heads, key_width)
    const void *k, *v;                                         // (rows, slots, groups, width)
    const bf16 *k_scales, *v_scales;                           // (rows, slots, groups)
    const int64_t *query_positions, *key_positions;          // (rows, steps), (rows, slots)
    const int64_t *query_documents, *key_documents;          // the same, or null
    bf16* out;                                                 // (rows, steps, heads, value_width)
    float* lse;                                                // (rows, steps, heads), base 2, or null
    const bf16* grad_out;                                      // as out
    bf16 *grad_q, *grad_k, *grad_v;                            // as q, k, v
};

#if defined(HYMBA_AMX)
namespace {

constexpr int BATCH = 4;         // blocks of keys whose scores are held together
constexpr int COLUMNS = 96;      // of a unit at least
constexpr float STALE = 8;       // base 2
constexpr float NOTHING = -1e30f;  // the maximum of no scores

// ---- What is seen --------------------------------------------------------------------------------------------------

// A key is seen from positions low…high, in its own document unless it is a meta token; an empty slot from none.
struct Keys {
    int32_t *low, *high, *document;
};
constexpr int32_t FAR = INT32_MAX, ANY = -1;  // ANY: the document of meta tokens here

// What the keys of a block, or the queries of a unit, have in common.
struct Range {
    int32_t first = FAR, last = ANY;            // smallest and largest position: of keys, of `low`
    int32_t first_high = FAR, last_high = ANY;  // of keys' `high`
    int32_t first_document = FAR, last_document = INT32_MIN;
    bool holes = false, metas = false, texts = false;
};

enum class Sight { none, some, all };

Sight sight(const Range& queries, const Range& keys, bool documents) {
    if (keys.last < 0 || queries.last < keys.first || queries.first > keys.last_high) return Sight::none;
    const bool same = keys.first_document == keys.last_document && queries.first_document == queries.last_document &&
                      keys.first_document == queries.first_document;
    if (documents && !keys.metas &&
        (queries.last_document < keys.first_document || queries.first_document > keys.last_document))
        return Sight::none;
    const bool all = !keys.holes && !queries.holes && queries.first >= keys.last && queries.last <= keys.first_high;
    return all && (!documents || !keys.texts || (same && !keys.metas)) ? Sight::all : Sight::some;
}

// ---- The kernel ----------------------------------------------------------------------------------------------------

struct Unit {
    int64_t row, group, first, count, columns;  // its queries, and (query, head) columns padded to SIDE
    int32_t *position, *document;                // of columns
    int64_t* blocks;                             // of keys that are seen
    bool* masked;
    int64_t seen;
};

struct Kernel {
    const Blocks& d;
    const int64_t shared = d.heads / d.groups, blocks = (d.slots + SIDE - 1) / SIDE;
    const int64_t key_width = padded(d.key_width), value_width = padded(d.value_width);
    const int64_t queries = unit_queries(), units = (d.steps + queries - 1) / queries;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d.key_width));
    const Scratch<int32_t> sights{d.rows * blocks * SIDE * 3};
    const Scratch<Range> ranges{d.rows * blocks};

    int64_t unit_queries() const { return shared >= COLUMNS / SIDE ? SIDE : SIDE * (COLUMNS / SIDE / shared); }
    int threads() const { return static_cast<int>(d.threads); }

    Keys keys_of(int64_t row) const {
        const int64_t count = blocks * SIDE;
        int32_t* from = sights + row * count * 3;
        return {from, from + count, from + 2 * count};
    }

    void look() const {
        parallel_for(d.rows, threads(), [&](int64_t row) {
            const Keys keys = keys_of(row);
            for (int64_t b = 0; b < blocks; ++b) {
                Range range;
                for (int64_t s = b * SIDE; s < (b + 1) * SIDE; ++s) {
                    const int64_t at = row * d.slots + s, position = s < d.slots ? d.key_positions[at] : -1;
                    const bool meta = position < d.num_meta, empty = position < 0;
                    const bool endless = meta || d.window >= FAR - position;
                    keys.low[s] = empty ? FAR : static_cast<int32_t>(position);
                    keys.high[s] = empty ? ANY : endless ? FAR : static_cast<int32_t>(position + d.window);
                    keys.document[s] = meta || !d.key_documents ? ANY : static_cast<int32_t>(d.key_documents[at]);
                    range.holes |= empty;
                    if (!empty) extend(range, keys, s, meta);
                }
                ranges[row * blocks + b] = range;
            }
        });
    }

    static void extend(Range& range, const Keys& keys, int64_t s, bool meta) {
        const auto less = [](int32_t& x, int32_t y) { x = y < x ? y : x; };
        const auto more = [](int32_t& x, int32_t y) { x = y > x ? y : x; };
        less(range.first, keys.low[s]);
        more(range.last, keys.low[s]);
        less(range.first_high, keys.high[s]);
        more(range.last_high, keys.high[s]);
        (meta ? range.metas : range.texts) = true;
        if (meta) return;
        less(range.first_document, keys.document[s]);
        more(range.last_document, keys.document[s]);
    }

    // Places the columns of a unit and lists the blocks of keys that they see.
    void place(Unit& u) const {
        Range range;
        for (int64_t c = 0; c < u.columns; ++c) {
            const int64_t t = c / shared, at = u.row * d.steps + u.first + t;
            const bool real = t < u.count;
            const int32_t position = real ? static_cast<int32_t>(d.query_positions[at]) : ANY;
            u.position[c] = position;
            u.document[c] = real && d.query_documents ? static_cast<int32_t>(d.query_documents[at]) : ANY;
            if (real && position < 0) range.holes = true;
            if (position < 0) continue;
            range.first = position < range.first ? position : range.first;
            range.last = position > range.last ? position : range.last;
            range.first_document = u.document[c] < range.first_document ? u.document[c] : range.first_document;
            range.last_document = u.document[c] > range.last_document ? u.document[c] : range.last_document;
        }
        u.seen = 0;
        for (int64_t b = 0; b < blocks; ++b) {
            const Sight s = sight(range, ranges[u.row * blocks + b], d.key_documents);
            u.blocks[u.seen] = b;
            u.masked[u.seen] = s == Sight::some;
            u.seen += s != Sight::none;
        }
    }

    // Puts −∞ where a column does not see a key; scores (SIDE, SIDE).
    void mask(const Unit& u, int64_t block, int64_t column, float* scores) const {
        const Keys keys = keys_of(u.row);
        for (int half = 0; half < 2; ++half) {
            const __m512i position = _mm512_loadu_si512(u.position + column + half * 16);
            const __m512i document = _mm512_loadu_si512(u.document + column + half * 16);
            for (int r = 0; r < SIDE; ++r) {
                const int64_t s = block * SIDE + r;
                __mmask16 seen = _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(keys.low[s])) &
                                 _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(keys.high[s]));
                if (d.key_documents && keys.low[s] >= d.num_meta)
                    seen &= _mm512_cmpeq_epi32_mask(document, _mm512_set1_epi32(keys.document[s]));
                float* at = scores + r * SIDE + half * 16;
                store(at, _mm512_mask_mov_ps(splat(-INFINITY), seen, load(at)));
            }
        }
    }

    // ---- Rows as they are given, SIDE of them, zeros behind their end and beside their width ----

    void read_slots(const void* from, const bf16* scales, const int64_t (&strides)[4], int64_t narrow, int64_t width,
                    int64_t row, int64_t group, int64_t block, bf16* to) const {
        const Keys keys = keys_of(row);
        std::memset(to, 0, static_cast<size_t>(SIDE * width) * sizeof(bf16));
        for (int64_t r = 0, s = block * SIDE; r < SIDE && s < d.slots; ++r, ++s, to += width) {
            if (keys.high[s] == ANY) continue;  // an empty slot may hold anything
            const int64_t at = row * strides[0] + s * strides[1] + group * narrow;
            if (!scales) {
                std::memcpy(to, static_cast<const bf16*>(from) + at, static_cast<size_t>(narrow) * sizeof(bf16));
                continue;
            }
            const float factor = widen(scales[row * strides[2] + s * strides[3] + group]);
            const int8_t* x = static_cast<const int8_t*>(from) + at;
            for (int64_t i = 0; i < narrow; i += 16) {
                const int count = narrow - i < 16 ? static_cast<int>(narrow - i) : 16;
                const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), x + i);
                const Vec<float> y = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
                store(to + i, y * factor);
            }
        }
    }
    void read_keys(int64_t row, int64_t group, int64_t block, bf16* to) const {
        const int64_t strides[] = {d.k_row, d.k_slot, d.k_scales_row, d.k_scales_slot};
        read_slots(d.k, d.k_scales, strides, d.key_width, key_width, row, group, block, to);
    }
    void read_values(int64_t row, int64_t group, int64_t block, bf16* to) const {
        const int64_t strides[] = {d.v_row, d.v_slot, d.v_scales_row, d.v_scales_slot};
        read_slots(d.v, d.v_scales, strides, d.value_width, value_width, row, group, block, to);
    }
    // A stripe of a unit's columns, from queries or what lies like the output.
    void read_columns(const Unit& u, int64_t column, const bf16* from, int64_t row_stride, int64_t step_stride,
                      int64_t narrow, int64_t width, bf16* to) const {
        std::memset(to, 0, static_cast<size_t>(SIDE * width) * sizeof(bf16));
        for (int64_t c = column; c < column + SIDE && c < u.count * shared; ++c, to += width) {
            const int64_t at = u.row * row_stride + (u.first + c / shared) * step_stride +
                               (u.group * shared + c % shared) * narrow;
            std::memcpy(to, from + at, static_cast<size_t>(narrow) * sizeof(bf16));
        }
    }

    // Writes sums (width, columns) as rows of columns, each times its factor.
    void write_columns(const Unit& u, const float* sums, const float* factors, int64_t narrow, bf16* to) const {
        const int64_t real = u.count * shared;
        for (int64_t c = 0; c < real; c += 16)
            for (int64_t i = 0; i < narrow; i += 16) {
                Vec<float> x[16];
                for (int r = 0; r < 16; ++r) x[r] = load(sums + (i + r) * u.columns + c);
                rotate<16>(x, 4);
                const int count = narrow - i < 16 ? static_cast<int>(narrow - i) : 16;
                for (int64_t r = 0; r < 16 && c + r < real; ++r) {
                    const int64_t head = u.group * shared + (c + r) % shared, t = u.first + (c + r) / shared;
                    store(to + ((u.row * d.steps + t) * d.heads + head) * narrow + i, x[r] * factors[c + r], count);
                }
            }
    }

    // Calls body with every unit of a row and group from `from` to `to`.
    template <class Body>
    void each_unit(int64_t row, int64_t group, int64_t from, int64_t to, const Body& body) const {
        const int64_t most = padded(queries * shared);
        Scratch<int32_t> placed(2 * most);
        Scratch<int64_t> listed(blocks + 1);
        Scratch<bool> masked(blocks + 1);
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = i * queries, count = first + queries < d.steps ? queries : d.steps - first;
            Unit u{row, group, first, count, padded(count * shared), placed, placed + most, listed, masked, 0};
            place(u);
            body(u);
        }
    }

    // ---- Forward ----

    void forward() const {
        const int64_t key_block = SIDE * key_width, value_block = SIDE * value_width, pairs = d.rows * d.groups;
        Scratch<bf16> keys(pairs * blocks * key_block), values(pairs * blocks * value_block);
        parallel_for(pairs * blocks, threads(), [&](int64_t i) {
            const int64_t row = i / blocks / d.groups, group = i / blocks % d.groups;
            Scratch<bf16> rows(SIDE * (key_width > value_width ? key_width : value_width));
            read_keys(row, group, i % blocks, rows);
            to_panels(rows, key_width, keys + i * key_block);
            read_values(row, group, i % blocks, rows);
            to_turned_panel(rows, value_width, values + i * value_block);
        });
        parallel_for(pairs * units, threads(), [&](int64_t i) {
            const int64_t pair = i / units, unit = i % units;
            configure();
            each_unit(pair / d.groups, pair % d.groups, unit, unit + 1, [&](const Unit& u) {
                attend(u, keys + pair * blocks * key_block, values + pair * blocks * value_block);
            });
            release();
        });
    }

    void attend(const Unit& u, const bf16* keys, const bf16* values) const {
        const int64_t n = u.columns;
        Scratch<uint32_t> queries(key_width / 2 * n), weights(BATCH * 16 * SIDE);
        Scratch<float> most(n), total(n), sums(value_width * n), scores(BATCH * SIDE * SIDE);
        Scratch<bf16> rows(SIDE * key_width);
        std::memset(sums, 0, static_cast<size_t>(value_width * n) * sizeof(float));
        for (int64_t c = 0; c < n; ++c) most[c] = NOTHING, total[c] = 0;
        for (int64_t c = 0; c < n; c += SIDE) {
            read_columns(u, c, d.q, d.q_row, d.q_step, d.key_width, key_width, rows);
            to_turned_words(rows, key_width, n, queries + c);
        }
        for (int64_t at = 0; at < u.seen; at += BATCH) {
            const int64_t count = at + BATCH < u.seen ? BATCH : u.seen - at;
            for (int64_t c = 0; c < n; c += SIDE) {
                const bf16* panels[BATCH];
                for (int64_t i = 0; i < count; ++i) {
                    score(u, at + i, keys, queries, c, scores + i * SIDE * SIDE);
                    panels[i] = values + u.blocks[at + i] * SIDE * value_width;
                }
                weigh(scores, count, most + c, total + c, sums + c, n, weights);
                multiply(panels, count, weights, SIDE, sums + c, n, value_width, SIDE, true);
            }
        }
        for (int64_t c = 0; c < u.count * shared; ++c) {
            if (d.lse)
                d.lse[((u.row * d.steps + u.first) * d.heads + c / shared * d.heads) + u.group * shared + c % shared] =
                    total[c] > 0 ? most[c] + std::log2(total[c]) : INFINITY;
            total[c] = total[c] > 0 ? 1 / total[c] : 0;
        }
        write_columns(u, sums, total, d.value_width, d.out);
    }

    // Scores (SIDE, SIDE) of a stripe of columns and the unit's i-th block of keys.
    void score(const Unit& u, int64_t i, const bf16* keys, const uint32_t* queries, int64_t column,
               float* scores) const {
        const int64_t block = u.blocks[i];
        product(keys + block * SIDE * key_width, key_width, queries + column, u.columns, scores);
        if (u.masked[i]) mask(u, block, column, scores);
    }

    // c (SIDE, SIDE) = panels of one block · words.
    static void product(const bf16* panels, int64_t width, const uint32_t* b, int64_t b_row, float* c) {
        const bf16* a[16];
        for (int64_t from = 0; from < width; from += 16 * SIDE) {
            const int64_t count = width - from < 16 * SIDE ? (width - from) / SIDE : 16;
            for (int64_t i = 0; i < count; ++i) a[i] = panels + (from + i * SIDE) * SIDE;
            multiply(a, count, b + from / 2 * b_row, b_row, c, SIDE, SIDE, SIDE, from > 0);
        }
    }

    // Turns the scores of `count` blocks into weights, as words; keeps the maximum, and rescales sums when it is stale.
    void weigh(const float* scores, int64_t count, float* most, float* total, float* sums, int64_t sums_row,
               uint32_t* weights) const {
        const float factor = scale * LOG2_E;
        for (int half = 0; half < 2; ++half, most += 16, total += 16, sums += 16, scores += 16, weights += 16) {
            Vec<float> top = splat(-INFINITY), largest = load(most), sum = load(total);
            for (int64_t r = 0; r < count * SIDE; ++r) top = _mm512_max_ps(top, load(scores + r * SIDE));
            top = top * factor;
            if (_mm512_cmp_ps_mask(top, largest + STALE, _CMP_GT_OQ)) {
                const Vec<float> next = _mm512_max_ps(top, largest), shrink = exp2(largest - next);
                for (int64_t i = 0; i < value_width; ++i)
                    store(sums + i * sums_row, load(sums + i * sums_row) * shrink);
                sum = sum * shrink;
                largest = next;
                store(most, largest);
            }
            for (int64_t r = 0; r < count * SIDE; r += 2) {
                const Vec<float> a = exp2(load(scores + r * SIDE) * factor - largest);
                const Vec<float> b = exp2(load(scores + (r + 1) * SIDE) * factor - largest);
                sum += a + b;
                put(weights + r / 2 * SIDE, side_by_side(a, b));
            }
            store(total, sum);
        }
    }

    // ---- Backward: a row's group is one task, which alone adds to its keys' and values' gradients ----

    struct Packed {
        bf16 *keys, *turned_keys, *values;  // panels
        float *grad_keys, *grad_values;    // (blocks · SIDE, width)
    };

    void backward() const {
        parallel_for(d.rows * d.groups, threads(), [&](int64_t pair) {
            const int64_t row = pair / d.groups, group = pair % d.groups, slots = blocks * SIDE;
            Scratch<bf16> keys(slots * key_width), turned(slots * key_width), values(slots * value_width);
            Scratch<float> grad_keys(slots * key_width), grad_values(slots * value_width);
            Scratch<bf16> rows(SIDE * (key_width > value_width ? key_width : value_width));
            for (int64_t b = 0; b < blocks; ++b) {
                read_keys(row, group, b, rows);
                to_panels(rows, key_width, keys + b * SIDE * key_width);
                to_turned_panel(rows, key_width, turned + b * SIDE * key_width);
                read_values(row, group, b, rows);
                to_panels(rows, value_width, values + b * SIDE * value_width);
            }
            std::memset(grad_keys, 0, static_cast<size_t>(slots * key_width) * sizeof(float));
            std::memset(grad_values, 0, static_cast<size_t>(slots * value_width) * sizeof(float));
            const Packed packed{keys, turned, values, grad_keys, grad_values};
            configure();
            each_unit(row, group, 0, units, [&](const Unit& u) { backward(u, packed); });
            release();
            write_slots(row, group, grad_keys, key_width, d.key_width, scale, d.grad_k);
            write_slots(row, group, grad_values, value_width, d.value_width, 1, d.grad_v);
        });
    }

    void write_slots(int64_t row, int64_t group, const float* from, int64_t width, int64_t narrow, float factor,
                     bf16* to) const {
        for (int64_t s = 0; s < d.slots; ++s)
            for (int64_t i = 0; i < narrow; i += 16)
                store(to + ((row * d.slots + s) * d.groups + group) * narrow + i, load(from + s * width + i) * factor,
                      narrow - i < 16 ? static_cast<int>(narrow - i) : 16);
    }

    // The operands of a unit's queries and output gradients.
    struct Columns {
        uint32_t *turned_queries, *queries, *turned_grads, *grads;
        float *lse, *delta;
    };

    void arrange(const Unit& u, const Columns& to) const {
        const int64_t n = u.columns, step = d.heads * d.value_width;
        Scratch<bf16> rows(SIDE * (key_width > value_width ? key_width : value_width));
        for (int64_t c = 0; c < n; c += SIDE) {
            read_columns(u, c, d.q, d.q_row, d.q_step, d.key_width, key_width, rows);
            to_turned_words(rows, key_width, n, to.turned_queries + c);
            to_words(rows, key_width, to.queries + c / 2 * key_width);
            read_columns(u, c, d.grad_out, d.steps * step, step, d.value_width, value_width, rows);
            to_turned_words(rows, value_width, n, to.turned_grads + c);
            to_words(rows, value_width, to.grads + c / 2 * value_width);
        }
        for (int64_t c = 0; c < n; ++c) {
            to.lse[c] = INFINITY;
            to.delta[c] = 0;
            if (c >= u.count * shared) continue;
            const int64_t at = (u.row * d.steps + u.first + c / shared) * d.heads + u.group * shared + c % shared;
            Vec<float> sum = {};
            for (int64_t i = 0; i < d.value_width; i += 16) {
                const int count = d.value_width - i < 16 ? static_cast<int>(d.value_width - i) : 16;
                sum += load(d.out + at * d.value_width + i, count) * load(d.grad_out + at * d.value_width + i, count);
            }
            to.delta[c] = sum_lanes<float>(sum);
            to.lse[c] = d.lse[at];
        }
    }

    void backward(const Unit& u, const Packed& p) const {
        const int64_t n = u.columns, most = n / SIDE;
        Scratch<uint32_t> turned_queries(key_width / 2 * n), queries(n / 2 * key_width);
        Scratch<uint32_t> turned_grads(value_width / 2 * n), grads(n / 2 * value_width), words(BATCH * 16 * n);
        Scratch<float> lse(n), delta(n), sums(key_width * n);
        Scratch<bf16> weights(SIDE * n), slopes(SIDE * n);
        const Columns columns{turned_queries, queries, turned_grads, grads, lse, delta};
        arrange(u, columns);
        std::memset(sums, 0, static_cast<size_t>(key_width * n) * sizeof(float));
        Scratch<const bf16*> weight_panels(most), slope_panels(most);
        for (int64_t i = 0; i < most; ++i) {
            weight_panels[i] = weights + i * SIDE * SIDE;
            slope_panels[i] = slopes + i * SIDE * SIDE;
        }
        for (int64_t at = 0; at < u.seen; at += BATCH) {
            const int64_t count = at + BATCH < u.seen ? BATCH : u.seen - at;
            const bf16* turned[BATCH];
            for (int64_t i = 0; i < count; ++i) {
                const int64_t b = u.blocks[at + i];
                turned[i] = p.turned_keys + b * SIDE * key_width;
                for (int64_t c = 0; c < n; c += SIDE)
                    differentiate(u, at + i, p, columns, c, weights + c * SIDE, slopes + c * SIDE,
                                  words + i * 16 * n + c);
                multiply(weight_panels, most, grads, value_width, p.grad_values + b * SIDE * value_width, value_width,
                         SIDE, value_width, true);
                multiply(slope_panels, most, queries, key_width, p.grad_keys + b * SIDE * key_width, key_width, SIDE,
                         key_width, true);
            }
            multiply(turned, count, words, n, sums, n, key_width, n, true);
        }
        for (int64_t c = 0; c < n; ++c) lse[c] = scale;
        write_columns(u, sums, lse, d.key_width, d.grad_q);
    }

    // The weights of one stripe of columns and one block of keys, and the gradients of its scores: as panels whose rows
    // hold columns c and c + 16 side by side, and the latter as words too.
    void differentiate(const Unit& u, int64_t i, const Packed& p, const Columns& x, int64_t c, bf16* weights,
                       bf16* slopes, uint32_t* words) const {
        alignas(64) float scores[SIDE * SIDE], grads[SIDE * SIDE];
        score(u, i, p.keys, x.turned_queries, c, scores);
        product(p.values + u.blocks[i] * SIDE * value_width, value_width, x.turned_grads + c, u.columns, grads);
        const float factor = scale * LOG2_E;
        const Vec<float> lse[] = {load(x.lse + c), load(x.lse + c + 16)};
        const Vec<float> delta[] = {load(x.delta + c), load(x.delta + c + 16)};
        for (int r = 0; r < SIDE; r += 2) {
            Vec<float> weight[2][2], slope[2][2];
            for (int k = 0; k < 2; ++k)
                for (int half = 0; half < 2; ++half) {
                    const int at = (r + k) * SIDE + half * 16;
                    weight[k][half] = exp2(load(scores + at) * factor - lse[half]);
                    slope[k][half] = weight[k][half] * (load(grads + at) - delta[half]);
                }
            for (int k = 0; k < 2; ++k) {
                put(weights + (r + k) * SIDE, side_by_side(weight[k][0], weight[k][1]));
                put(slopes + (r + k) * SIDE, side_by_side(slope[k][0], slope[k][1]));
            }
            for (int half = 0; half < 2; ++half)
                put(words + r / 2 * u.columns + half * 16, side_by_side(slope[0][half], slope[1][half]));
        }
    }
};

}  // namespace
#endif

// Whether this machine has what the two functions below need.
HYMBA_API int hymba_attention_has_tiles() {
#if defined(HYMBA_AMX)
    return amx::usable();
#else
    return 0;
#endif
}

// Attention with the mask of ops/attention; window INT64_MAX for none.
HYMBA_API void hymba_attention_forward([[maybe_unused]] const Blocks* d) {
#if defined(HYMBA_AMX)
    const Kernel kernel{*d};
    kernel.look();
    kernel.forward();
#endif
}

// Its gradients, from `out` and `lse` of the forward pass.
HYMBA_API void hymba_attention_backward([[maybe_unused]] const Blocks* d) {
#if defined(HYMBA_AMX)
    const Kernel kernel{*d};
    kernel.look();
    kernel.backward();
#endif
}
