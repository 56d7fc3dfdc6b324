// The causal convolution and its SiLU: forward and backward.
//
// Vector lanes are channels, and the last TAPS inputs of LANES channels stay in registers while a task walks its row.
// The backward pass walks forward too: it recomputes each step's sum, and a step's input has its whole gradient
// TAPS − 1 steps later. What a step sees across a document's start is the state before it, read the slow way.
#include "kernels.h"

using namespace hymba;

// As native.py fills it. Strides count elements; the last dimension is dense. A null pointer stands for None.
struct Conv {
    int64_t rows, steps, width, taps, dtype, wide_weights, threads;
    int64_t u_row, grad_out_row, initial_row, u_step, grad_out_step;
    const void* u;                     // (rows, steps, width)
    const void *weight, *bias;         // (width, taps), (width): wide if wide_weights, else as u
    const void* initial;               // (rows, width, taps − 1), as u; its rows may be one
    const int64_t *lengths, *offsets;  // (rows), (rows, steps)
    void *out, *final;                 // as u: (rows, steps, width), (rows, width, taps − 1)
    const void *grad_out, *grad_final;
    void *grad_u, *grad_initial;        // as u
    void *grad_weight, *grad_bias;      // wide
};

namespace {

HYMBA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, int TAPS>
struct Kernel {
    using R = Wide<T>;
    using V = Vec<R>;
    static constexpr int L = LANES<R>, BACK = TAPS - 1;
    static constexpr int GROUP = 4;    // vectors of channels a task walks abreast
    static constexpr int AHEAD = 8;    // steps between asking for a cache line and using it

    const Conv& x;
    const int64_t vectors, groups;

    explicit Kernel(const Conv& conv)
        : x(conv), vectors((conv.width + L - 1) / L), groups((vectors + GROUP - 1) / GROUP) {}

    int lanes(int64_t vector) const { return static_cast<int>(least(L, x.width - vector * L)); }
    int64_t length(int64_t row) const {
        if (!x.lengths) return x.steps;
        return x.lengths[row] < 0 ? 0 : least(x.lengths[row], x.steps);
    }
    const T* input(int64_t row, int64_t t, int64_t vector) const {
        return static_cast<const T*>(x.u) + row * x.u_row + t * x.u_step + vector * L;
    }
    // Step t's distance from its document's start; BACK or more where it sees nothing of another document.
    int64_t offset(int64_t row, int64_t t) const { return x.offsets ? x.offsets[row * x.steps + t] : BACK; }
    // Which initial input a step `offset` behind its document's start sees `back` steps ago.
    static int before(int64_t offset, int back) {
        return static_cast<int>(BACK + offset - back > 0 ? BACK + offset - back : 0);
    }

    // What stays in registers: the weights and, oldest first, the inputs behind the current step.
    struct Channels {
        V weight[TAPS], bias, initial[TAPS], window[TAPS];
    };

    template <class W>
    void load_weights(const W* weight, const W* bias, int64_t vector, Channels& c) const {
        const int count = lanes(vector);
        R wide[L * TAPS];
        for (int i = 0; i < count * TAPS; i += L)
            store(wide + i, load(weight + vector * L * TAPS + i, count * TAPS - i < L ? count * TAPS - i : L));
        load_transposed(wide, count, TAPS, c.weight);
        c.bias = load(bias + vector * L, count);
    }

    void load_weights(int64_t vector, Channels& c) const {
        if (x.wide_weights)
            load_weights(static_cast<const R*>(x.weight), static_cast<const R*>(x.bias), vector, c);
        else
            load_weights(static_cast<const T*>(x.weight), static_cast<const T*>(x.bias), vector, c);
    }

    void begin(Channels& c, int64_t row, int64_t vector) const {
        const int count = lanes(vector);
        std::memset(c.initial, 0, sizeof c.initial);
        if (x.initial) {
            const T* from = static_cast<const T*>(x.initial) + row * x.initial_row + vector * L * BACK;
            if (BACK == 3 && count == L)
                load_thirds(from, c.initial);
            else
                for (int k = 0; k < BACK; ++k)
                    for (int i = 0; i < count; ++i) c.initial[k][i] = widen(from[i * BACK + k]);
        }
        for (int k = 0; k < BACK; ++k) c.window[k + 1] = c.initial[k];
    }

