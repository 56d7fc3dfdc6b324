// The selective scan: forward, and backward from states kept every few steps.
//
// Vector lanes are channels: the N states of LANES channels are N vectors that stay in registers or first-level cache,
// and B_t, C_t are scalars to all of them, so that a step needs no sum across lanes. A task is one row and GROUP such
// vectors of channels. It walks the row a block of BLOCK steps at a time, and in each block first reads and widens the
// inputs, then runs the recurrence, then finishes and stores: only the first and the last part know the stored type.
//
// The backward pass walks the blocks in reverse, recomputes each from the state that entered it, and keeps its states
// and decays in cache. Gradients that sum over rows or over channels are written in parts and added in a fixed order.
#include "kernels.h"

using namespace hymba;

namespace {

constexpr int BLOCK = 16;                    // steps; native.py allocates one kept state for each block
constexpr int GROUP = 4;                     // vectors of channels
constexpr int PADDING = 64;                  // kept states pad their channels to a multiple of this
constexpr int AT_ONCE = LANES<float> / 2;    // states that share a pass over the block: two or three registers each

}  // namespace

// As native.py fills it. Strides count elements; the last dimension is dense. A null pointer stands for None.
struct Scan {
    int64_t rows, steps, width, states, dtype, wide_weights, threads;
    int64_t u_row, dt_row, B_row, C_row, gate_row, grad_y_row, initial_row;
    int64_t u_step, dt_step, B_step, C_step, gate_step, grad_y_step;
    const void *u, *dt, *B, *C, *gate;          // (rows, steps, width or states)
    const void *A_log, *D, *dt_bias;            // (width, states), (width), (width): wide if wide_weights, else as u
    const void* initial;                        // wide: (rows, width, states)
    const int64_t *lengths, *offsets;           // (rows), (rows, steps)
    const void* grad_y;
    void *y, *final, *kept;                     // kept (rows, blocks, states, padded width), wide
    const void* grad_final;
    void *grad_u, *grad_dt, *grad_B, *grad_C, *grad_gate, *grad_A_log, *grad_D, *grad_dt_bias, *grad_initial;
};

namespace {

// Rates come multiplied by RATE_SCALE, so that a decay is one exp2.
template <class R>
constexpr R RATE_SCALE = 1;
template <>
constexpr float RATE_SCALE<float> = LOG2_E;

HYMBA_INLINE Vec<float> decay(Vec<float> exponent) { return exp2(exponent); }
HYMBA_INLINE Vec<double> decay(Vec<double> exponent) { return exp(exponent); }

// The softplus of x and its slope, the sigmoid.
HYMBA_INLINE Vec<float> softplus(Vec<float> x, Vec<float>& slope) {
    const Vec<float> z = exp(x < 0.0f ? x : -x);
    slope = (x < 0.0f ? z : splat(1.0f)) / (1.0f + z);
    // log(1 + z) = 2 artanh(w), by a minimax polynomial in w²; relative error at most 4e-9.
    const Vec<float> w = z / (2.0f + z), q = w * w;
    Vec<float> p = splat(0.14089169f);
    p = p * q + 0.139803f;
    p = p * q + 0.20012455f;
    p = p * q + 0.33333158f;
    p = p * q + 1.0f;
    return (x < 0.0f ? splat(0.0f) : x) + 2.0f * w * p;
}
HYMBA_INLINE Vec<double> softplus(Vec<double> x, Vec<double>& slope) {
    for (int i = 0; i < LANES<double>; ++i) {
        const double z = std::exp(x[i]);
        slope[i] = x[i] > 20 ? 1 : z / (1 + z);
        x[i] = x[i] > 20 ? x[i] : std::log1p(z);  // as torch has it
    }
    return x;
}

HYMBA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HYMBA_INLINE int64_t pieces(int64_t total, int64_t size) { return (total + size - 1) / size; }

template <class T>
struct Kernel {
    using R = Wide<T>;
    using V = Vec<R>;
    static constexpr int L = LANES<R>;

