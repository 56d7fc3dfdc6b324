// Torch's operations that a recorded step (ops/recording.py) repeats most, without the way through its dispatcher: after
// the weights of a layer have passed through the caches that way lies cold, and takes ten times as long as the arithmetic.
#include "kernels.h"

using namespace hymba;

namespace {

constexpr int64_t GRAIN = 1 << 15;  // values of a task: a fork is worth more of them

template <class T>
void add(const void* x, const void* y, void* out, int64_t count, int threads) {
    constexpr int64_t L = LANES<Wide<T>>;
    const T *a = static_cast<const T*>(x), *b = static_cast<const T*>(y);
    parallel_for((count + GRAIN - 1) / GRAIN, threads, [&](int64_t task) {
        const int64_t end = (task + 1) * GRAIN < count ? (task + 1) * GRAIN : count;
        for (int64_t i = task * GRAIN; i < end; i += L) {
            const int lanes = static_cast<int>(end - i < L ? end - i : L);
            store(static_cast<T*>(out) + i, load(a + i, lanes) + load(b + i, lanes), lanes);
        }
    });
}

}  // namespace

// out = x + y, `count` values of a dtype: 0 float, 1 bf16 (added in float and rounded once), 2 double.
HYMBA_API void hymba_add(int dtype, const void* x, const void* y, void* out, int64_t count, int threads) {
    if (dtype == 0) add<float>(x, y, out, count, threads);
    if (dtype == 1) add<bf16>(x, y, out, count, threads);
    if (dtype == 2) add<double>(x, y, out, count, threads);
}

// to[rows[i], columns[i]] = from[i] for i < count, where `to` is (height, width) stretches of `bytes`, those of `from` lie
// `apart`, and an index below zero counts from the end. Returns how many lie outside; nothing is written there.
HYMBA_API int hymba_scatter(const char* from, char* to, const int64_t* rows, const int64_t* columns, int64_t count,
                            int64_t apart, int64_t height, int64_t width, int64_t bytes) {
    int outside = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows[i] < 0 ? rows[i] + height : rows[i];
        const int64_t column = columns[i] < 0 ? columns[i] + width : columns[i];
        if (row < 0 || row >= height || column < 0 || column >= width)
            ++outside;
        else
            std::memcpy(to + (row * width + column) * bytes, from + i * apart, static_cast<size_t>(bytes));
    }
    return outside;
}
