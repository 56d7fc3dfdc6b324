// The RMS norm, of one tensor or as the mean of two: forward and backward.
//
// A row is walked twice, the second time out of the nearest cache: once for its mean square, once to be scaled. Results
// are rounded where torch's separate operations round them, so that bfloat16 models see the same numbers.
#include "kernels.h"

using namespace hymba;

namespace {

constexpr int64_t GRAIN = 1 << 15;  // values
constexpr int64_t MOST_PARTS = 32;  // sums that a weight's gradient is added up from

// One normed tensor: its rows begin `stride` values apart, and everything else is dense.
struct Branch {
    const void *x, *weight;
    int64_t stride;
    void *grad_x, *grad_weight;
};

// X, W, O: how x, weight and result are stored.
template <class X, class W, class O, int BRANCHES>
struct Kernel {
    using R = Wide<X>;
    using V = Vec<R>;
    using P = std::conditional_t<std::is_same_v<X, W>, X, R>;  // the dtype that torch gives x · weight
    static constexpr int L = LANES<R>;

    const Branch* branch;
    int64_t rows, width;
    R eps;

    int count(int64_t i) const { return static_cast<int>(width - i < L ? width - i : L); }
    const X* input(int b, int64_t row) const { return static_cast<const X*>(branch[b].x) + row * branch[b].stride; }
    const W* weight(int b) const { return static_cast<const W*>(branch[b].weight); }
    R inverse_rms(R square_sum) const { return 1 / std::sqrt(square_sum / static_cast<R>(width) + eps); }

    // ---- Forward ----