    // One block of one row for LANES channels, wide.
    struct Block {
        V u[BLOCK], delta[BLOCK], inner[BLOCK];  // inner = delta u
        V slope[BLOCK];                          // of delta, by dt
        V out[BLOCK];                            // C · s
        // In the backward pass: the gradients of `out` (before D and gate), of `inner` and, by way of decay, of `delta`.
        V grad_out[BLOCK], grad_inner[BLOCK], grad_delta[BLOCK];
    };

    // Steps [begin, end) of a block, at whose first the row may restart. `slot`: where its states are kept.
    struct Segment {
        int begin, end, slot;
        bool restart;
    };

    const Scan& x;
    const int64_t N, blocks, vectors, groups, padded;

    explicit Kernel(const Scan& scan)
        : x(scan),
          N(scan.states),
          blocks(pieces(scan.steps, BLOCK)),
          vectors(pieces(scan.width, L)),
          groups(pieces(vectors, GROUP)),
          padded(pieces(scan.width, PADDING) * PADDING) {}

    // ---- Pieces of a task ----

    static const T* at(const void* base, int64_t row, int64_t row_stride, int64_t step, int64_t step_stride) {
        return static_cast<const T*>(base) + row * row_stride + step * step_stride;
    }
    int lanes(int64_t vector) const { return static_cast<int>(least(L, x.width - vector * L)); }
    int64_t length(int64_t row) const {
        if (!x.lengths) return x.steps;
        return x.lengths[row] < 0 ? 0 : least(x.lengths[row], x.steps);
    }
    R* kept(int64_t row, int64_t block, int64_t vector) const {
        return static_cast<R*>(x.kept) + (row * blocks + block) * N * padded + vector * L;
    }

    // The LANES channels of a weight (width): D or dt_bias.
    V load_weight(const void* weight, int64_t vector) const {
        if (x.wide_weights) return load(static_cast<const R*>(weight) + vector * L, lanes(vector));
        return load(static_cast<const T*>(weight) + vector * L, lanes(vector));
    }
    // The rates −exp(A_log) of LANES channels.
    void load_rates(int64_t vector, V* rates) const {
        const int64_t begin = vector * L * N, count = lanes(vector) * N;
        if (x.wide_weights) {
            load_transposed(static_cast<const R*>(x.A_log) + begin, lanes(vector), static_cast<int>(N), rates);
        } else {
            const Scratch<R> wide(L * N);
            for (int64_t i = 0; i < count; ++i) wide[i] = widen(static_cast<const T*>(x.A_log)[begin + i]);
            load_transposed(static_cast<const R*>(wide), lanes(vector), static_cast<int>(N), rates);
        }
        for (int64_t n = 0; n < N; ++n) rates[n] = -exp(rates[n]);
    }
    void load_scaled_rates(int64_t vector, V* rates) const {
        load_rates(vector, rates);
        for (int64_t n = 0; n < N; ++n) rates[n] *= RATE_SCALE<R>;
    }
    void load_initial(int64_t row, int64_t vector, V* state) const {
        if (!x.initial) return void(std::memset(state, 0, sizeof(V) * static_cast<size_t>(N)));
        const R* from = static_cast<const R*>(x.initial) + row * x.initial_row + vector * L * N;
        load_transposed(from, lanes(vector), static_cast<int>(N), state);
    }

    // Copies steps [t, t + steps) of B or C, (steps, N), widened.
    void load_maps(const void* from, int64_t row_stride, int64_t step_stride, int64_t row, int64_t t, int steps,
                   R* to) const {
        for (int i = 0; i < steps; ++i) {
            const T* values = at(from, row, row_stride, t + i, step_stride);
            for (int64_t n = 0; n < N; ++n) to[i * N + n] = widen(values[n]);
        }
    }

    // Cuts steps [t, t + steps) of a row where a document starts; returns the number of segments.
    int cut(int64_t row, int64_t t, int steps, Segment* segments) const {
        int count = 0;
        for (int i = 0; i < steps; ++i) {
            const bool restart = x.offsets && x.offsets[row * x.steps + t + i] == 0 && t + i < length(row);
            if (i > 0 && !restart) continue;
            if (i > 0) segments[count - 1].end = i;
            segments[count] = {i, steps, i + count, restart};
            ++count;
        }
        return count;
    }

