// The tanh GELU of an array and its gradient, for a CPU.

#include "vectors.h"

namespace {

// 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)) = s has the slope 2 u' s (1 - s).
v16 gelu_slope(v16 x) {
    const v16 square = x * x * 0.044715f;
    const v16 u = x * (square + 1.0f) * 0.7978845608f;
    const v16 s = 1.0f / (exponential(u * -2.0f) + 1.0f);
    return s + x * s * (1.0f - s) * (square * 3.0f + 1.0f) * 1.5957691216f;
}

constexpr int64_t BLOCK = 4096;  // numbers of one task

template <class F>
void blocks(int64_t n, int threads, F task) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = std::min(n, first + BLOCK);
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) task(i, LANES);
        if (i < last) task(i, last - i);
    }
}

v16 load_some(const float* x, int64_t n) {
    if (n == LANES) return load(x);
    v16 y{};
    for (int64_t i = 0; i < n; ++i) y[i] = x[i];
    return y;
}

void store_some(float* x, v16 y, int64_t n) {
    if (n == LANES) return store(x, y);
    for (int64_t i = 0; i < n; ++i) x[i] = y[i];
}

}  // namespace

extern "C" {

// out (n,) of x (n,).
void gelu_forward(const float* x, int64_t n, float* out, int threads) {
    blocks(n, threads, [=](int64_t i, int64_t some) { store_some(out + i, gelu(load_some(x + i, some)), some); });
}

// by_x (n,), the gradient of x (n,), from that of the output, by_out (n,).
void gelu_backward(const float* x, const float* by_out, int64_t n, float* by_x, int threads) {
    blocks(n, threads, [=](int64_t i, int64_t some) {
        store_some(by_x + i, load_some(by_out + i, some) * gelu_slope(load_some(x + i, some)), some);
    });
}

}  // extern "C"
