// The matrix units (AMX): whether they may be used, what shapes their tiles have, and memory that they read.
//
// The compiler knows of none of their reads: what has been stored right before one needs settle().
#pragma once

#include "kernels.h"

#if defined(HYMBA_AVX512) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define HYMBA_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hymba {
namespace amx {

constexpr int LINE = 64;  // bytes of a tile's row at most

// Whether the processor has the units and the kernel lets us use them; asked once.
inline bool usable() {
    static const bool answer = [] {
        unsigned a, b, c, d;
        constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return answer;
}

// Makes sure that what lies at `memory`, and all else that others can reach, has been written.
HYMBA_INLINE void settle(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// What the units are configured with, laid out as they read it.
struct Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t lines[16] = {};

    void set(int tile, int64_t count, int64_t width) {
        lines[tile] = static_cast<uint8_t>(count);
        bytes[tile] = static_cast<uint16_t>(width);
    }
};
static_assert(sizeof(Shapes) == 64);

// Makes this thread's units ready; release() gives them back.
HYMBA_AMX inline void configure(const Shapes& shapes) {
    settle(&shapes);  // the intrinsic reads 64 bytes but tells GCC of 8
    _tile_loadconfig(&shapes);
}
HYMBA_AMX inline void release() { _tile_release(); }

}  // namespace amx
}  // namespace hymba
#endif
