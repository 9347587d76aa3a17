// Causal attention inside documents that lie one behind the other, and its gradient, for a CPU.
//
// qkv (N, 3, H, d) is what the projection makes.  A task is one head of one document, so nothing is computed on padding,
// and its numbers depend neither on other documents nor on the threads.  Both directions take a block of queries at a
// time; the gradient computes probabilities again from the log-sum-exp (Dao et al. 2022).
//
// Left out on purpose: dropout, windows, and grouped heads.

#include <utility>

#include "vectors.h"

namespace {

constexpr int QUERIES = 32;  // of one block
#ifdef __AVX512F__
constexpr int TILE_ROWS = 8, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#endif

// A matrix whose neighbours in a row lie ``column`` floats apart, and those in a column ``row``.
struct Matrix { const float* at; int64_t row, column; };

template <int R, int V>
void tile(Matrix a, const float* b, int64_t b_row, int64_t K, float* c, int64_t c_row, bool add) {
    v16 total[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) total[r][v] = add ? load(c + r * c_row + v * LANES) : v16{};
    for (int64_t k = 0; k < K; ++k) {
        v16 w[V];
        for (int v = 0; v < V; ++v) w[v] = load(b + k * b_row + v * LANES);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) total[r][v] += w[v] * a.at[r * a.row + k * a.column];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_row + v * LANES, total[r][v]);
}

template <int V>
void strip(Matrix a, const float* b, int64_t b_row, int64_t M, int64_t K, float* c, int64_t c_row, bool add) {
    const auto multiply = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        tile<R, V>(a, b, b_row, K, c, c_row, add);
        a.at += R * a.row;
        c += R * c_row;
        M -= R;
    };
    while (M >= TILE_ROWS) multiply(std::integral_constant<int, TILE_ROWS>{});
    while (M >= 4) multiply(std::integral_constant<int, 4>{});
    while (M >= 1) multiply(std::integral_constant<int, 1>{});
}

// c (M, N) = a (M, K) b (K, N), or added to what is there; N is a multiple of 16.
void product(Matrix a, const float* b, int64_t b_row, int64_t M, int64_t K, int64_t N, float* c, int64_t c_row,
             bool add = false) {
    int64_t n = 0;
    for (; n + TILE_VECTORS * LANES <= N; n += TILE_VECTORS * LANES)
        strip<TILE_VECTORS>(a, b + n, b_row, M, K, c + n, c_row, add);
    for (; n < N; n += LANES) strip<1>(a, b + n, b_row, M, K, c + n, c_row, add);
}

int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// One step of turning 16 x 16 numbers over: blocks of S x S off the diagonal change places (Eklundh 1972).
template <int S, int... L>
void swap_blocks(v16* rows, std::integer_sequence<int, L...>) {
    for (int i = 0; i < LANES; ++i) {
        if (i & S) continue;
        const v16 a = rows[i], b = rows[i + S];
        rows[i] = __builtin_shufflevector(a, b, (L & S ? LANES + L - S : L)...);
        rows[i + S] = __builtin_shufflevector(a, b, (L & S ? LANES + L : L + S)...);
    }
}

// x (T, d), its rows ``apart`` floats apart, as (d, T) in rows of whole vectors, zeros behind.
void transpose(const float* x, int64_t apart, int64_t T, int64_t d, std::vector<float>& out) {
    const int64_t width = whole(T);
    const std::make_integer_sequence<int, LANES> lanes;
    out.resize(d * width);
    for (int64_t t = 0; t < width; t += LANES)
        for (int64_t j = 0; j < d; j += LANES) {
            v16 rows[LANES];
            for (int i = 0; i < LANES; ++i) rows[i] = t + i < T ? load(x + (t + i) * apart + j) : v16{};
            swap_blocks<8>(rows, lanes);
            swap_blocks<4>(rows, lanes);
            swap_blocks<2>(rows, lanes);
            swap_blocks<1>(rows, lanes);
            for (int i = 0; i < LANES; ++i) store(out.data() + (j + i) * width + t, rows[i]);
        }
}

// Scores (n,) to probabilities, zeros behind up to whole vectors; returns the log-sum-exp of the scaled scores.
float softmax(float* scores, int64_t n, float scale) {
    const int64_t end = whole(n);
    for (int64_t c = n; c < end; ++c) scores[c] = -std::numeric_limits<float>::infinity();
    v16 top = load(scores), mass{};
    for (int64_t c = LANES; c < end; c += LANES) top = largest(top, load(scores + c));
    const float peak = largest(top);
    for (int64_t c = 0; c < end; c += LANES) {
        const v16 p = exponential((load(scores + c) - peak) * scale);
        store(scores + c, p);
        mass += p;
    }
    const float total = sum(mass), share = 1.0f / total;
    for (int64_t c = 0; c < end; c += LANES) store(scores + c, load(scores + c) * share);
    return peak * scale + std::log(total);
}

// One head of one document; pointers are to its first token's numbers, D = H d.
struct Head {
    int64_t T, d, D;
    float scale;
    const float *q, *k, *v;  // rows 3 D apart
};

struct Buffers { std::vector<float> keys, values, p, dp; };

