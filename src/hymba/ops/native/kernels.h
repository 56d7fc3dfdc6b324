// What every kernel shares: vectors, bfloat16, fork and join. One source text serves every instruction set.
//
// Each .cpp is compiled once per level (build.py) into that level's own shared library, so that no inline function of
// one level can be linked into another. HYMBA_AVX512 or HYMBA_AVX2 is defined where the level has those instructions;
// everything else is GCC's vector extension, which g++ and clang++ translate for any machine.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(HYMBA_AVX512) && defined(__AVX512BF16__)
#define HYMBA_BF16_DOT  // compiled in; whether the processor has it is asked at run time
#endif

#define HYMBA_API extern "C" __attribute__((visibility("default")))
#define HYMBA_INLINE inline __attribute__((always_inline))

namespace hymba {

// ---- Threads -------------------------------------------------------------------------------------------------------

// Runs work(data) on `threads` threads, the caller's among them: in torch's own OpenMP pool where it has one.
void fork_join(void (*work)(void*), void* data, int threads);

// Calls body(i) for every i < tasks. Tasks are taken in order but run on any thread: a result must not depend on which.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
    struct Job {
        const Body& body;
        int64_t tasks;
        std::atomic<int64_t> next;
    } job{body, tasks, {0}};
    auto work = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.body(i);
    };
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1)
        work(&job);
    else
        fork_join(work, &job, threads);
}

// Calls body(first, last) for runs of `rows`, of a length that the sizes alone decide. A run has `grain` values or more,
// about 10 µs of work, which is what a fork costs: less than two of them stay on the calling thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t width, int64_t grain, int threads, const Body& body) {
    const int64_t run = width < grain ? grain / width : 1;
    parallel_for((rows + run - 1) / run, threads, [&](int64_t i) {
        body(i * run, (i + 1) * run < rows ? (i + 1) * run : rows);
    });
}

// The same for tasks that lie one behind the other in memory: each thread has a stretch of its own, so that what it
// calls for ahead of time is what it needs next, and helps with the others' when that is done.
template <class Body>
void parallel_stretches(int64_t tasks, int threads, const Body& body) {
    constexpr int MOST = 32;
    struct alignas(64) Counter {
        std::atomic<int64_t> next;
    };
    struct Job {
        const Body& body;
        int64_t tasks, stretches;
        std::atomic<int64_t> arrived;
        Counter counters[MOST];
        int64_t start(int64_t stretch) const { return tasks * stretch / stretches; }
    } job{body, tasks, threads < MOST ? threads : MOST, {0}, {}};
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (job.stretches > threads) job.stretches = threads;
    for (int64_t i = 0; i < job.stretches; ++i) job.counters[i].next.store(job.start(i), std::memory_order_relaxed);
    auto work = [](void* data) {
        Job& job = *static_cast<Job*>(data);
        const int64_t own = job.arrived.fetch_add(1, std::memory_order_relaxed);
        for (int64_t turn = 0; turn < job.stretches; ++turn) {
            const int64_t stretch = (own + turn) % job.stretches, end = job.start(stretch + 1);
            std::atomic<int64_t>& next = job.counters[stretch].next;
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < end;) job.body(i);
        }
    };
    if (threads <= 1)
        work(&job);
    else
        fork_join(work, &job, threads);
}

// ---- Vectors -------------------------------------------------------------------------------------------------------

#if defined(HYMBA_AVX512)
constexpr int VECTOR_BYTES = 64;
#elif defined(HYMBA_AVX2)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class R>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(R));