    // Asks for the cache lines of steps [t, t + steps) before they are needed: rows are too far apart for the hardware
    // to guess them. `base` may be null, and t past the end.
    void fetch(const void* base, int64_t row, int64_t row_stride, int64_t t, int64_t step_stride, int64_t vector) const {
        if (!base) return;
        for (int64_t i = t, end = least(t + BLOCK, x.steps); i < end; ++i)
            __builtin_prefetch(at(base, row, row_stride, i, step_stride) + vector * L);
    }

    void prepare(Block& b, int64_t row, int64_t t, int steps, int64_t vector) const {
        const int count = lanes(vector);
        fetch(x.gate, row, x.gate_row, t, x.gate_step, vector);
        const V bias = load_weight(x.dt_bias, vector);
        const int64_t valid = length(row) - t;
        for (int i = 0; i < steps; ++i) {
            b.u[i] = load(at(x.u, row, x.u_row, t + i, x.u_step) + vector * L, count);
            b.delta[i] = softplus(load(at(x.dt, row, x.dt_row, t + i, x.dt_step) + vector * L, count) + bias, b.slope[i]);
            if (i >= valid) b.delta[i] = b.slope[i] = V{};
            b.inner[i] = b.delta[i] * b.u[i];
            b.out[i] = V{};
        }
    }

    // ---- The recurrence ----

    // Advances `count` states over the steps. KEEP: records each step's decay, and its state behind the one before it.
    template <int COUNT, bool KEEP>
    static void advance(int steps, int64_t N, const V* delta, const V* inner, const V* rates, const R* B, const R* C,
                        V* state, V* out, V* decays, V* states) {
        V s[COUNT];
        for (int n = 0; n < COUNT; ++n) s[n] = state[n];
        for (int i = 0; i < steps; ++i, B += N, C += N, decays += N) {
            const V d = delta[i], in = inner[i];
            V sum = out[i];
            if (KEEP) states += N;
#pragma GCC unroll 16
            for (int n = 0; n < COUNT; ++n) {
                const V e = decay(d * rates[n]);
                s[n] = e * s[n] + in * B[n];
                sum += s[n] * C[n];
                if (KEEP) decays[n] = e, states[n] = s[n];
            }
            out[i] = sum;
        }
        for (int n = 0; n < COUNT; ++n) state[n] = s[n];
    }

    // Walks the steps back. `flow` comes as the gradient of the last state by what follows it and becomes that of the
    // state before the first. Adds to all the other gradients; that of `delta` is in units of RATE_SCALE.
    template <int COUNT>
    static void retreat(int steps, int64_t N, const Block& b, const V* rates, const R* B, const R* C, const V* decays,
                        const V* states, V* flow, V* grad_rates, V* grad_inner, V* grad_delta, V* grad_B, V* grad_C,
                        int begin) {
        V g[COUNT], a[COUNT];
        for (int n = 0; n < COUNT; ++n) g[n] = flow[n], a[n] = grad_rates[n];
        for (int i = steps - 1; i >= 0; --i) {
            const V d = b.delta[begin + i], in = b.inner[begin + i], grad_out = b.grad_out[begin + i];
            V by_inner = grad_inner[begin + i], by_delta = grad_delta[begin + i];
            const int64_t k = i * N;
#pragma GCC unroll 16
            for (int n = 0; n < COUNT; ++n) {
                const V grad = g[n] + grad_out * C[k + n];
                grad_C[k + n] += grad_out * states[k + N + n];
                grad_B[k + n] += grad * in;
                by_inner += grad * B[k + n];
                g[n] = grad * decays[k + n];
                const V by_exponent = g[n] * states[k + n];
                a[n] += by_exponent * d;
                by_delta += by_exponent * rates[n];
            }
            grad_inner[begin + i] = by_inner;
            grad_delta[begin + i] = by_delta;
        }
        for (int n = 0; n < COUNT; ++n) flow[n] = g[n], grad_rates[n] = a[n];
    }

