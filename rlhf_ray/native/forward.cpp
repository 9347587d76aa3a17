// One pass of a GPT-2 over M tokens, each with its own row and position, for a CPU.
//
// A row's keys and values are stored first; then each of its tokens attends to the columns 0..position.  Prompts of
// any lengths and rows that decode are therefore one and the same pass, without padding.  Every sum runs in one order
// whatever the other tokens are, so a row's numbers don't depend on its batch.  Weights and cache are float32 or
// bfloat16, arithmetic is float32.
//
// Left out on purpose: gradients, and any header but the standard library's, with which it compiles in two seconds.

#include "team.h"
#include "vectors.h"

namespace {

constexpr int STRIP = 64;  // rows that one task multiplies
#ifdef __AVX512F__
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 1;
#endif
constexpr int PANEL = TILE_VECTORS * LANES;  // columns of a packed weight that lie together

enum Finish { ASSIGN, GELU, ADD };

template <class S, Finish finish, int R>
void tile(const S* weight, const S* ahead, int64_t stride, const float* bias, const float* a, int64_t K, float* out,
          int64_t N, int64_t columns) {
    v16 total[R][TILE_VECTORS] = {};
    for (int64_t k = 0; k < K; ++k) {
        __builtin_prefetch(ahead + k * stride);
        v16 w[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; ++v) w[v] = load(weight + k * PANEL + v * LANES);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < TILE_VECTORS; ++v) total[r][v] += w[v] * a[r * K + k];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < TILE_VECTORS; ++v) {
            v16 y = total[r][v];
            if (bias) y += load(bias + v * LANES);
            if (finish == GELU) y = gelu(y);
            float* target = out + r * N + v * LANES;
            const int64_t room = columns - v * LANES;
            if (room >= LANES) store(target, finish == ADD ? load(target) + y : y);
            else for (int i = 0; i < room; ++i) target[i] = finish == ADD ? target[i] + y[i] : y[i];
        }
}

// out (M, N) = a (M, K) times a weight packed in panels (N / PANEL, K, PANEL), plus a bias padded to whole panels.
template <class S, Finish finish>
void linear(Team& team, const void* weight, const float* bias, const float* a, int64_t M, int64_t K, int64_t N,
            float* out) {
    const int64_t panels = (N + PANEL - 1) / PANEL, strips = (M + STRIP - 1) / STRIP, tasks = panels * strips;
    for (int64_t task = team.first(tasks); task < team.last(tasks); ++task) {
        const int64_t panel = task / strips, first = task % strips * STRIP, last = std::min(M, first + STRIP);
        const S* w = static_cast<const S*>(weight) + panel * K * PANEL;
        const float* b = bias ? bias + panel * PANEL : nullptr;
        const int64_t tiles = (last - first + TILE_ROWS - 1) / TILE_ROWS, stride = PANEL / tiles;
        const S* ahead = w + K * PANEL;  // the next panel is fetched while this one is multiplied
        int64_t m = first;
        const auto multiply = [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            tile<S, finish, R>(w, ahead, stride, b, a + m * K, K, out + m * N + panel * PANEL, N, N - panel * PANEL);
            ahead += K * stride;
            m += R;
        };
        while (last - m >= TILE_ROWS) multiply(std::integral_constant<int, TILE_ROWS>{});
        while (last - m >= 4) multiply(std::integral_constant<int, 4>{});
        while (last - m >= 2) multiply(std::integral_constant<int, 2>{});
        while (last - m >= 1) multiply(std::integral_constant<int, 1>{});
    }
    team.wait();
}

void layer_norm(Team& team, const float* x, const float* weight, const float* bias, float epsilon, int64_t M, int64_t D,
                float* out) {
    for (int64_t m = team.first(M); m < team.last(M); ++m) {
        v16 total{}, squares{};
        for (int64_t i = 0; i < D; i += LANES) total += load(x + m * D + i);
        const float mean = sum(total) / D;
        for (int64_t i = 0; i < D; i += LANES) { const v16 d = load(x + m * D + i) - mean; squares += d * d; }
        const float scale = 1.0f / std::sqrt(sum(squares) / D + epsilon);
        for (int64_t i = 0; i < D; i += LANES)
            store(out + m * D + i, (load(x + m * D + i) - mean) * scale * load(weight + i) + load(bias + i));
    }
    team.wait();
}