    // Takes in step t, and fills `seen` with the inputs that each tap weighs.
    HYMBA_INLINE void step(Channels& c, int64_t row, int64_t t, int64_t vector, int count, V* seen) const {
        for (int k = 0; k < BACK; ++k) c.window[k] = c.window[k + 1];
        c.window[BACK] = load(input(row, t, vector), count);
        for (int k = 0; k < TAPS; ++k) seen[k] = c.window[k];
        const int64_t o = offset(row, t);
        if (__builtin_expect(o < BACK, 0))
            for (int back = BACK; back > o && back > 0; --back) seen[BACK - back] = c.initial[before(o, back)];
    }

    static HYMBA_INLINE V weigh(const Channels& c, const V* seen) {
        V sum = c.bias;
        for (int k = 0; k < TAPS; ++k) sum += c.weight[k] * seen[k];
        return sum;
    }

    // ---- Forward ----

    void forward() const {
        // The weights cost as much as a decode step: there the rows share them.
        const int64_t together = x.steps == 1 && x.rows > 0 ? x.rows : 1;
        parallel_for(x.rows / together * groups, static_cast<int>(x.threads), [&](int64_t task) {
            const int64_t row = task / groups * together, first = task % groups * GROUP;
            for (int64_t vector = first; vector < least(first + GROUP, vectors); ++vector) {
                Channels c;
                load_weights(vector, c);
                for (int64_t i = row; i < row + together; ++i) {
                    // In this order, since `final` may be `initial` itself.
                    begin(c, i, vector);
                    forward_channels(c, i, vector);
                    leave(c, i, vector);
                }
            }
        });
    }

    void forward_channels(Channels& c, int64_t row, int64_t vector) const {
        const int count = lanes(vector);
        T* out = static_cast<T*>(x.out) + row * x.steps * x.width + vector * L;
        for (int64_t t = 0; t < x.steps; ++t, out += x.width) {
            __builtin_prefetch(input(row, least(t + AHEAD, x.steps - 1), vector));
            V seen[TAPS];
            step(c, row, t, vector, count, seen);
            const V sum = weigh(c, seen);
            store(out, sum * sigmoid(sum), count);
        }
    }

    // Stores the last inputs before the row's length.
    void leave(const Channels& c, int64_t row, int64_t vector) const {
        const int count = lanes(vector);
        T* to = static_cast<T*>(x.final) + (row * x.width + vector * L) * BACK;
        V left[TAPS];
        for (int k = 0; k < BACK; ++k) {
            const int64_t t = length(row) - BACK + k;
            left[k] = t < 0 ? c.initial[t + BACK] : load(input(row, t, vector), count);
        }
        if (BACK == 3 && count == L) return store_thirds(to, left);
        for (int k = 0; k < BACK; ++k) {
            T values[L];
            store(values, left[k]);
            for (int i = 0; i < count; ++i) to[i * BACK + k] = values[i];
        }
    }

    // ---- Backward ----

    void backward() const {
        // grad_weight and grad_bias by row, to be added in order.
        const Scratch<V> parts(x.rows * vectors * (TAPS + 1));
        parallel_for(x.rows * vectors, static_cast<int>(x.threads), [&](int64_t task) {
            backward_channels(task / vectors, task % vectors, parts + task * (TAPS + 1));
        });
        parallel_for(vectors, static_cast<int>(x.threads), [&](int64_t vector) {
            V sum[TAPS + 1] = {};
            for (int64_t row = 0; row < x.rows; ++row)
                for (int k = 0; k <= TAPS; ++k) sum[k] += parts[(row * vectors + vector) * (TAPS + 1) + k];
            store_transposed(static_cast<R*>(x.grad_weight) + vector * L * TAPS, lanes(vector), TAPS, sum);
            store(static_cast<R*>(x.grad_bias) + vector * L, sum[TAPS], lanes(vector));
        });
    }

