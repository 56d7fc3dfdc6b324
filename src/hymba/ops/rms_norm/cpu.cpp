// The RMS norm, of one tensor or as the mean of two: forward and backward.
//
// A row is walked twice, the second time out of the nearest cache: once for its mean square, once to be scaled. Results
// are rounded where torch's separate operations round them, so that bfloat16 models see the same numbers.
#include "kernels.h"

using namespace hymba;

// One of the normed tensors: its rows begin `stride` values apart, and all else is dense. The gradients are outputs of
// the backward pass.
struct Branch {
    const void *x, *weight;
    int64_t stride;
    void *grad_x, *grad_weight;
};

// As native.py packs it. A null second x stands for the norm of the first alone.
struct Norms {
    int64_t types, rows, width, threads;
    double eps;
    void* out;
    const void* grad;
    int64_t grad_stride;
    Branch branch[2];
};

namespace {

constexpr int64_t GRAIN = 1 << 15;  // values
constexpr int64_t MOST_PARTS = 32;  // sums that a weight's gradient is added up from

// X, W, O: how x, weight and result are stored.
template <class X, class W, class O, int BRANCHES>
struct Kernel {
    using R = Wide<X>;
    using V = Vec<R>;
    using P = std::conditional_t<std::is_same_v<X, W>, X, R>;  // the dtype that torch gives x · weight
    static constexpr int L = LANES<R>;

    const Branch* const branch;
    const int64_t rows, width;
    const int threads;
    const R eps;

    explicit Kernel(const Norms& n)
        : branch(n.branch),
          rows(n.rows),
          width(n.width),
          threads(static_cast<int>(n.threads)),
          eps(static_cast<R>(n.eps)) {}

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

    void forward(O* out) const {
        parallel_rows(rows, width, GRAIN, threads, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) forward_row(row, out + row * width);
        });
    }

    void forward_row(int64_t row, O* out) const {
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

    void backward(const O* grad, int64_t grad_stride) const {
        const int64_t vectors = (width + L - 1) / L, per_part = BRANCHES * vectors;
        const int64_t least = width < GRAIN ? GRAIN / width : 1, share = (rows + MOST_PARTS - 1) / MOST_PARTS;
        const int64_t run = share > least ? share : least, count_parts = (rows + run - 1) / run;
        const Scratch<V> parts(count_parts * per_part);
        std::memset(static_cast<void*>(parts), 0, static_cast<size_t>(count_parts * per_part) * sizeof(V));
        parallel_for(count_parts, threads, [&](int64_t part) {
            for (int64_t row = part * run; row < rows && row < (part + 1) * run; ++row)
                backward_row(row, grad + row * grad_stride, parts + part * per_part, vectors);
        });
        for (int64_t v = 0; v < per_part; ++v) {
            V sum = parts[v];
            for (int64_t part = 1; part < count_parts; ++part) sum += parts[part * per_part + v];
            const int64_t i = v % vectors * L;
            store(static_cast<W*>(branch[v / vectors].grad_weight) + i, sum, count(i));
        }
    }

    // Writes the gradients of a row's inputs and adds its share of the weights' to `parts`, one row of vectors a branch.
    void backward_row(int64_t row, const O* grad, V* parts, int64_t vectors) const {
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
};

// Calls run(kernel, pointer) for the stored types, in the order of native.py; `pointer` is a null one to the result's.
template <int BRANCHES, class Run>
void with_types(const Norms& n, const Run& run) {
    if (n.types == 0) run(Kernel<float, float, float, BRANCHES>(n), static_cast<float*>(nullptr));
    if (n.types == 1) run(Kernel<bf16, bf16, bf16, BRANCHES>(n), static_cast<bf16*>(nullptr));
    if (n.types == 2) run(Kernel<bf16, float, float, BRANCHES>(n), static_cast<float*>(nullptr));
    if (n.types == 3) run(Kernel<bf16, float, bf16, BRANCHES>(n), static_cast<bf16*>(nullptr));
    if (n.types == 4) run(Kernel<float, float, bf16, BRANCHES>(n), static_cast<bf16*>(nullptr));
    if (n.types == 5) run(Kernel<double, double, double, BRANCHES>(n), static_cast<double*>(nullptr));
}
template <class Run>
void with_kernel(const Norms& n, const Run& run) {
    if (n.branch[1].x)
        with_types<2>(n, run);
    else
        with_types<1>(n, run);
}

}  // namespace

HYMBA_API void hymba_rms_norm_forward(const Norms* norms) {
    with_kernel(*norms, [&](const auto& kernel, auto* out) { kernel.forward(static_cast<decltype(out)>(norms->out)); });
}

HYMBA_API void hymba_rms_norm_backward(const Norms* norms) {
    with_kernel(*norms, [&](const auto& kernel, auto* out) {
        using O = std::remove_pointer_t<decltype(out)>;
        kernel.backward(static_cast<const O*>(norms->grad), norms->grad_stride);
    });
}
