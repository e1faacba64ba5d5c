// What `run.py --compile` runs on a CPU, in float32: products with matrices W that bfloat16 holds, and with them all layers of a decoder for
// tokens of one text. tools/kernels.py calls it through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 14;       // floats in a register; rows, twice of which are sums in 32 registers
#else
constexpr int64_t LANES = 8, ROWS = 6;         // 16 registers
#endif
constexpr int64_t BLOCK = 2 * LANES, AHEAD = 1024;
constexpr int64_t MUCH = 2048;                 // numbers, from which on small work is worth a second thread

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float *from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, Floats value) { std::memcpy(to, &value, sizeof value); }

// Calls `run` with the number of rows, of at most R, as a constant: what is summed for so many stays in registers.
template <int R, class Run>
static inline void with_constant(int64_t rows, Run run) {
    if (rows == R)
        run(std::integral_constant<int, R>());
    else if constexpr (R > 1)
        with_constant<R - 1>(rows, run);
}

// ------------------------------------------------------------------------------------------------------------ y = x W^T
//
// A few rows x of a small model wait for W to arrive from memory, and a CPU's own prefetching stops at each page: here W is asked for
// AHEAD words early. It comes as words [outputs / BLOCK][inputs][LANES], the weights of an output in their low halves and of the LANES-th
// after it in their high ones, so that it is read from front to back, once for up to ROWS rows of x, whose sums stay in registers.

template <int R>
static void block(const uint32_t *w, const float *x, float *y, int64_t inputs, int64_t outputs) {
    Floats low[R] = {}, high[R] = {};
    for (int64_t k = 0; k < inputs; k++, w += LANES) {
        __builtin_prefetch(w + AHEAD);
        Words pairs;
        std::memcpy(&pairs, w, sizeof pairs);
        Floats first = (Floats)(pairs << 16), second = (Floats)(pairs & 0xffff0000);
        for (int r = 0; r < R; r++) {
            low[r] += first * x[r * inputs + k];
            high[r] += second * x[r * inputs + k];
        }
    }
    for (int r = 0; r < R; r++) {
        store(y + r * outputs, low[r]);
        store(y + r * outputs + LANES, high[r]);
    }
}

extern "C" const int64_t block_size = BLOCK;

// x [rows][inputs], y [rows][outputs]; outputs is a multiple of BLOCK.
extern "C" void product(const uint32_t *w, const float *x, float *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < outputs; o += BLOCK)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
            with_constant<ROWS>(end - begin, [&](auto r) { block<r>(w + o / 2 * inputs, x + begin * inputs, y + begin * outputs + o, inputs, outputs); });
        }
}

// ----------------------------------------------------------------------------------------------------- small operations

// e^x to two units in the last place: 2^n times a polynomial in what is left of x (Cephes' expf); 0 below -87.
static inline Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f, inside = x < low ? low : x > high ? high : x;
    const Floats n = (inside * 1.44269504f + 12582912.0f) - 12582912.0f;       // to the nearest whole number
    const Floats r = inside - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + factor;
    const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
    return x < low ? Floats{} : (p * r * r + r + 1.0f) * power;
}

// to = from / sqrt(mean(from^2) + eps) * weight.
static void norm(const float *from, const float *weight, float eps, float *to, int64_t size) {
    float squares = 0;
    #pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++)
        squares += from[i] * from[i];
    const float scale = 1 / std::sqrt(squares / size + eps);
    for (int64_t i = 0; i < size; i++)
        to[i] = from[i] * scale * weight[i];
}

// x [n][size] grows by what is added; `to` is its norm.
static void add_norm(float *x, const float *added, const float *weight, float eps, float *to, int64_t n, int64_t size, int64_t threads) {
    #pragma omp parallel for num_threads(threads) if (n * size >= MUCH)
    for (int64_t row = 0; row < n; row++) {
        #pragma omp simd
        for (int64_t i = row * size; i < (row + 1) * size; i++)
            x[i] += added[i];
        norm(x + row * size, weight, eps, to + row * size, size);
    }
}