    // The gradient of the state left behind, by the input at history index `index`: the initial ones come first.
    V grad_left(int64_t row, int64_t vector, int64_t index) const {
        const int64_t k = index - length(row);
        V grad = {};
        if (k < 0 || k >= BACK) return grad;
        const T* from = static_cast<const T*>(x.grad_final) + (row * x.width + vector * L) * BACK + k;
        for (int i = 0, count = lanes(vector); i < count; ++i) grad[i] = widen(from[i * BACK]);
        return grad;
    }

    void backward_channels(int64_t row, int64_t vector, V* part) const {
        const int count = lanes(vector);
        Channels c;
        load_weights(vector, c);
        begin(c, row, vector);
        V weight_sum[TAPS + 1] = {}, grad_initial[TAPS] = {}, grad_window[TAPS] = {};
        for (int k = 0; k < BACK; ++k) grad_window[k + 1] = grad_left(row, vector, k);
        for (int64_t t = 0; t < x.steps; ++t) {
            const int64_t ahead = least(t + AHEAD, x.steps - 1), o = offset(row, t);
            const T* grads = static_cast<const T*>(x.grad_out) + row * x.grad_out_row + vector * L;
            __builtin_prefetch(input(row, ahead, vector));
            __builtin_prefetch(grads + ahead * x.grad_out_step);
            V seen[TAPS];
            step(c, row, t, vector, count, seen);
            const V sum = weigh(c, seen), open = sigmoid(sum);
            const V grad = load(grads + t * x.grad_out_step, count) * open * (1 + sum * (1 - open));
            for (int k = 0; k < TAPS; ++k) weight_sum[k] += grad * seen[k];
            weight_sum[TAPS] += grad;
            for (int k = 0; k < BACK; ++k) grad_window[k] = grad_window[k + 1];
            grad_window[BACK] = t + BACK >= length(row) ? grad_left(row, vector, t + BACK) : V{};
            for (int back = 0; back < TAPS; ++back) {
                const bool cut = back > 0 && o < back;
                V& to = __builtin_expect(cut, 0) ? grad_initial[before(o, back)] : grad_window[BACK - back];
                to += grad * c.weight[BACK - back];
            }
            finish(row, t - BACK, vector, count, grad_window[0], grad_initial);
        }
        for (int k = 1; k < TAPS; ++k) finish(row, x.steps - TAPS + k, vector, count, grad_window[k], grad_initial);
        for (int k = 0; k <= TAPS; ++k) part[k] = weight_sum[k];
        if (x.grad_initial) store_initial(row, vector, count, grad_initial);
    }

    // Puts the whole gradient of the input of step t in its place.
    void finish(int64_t row, int64_t t, int64_t vector, int count, V grad, V* grad_initial) const {
        if (t < 0)
            grad_initial[t + BACK] += grad;
        else
            store(static_cast<T*>(x.grad_u) + (row * x.steps + t) * x.width + vector * L, grad, count);
    }

    void store_initial(int64_t row, int64_t vector, int count, const V* grad) const {
        T* to = static_cast<T*>(x.grad_initial) + (row * x.width + vector * L) * BACK;
        for (int k = 0; k < BACK; ++k) {
            T values[L];
            store(values, grad[k]);
            for (int i = 0; i < count; ++i) to[i * BACK + k] = values[i];
        }
    }
};

// Calls run(kernel) for the stored type (0 float, 1 bfloat16, 2 double) and the taps.
template <class T, class Run>
void with_taps(const Conv& conv, const Run& run) {
    if (conv.taps == 2) run(Kernel<T, 2>(conv));
    if (conv.taps == 3) run(Kernel<T, 3>(conv));
    if (conv.taps == 4) run(Kernel<T, 4>(conv));
}
template <class Run>
void with_kernel(const Conv& conv, const Run& run) {
    if (conv.dtype == 0) with_taps<float>(conv, run);
    if (conv.dtype == 1) with_taps<bf16>(conv, run);
    if (conv.dtype == 2) with_taps<double>(conv, run);
}

}  // namespace

// `final` may be `initial` itself where each row has its own: a decode step in place.
HYMBA_API void hymba_causal_conv1d_forward(const Conv* conv) {
    with_kernel(*conv, [](const auto& kernel) { kernel.forward(); });
}

HYMBA_API void hymba_causal_conv1d_backward(const Conv* conv) {
    with_kernel(*conv, [](const auto& kernel) { kernel.backward(); });
}
