// How weights are stored, all output by output (weight.py):
//   bf16: (out, in).
//   int8: (out, in), and one float scale an output.
//   int4: groups of 64 inputs in 32 bytes, (out, ⌈in/64⌉ · 32), and one bf16 scale a group, (out, ⌈in/64⌉). Byte j of a
//         group holds input j in its low four bits and input 32 + j in its high four; v stands for (v − 8) · scale.
#pragma once

#include "kernels.h"

namespace hymba {

constexpr int CHUNK = 64;  // inputs taken together, and an int4 group

inline int64_t chunks_of(int64_t in) { return (in + CHUNK - 1) / CHUNK; }

struct Weights {
    const void* data;
    const void* scales;
    int64_t in, out;
};

template <class X>
HYMBA_INLINE X load_as(const void* from) {
    X x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

}  // namespace hymba
