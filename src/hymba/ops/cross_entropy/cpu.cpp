// Cross entropy of some rows of logits, which their gradient replaces: each row is read three times out of the cache.
#include "kernels.h"

using namespace hymba;

// As native.py packs it. dtype: 0 float, 1 bfloat16, 2 double. A row whose target is negative has neither loss nor
// gradient.
struct Loss {
    int64_t dtype, rows, vocabulary, threads, wants_gradient;
    void* logits;            // (rows, vocabulary); their gradient, if it is wanted
    const int64_t* targets;  // (rows)
    void* losses;            // (rows), wide
};

namespace {

constexpr int64_t GRAIN = 1 << 14;  // values

template <class T>
struct Row {
    using R = Wide<T>;
    using V = Vec<R>;
    static constexpr int L = LANES<R>;

    T* logits;
    int64_t size;

    int count(int64_t i) const { return static_cast<int>(size - i < L ? size - i : L); }

    // What lies behind the end reads as −∞.
    V read(int64_t i) const {
        V x = load(logits + i, count(i));
        for (int lane = count(i); lane < L; ++lane) x[lane] = -INFINITY;
        return x;
    }

    R largest() const {
        V most = splat(static_cast<R>(-INFINITY));
        for (int64_t i = 0; i < size; i += L) {
            const V x = read(i);
            most = x > most ? x : most;
        }
        R result = most[0];
        for (int lane = 1; lane < L; ++lane) result = most[lane] > result ? most[lane] : result;
        return result;
    }

    // Returns ln Σ e^(x − most).
    R log_sum(R most) const {
        V sum = {};
        for (int64_t i = 0; i < size; i += L) sum += exp(read(i) - most);
        return std::log(sum_lanes<R>(sum));
    }

    // Softmax − 1 at the target.
    void replace(R most, R log_sum, int64_t target) const {
        const R wanted = std::exp(widen(logits[target]) - most - log_sum) - 1;
        for (int64_t i = 0; i < size; i += L) store(logits + i, exp(read(i) - most - log_sum), count(i));
        store(logits + target, splat(wanted), 1);
    }
};

template <class T>
void run(const Loss& x) {
    using R = Wide<T>;
    parallel_rows(x.rows, x.vocabulary, GRAIN, static_cast<int>(x.threads), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const Row<T> row{static_cast<T*>(x.logits) + i * x.vocabulary, x.vocabulary};
            R& loss = static_cast<R*>(x.losses)[i];
            const int64_t target = x.targets[i];
            if (target < 0) {
                loss = 0;
                if (x.wants_gradient) std::memset(row.logits, 0, static_cast<size_t>(x.vocabulary) * sizeof(T));
                continue;
            }
            const R most = row.largest(), log_sum = row.log_sum(most);
            loss = most - widen(row.logits[target]) + log_sum;
            if (x.wants_gradient) row.replace(most, log_sum, target);
        }
    });
}

}  // namespace

HYMBA_API void hymba_cross_entropy(const Loss* loss) {
    if (loss->dtype == 0) run<float>(*loss);
    if (loss->dtype == 1) run<bf16>(*loss);
    if (loss->dtype == 2) run<double>(*loss);
}