    // Calls run(count, first) for all states, AT_ONCE of them at a time while that many are left; `count` is a type.
    template <int COUNT = AT_ONCE, class Run>
    static void in_parts(int64_t N, const Run& run, int64_t n = 0) {
        for (; n + COUNT <= N; n += COUNT) run(std::integral_constant<int, COUNT>(), n);
        if constexpr (COUNT > 1) in_parts<COUNT / 2>(N, run, n);
    }

    template <bool KEEP>
    void advance_block(Block& b, const Segment* segments, int cuts, const V* rates, const V* initial, const R* B,
                       const R* C, V* state, V* decays, V* states) const {
        for (const Segment* s = segments; s < segments + cuts; ++s) {
            const int64_t k = s->begin * N;
            if (s->restart) std::memcpy(state, initial, sizeof(V) * static_cast<size_t>(N));
            if (KEEP) std::memcpy(states + s->slot * N, state, sizeof(V) * static_cast<size_t>(N));
            in_parts(N, [&](auto count, int64_t n) {
                advance<count, KEEP>(s->end - s->begin, N, b.delta + s->begin, b.inner + s->begin, rates + n, B + k + n,
                                     C + k + n, state + n, b.out + s->begin, decays + k + n, states + s->slot * N + n);
            });
        }
    }

    // ---- Forward ----

    void forward() const {
        if (x.steps == 1) return step_forward();
        parallel_for(x.rows * groups, static_cast<int>(x.threads), [&](int64_t task) {
            const int64_t first = task % groups * GROUP;
            const Scratch<V> rates(GROUP * N);
            load_group_rates(first, rates);
            forward_group(task / groups, first, rates);
        });
    }

    // A decode step: the rates cost as much as all else, so the rows share them; and the states of a row stream.
    void step_forward() const {
        const int64_t stretches = least(x.threads, groups);
        parallel_for(stretches, static_cast<int>(stretches), [&](int64_t i) {
            const int64_t begin = groups * i / stretches * GROUP, end = least(groups * (i + 1) / stretches * GROUP, vectors);
            const Scratch<V> rates((end - begin) * N);
            for (int64_t row = 0; row < x.rows; ++row)
                for (int64_t first = begin; first < end; first += GROUP) {
                    V* own = rates + (first - begin) * N;
                    if (row == 0) load_group_rates(first, own);
                    forward_group(row, first, own);
                }
        });
    }

    void load_group_rates(int64_t first, V* rates) const {
        for (int64_t v = 0; v < least(GROUP, vectors - first); ++v) load_scaled_rates(first + v, rates + v * N);
    }

    void forward_group(int64_t row, int64_t first, const V* rates) const {
        const int64_t count = least(GROUP, vectors - first);
        const Scratch<V> state(GROUP * N), initial(GROUP * N);
        const Scratch<R> B(BLOCK * N), C(BLOCK * N);
        Segment segments[BLOCK];
        Block b;
        for (int64_t v = 0; v < count; ++v) load_initial(row, first + v, initial + v * N);
        std::memcpy(state, initial, sizeof(V) * static_cast<size_t>(count * N));
        for (int64_t k = 0, t = 0; k < blocks; ++k, t += BLOCK) {
            const int steps = static_cast<int>(least(BLOCK, x.steps - t)), cuts = cut(row, t, steps, segments);
            load_maps(x.B, x.B_row, x.B_step, row, t, steps, B);
            load_maps(x.C, x.C_row, x.C_step, row, t, steps, C);
            for (int64_t v = 0; v < count; ++v) {
                if (x.kept)
                    for (int64_t n = 0; n < N; ++n) store(kept(row, k, first + v) + n * padded, state[v * N + n]);
                fetch(x.u, row, x.u_row, t + BLOCK, x.u_step, first + v);
                fetch(x.dt, row, x.dt_row, t + BLOCK, x.dt_step, first + v);
                prepare(b, row, t, steps, first + v);
                advance_block<false>(b, segments, cuts, rates + v * N, initial + v * N, B, C, state + v * N, nullptr,
                                     nullptr);
                read_out(b, row, t, steps, first + v);
            }
        }
        for (int64_t v = 0; v < count; ++v) {
            R* to = static_cast<R*>(x.final) + (row * x.width + (first + v) * L) * N;
            store_transposed(to, lanes(first + v), static_cast<int>(N), state + v * N);
        }
    }