// SwiGLU's middle: rows [n][2 size] of a gate and what it lets through -> [n][size].
static void gate(const float *rows, float *to, int64_t n, int64_t size, int64_t threads) {
    #pragma omp parallel for collapse(2) num_threads(threads) if (n * size >= MUCH)
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < size; i += LANES) {
            const float *own = rows + 2 * row * size + i;
            const int64_t count = std::min(LANES, size - i);
            Floats x{}, up{};
            std::memcpy(&x, own, count * sizeof(float));
            std::memcpy(&up, own + size, count * sizeof(float));
            x = x / (1.0f + exponential(-x)) * up;
            std::memcpy(to + row * size + i, &x, count * sizeof(float));
        }
}

// ------------------------------------------------------------------------------------------------------------ attention
//
// A transposed tile of LANES keys serves all rows of queries that a thread has for their head, and each row's sums of keys' and values' products stay in
// registers. `stride` is m rounded up to LANES.

struct Call {
    int64_t n, m, w, causal;                       // tokens; columns, their own n among them; the last w of them have a mask; whether a token sees none behind it
    int64_t h, k, d, capacity, threads;            // heads; head size; rows of the cache
    int64_t layers, inputs, hidden, middle;        // and the sizes of what is given, of a hidden state and of an MLP's middle
    float eps;
};

