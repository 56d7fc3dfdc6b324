// SiLU(gate) · up: forward and backward. SiLU is rounded as its result is stored, as in torch's two operations.
#include "kernels.h"

using namespace hymba;

// As native.py packs it. Rows of inputs begin so many values apart; outputs are dense. `grad` and behind: the backward
// pass's.
struct Gate {
    int64_t dtype, rows, width, threads;
    const void* gate;
    int64_t gate_stride;
    const void* up;
    int64_t up_stride;
    void* out;
    const void* grad;
    int64_t grad_stride;
    void *grad_gate, *grad_up;
};

namespace {

constexpr int64_t GRAIN = 1 << 14;  // values

template <class T>
struct Kernel {
    using V = Vec<Wide<T>>;
    static constexpr int L = LANES<Wide<T>>;

    const Gate& x;

    static V read(const void* from, int64_t at, int count) { return load(static_cast<const T*>(from) + at, count); }
    static void write(void* to, int64_t at, V value, int count) { store(static_cast<T*>(to) + at, value, count); }

    // Calls body(row, i, count) for every vector: `count` values from value i of a row on.
    template <class Body>
    void for_each(const Body& body) const {
        parallel_rows(x.rows, x.width, GRAIN, static_cast<int>(x.threads), [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                for (int64_t i = 0; i < x.width; i += L)
                    body(row, i, static_cast<int>(x.width - i < L ? x.width - i : L));
        });
    }

    void forward() const {
        for_each([&](int64_t row, int64_t i, int count) {
            const V gate = read(x.gate, row * x.gate_stride + i, count);
            const V up = read(x.up, row * x.up_stride + i, count);
            write(x.out, row * x.width + i, rounded<T>(gate * sigmoid(gate)) * up, count);
        });
    }

    void backward() const {
        for_each([&](int64_t row, int64_t i, int count) {
            const V gate = read(x.gate, row * x.gate_stride + i, count), open = sigmoid(gate);
            const V up = read(x.up, row * x.up_stride + i, count);
            const V grad = read(x.grad, row * x.grad_stride + i, count);
            write(x.grad_gate, row * x.width + i, grad * up * open * (1 + gate * (1 - open)), count);
            write(x.grad_up, row * x.width + i, grad * rounded<T>(gate * open), count);
        });
    }
};

// Calls run(kernel) for the stored type: 0 float, 1 bfloat16, 2 double.
template <class Run>
void with_kernel(const Gate& gate, const Run& run) {
    if (gate.dtype == 0) run(Kernel<float>{gate});
    if (gate.dtype == 1) run(Kernel<bf16>{gate});
    if (gate.dtype == 2) run(Kernel<double>{gate});
}

}  // namespace

HYMBA_API void hymba_gated_silu_forward(const Gate* gate) {
    with_kernel(*gate, [](const auto& kernel) { kernel.forward(); });
}

HYMBA_API void hymba_gated_silu_backward(const Gate* gate) {
    with_kernel(*gate, [](const auto& kernel) { kernel.backward(); });
}