// Store one head's k (d,) and v (d,), ``apart`` floats later, at a column.
template <class S>
void keep(const float* k, int64_t apart, int64_t column, int64_t d, S* keys, S* values) {
    S* block = keys + column / LANES * LANES * d + column % LANES;
    for (int64_t j = 0; j < d; ++j) {
        put(block + j * LANES, k[j]);
        put(values + column * d + j, k[apart + j]);
    }
}

// One head of one token: q (d,) over n columns of keys (n / 16, d, 16) and values (n, d).
template <class S>
void attend(const float* q, const S* keys, const S* values, int64_t n, int64_t d, float* scores, float* out) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    const int64_t columns = (n + LANES - 1) / LANES * LANES;
    for (int64_t c = 0; c < columns; c += LANES) {
        v16 part[4] = {};
        for (int64_t j = 0; j < d; ++j) __builtin_prefetch(keys + (c + 2 * LANES) * d + j * LANES);
        for (int64_t j = 0; j < d; j += 4)
            for (int i = 0; i < 4; ++i) part[i] += load(keys + c * d + (j + i) * LANES) * q[j + i];
        store(scores + c, ((part[0] + part[1]) + (part[2] + part[3])) * scale);
    }
    for (int64_t c = n; c < columns; ++c) scores[c] = -std::numeric_limits<float>::infinity();
    v16 top = load(scores);
    for (int64_t c = LANES; c < columns; c += LANES) top = largest(top, load(scores + c));
    const float peak = largest(top);
    v16 mass{};
    for (int64_t c = 0; c < columns; c += LANES) {
        const v16 p = exponential(load(scores + c) - peak);
        store(scores + c, p);
        mass += p;
    }
    const float whole = 1.0f / sum(mass);
    for (int64_t j = 0; j < d; j += LANES) {
        v16 part[4] = {};
        int64_t c = 0;
        for (; c + 4 <= n; c += 4)
            for (int i = 0; i < 4; ++i) part[i] += load(values + (c + i) * d + j) * scores[c + i];
        for (; c < n; ++c) part[0] += load(values + c * d + j) * scores[c];
        store(out + j, ((part[0] + part[1]) + (part[2] + part[3])) * whole);
    }
}

}  // namespace

extern "C" {

struct Layer {
    const float *ln_1_weight, *ln_1_bias;
    const void* c_attn_weight; const float* c_attn_bias;
    const void* attn_c_proj_weight; const float* attn_c_proj_bias;
    const float *ln_2_weight, *ln_2_bias;
    const void* c_fc_weight; const float* c_fc_bias;
    const void* mlp_c_proj_weight; const float* mlp_c_proj_bias;
};

struct Model {
    int64_t n_layer, n_embd, n_head, vocab_size;
    double epsilon;
    const void *wte, *wpe;  // (V, D), (n_positions, D)
    const float *ln_f_weight, *ln_f_bias;
    const void* head;  // wte, packed
    const Layer* layers;
};

struct Cache {
    void *keys, *values;  // (L, rows, H, capacity / 16, d, 16) and (L, rows, H, capacity, d)
    int64_t rows, capacity;
};

int64_t panel_width() { return PANEL; }

}  // extern "C"