// LANES rows of d numbers, or the first `rows` of so many -> [d][LANES]: squares of registers are riffled until they are transposed.
static void transpose(const float *from, int64_t rows, int64_t d, float *to) {
    int64_t i = 0;
    for (; rows == LANES && i + LANES <= d; i += LANES) {
        Floats some[LANES], next[LANES];
        for (int64_t r = 0; r < LANES; r++)
            some[r] = load(from + r * d + i);
        for (int64_t turn = 1; turn < LANES; turn *= 2) {
            for (int64_t r = 0; r < LANES / 2; r++) {
#ifdef __AVX512F__
                next[2 * r] = __builtin_shuffle(some[r], some[r + 8], (Ints){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
                next[2 * r + 1] = __builtin_shuffle(some[r], some[r + 8], (Ints){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#else
                next[2 * r] = __builtin_shuffle(some[r], some[r + 4], (Ints){0, 8, 1, 9, 2, 10, 3, 11});
                next[2 * r + 1] = __builtin_shuffle(some[r], some[r + 4], (Ints){4, 12, 5, 13, 6, 14, 7, 15});
#endif
            }
            std::memcpy(some, next, sizeof some);
        }
        for (int64_t r = 0; r < LANES; r++)
            store(to + (i + r) * LANES, some[r]);
    }
    for (; i < d; i++)
        for (int64_t r = 0; r < LANES; r++)
            to[i * LANES + r] = r < rows ? from[r * d + i] : 0;
}

// The products of R queries with LANES keys [d][LANES].
template <int R>
static void products(const float *const *queries, const float *keys, int64_t d, float *to, int64_t stride) {
    Floats even[R] = {}, odd[R] = {};
    for (int64_t i = 0; i < d; i += 2) {
        const Floats key = load(keys + i * LANES), next = load(keys + (i + 1) * LANES);
        for (int r = 0; r < R; r++) {
            even[r] += key * queries[r][i];
            odd[r] += next * queries[r][i + 1];
        }
    }
    for (int r = 0; r < R; r++)
        store(to + r * stride, even[r] + odd[r]);
}

constexpr int64_t SOME = LANES == 16 ? 6 : 2, MANY = 48, TILE = 64;           // rows that share what is in registers, and in caches; values there

// The softmax of m scores, but for its division: returns what each is to be divided by.
static float soften(float *scores, int64_t m) {
    float highest = -INFINITY, sum = 0;
    for (int64_t c = m; c % LANES; c++)
        scores[c] = -INFINITY;
    Floats most = load(scores), sums{};
    for (int64_t c = 0; c < m; c += LANES) {
        const Floats some = load(scores + c);
        most = some > most ? some : most;
    }
    for (int64_t lane = 0; lane < LANES; lane++)
        highest = std::max(highest, most[lane]);
    for (int64_t c = 0; c < m; c += LANES) {
        const Floats some = exponential(load(scores + c) - highest);
        store(scores + c, some);
        sums += some;
    }
    for (int64_t lane = 0; lane < LANES; lane++)
        sum += sums[lane];
    return sum;
}

// To R rows' sums of the values, each times its score, those from `begin` to `end` are added.
template <int V, int R>
static void mix(const float *scores, const float *values, int64_t stride, int64_t begin, int64_t end, int64_t d, float *const *to) {
    if constexpr (V > 0) {
        Floats sums[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++)
                sums[r][v] = load(to[r] + v * LANES);
        for (int64_t c = begin; c < end; c++)
            for (int v = 0; v < V; v++) {
                const Floats value = load(values + c * d + v * LANES);
                for (int r = 0; r < R; r++)
                    sums[r][v] += value * scores[r * stride + c];
            }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++)
                store(to[r] + v * LANES, sums[r][v]);
    } else
        for (int r = 0; r < R; r++)
            for (int64_t c = begin; c < end; c++)
                for (int64_t i = 0; i < d; i++)
                    to[r][i] += scores[r * stride + c] * values[c * d + i];
}

// Up to MANY rows, of these tokens, over one head's keys and values [m][d]. V is the number of registers that a head fills, or 0: any head size.
template <int V>
static void attend(const Call &a, int64_t rows, const int64_t *tokens, const float *const *queries, const bool *mask, const float *keys, const float *values,
                   float *const *to, float *scores, float *turned, int64_t stride) {
    float by[MANY];
    int64_t seen[MANY], m = 0;                                                // columns: of a row, of all
    for (int64_t r = 0; r < rows; r++)
        m = std::max(m, seen[r] = a.causal ? a.m - a.n + tokens[r] + 1 : a.m);
    for (int64_t c = 0; c < m; c += LANES) {
        transpose(keys + c * a.d, std::min(LANES, m - c), a.d, turned);
        for (int64_t r = 0; r < rows; r += SOME)
            with_constant<SOME>(std::min(SOME, rows - r), [&](auto some) { products<some>(queries + r, turned, a.d, scores + r * stride + c, stride); });
    }
    for (int64_t r = 0; r < rows; r++) {
        float *own = scores + r * stride;
        std::fill(own + seen[r], own + m, -INFINITY);
        for (int64_t c = 0; c < a.w; c++)
            if (!mask[tokens[r] * a.w + c])
                own[m - a.w + c] = -INFINITY;
        by[r] = soften(own, m);
        std::fill_n(to[r], a.d, 0.0f);
    }
    for (int64_t c = 0; c < m; c += TILE)                                     // so many values stay near while all rows take them
        for (int64_t r = 0; r < rows; r += SOME)
            with_constant<SOME>(std::min(SOME, rows - r), [&](auto some) { mix<V, some>(scores + r * stride, values, stride, c, std::min(c + TILE, m), a.d, to + r); });
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < a.d; i++)
            to[r][i] /= by[r];
}

// rows [n][(h + 2k) d] of queries, keys and values: norms of query and key heads, where there are weights; rotation by cos and sin [n][d], the first half of
// sin being negative; keys and values go into the cache, kept [2k][capacity][d], behind m - n others; attention, under mask [n][w] -> to [n][h d].
static void read(const Call &a, const float *rows, const float *cos, const float *sin, float *kept, const bool *mask, const float *query_norm,
                 const float *key_norm, float *to) {
    const int64_t heads = a.h + 2 * a.k, g = a.h / a.k, all = a.h * a.n, half = a.d / 2, stride = (a.m + LANES - 1) / LANES * LANES;
    const float scale = 1 / std::sqrt((float)a.d);
    std::vector<Floats> room(all * a.d / LANES + 1);                          // aligned
    float *queries = (float *)room.data();
    #pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> normed(a.d);
        #pragma omp for
        for (int64_t head = 0; head < heads; head++)
            for (int64_t t = 0; t < a.n; t++) {
                const bool asks = head < a.h, turns = head < a.h + a.k;
                const float *x = rows + (t * heads + head) * a.d, *weight = asks ? query_norm : key_norm;
                float *y = asks ? queries + (head * a.n + t) * a.d : kept + ((head - a.h) * a.capacity + a.m - a.n + t) * a.d;
                if (!turns) {
                    std::memcpy(y, x, a.d * sizeof(float));
                    continue;
                }
                if (weight) {
                    norm(x, weight, a.eps, normed.data(), a.d);
                    x = normed.data();
                }
                const float *c = cos + t * a.d, *s = sin + t * a.d, by = asks ? scale : 1;
                #pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    y[i] = (x[i] * c[i] + x[i + half] * s[i]) * by;
                    y[i + half] = (x[i + half] * c[i + half] + x[i] * s[i + half]) * by;
                }
            }
        std::vector<Floats> scores(std::min(MANY, all) * stride / LANES), keys_turned(a.d);
        #pragma omp for
        for (int64_t part = 0; part < a.threads; part++)                      // each an equal share of the rows of queries, in the order of their heads
            for (int64_t row = all * part / a.threads, end = all * (part + 1) / a.threads; row < end;) {
                const int64_t head = row / (g * a.n), count = std::min({MANY, end - row, (head + 1) * g * a.n - row});
                const float *own[MANY];
                float *out[MANY];
                int64_t tokens[MANY];
                for (int64_t r = 0; r < count; r++) {
                    tokens[r] = (row + r) % a.n;
                    own[r] = queries + (row + r) * a.d;
                    out[r] = to + (tokens[r] * a.h + (row + r) / a.n) * a.d;
                }
                const float *keys = kept + head * a.capacity * a.d, *values = keys + a.k * a.capacity * a.d;
                const auto attend_d = a.d == 64 ? attend<64 / LANES> : a.d == 128 ? attend<128 / LANES> : attend<0>;
                attend_d(a, count, tokens, own, mask, keys, values, out, (float *)scores.data(), (float *)keys_turned.data(), stride);
                row += count;
            }
    }
}

