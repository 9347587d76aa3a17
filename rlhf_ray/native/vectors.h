// Sixteen numbers at a time: float32 and bfloat16 in memory, float32 in arithmetic, and the functions of them.
//
// The vectors are the compiler's (GCC and Clang), so that one source serves AVX512, AVX2 and NEON; no intrinsics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };

constexpr int LANES = 16;
inline v16 load(const float* p) { v16 x; std::memcpy(&x, p, sizeof x); return x; }
inline v16 load(const bf16* p) {
    h16 half; std::memcpy(&half, p, sizeof half);
    u16 wide = __builtin_convertvector(half, u16) << 16;
    v16 x; std::memcpy(&x, &wide, sizeof x); return x;
}
inline void store(float* p, v16 x) { std::memcpy(p, &x, sizeof x); }
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // to nearest, ties to even
    uint32_t bits; std::memcpy(&bits, &x, sizeof bits);
    p->bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
inline v8 low(v16 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline v8 high(v16 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
inline v4 low(v8 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
inline v4 high(v8 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
// All sixteen by pairs, halves first.
template <class F> inline float fold(v16 x, F f) {
    const v8 eight = f(low(x), high(x));
    const v4 four = f(low(eight), high(eight));
    const v4 two = f(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
    return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}
inline float sum(v16 x) { return fold(x, [](auto a, auto b) { return a + b; }); }
inline float largest(v16 x) { return fold(x, [](auto a, auto b) { return a > b ? a : b; }); }
inline v16 largest(v16 a, v16 b) { return a > b ? a : b; }
inline v16 smallest(v16 a, v16 b) { return a < b ? a : b; }

// exp(x), Cody and Waite's reduction and a polynomial of degree 6; 0 below -87, and no more than exp(88).
inline v16 exponential(v16 x) {
    const v16 bounded = smallest(largest(x, v16{} - 87.3f), v16{} + 88.0f);
    const v16 shifted = bounded * 1.44269504f + 12582912.0f;  // rounds to whole numbers
    const v16 n = shifted - 12582912.0f;
    const v16 r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    v16 y = v16{} + 1.3981999e-3f;
    y = y * r + 8.3334519e-3f;
    y = y * r + 4.1665795e-2f;
    y = y * r + 1.6666665e-1f;
    y = y * r + 0.5f;
    y = y * r * r + r + 1.0f;
    const i16 scale = (__builtin_convertvector(n, i16) + 127) << 23;
    v16 power; std::memcpy(&power, &scale, sizeof power);
    return x < -87.3f ? v16{} : y * power;
}
inline v16 gelu(v16 x) {  // the tanh form: 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
    const v16 u = x * (x * x * 0.044715f + 1.0f) * 0.7978845608f;
    return x / (exponential(u * -2.0f) + 1.0f);
}

}  // namespace