template <class S>
void forward(const Model& model, const Cache& cache, int64_t M, const int64_t* tokens, const int64_t* rows,
             const int64_t* positions, float* work, float* hidden, int only_store, int threads) {
    const int64_t D = model.n_embd, H = model.n_head, d = D / H, C = cache.capacity;
    const float epsilon = static_cast<float>(model.epsilon);
    float *x = work, *wide = x + M * D;
    std::vector<int64_t> starts;  // of runs of tokens of one row, and the end
    for (int64_t m = 0; m < M; ++m) if (m == 0 || rows[m] != rows[m - 1]) starts.push_back(m);
    const int64_t runs = starts.size();
    starts.push_back(M);
    Barrier barrier;
    #pragma omp parallel num_threads(threads)
    {
        Team team(barrier);
        std::vector<float> scores(C);
        for (int64_t m = team.first(M); m < team.last(M); ++m)
            for (int64_t i = 0; i < D; i += LANES)
                store(x + m * D + i, load(static_cast<const S*>(model.wte) + tokens[m] * D + i) +
                                         load(static_cast<const S*>(model.wpe) + positions[m] * D + i));
        team.wait();
        for (int64_t l = 0; l < model.n_layer; ++l) {
            const Layer& layer = model.layers[l];
            S* keys = static_cast<S*>(cache.keys) + l * cache.rows * H * C * d;
            S* values = static_cast<S*>(cache.values) + l * cache.rows * H * C * d;
            layer_norm(team, x, layer.ln_1_weight, layer.ln_1_bias, epsilon, M, D, hidden);
            linear<S, ASSIGN>(team, layer.c_attn_weight, layer.c_attn_bias, hidden, M, D, 3 * D, wide);
            for (int64_t task = team.rank; task < runs * H; task += team.size) {
                const int64_t first = starts[task / H], last = starts[task / H + 1], h = task % H;
                const int64_t base = (rows[first] * H + h) * C * d;
                const float* qkv = wide + h * d;
                for (int64_t m = first; m < last; ++m)
                    keep(qkv + m * 3 * D + D, D, positions[m], d, keys + base, values + base);
                if (only_store && l + 1 == model.n_layer) continue;
                for (int64_t m = first; m < last; ++m)
                    attend(qkv + m * 3 * D, keys + base, values + base, positions[m] + 1, d, scores.data(),
                           hidden + m * D + h * d);
            }
            team.wait();
            if (only_store && l + 1 == model.n_layer) break;
            linear<S, ADD>(team, layer.attn_c_proj_weight, layer.attn_c_proj_bias, hidden, M, D, D, x);
            layer_norm(team, x, layer.ln_2_weight, layer.ln_2_bias, epsilon, M, D, hidden);
            linear<S, GELU>(team, layer.c_fc_weight, layer.c_fc_bias, hidden, M, D, 4 * D, wide);
            linear<S, ADD>(team, layer.mlp_c_proj_weight, layer.mlp_c_proj_bias, wide, M, 4 * D, D, x);
        }
        if (!only_store) layer_norm(team, x, model.ln_f_weight, model.ln_f_bias, epsilon, M, D, hidden);
    }
}

template <class S>
void logits(const Model& model, const float* hidden, int64_t M, float* out, int threads) {
    Barrier barrier;
    #pragma omp parallel num_threads(threads)
    {
        Team team(barrier);
        linear<S, ASSIGN>(team, model.head, nullptr, hidden, M, model.n_embd, model.vocab_size, out);
    }
}

extern "C" {

// Hidden states (M, D) after the final norm; work holds 5 M D floats.  To only store keys and values, as a prompt
// needs, the last layer stops there, and hidden is scratch.
void forward_float32(const Model* model, const Cache* cache, int64_t M, const int64_t* tokens, const int64_t* rows,
                     const int64_t* positions, float* work, float* hidden, int only_store, int threads) {
    forward<float>(*model, *cache, M, tokens, rows, positions, work, hidden, only_store, threads);
}
void forward_bfloat16(const Model* model, const Cache* cache, int64_t M, const int64_t* tokens, const int64_t* rows,
                      const int64_t* positions, float* work, float* hidden, int only_store, int threads) {
    forward<bf16>(*model, *cache, M, tokens, rows, positions, work, hidden, only_store, threads);
}

// Logits (M, V) of hidden states (M, D).
void logits_float32(const Model* model, const float* hidden, int64_t M, float* out, int threads) {
    logits<float>(*model, hidden, M, out, threads);
}
void logits_bfloat16(const Model* model, const float* hidden, int64_t M, float* out, int threads) {
    logits<bf16>(*model, hidden, M, out, threads);
}

}  // extern "C"
