// Drawing tokens from logits, a row a task.
//
// A cut at rank k or at a share of the probability needs the tokens in order only around it. So they are counted, and
// their weights added, in buckets by how far their logit lies below the largest; the bucket that holds the cut is found
// from the top, and its tokens alone are sorted.
#include "../native/kernels.h"

#include <algorithm>

using namespace hymba;

namespace {

constexpr int FLOATS = LANES<float>;
constexpr int BUCKETS = 2048;
constexpr float PER_UNIT = 64;    // buckets of a unit of score; the last one holds the rest
constexpr int64_t STRETCH = 512;  // tokens whose weights are summed together

struct Settings {
    double temperature, top_p, min_p, draw;
};

// The tokens in order, larger logits first and then lower ids, up to and with this one.
struct Cut {
    float logit;
    int64_t id;
};

struct Row {
    const float* logits;
    int64_t width;
    const Settings& settings;
    float largest = -INFINITY;
    Scratch<float> weights{width + FLOATS};

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
        const float scale = static_cast<float>(settings.temperature);
        for (int64_t i = 0; i < width; i += FLOATS) {
            const Vec<float> score = (load(logits + i, lanes(i)) - largest) / scale;
            store(weights + i, score < -87.0f ? splat(0.0f) : exp(score), lanes(i));
        }
    }

    int bucket(int64_t i, float steepness) const {
        const float depth = (largest - logits[i]) * steepness;
        return depth < BUCKETS - 1 ? static_cast<int>(depth) : BUCKETS - 1;
    }

    // Zeroes the weights of all tokens that the settings cut off.
    void cut(int64_t top_k) {
        const float least = static_cast<float>(settings.min_p);
        if (top_k < width || settings.top_p < 1) {
            const Cut last = find_cut(top_k);
            for (int64_t i = 0; i < width; ++i)
                if (logits[i] < last.logit || (logits[i] == last.logit && i > last.id)) weights[i] = 0;
        }
        if (least > 0)
            for (int64_t i = 0; i < width; ++i)
                if (weights[i] < least) weights[i] = 0;
    }

    Cut find_cut(int64_t top_k) const {
        const float steepness = static_cast<float>(PER_UNIT / settings.temperature);
        Scratch<int64_t> counts(BUCKETS), ids(width);
        Scratch<double> sums(BUCKETS);
        for (int b = 0; b < BUCKETS; ++b) counts[b] = 0, sums[b] = 0;
        for (int64_t i = 0; i < width; ++i) {
            const int b = bucket(i, steepness);
            ++counts[b];
            sums[b] += weights[i];
        }
        double total = 0;
        int64_t behind = 0;  // tokens in the buckets before that of rank top_k
        int last = 0;
        while (last < BUCKETS - 1 && behind + counts[last] < top_k) total += sums[last], behind += counts[last++];
        int64_t count = gather(last, steepness, ids);
        if (top_k - behind < count) count = top_k - behind;
        for (int64_t j = 0; j < count; ++j) total += weights[ids[j]];
        if (settings.top_p < 1) {  // earlier, where the weights before a token reach their share
            const double wanted = settings.top_p * total;
            double sum = 0;
            int b = 0;
            while (b < last && sum + sums[b] < wanted) sum += sums[b++];
            if (b < last) count = gather(b, steepness, ids);
            int64_t kept = 0;
            for (; kept < count && (kept == 0 || sum < wanted); ++kept) sum += weights[ids[kept]];
            count = kept;
        }
        return {logits[ids[count - 1]], ids[count - 1]};
    }

    // Writes the tokens of a bucket in order, and returns how many there are.
    int64_t gather(int b, float steepness, int64_t* ids) const {
        int64_t count = 0;
        for (int64_t i = 0; i < width; ++i)
            if (bucket(i, steepness) == b) ids[count++] = i;
        std::sort(ids, ids + count, [&](int64_t i, int64_t j) {
            return logits[i] > logits[j] || (logits[i] == logits[j] && i < j);
        });
        return count;
    }

    int64_t draw() const {
        const int64_t stretches = (width + STRETCH - 1) / STRETCH;
        Scratch<double> sums(stretches);
        double total = 0;
        for (int64_t s = 0; s < stretches; ++s) {
            const int64_t end = (s + 1) * STRETCH < width ? (s + 1) * STRETCH : width;
            double sum = 0;
            for (int64_t i = s * STRETCH; i < end; ++i) sum += weights[i];
            total += sums[s] = sum;
        }
        const double wanted = settings.draw * total;
        double sum = 0;
        int64_t s = 0;
        while (s < stretches - 1 && sum + sums[s] <= wanted) sum += sums[s++];
        int64_t chosen = -1;
        for (int64_t i = s * STRETCH; i < width; ++i) {
            if (weights[i] == 0) continue;
            chosen = i;
            if ((sum += weights[i]) > wanted) break;
        }
        return chosen < 0 ? likeliest() : chosen;  // rounding may leave nothing behind the last stretch but zeros
    }
};

}  // namespace

// chosen (rows) from logits (rows, width), settings (rows) and top_k (rows); −1 for a row with a NaN.
HYMBA_API void hymba_draw(const float* logits, const Settings* settings, const int64_t* top_k, int64_t* chosen,
                          int64_t rows, int64_t width, int threads) {
    parallel_for(rows, threads, [&](int64_t i) {
        Row row{logits + i * width, width, settings[i]};
        if (!row.look()) return void(chosen[i] = -1);
        if (settings[i].temperature == 0) return void(chosen[i] = row.likeliest());
        row.weigh();
        if (top_k[i] < width || settings[i].top_p < 1 || settings[i].min_p > 0) row.cut(top_k[i]);
        chosen[i] = row.draw();
    });
}
