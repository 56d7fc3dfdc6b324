// Drawing tokens from logits, a row a task: the largest sum of score and Gumbel noise (reference.py) wins.
//
// A cut at rank k or at a share of the probability needs the tokens in order only around it. So they are counted, and
// their weights added, in buckets by how far their logit lies below the largest; the bucket that holds the cut is found
// from the top, and its tokens alone are sorted.
//
// The noise of a token is −log E with E = −log(1 − v), so that the largest sum is the smallest E / weight. E is at least
// v, whose first bits and a multiplication tell of nearly every token that it cannot win. Only the other tokens need
// logarithms.
#include "../native/kernels.h"

#include <algorithm>

using namespace hymba;

namespace {

constexpr int FLOATS = LANES<float>;
constexpr int BUCKETS = 2048;
constexpr float PER_UNIT = 64;    // buckets of a unit of score; the last one holds the rest
constexpr float LEAST_TEMPERATURE = 0x1p-126f, MOST_TEMPERATURE = 0x1p127f;
constexpr int BLOCK = 64;              // tokens that are tested together
constexpr double SLACK = 1 + 0x1p-10;  // more than the relative error of a weight

struct Settings {
    double temperature, top_p, min_p;
    int64_t top_k, seed, index;
};

// ---- Noise: the operations of reference.py in the same order -------------------------------------------------------

typedef uint64_t Uint64Vec __attribute__((vector_size(VECTOR_BYTES)));

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

template <class U>
HYMBA_INLINE U mix(U x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Output n of SplitMix64 started from `state`.
uint64_t split_mix(uint64_t state, uint64_t n) { return mix(state + (n + 1) * GOLDEN); }

// Not inlined: a compiler may fuse a product with the sum that it is part of, which rounds once instead of twice.
__attribute__((noinline)) double product(double x, double y) { return x * y; }

double log_of(double x) {
    int k;
    double m = std::frexp(x, &k);
    if (m < 0.70703125) m = 2 * m, --k;
    const double s = (m - 1) / (m + 1), z = product(s, s);
    double series = 1.0 / 19;
    for (int power = 17; power > 0; power -= 2) series = product(series, z) + 1.0 / power;
    return product(k, 0.6931471805599453) + product(2 * s, series);
}

double gumbel(uint64_t state, int64_t id) {
    const uint64_t token = static_cast<uint64_t>(id), rest = split_mix(state, token + (1ULL << 32));
    const uint64_t first = (split_mix(state, token >> 1) >> (token & 1 ? 32 : 0)) & 0xffffffffu;
    const double v = static_cast<double>(first << 21 | rest >> 43 | 1) * 0x1p-53;
    return -log_of(-log_of(1 - v));
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

// The tokens in order, larger logits first and then lower ids, up to and with this one.
struct Cut {
    float logit;
    int64_t id;
};

bool is_none(IntVec lanes) {
    uint64_t parts[VECTOR_BYTES / 8], any = 0;
    std::memcpy(parts, &lanes, sizeof parts);
    for (uint64_t part : parts) any |= part;
    return any == 0;
}

struct Row {
    const float* logits;
    int64_t width;
    const Settings settings;
    const float temperature = within(settings.temperature);
    float largest = -INFINITY;
    Scratch<float> weights{width + BLOCK};

    static float within(double x) {
        const float y = static_cast<float>(x);
        return y < LEAST_TEMPERATURE ? LEAST_TEMPERATURE : y > MOST_TEMPERATURE ? MOST_TEMPERATURE : y;
    }

    int lanes(int64_t i) const { return width - i < FLOATS ? static_cast<int>(width - i) : FLOATS; }

    // Finds the largest logit; returns whether none is NaN.
    bool look() {
        Vec<float> most = splat(-INFINITY);
        IntVec numbers = {};  // minus how many
        for (int64_t i = 0; i < width; i += FLOATS) {
            Vec<float> x = load(logits + i, lanes(i));  // zeros behind the end
            for (int j = lanes(i); j < FLOATS; ++j) x[j] = -INFINITY;
            most = x > most ? x : most;
            numbers += x == x;
        }
        int64_t count = 0;
        for (int j = 0; j < FLOATS; ++j) {
            largest = most[j] > largest ? most[j] : largest;
            count -= numbers[j];
        }
        return count == (width + FLOATS - 1) / FLOATS * FLOATS;
    }

    int64_t likeliest() const {
        int64_t i = 0;
        while (logits[i] != largest) ++i;
        return i;
    }

    void weigh() {
        for (int i = 0; i < BLOCK; ++i) weights[width + i] = 0;
        for (int64_t i = 0; i < width; i += FLOATS) {
            const Vec<float> x = load(logits + i, lanes(i));
            // 0 for the largest, even if it is infinite.
            const Vec<float> score = (x == largest ? splat(0.0f) : x - largest) / temperature;
            store(weights + i, score < -87.0f ? splat(0.0f) : exp(score), lanes(i));
        }
    }

    // The buckets of a vector of tokens: 0 for the largest logit even if it is infinite.
    IntVec buckets(int64_t i, float steepness) const {
        const Vec<float> x = load(logits + i, lanes(i)), deepest = splat(BUCKETS - 1.0f);
        const Vec<float> depth = x == largest ? splat(0.0f) : (largest - x) * steepness;
        return __builtin_convertvector(depth < deepest ? depth : deepest, IntVec);
    }

    // Zeroes the weights of all tokens that the settings cut off.
    void cut() {
        const float least = settings.min_p < 1 ? static_cast<float>(settings.min_p) : 1.0f;
        const int64_t top_k = settings.top_k < 1 ? 1 : settings.top_k;
        if (top_k < width || settings.top_p < 1) {
            const Cut last = find_cut(top_k);
            for (int64_t i = 0; i <= last.id; ++i) weights[i] = logits[i] < last.logit ? 0 : weights[i];
            for (int64_t i = last.id + 1; i < width; ++i) weights[i] = logits[i] <= last.logit ? 0 : weights[i];
        }
        if (least > 0)
            for (int64_t i = 0; i < width; ++i) weights[i] = weights[i] < least ? 0 : weights[i];
    }

    Cut find_cut(int64_t top_k) const {
        const float steepness = PER_UNIT / temperature;
        Scratch<int64_t> tokens(BUCKETS), ids(width);
        Scratch<double> sums(BUCKETS);
        for (int b = 0; b < BUCKETS; ++b) tokens[b] = 0, sums[b] = 0;
        for (int64_t i = 0; i < width; i += FLOATS) {
            const IntVec found = buckets(i, steepness);
            for (int j = 0; j < lanes(i); ++j) {
                ++tokens[found[j]];
                sums[found[j]] += weights[i + j];
            }
        }
        const bool ranked = top_k < width;  // else the last bucket, often the largest, need not be sorted
        double total = 0;
        int64_t before = 0;  // tokens in the buckets before that of rank top_k
        int last = 0;
        while (last < BUCKETS - 1 && (!ranked || before + tokens[last] < top_k))
            total += sums[last], before += tokens[last++];
        int64_t count = 0;
        if (ranked) {
            count = gather(last, steepness, ids);
            if (top_k - before < count) count = top_k - before;
            for (int64_t j = 0; j < count; ++j) total += weights[ids[j]];
        } else {
            total += sums[last];
        }
        if (settings.top_p < 1) {  // earlier, where the weights before a token reach their share
            const double wanted = settings.top_p * total;
            double sum = 0;
            int b = 0;
            while (b < last && sum + sums[b] < wanted) sum += sums[b++];
            if (b < last || !ranked) count = gather(b, steepness, ids);
            int64_t kept = 0;
            for (; kept < count && (kept == 0 || sum < wanted); ++kept) sum += weights[ids[kept]];
            count = kept;
        }
        return {logits[ids[count - 1]], ids[count - 1]};
    }

    // Writes the tokens of a bucket in order, and returns how many there are.
    int64_t gather(int b, float steepness, int64_t* ids) const {
        int64_t count = 0;
        for (int64_t i = 0; i < width; i += FLOATS) {
            const IntVec in = buckets(i, steepness) == b;
            if (is_none(in)) continue;
            for (int j = 0; j < lanes(i); ++j)
                if (in[j]) ids[count++] = i + j;
        }
        std::sort(ids, ids + count, [&](int64_t i, int64_t j) {
            return logits[i] > logits[j] || (logits[i] == logits[j] && i < j);
        });
        return count;
    }

    double score(int64_t i) const {
        return logits[i] == largest ? 0 : (static_cast<double>(logits[i]) - largest) / temperature;
    }

    int64_t draw() const {
        const uint64_t state = split_mix(static_cast<uint64_t>(settings.seed), static_cast<uint64_t>(settings.index));
        int64_t chosen = likeliest();
        double best = gumbel(state, chosen);
        double reach = std::exp(-best) * SLACK;  // a token can win only if its v is at most its weight times this
        for (int64_t first = 0; first < width; first += BLOCK) {
            for (uint64_t left = may_win(first, state, reach); left; left &= left - 1) {
                const int64_t i = first + __builtin_ctzll(left);
                const double value = score(i) + gumbel(state, i);
                if (value < best || (value == best && i >= chosen)) continue;
                chosen = i, best = value, reach = std::exp(-best) * SLACK;
            }
        }
        return chosen;
    }

    // Returns a bit for each token of a block that may win by the first 24 bits of its v.
    uint64_t may_win(int64_t first, uint64_t state, double reach) const {
        constexpr int DOUBLES = LANES<double>;
        Vec<float> most = {};
        for (int64_t i = first; i < first + BLOCK; i += FLOATS) {
            const Vec<float> w = load(weights + i);
            most = w > most ? w : most;
        }
        float largest_weight = 0;
        for (int j = 0; j < FLOATS; ++j) largest_weight = most[j] > largest_weight ? most[j] : largest_weight;
        if (largest_weight * reach < 0x1p-53) return 0;  // as where all are cut off
        Uint64Vec x;
        for (int j = 0; j < DOUBLES; ++j) x[j] = state + static_cast<uint64_t>(first / 2 + j + 1) * GOLDEN;
        alignas(64) int32_t passed[BLOCK];
        IntVec any = {};
        for (int i = 0; i < BLOCK; i += FLOATS, x += DOUBLES * GOLDEN) {
            const UintVec bits = reinterpret_cast<UintVec>(mix(x)) >> 8;  // of two tokens each
            const Vec<float> v = __builtin_convertvector(reinterpret_cast<IntVec>(bits), Vec<float>);
            const IntVec lanes = v < load(weights + first + i) * static_cast<float>(reach * 0x1p24);
            std::memcpy(passed + i, &lanes, sizeof lanes);
            any |= lanes;
        }
        if (is_none(any)) return 0;
        uint64_t found = 0;
        for (int i = 0; i < BLOCK; ++i) found |= static_cast<uint64_t>(passed[i] & 1) << i;
        return found;
    }
};

}  // namespace

// Writes a token a row to `chosen`: −1 for a row with a NaN, −2 for one where every logit is −∞. logits are
// (rows, width), all other arrays (rows).
HYMBA_API void hymba_draw(const float* logits, const double* temperatures, const int64_t* top_k, const double* top_p,
                          const double* min_p, const int64_t* seeds, const int64_t* indices, int64_t* chosen,
                          int64_t rows, int64_t width, int threads) {
    parallel_for(rows, threads, [&](int64_t i) {
        Row row{logits + i * width, width, {temperatures[i], top_p[i], min_p[i], top_k[i], seeds[i], indices[i]}};
        if (!row.look()) return void(chosen[i] = -1);
        if (row.largest == -INFINITY) return void(chosen[i] = -2);
        if (temperatures[i] == 0) return void(chosen[i] = row.likeliest());
        row.weigh();
        if (top_k[i] < width || top_p[i] < 1 || min_p[i] > 0) row.cut();
        chosen[i] = row.draw();
    });
}
