// Tokens by inverse CDF in two levels, as generation/sampling.py draws them, from one uniform number each.

#include "vectors.h"

namespace {

constexpr int BLOCK = 256;  // columns whose sum is one entry of the coarse CDF

// exp((logits - top) / temperature) of columns [first, last) into out, zeros behind; 0 for the banned column.
float weigh(const float* logits, int64_t first, int64_t last, float top, float inverse, int64_t banned, float* out) {
    v16 total{};
    for (int64_t c = first; c < last; c += LANES) {
        v16 z = v16{} - std::numeric_limits<float>::infinity();
        if (last - c >= LANES) z = load(logits + c);
        else for (int64_t i = c; i < last; ++i) z[i - c] = logits[i];
        v16 p = exponential((z - top) * inverse);
        if (c <= banned && banned < c + LANES) p[banned - c] = 0.0f;
        store(out + c - first, p);
        total += p;
    }
    return sum(total);
}

// One token by inverse CDF in two levels: sums of blocks, then columns; its log-probability with nothing banned.
void draw_row(const float* logits, int64_t V, float inverse, double uniform, int64_t banned, int64_t* token,
              float* logprob, float* log_kept) {
    v16 best = v16{} - std::numeric_limits<float>::infinity();
    float top = -std::numeric_limits<float>::infinity();
    int64_t c = 0;
    for (; c + LANES <= V; c += LANES) {
        v16 z = load(logits + c);
        if (c <= banned && banned < c + LANES) z[banned - c] = top;
        best = largest(best, z);
    }
    top = std::max(top, largest(best));
    for (; c < V; ++c) if (c != banned) top = std::max(top, logits[c]);

    const int64_t blocks = (V + BLOCK - 1) / BLOCK;
    std::vector<double> sums(blocks);
    float weights[BLOCK];
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b)
        total += sums[b] = weigh(logits, b * BLOCK, std::min(V, (b + 1) * BLOCK), top, inverse, banned, weights);

    double rest = uniform * total;
    int64_t b = 0;
    while (b + 1 < blocks && rest >= sums[b]) rest -= sums[b++];
    while (b > 0 && sums[b] == 0) --b;  // rounding went past the end
    const int64_t first = b * BLOCK, last = std::min(V, first + BLOCK);
    weigh(logits, first, last, top, inverse, banned, weights);
    int64_t chosen = 0;
    for (int64_t i = 0; i < last - first; ++i) {
        if (weights[i] > 0) chosen = i;
        if (rest < weights[i]) break;
        rest -= weights[i];
    }
    double mass = std::log(total);
    if (banned >= 0) {
        const double excess = (static_cast<double>(logits[banned]) - top) * inverse;
        mass = excess > 0 ? excess + std::log1p(total * std::exp(-excess)) : std::log(total + std::exp(excess));
    }
    *token = first + chosen;
    *log_kept = static_cast<float>(std::log(total) - mass);
    *logprob = static_cast<float>((static_cast<double>(logits[first + chosen]) - top) * inverse - mass);
}

}  // namespace

extern "C" {

// Tokens (M,) and their log-probabilities (M,) from logits (M, V), uniforms (M,) and a banned token a row (-1: none).
void draw(const float* logits, int64_t M, int64_t V, double temperature, const double* uniforms, const int64_t* banned,
          int64_t* tokens, float* logprobs, float* log_kept, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; ++m)
        draw_row(logits + m * V, V, static_cast<float>(1.0 / temperature), uniforms[m], banned[m], tokens + m,
                 logprobs + m, log_kept + m);
}

}  // extern "C"