    R square_sum(const X* x) const {
        V sum[4] = {};
        int64_t i = 0;
        for (; i + 4 * L <= width; i += 4 * L)
            for (int k = 0; k < 4; ++k) {
                const V v = load(x + i + k * L);
                sum[k] += v * v;
            }
        for (; i < width; i += L) {
            const V v = load(x + i, count(i));
            sum[0] += v * v;
        }
        return sum_lanes<R>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    void forward(int64_t row, O* out) const {
        R scale[BRANCHES];
        for (int b = 0; b < BRANCHES; ++b) scale[b] = inverse_rms(square_sum(input(b, row)));
        for (int64_t i = 0; i < width; i += L) {
            V sum = {};
            for (int b = 0; b < BRANCHES; ++b) {
                const V normed = rounded<X>(load(input(b, row) + i, count(i)) * scale[b]);
                const V weighed = rounded<P>(normed * load(weight(b) + i, count(i)));
                sum = b ? rounded<P>(sum + weighed) : weighed;
            }
            store(out + i, BRANCHES == 1 ? sum : sum / BRANCHES, count(i));
        }
    }

    // ---- Backward ----

    // Writes the gradients of a row's inputs and adds its share of the weights' to `parts`, one row of vectors a branch.
    void backward(int64_t row, const O* grad, V* parts, int64_t vectors) const {
        for (int b = 0; b < BRANCHES; ++b) {
            const X* x = input(b, row);
            X* grad_x = static_cast<X*>(branch[b].grad_x) + row * width;
            V squares = {}, products = {};
            for (int64_t i = 0; i < width; i += L) {
                const V v = load(x + i, count(i));
                squares += v * v;
                products += v * load(grad + i, count(i)) * load(weight(b) + i, count(i));
            }
            const R scale = inverse_rms(sum_lanes<R>(squares));
            const R pull = sum_lanes<R>(products) / static_cast<R>(width) * scale * scale * scale;
            for (int64_t i = 0; i < width; i += L) {
                const V v = load(x + i, count(i)), g = load(grad + i, count(i)) / BRANCHES;
                store(grad_x + i, g * load(weight(b) + i, count(i)) * scale - v * (pull / BRANCHES), count(i));
                parts[b * vectors + i / L] += g * rounded<X>(v * scale);
            }
        }
    }

    void backward_all(const O* grad, int64_t grad_stride, int threads) const {
        const int64_t vectors = (width + L - 1) / L, per_part = BRANCHES * vectors;
        const int64_t least = width < GRAIN ? GRAIN / width : 1, share = (rows + MOST_PARTS - 1) / MOST_PARTS;
        const int64_t run = share > least ? share : least, count_parts = (rows + run - 1) / run;
        const Scratch<V> parts(count_parts * per_part);
        std::memset(static_cast<void*>(parts), 0, static_cast<size_t>(count_parts * per_part) * sizeof(V));
        parallel_for(count_parts, threads, [&](int64_t part) {
            for (int64_t row = part * run; row < rows && row < (part + 1) * run; ++row)
                backward(row, grad + row * grad_stride, parts + part * per_part, vectors);
        });
        for (int64_t v = 0; v < per_part; ++v) {
            V sum = parts[v];
            for (int64_t part = 1; part < count_parts; ++part) sum += parts[part * per_part + v];
            const int64_t i = v % vectors * L;
            store(static_cast<W*>(branch[v / vectors].grad_weight) + i, sum, count(i));
        }
    }
};

// Calls run(kernel, out) for the stored types, out being a null pointer to the result's: the order of native.py.
template <int BRANCHES, class Run>
void with_types(int types, const Branch* branch, int64_t rows, int64_t width, double eps, const Run& run) {
    const float e = static_cast<float>(eps);
    if (types == 0) run(Kernel<float, float, float, BRANCHES>{branch, rows, width, e}, static_cast<float*>(nullptr));
    if (types == 1) run(Kernel<bf16, bf16, bf16, BRANCHES>{branch, rows, width, e}, static_cast<bf16*>(nullptr));
    if (types == 2) run(Kernel<bf16, float, float, BRANCHES>{branch, rows, width, e}, static_cast<float*>(nullptr));
    if (types == 3) run(Kernel<bf16, float, bf16, BRANCHES>{branch, rows, width, e}, static_cast<bf16*>(nullptr));
    if (types == 4) run(Kernel<float, float, bf16, BRANCHES>{branch, rows, width, e}, static_cast<bf16*>(nullptr));
    if (types == 5) run(Kernel<double, double, double, BRANCHES>{branch, rows, width, eps}, static_cast<double*>(nullptr));
}
template <class Run>
void with_kernel(int types, const Branch* branch, int64_t rows, int64_t width, double eps, const Run& run) {
    if (branch[1].x)
        with_types<2>(types, branch, rows, width, eps, run);
    else
        with_types<1>(types, branch, rows, width, eps, run);
}

}  // namespace

// A null y: the norm of x alone.
HYMBA_API void hymba_rms_norm_forward(int types, const void* x, const void* y, const void* x_weight,
                                      const void* y_weight, void* out, int64_t rows, int64_t width, int64_t x_stride,
                                      int64_t y_stride, double eps, int threads) {
    const Branch branch[2] = {{x, x_weight, x_stride, nullptr, nullptr}, {y, y_weight, y_stride, nullptr, nullptr}};
    with_kernel(types, branch, rows, width, eps, [&](const auto& kernel, auto* to) {
        to = static_cast<decltype(to)>(out);
        parallel_rows(rows, width, GRAIN, threads, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) kernel.forward(row, to + row * width);
        });
    });
}

HYMBA_API void hymba_rms_norm_backward(int types, const void* x, const void* y, const void* x_weight,
                                       const void* y_weight, const void* grad, void* grad_x, void* grad_y,
                                       void* grad_x_weight, void* grad_y_weight, int64_t rows, int64_t width,
                                       int64_t x_stride, int64_t y_stride, int64_t grad_stride, double eps,
                                       int threads) {
    const Branch branch[2] = {{x, x_weight, x_stride, grad_x, grad_x_weight},
                              {y, y_weight, y_stride, grad_y, grad_y_weight}};
    with_kernel(types, branch, rows, width, eps, [&](const auto& kernel, auto* from) {
        kernel.backward_all(static_cast<decltype(from)>(const_cast<void*>(grad)), grad_stride, threads);
    });
}