// Vec<float>, Vec<double>: arithmetic, comparison and ?: work lane by lane, and a scalar stands for all lanes.
template <class R>
struct VectorOf {
    typedef R type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class R>
using Vec = typename VectorOf<R>::type;
typedef int32_t IntVec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t UintVec __attribute__((vector_size(VECTOR_BYTES)));

template <class R>
HYMBA_INLINE Vec<R> splat(R x) {
    return Vec<R>{} + x;
}

// ---- bfloat16 ------------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
typedef uint16_t HalfVec __attribute__((vector_size(VECTOR_BYTES / 2)));

HYMBA_INLINE float widen(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
HYMBA_INLINE float widen(float x) { return x; }
HYMBA_INLINE double widen(double x) { return x; }

HYMBA_INLINE Vec<float> widen(HalfVec x) {
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(x, UintVec) << 16);
}

// The nearest bfloat16 in the upper half of every lane, ties to even; a NaN stays one.
HYMBA_INLINE UintVec rounded_bits(Vec<float> x) {
    const UintVec bits = reinterpret_cast<UintVec>(x);
    return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}
HYMBA_INLINE HalfVec narrow(Vec<float> x) { return __builtin_convertvector(rounded_bits(x) >> 16, HalfVec); }

// x as it comes back from memory that holds T.
template <class T, class V>
HYMBA_INLINE V rounded(V x) {
    if constexpr (std::is_same_v<T, bf16>)
        return reinterpret_cast<V>(rounded_bits(x) & 0xffff0000u);
    else
        return x;
}

// ---- Memory --------------------------------------------------------------------------------------------------------

// The type that values stored as T are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Loads and stores one vector of consecutive values, of any alignment.
HYMBA_INLINE Vec<float> load(const float* from) {
    Vec<float> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
HYMBA_INLINE Vec<double> load(const double* from) {
    Vec<double> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
HYMBA_INLINE Vec<float> load(const bf16* from) {
    HalfVec x;
    std::memcpy(&x, from, sizeof x);
    return widen(x);
}
HYMBA_INLINE void store(float* to, Vec<float> x) { std::memcpy(to, &x, sizeof x); }
HYMBA_INLINE void store(double* to, Vec<double> x) { std::memcpy(to, &x, sizeof x); }
HYMBA_INLINE void store(bf16* to, Vec<float> x) {
    HalfVec y = narrow(x);
    std::memcpy(to, &y, sizeof y);
}

// The same for the first `count` lanes; the other lanes load as zero and are not stored.
#if defined(HYMBA_AVX512)
HYMBA_INLINE uint32_t first_lanes(int count) { return (1u << count) - 1; }
HYMBA_INLINE Vec<float> load(const float* from, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(count)), from);
}
HYMBA_INLINE Vec<float> load(const bf16* from, int count) {
    return widen(reinterpret_cast<HalfVec>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(count)), from)));
}
HYMBA_INLINE void store(float* to, Vec<float> x, int count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_lanes(count)), x);
}
HYMBA_INLINE void store(bf16* to, Vec<float> x, int count) {
    const __m256i y = reinterpret_cast<__m256i>(narrow(x));
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(first_lanes(count)), y);
}
#endif
template <class T>
HYMBA_INLINE Vec<Wide<T>> load(const T* from, int count) {
    if (__builtin_expect(count == LANES<Wide<T>>, 1)) return load(from);
    T copy[LANES<Wide<T>>] = {};
    std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(T));
    return load(copy);
}
template <class T>
HYMBA_INLINE void store(T* to, Vec<Wide<T>> x, int count) {
    if (__builtin_expect(count == LANES<Wide<T>>, 1)) return store(to, x);
    T copy[LANES<Wide<T>>];
    store(copy, x);
    std::memcpy(to, copy, static_cast<size_t>(count) * sizeof(T));
}

// A thread's working memory, kept from one call to the next; what does not fit is allocated.
struct Arena {
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t SIZE = 0;  // so that the sanitizer sees where each array ends
#else
    static constexpr size_t SIZE = 1 << 19;
#endif
    char* base = nullptr;
    size_t used = 0;
    ~Arena() { std::free(base); }
};
inline thread_local Arena arena;

// Vector-aligned memory, uninitialised, given back at the end of its scope.
template <class X>
class Scratch {
  public:
    explicit Scratch(int64_t count) : size_((static_cast<size_t>(count) * sizeof(X) + 64) / 64 * 64) {
        if (!arena.base) arena.base = allocate(Arena::SIZE + 64);
        borrowed_ = arena.used + size_ <= Arena::SIZE;
        memory_ = reinterpret_cast<X*>(borrowed_ ? arena.base + arena.used : allocate(size_));
        if (borrowed_) arena.used += size_;
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        if (borrowed_)
            arena.used -= size_;
        else
            std::free(memory_);
    }
    operator X*() const { return memory_; }

  private:
    static char* allocate(size_t size) {
        char* memory = static_cast<char*>(std::aligned_alloc(64, size));
        if (!memory) std::abort();
        return memory;
    }
    size_t size_;
    bool borrowed_;
    X* memory_;
};

// ---- Lanes ---------------------------------------------------------------------------------------------------------