// -------------------------------------------------------------------------------------------------------------- layers

struct Layer {
    const uint32_t *qkv, *o, *gate_up, *down;
    const float *input_norm, *attention_norm, *query_norm, *key_norm;
};

// x [n][hidden] through all layers -> to. given [n][inputs]: what the first layer attends by, where that is not x's norm. cache [layers][2k][capacity][d].
// slots [layers]: where in tapped [..][n][hidden] what comes out of a layer is wanted, or -1. An MLP's result is added where the next norm is taken.
extern "C" void layers(const Call *call, const Layer *layer, const float *x, const float *given, const float *cos, const float *sin, float *cache, const bool *mask,
                       const int64_t *slots, float *tapped, float *to) {
    const Call &a = *call;
    const int64_t wide = std::max((a.h + 2 * a.k) * a.d, 2 * a.middle), narrow = std::max(a.h * a.d, a.middle), size = a.n * a.hidden;
    thread_local std::vector<float> room;                                     // asking the system for it each time would cost fresh pages
    room.resize(std::max<size_t>(room.size(), a.n * (wide + narrow) + 2 * size));
    float *rows = room.data(), *middle = rows + a.n * wide, *normed = middle + a.n * narrow, *added = normed + size;
    std::copy_n(x, size, to);
    std::fill_n(added, size, 0.0f);
    for (int64_t l = 0; l < a.layers; l++, layer++, cache += 2 * a.k * a.capacity * a.d) {
        const bool is_given = given && !l;
        if (!is_given)
            add_norm(to, added, layer->input_norm, a.eps, normed, a.n, a.hidden, a.threads);
        product(layer->qkv, is_given ? given : normed, rows, a.n, is_given ? a.inputs : a.hidden, (a.h + 2 * a.k) * a.d, a.threads);
        read(a, rows, cos, sin, cache, mask, layer->query_norm, layer->key_norm, middle);
        product(layer->o, middle, added, a.n, a.h * a.d, a.hidden, a.threads);
        add_norm(to, added, layer->attention_norm, a.eps, normed, a.n, a.hidden, a.threads);
        product(layer->gate_up, normed, rows, a.n, a.hidden, 2 * a.middle, a.threads);
        gate(rows, middle, a.n, a.middle, a.threads);
        product(layer->down, middle, added, a.n, a.middle, a.hidden, a.threads);
        for (int64_t i = 0; slots[l] >= 0 && i < size; i++)
            tapped[slots[l] * size + i] = to[i] + added[i];
    }
    for (int64_t i = 0; i < size; i++)
        to[i] += added[i];
}