    void read_out(const Block& b, int64_t row, int64_t t, int steps, int64_t vector) const {
        const int count = lanes(vector);
        const V D = load_weight(x.D, vector);
        T* y = static_cast<T*>(x.y) + (row * x.steps + t) * x.width + vector * L;
        for (int i = 0; i < steps; ++i, y += x.width) {
            V out = b.out[i] + D * b.u[i];
            if (x.gate) {
                const V gate = load(at(x.gate, row, x.gate_row, t + i, x.gate_step) + vector * L, count);
                out *= gate * sigmoid(gate);
            }
            store(y, out, count);
        }
    }

    // ---- Backward ----

    // What one task of the backward pass works in.
    struct Work {
        Scratch<V> rates, initial, flow, grad_initial, grad_rates, decays, states, grad_B, grad_C;
        Scratch<R> B, C;
        V grad_D[GROUP] = {}, grad_bias[GROUP] = {};
        Segment segments[BLOCK];
        Block block;

        explicit Work(int64_t N)
            : rates(GROUP * N),
              initial(GROUP * N),
              flow(GROUP * N),
              grad_initial(GROUP * N),
              grad_rates(GROUP * N),
              decays(BLOCK * N),
              states(2 * BLOCK * N),
              grad_B(BLOCK * N),
              grad_C(BLOCK * N),
              B(BLOCK * N),
              C(BLOCK * N) {}
    };

    void backward() const {
        // Parts to add up: over the rows, grad_A (N), grad_D and grad_dt_bias; over the groups, grad_B and grad_C.
        const Scratch<R> row_parts(x.rows * (N + 2) * padded);
        const int64_t map_size = x.rows * x.steps * N;
        const Scratch<R> B_parts(groups * map_size), C_parts(groups * map_size);
        const int threads = static_cast<int>(x.threads);
        parallel_for(x.rows * groups, threads, [&](int64_t task) {
            const int64_t row = task / groups, group = task % groups, offset = group * map_size + row * x.steps * N;
            backward_group(row, group * GROUP, row_parts + row * (N + 2) * padded, B_parts + offset, C_parts + offset);
        });
        parallel_for(vectors, threads, [&](int64_t vector) { add_rows(row_parts, vector); });
        constexpr int64_t PIECE = 4096;
        parallel_for(pieces(map_size, PIECE), threads, [&](int64_t piece) {
            const int64_t begin = piece * PIECE, end = least(begin + PIECE, map_size);
            add_groups(B_parts, map_size, begin, end, static_cast<T*>(x.grad_B));
            add_groups(C_parts, map_size, begin, end, static_cast<T*>(x.grad_C));
        });
    }

