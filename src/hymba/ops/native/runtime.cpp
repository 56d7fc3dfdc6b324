// What the loader asks of a library, and where its threads come from.
#include "kernels.h"

#include <thread>
#include <vector>

namespace {

// libgomp's entry: runs work(data) in a team of `threads` and waits for all. Null until the loader sets it.
using Gomp = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
Gomp gomp = nullptr;

}  // namespace

void hymba::fork_join(void (*work)(void*), void* data, int threads) {
    if (gomp) return gomp(work, data, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, data);
    work(data);
    for (std::thread& other : others) other.join();
}

HYMBA_API void hymba_set_gomp(void* entry) { gomp = reinterpret_cast<Gomp>(entry); }

// The digest of the sources this library was built from (build.py).
HYMBA_API const char* hymba_fingerprint() { return HYMBA_FINGERPRINT; }

// Whether this machine runs the instructions of a level: 0 portable, 1 AVX2, 2 AVX-512.
HYMBA_API int hymba_supports(int level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == 1) return avx2;
    if (level == 2)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return level == 0;
}

// Sums `count` floats: a read of memory at full speed, by which a benchmark knows the machine.
HYMBA_API float hymba_read_bandwidth(const float* x, int64_t count, int threads) {
    using namespace hymba;
    constexpr int64_t PIECE = 1 << 16;
    const int64_t pieces = (count + PIECE - 1) / PIECE;
    Scratch<float> sums(pieces);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const float* at = x + piece * PIECE;
        const int64_t n = count - piece * PIECE < PIECE ? count - piece * PIECE : PIECE;
        Vec<float> sum[8] = {};
        int64_t i = 0;
        for (; i + 8 * LANES<float> <= n; i += 8 * LANES<float>)
            for (int k = 0; k < 8; ++k) sum[k] += load(at + i + k * LANES<float>);
        float rest = 0;
        for (; i < n; ++i) rest += at[i];
        for (int k = 1; k < 8; ++k) sum[0] += sum[k];
        sums[piece] = sum_lanes<float>(sum[0]) + rest;
    });
    float total = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece];
    return total;
}
