// The rotation of every head's two halves by its position's angles. Products are rounded as they are stored in torch's
// separate operations.
#include "kernels.h"

using namespace hymba;

// As native.py packs it. Strides count elements; a head's values are dense, and so are tables and output.
struct Rotary {
    int64_t types, direction, threads;  // 0 float, 1 bfloat16, 2 bfloat16 by tables of float, 3 double; 1, or −1: back
    int64_t rows, steps, heads, width;
    int64_t row_stride, step_stride, head_stride, table_rows;
    const void *x, *cos, *sin;
    void* out;
};

namespace {

constexpr int64_t GRAIN = 1 << 15;  // values

// X, Y: how x and the tables are stored.
template <class X, class Y>
void rotate(const Rotary& r, int64_t index) {
    using R = Wide<X>;
    using V = Vec<R>;
    constexpr int L = LANES<R>;
    const int64_t row = index / r.steps, t = index % r.steps, half = r.width / 2;
    const int64_t angles = ((r.table_rows == 1 ? 0 : row) * r.steps + t) * half;
    const X* x = static_cast<const X*>(r.x) + row * r.row_stride + t * r.step_stride;
    const Y *cos = static_cast<const Y*>(r.cos) + angles, *sin = static_cast<const Y*>(r.sin) + angles;
    X* out = static_cast<X*>(r.out) + index * r.heads * r.width;
    for (int64_t i = 0; i < half; i += L) {
        const int count = static_cast<int>(half - i < L ? half - i : L);
        const V c = rounded<X>(load(cos + i, count));
        const V s = rounded<X>(load(sin + i, count)) * static_cast<R>(r.direction);
        for (int64_t head = 0; head < r.heads; ++head) {
            const X* from = x + head * r.head_stride + i;
            X* to = out + head * r.width + i;
            const V first = load(from, count), second = load(from + half, count);
            store(to, rounded<X>(first * c) - rounded<X>(second * s), count);
            store(to + half, rounded<X>(second * c) + rounded<X>(first * s), count);
        }
    }
}

template <class X, class Y>
void rotate_all(const Rotary& r) {
    parallel_rows(r.rows * r.steps, r.heads * r.width, GRAIN, static_cast<int>(r.threads),
                  [&](int64_t first, int64_t last) {
                      for (int64_t index = first; index < last; ++index) rotate<X, Y>(r, index);
                  });
}

}  // namespace

HYMBA_API void hymba_rotary(const Rotary* rotary) {
    if (rotary->types == 0) rotate_all<float, float>(*rotary);
    if (rotary->types == 1) rotate_all<bf16, bf16>(*rotary);
    if (rotary->types == 2) rotate_all<bf16, float>(*rotary);
    if (rotary->types == 3) rotate_all<double, double>(*rotary);
}