    void backward_group(int64_t row, int64_t first, R* row_part, R* B_part, R* C_part) const {
        const int64_t count = least(GROUP, vectors - first);
        Work w(N);
        for (int64_t v = 0; v < count; ++v) {
            const R* from = static_cast<const R*>(x.grad_final) + (row * x.width + (first + v) * L) * N;
            load_transposed(from, lanes(first + v), static_cast<int>(N), w.flow + v * N);
            load_scaled_rates(first + v, w.rates + v * N);
            load_initial(row, first + v, w.initial + v * N);
        }
        std::memset(w.grad_initial, 0, sizeof(V) * static_cast<size_t>(count * N));
        std::memset(w.grad_rates, 0, sizeof(V) * static_cast<size_t>(count * N));
        for (int64_t k = blocks - 1; k >= 0; --k) {
            const int64_t t = k * BLOCK;
            const int steps = static_cast<int>(least(BLOCK, x.steps - t)), cuts = cut(row, t, steps, w.segments);
            load_maps(x.B, x.B_row, x.B_step, row, t, steps, w.B);
            load_maps(x.C, x.C_row, x.C_step, row, t, steps, w.C);
            std::memset(w.grad_B, 0, sizeof(V) * static_cast<size_t>(steps * N));
            std::memset(w.grad_C, 0, sizeof(V) * static_cast<size_t>(steps * N));
            for (int64_t v = 0; v < count; ++v) {
                if (k > 0) {
                    fetch(x.u, row, x.u_row, t - BLOCK, x.u_step, first + v);
                    fetch(x.dt, row, x.dt_row, t - BLOCK, x.dt_step, first + v);
                }
                for (int64_t n = 0; n < N; ++n) __builtin_prefetch(kept(row, k, first + v) + n * padded);
                fetch(x.grad_y, row, x.grad_y_row, t, x.grad_y_step, first + v);
                prepare(w.block, row, t, steps, first + v);
                recompute(w, row, k, cuts, first + v, v);
                prepare_gradients(w.block, row, t, steps, first + v);
                retreat_block(w, cuts, v);
                finish_gradients(w, row, t, steps, first + v, v);
            }
            sum_all_lanes(w.grad_B, steps * N, B_part + t * N);
            sum_all_lanes(w.grad_C, steps * N, C_part + t * N);
        }
        for (int64_t v = 0; v < count; ++v) store_parts(w, row, first + v, v, row_part);
    }

    void recompute(Work& w, int64_t row, int64_t k, int cuts, int64_t vector, int64_t v) const {
        const Scratch<V> state(N);
        for (int64_t n = 0; n < N; ++n) state[n] = load(kept(row, k, vector) + n * padded);
        advance_block<true>(w.block, w.segments, cuts, w.rates + v * N, w.initial + v * N, w.B, w.C, state, w.decays,
                            w.states);
    }

    // Passes grad_y through the gate.
    void prepare_gradients(Block& b, int64_t row, int64_t t, int steps, int64_t vector) const {
        const int count = lanes(vector);
        const V D = load_weight(x.D, vector);
        T* grad_gate = static_cast<T*>(x.grad_gate) + (row * x.steps + t) * x.width + vector * L;
        for (int i = 0; i < steps; ++i, grad_gate += x.width) {
            V grad = load(at(x.grad_y, row, x.grad_y_row, t + i, x.grad_y_step) + vector * L, count);
            if (x.gate) {
                const V gate = load(at(x.gate, row, x.gate_row, t + i, x.gate_step) + vector * L, count);
                const V open = sigmoid(gate);
                store(grad_gate, grad * (b.out[i] + D * b.u[i]) * open * (1 + gate * (1 - open)), count);
                grad *= gate * open;
            }
            b.grad_out[i] = grad;
            b.grad_inner[i] = b.grad_delta[i] = V{};
        }
    }

    void retreat_block(Work& w, int cuts, int64_t v) const {
        V *flow = w.flow + v * N, *grad_initial = w.grad_initial + v * N;
        for (const Segment* s = w.segments + cuts - 1; s >= w.segments; --s) {
            const int64_t k = s->begin * N;
            in_parts<AT_ONCE / 2>(N, [&](auto count, int64_t n) {
                retreat<count>(s->end - s->begin, N, w.block, w.rates + v * N + n, w.B + k + n, w.C + k + n,
                               w.decays + k + n, w.states + s->slot * N + n, flow + n, w.grad_rates + v * N + n,
                               w.block.grad_inner, w.block.grad_delta, w.grad_B + k + n, w.grad_C + k + n, s->begin);
            });
            if (s->restart)
                for (int64_t n = 0; n < N; ++n) grad_initial[n] += flow[n], flow[n] = V{};
        }
    }