void attend(const Head& head, Buffers& buffers, float* out, float* log_mass, int64_t H) {
    const int64_t d = head.d, apart = 3 * head.D, width = whole(head.T);
    transpose(head.k, apart, head.T, d, buffers.keys);
    buffers.p.resize(QUERIES * width);
    float* p = buffers.p.data();
    for (int64_t first = 0; first < head.T; first += QUERIES) {
        const int64_t rows = std::min<int64_t>(QUERIES, head.T - first), columns = whole(first + rows);
        product({head.q + first * apart, apart, 1}, buffers.keys.data(), width, rows, d, columns, p, width);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t seen = first + r + 1;
            log_mass[(first + r) * H] = softmax(p + r * width, seen, head.scale);
            std::fill(p + r * width + whole(seen), p + r * width + columns, 0.0f);
        }
        product({p, width, 1}, head.v, apart, rows, first + rows, d, out + first * head.D, head.D);
    }
}

void attend_backward(const Head& head, Buffers& buffers, const float* out, const float* log_mass, int64_t H,
                     const float* by_out, float* by_q, float* by_k, float* by_v) {
    const int64_t d = head.d, D = head.D, apart = 3 * D, width = whole(head.T);
    transpose(head.k, apart, head.T, d, buffers.keys);
    transpose(head.v, apart, head.T, d, buffers.values);
    buffers.p.resize(QUERIES * width);
    buffers.dp.resize(QUERIES * width);
    float *p = buffers.p.data(), *dp = buffers.dp.data();
    for (int64_t t = 0; t < head.T; ++t) {
        std::fill(by_k + t * apart, by_k + t * apart + d, 0.0f);
        std::fill(by_v + t * apart, by_v + t * apart + d, 0.0f);
    }
    for (int64_t first = 0; first < head.T; first += QUERIES) {
        const int64_t rows = std::min<int64_t>(QUERIES, head.T - first), last = first + rows, columns = whole(last);
        const float *q = head.q + first * apart, *dout = by_out + first * D;
        product({q, apart, 1}, buffers.keys.data(), width, rows, d, columns, p, width);
        product({dout, D, 1}, buffers.values.data(), width, rows, d, columns, dp, width);
        for (int64_t r = 0; r < rows; ++r) {
            float *pr = p + r * width, *dpr = dp + r * width;
            const int64_t seen = first + r + 1;
            const float mass = log_mass[(first + r) * H];
            v16 along{};
            for (int64_t j = 0; j < d; j += LANES) along += load(dout + r * D + j) * load(out + (first + r) * D + j);
            const float mean = sum(along);
            for (int64_t c = seen; c < whole(seen); ++c) pr[c] = -std::numeric_limits<float>::infinity();
            for (int64_t c = 0; c < seen; c += LANES) {
                const v16 x = exponential(load(pr + c) * head.scale - mass);
                store(pr + c, x);
                store(dpr + c, x * (load(dpr + c) - mean) * head.scale);
            }
            std::fill(pr + whole(seen), pr + columns, 0.0f);
            std::fill(dpr + whole(seen), dpr + columns, 0.0f);
        }
        product({dp, width, 1}, head.k, apart, rows, last, d, by_q + first * apart, apart);
        product({dp, 1, width}, q, apart, last, rows, d, by_k, apart, true);
        product({p, 1, width}, dout, D, last, rows, d, by_v, apart, true);
    }
}

template <class F>
void each_head(const float* qkv, const int64_t* bounds, int64_t documents, int64_t H, int64_t d, int threads, F task) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    #pragma omp parallel num_threads(threads)
    {
        Buffers buffers;
        #pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < documents * H; ++i) {
            const int64_t first = bounds[i / H], h = i % H;
            const float* q = qkv + first * 3 * H * d + h * d;
            task(Head{bounds[i / H + 1] - first, d, H * d, scale, q, q + H * d, q + 2 * H * d}, buffers, first, h);
        }
    }
}

}  // namespace

extern "C" {

// out (N, H, d) and the log-sum-exp of every query (N, H); document i is the tokens from bounds[i] to bounds[i + 1].
void attention(const float* qkv, const int64_t* bounds, int64_t documents, int64_t H, int64_t d, float* out,
               float* log_mass, int threads) {
    each_head(qkv, bounds, documents, H, d, threads, [&](const Head& head, Buffers& buffers, int64_t first, int64_t h) {
        attend(head, buffers, out + (first * H + h) * d, log_mass + first * H + h, H);
    });
}

// by_qkv (N, 3, H, d), the gradient of qkv, from that of out, by_out (N, H, d).
void attention_backward(const float* qkv, const int64_t* bounds, int64_t documents, int64_t H, int64_t d,
                        const float* out, const float* log_mass, const float* by_out, float* by_qkv, int threads) {
    each_head(qkv, bounds, documents, H, d, threads, [&](const Head& head, Buffers& buffers, int64_t first, int64_t h) {
        const int64_t at = (first * H + h) * d;
        float* by_q = by_qkv + first * 3 * H * d + h * d;
        attend_backward(head, buffers, out + at, log_mass + first * H + h, H, by_out + at, by_q, by_q + H * d,
                        by_q + 2 * H * d);
    });
}

}  // extern "C"
