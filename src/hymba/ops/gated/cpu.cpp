// SiLU(gate) · up: forward and backward. SiLU is rounded as its result is stored, as in torch's two operations.
#include "kernels.h"

using namespace hymba;

namespace {

constexpr int64_t GRAIN = 1 << 14;  // values

// Rows of gate, up and (backward) the result's gradient begin so many values apart; outputs are dense.
template <class T>
struct Kernel {
    using V = Vec<Wide<T>>;
    static constexpr int L = LANES<Wide<T>>;

    int64_t rows, width;
    int threads;

    int count(int64_t i) const { return static_cast<int>(width - i < L ? width - i : L); }

    void forward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out) const {
        parallel_rows(rows, width, GRAIN, threads, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                for (int64_t i = 0; i < width; i += L) {
                    const V x = load(gate + row * gate_stride + i, count(i));
                    const V y = load(up + row * up_stride + i, count(i));
                    store(out + row * width + i, rounded<T>(x * sigmoid(x)) * y, count(i));
                }
        });
    }

    void backward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, const T* grad,
                  int64_t grad_stride, T* grad_gate, T* grad_up) const {
        parallel_rows(rows, width, GRAIN, threads, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                for (int64_t i = 0; i < width; i += L) {
                    const V x = load(gate + row * gate_stride + i, count(i)), open = sigmoid(x);
                    const V y = load(up + row * up_stride + i, count(i));
                    const V g = load(grad + row * grad_stride + i, count(i));
                    store(grad_gate + row * width + i, g * y * open * (1 + x * (1 - open)), count(i));
                    store(grad_up + row * width + i, g * rounded<T>(x * open), count(i));
                }
        });
    }
};

// Calls run(kernel, pointer) for the stored type (0 float, 1 bfloat16, 2 double), `pointer` a null one to that type.
template <class Run>
void with_kernel(int dtype, int64_t rows, int64_t width, int threads, const Run& run) {
    if (dtype == 0) run(Kernel<float>{rows, width, threads}, static_cast<float*>(nullptr));
    if (dtype == 1) run(Kernel<bf16>{rows, width, threads}, static_cast<bf16*>(nullptr));
    if (dtype == 2) run(Kernel<double>{rows, width, threads}, static_cast<double*>(nullptr));
}

}  // namespace

HYMBA_API void hymba_gated_silu_forward(int dtype, const void* gate, const void* up, void* out, int64_t rows,
                                        int64_t width, int64_t gate_stride, int64_t up_stride, int threads) {
    with_kernel(dtype, rows, width, threads, [&](const auto& kernel, auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        kernel.forward(static_cast<const T*>(gate), gate_stride, static_cast<const T*>(up), up_stride,
                       static_cast<T*>(out));
    });
}

HYMBA_API void hymba_gated_silu_backward(int dtype, const void* gate, const void* up, const void* grad,
                                         void* grad_gate, void* grad_up, int64_t rows, int64_t width,
                                         int64_t gate_stride, int64_t up_stride, int64_t grad_stride, int threads) {
    with_kernel(dtype, rows, width, threads, [&](const auto& kernel, auto* typed) {
        using T = std::remove_pointer_t<decltype(typed)>;
        kernel.backward(static_cast<const T*>(gate), gate_stride, static_cast<const T*>(up), up_stride,
                        static_cast<const T*>(grad), grad_stride, static_cast<T*>(grad_gate),
                        static_cast<T*>(grad_up));
    });
}