    void finish_gradients(Work& w, int64_t row, int64_t t, int steps, int64_t vector, int64_t v) const {
        const int count = lanes(vector);
        const Block& b = w.block;
        const V D = load_weight(x.D, vector);
        const int64_t offset = (row * x.steps + t) * x.width + vector * L;
        T *grad_u = static_cast<T*>(x.grad_u) + offset, *grad_dt = static_cast<T*>(x.grad_dt) + offset;
        for (int i = 0; i < steps; ++i, grad_u += x.width, grad_dt += x.width) {
            const V by_dt = (b.grad_delta[i] * (1 / RATE_SCALE<R>)+b.grad_inner[i] * b.u[i]) * b.slope[i];
            store(grad_u, b.grad_inner[i] * b.delta[i] + b.grad_out[i] * D, count);
            store(grad_dt, by_dt, count);
            w.grad_D[v] += b.grad_out[i] * b.u[i];
            w.grad_bias[v] += by_dt;
        }
    }

    static void sum_all_lanes(V* from, int64_t count, R* to) {
        int64_t i = 0;
        for (; i + L <= count; i += L) store(to + i, sum_lanes_of_each<R>(from + i));
        for (; i < count; ++i) to[i] = sum_lanes<R>(from[i]);
    }

    void store_parts(Work& w, int64_t row, int64_t vector, int64_t v, R* part) const {
        part += vector * L;
        for (int64_t n = 0; n < N; ++n) store(part + n * padded, w.grad_rates[v * N + n]);
        store(part + N * padded, w.grad_D[v]);
        store(part + (N + 1) * padded, w.grad_bias[v]);
        if (!x.grad_initial) return;
        for (int64_t n = 0; n < N; ++n) w.flow[v * N + n] += w.grad_initial[v * N + n];
        R* to = static_cast<R*>(x.grad_initial) + (row * x.width + vector * L) * N;
        store_transposed(to, lanes(vector), static_cast<int>(N), w.flow + v * N);
    }

    void add_rows(R* parts, int64_t vector) const {
        R* sum = parts + vector * L;  // the first row's part takes the others'
        for (int64_t row = 1; row < x.rows; ++row)
            for (int64_t n = 0; n < N + 2; ++n)
                store(sum + n * padded, load(sum + n * padded) + load(sum + (row * (N + 2) + n) * padded));
        const Scratch<V> rates(N);
        load_rates(vector, rates);
        for (int64_t n = 0; n < N; ++n) rates[n] *= load(sum + n * padded);
        store_transposed(static_cast<R*>(x.grad_A_log) + vector * L * N, lanes(vector), static_cast<int>(N), rates);
        store(static_cast<R*>(x.grad_D) + vector * L, load(sum + N * padded), lanes(vector));
        store(static_cast<R*>(x.grad_dt_bias) + vector * L, load(sum + (N + 1) * padded), lanes(vector));
    }

    void add_groups(const R* parts, int64_t size, int64_t begin, int64_t end, T* to) const {
        for (int64_t i = begin; i < end; i += L) {
            const int count = static_cast<int>(least(L, end - i));
            V sum = load(parts + i, count);
            for (int64_t group = 1; group < groups; ++group) sum += load(parts + group * size + i, count);
            store(to + i, sum, count);
        }
    }
};

// Calls run with a null pointer of the stored type: 0 float, 1 bfloat16, 2 double.
template <class Run>
void with_type(int64_t dtype, const Run& run) {
    if (dtype == 0) run(static_cast<float*>(nullptr));
    if (dtype == 1) run(static_cast<bf16*>(nullptr));
    if (dtype == 2) run(static_cast<double*>(nullptr));
}

}  // namespace

// `final` may be `initial` itself: a task reads its part of the one before it writes its part of the other.
HYMBA_API void hymba_selective_scan_forward(const Scan* scan) {
    with_type(scan->dtype, [&](auto* type) { Kernel<std::remove_pointer_t<decltype(type)>>(*scan).forward(); });
}

HYMBA_API void hymba_selective_scan_backward(const Scan* scan) {
    with_type(scan->dtype, [&](auto* type) { Kernel<std::remove_pointer_t<decltype(type)>>(*scan).backward(); });
}