// Lane 0 of a, lane 0 of b, lane 1 of a, ...: the lower half of the interleaved vectors, and the upper half.
#if defined(__clang__) || __GNUC__ >= 12
template <class V, int... I>
HYMBA_INLINE V interleave(V a, V b, int from, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return from ? __builtin_shufflevector(a, b, ((I + n) / 2 + (I % 2) * n)...)
                : __builtin_shufflevector(a, b, (I / 2 + (I % 2) * n)...);
}
#else
template <class V, int... I>
HYMBA_INLINE V interleave(V a, V b, int from, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    typedef std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t> Index;
    typedef Index Mask __attribute__((vector_size(VECTOR_BYTES)));
    const Mask low = {static_cast<Index>(I / 2 + (I % 2) * n)...};
    return __builtin_shuffle(a, b, from ? low + n / 2 : low);
}
#endif
template <class V>
HYMBA_INLINE V interleave_low(V a, V b) {
    return interleave(a, b, 0, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}
template <class V>
HYMBA_INLINE V interleave_high(V a, V b) {
    return interleave(a, b, 1, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}

// The sum of all lanes, always in the same order.
template <class R>
HYMBA_INLINE R sum_lanes(Vec<R> x) {
    R part[LANES<R>];
    store(part, x);
    for (int half = LANES<R> / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// The sums of the lanes of four vectors of 32-bit values, each always in the same order.
template <class V, class X>
HYMBA_INLINE void sum_lanes_of(const V (&v)[4], X* out) {
    static_assert(sizeof(X) == 4);
    typedef X Four __attribute__((vector_size(16)));
    const V ab = interleave_low(v[0], v[1]) + interleave_high(v[0], v[1]);
    const V cd = interleave_low(v[2], v[3]) + interleave_high(v[2], v[3]);
    const Vec<double> x = reinterpret_cast<Vec<double>>(ab), y = reinterpret_cast<Vec<double>>(cd);
    const V abcd = reinterpret_cast<V>(interleave_low(x, y)) + reinterpret_cast<V>(interleave_high(x, y));
    Four parts[VECTOR_BYTES / 16];
    std::memcpy(parts, &abcd, sizeof parts);
    for (int i = 1; i < VECTOR_BYTES / 16; ++i) parts[0] += parts[i];
    std::memcpy(out, parts, sizeof parts[0]);
}

// The sums of the lanes of LANES<R> vectors, one a lane. Overwrites them.
template <class R>
HYMBA_INLINE Vec<R> sum_lanes_of_each(Vec<R>* x) {
    for (int half = LANES<R> / 2; half; half /= 2)
        for (int i = 0; i < half; ++i)
            x[i] = interleave_low(x[i], x[i + half]) + interleave_high(x[i], x[i + half]);
    return x[0];
}

// Interleaves the lower and the upper half of WIDTH vectors `rounds` times. Each time rotates the bits of the index of
// every value among all WIDTH LANES ones by one, so that log2(LANES) or log2(WIDTH) rounds transpose.
template <int WIDTH, class V>
HYMBA_INLINE void rotate(V* x, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        V next[WIDTH];
        for (int i = 0; i < WIDTH / 2; ++i) {
            next[2 * i] = interleave_low(x[i], x[i + WIDTH / 2]);
            next[2 * i + 1] = interleave_high(x[i], x[i + WIDTH / 2]);
        }
        for (int i = 0; i < WIDTH; ++i) x[i] = next[i];
    }
}

template <int WIDTH, class R>
void load_square(const R* from, Vec<R>* to) {
    Vec<R> x[WIDTH];
    for (int i = 0; i < WIDTH; ++i) x[i] = load(from + i * LANES<R>);
    rotate<WIDTH>(x, __builtin_ctz(LANES<R>));
    for (int i = 0; i < WIDTH; ++i) to[i] = x[i];
}
template <int WIDTH, class R>
void store_square(R* to, const Vec<R>* from) {
    Vec<R> x[WIDTH];
    for (int i = 0; i < WIDTH; ++i) x[i] = from[i];
    rotate<WIDTH>(x, __builtin_ctz(WIDTH));
    for (int i = 0; i < WIDTH; ++i) store(to + i * LANES<R>, x[i]);
}

// Three vectors of three values a lane, one lane's behind another's, turned: value k of lane i stands at 3 i + k.
#if defined(__clang__) || __GNUC__ >= 12
template <int K, class V, int... I>
HYMBA_INLINE V every_third(V a, V b, V c, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    const V ab = __builtin_shufflevector(a, b, (3 * I + K < 2 * n ? 3 * I + K : 0)...);
    return __builtin_shufflevector(ab, c, (3 * I + K < 2 * n ? I : 3 * I + K - n)...);
}
template <int PART, class V, int... I>
HYMBA_INLINE V merge_thirds(V a, V b, V c, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    const V ab = __builtin_shufflevector(a, b, ((PART * n + I) / 3 + ((PART * n + I) % 3 == 1 ? n : 0))...);
    return __builtin_shufflevector(ab, c, ((PART * n + I) % 3 == 2 ? n + (PART * n + I) / 3 : I)...);
}
#define HYMBA_THIRDS
#endif

// Reads LANES channels of three values each, one channel behind the other, so that to[k] holds value k of every channel;
// and writes them back so.
template <class T>
HYMBA_INLINE void load_thirds(const T* from, Vec<Wide<T>>* to) {
    using R = Wide<T>;
    constexpr int L = LANES<R>;
#if defined(HYMBA_THIRDS)
    const std::make_integer_sequence<int, L> lanes;
    const Vec<R> a = load(from), b = load(from + L), c = load(from + 2 * L);
    to[0] = every_third<0>(a, b, c, lanes);
    to[1] = every_third<1>(a, b, c, lanes);
    to[2] = every_third<2>(a, b, c, lanes);
#else
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < L; ++i) to[k][i] = widen(from[3 * i + k]);
#endif
}
template <class T>
HYMBA_INLINE void store_thirds(T* to, const Vec<Wide<T>>* from) {
    using R = Wide<T>;
    constexpr int L = LANES<R>;
#if defined(HYMBA_THIRDS)
    const std::make_integer_sequence<int, L> lanes;
    store(to, merge_thirds<0>(from[0], from[1], from[2], lanes));
    store(to + L, merge_thirds<1>(from[0], from[1], from[2], lanes));
    store(to + 2 * L, merge_thirds<2>(from[0], from[1], from[2], lanes));
#else
    for (int k = 0; k < 3; ++k) {
        T values[L];
        store(values, from[k]);
        for (int i = 0; i < L; ++i) to[3 * i + k] = values[i];
    }
#endif
}

// Reads LANES<R> channels of `width` values each, one channel behind the other, so that to[i] holds value i of every
// channel; channels from `count` on read as zero.
template <class R>
void load_transposed(const R* from, int count, int width, Vec<R>* to) {
    if (count == LANES<R> && width == 16) return load_square<16>(from, to);
    if (count == LANES<R> && width == 8) return load_square<8>(from, to);
    if (count == LANES<R> && width == 4) return load_square<4>(from, to);
    for (int i = 0; i < width; ++i) {
        R lanes[LANES<R>] = {};
        for (int c = 0; c < count; ++c) lanes[c] = from[c * width + i];
        to[i] = load(lanes);
    }
}

// The inverse of load_transposed; writes the first `count` channels.
template <class R>
void store_transposed(R* to, int count, int width, const Vec<R>* from) {
    if (count == LANES<R> && width == 16) return store_square<16>(to, from);
    if (count == LANES<R> && width == 8) return store_square<8>(to, from);
    if (count == LANES<R> && width == 4) return store_square<4>(to, from);
    for (int i = 0; i < width; ++i)
        for (int c = 0; c < count; ++c) to[c * width + i] = from[i][c];
}

// ---- Functions -----------------------------------------------------------------------------------------------------

constexpr float LOG2_E = 1.44269504088896340736f;

// 2^x to about one unit in the last place, exactly 1 at 0; below the normal numbers it may be their smallest.
HYMBA_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(HYMBA_AVX512)
    const Vec<float> r = _mm512_reduce_ps(x, 0);  // x minus its nearest integer; 0 where x is infinite
    const Vec<float> whole = x - r;
#else
    const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, found in the lowest bits
    x = x > 128.0f ? splat(128.0f) : x;
    x = x < -126.0f ? splat(-126.0f) : x;
    const Vec<float> shifted = x + magic;
    const Vec<float> r = x - (shifted - magic);
#endif
    // Minimax for (2^r - 1) / r on [-1/2, 1/2]: relative error of 2^r at most 2e-9.
    Vec<float> p = splat(0.00015353355f);
    p = p * r + 0.0013398875f;
    p = p * r + 0.009618438f;
    p = p * r + 0.055503324f;
    p = p * r + 0.24022648f;
    p = p * r + 0.6931472f;
    p = p * r + 1.0f;
#if defined(HYMBA_AVX512)
    return _mm512_scalef_ps(p, whole);
#else
    const UintVec power = reinterpret_cast<UintVec>(p) + (reinterpret_cast<UintVec>(shifted) << 23);
    return x == x ? reinterpret_cast<Vec<float>>(power) : x;  // of a NaN, the sum might be a number
#endif
}

HYMBA_INLINE Vec<float> exp(Vec<float> x) { return exp2(x * LOG2_E); }

HYMBA_INLINE Vec<double> exp(Vec<double> x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// 1 / (1 + e^−x).
template <class V>
HYMBA_INLINE V sigmoid(V x) {
    return 1 / (1 + exp(-x));
}

}  // namespace hymba
