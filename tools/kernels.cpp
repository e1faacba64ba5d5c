// What run.py runs on a CPU in float32 and bfloat16: products with matrices W that bfloat16 holds, and with them all
// layers of a decoder. tools/kernels.py calls it through ctypes. In bfloat16 (NARROW, where it is a constant) products
// read their inputs in pairs of it, attention's too, and caches hold it; all else is float32. What holds an `omp for`
// is called by all threads, which share its work and, unless it says otherwise, go on together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 14;       // floats in a register; rows, twice of which are sums in 32 registers
#else
constexpr int64_t LANES = 8, ROWS = 6;         // 16 registers
#endif
// how many words ahead of their use weights are asked for, and for how near a cache (3: all; 0: past the large ones, a
// Zen 5's products of up to 14 rows then take 6% less)
#ifdef __AVX512BF16__
constexpr int64_t AHEAD = 1536, NEAR = 0;
#else
constexpr int64_t AHEAD = 1024, NEAR = 3;
#endif
constexpr int64_t BLOCK = 2 * LANES;
constexpr int64_t MUCH = 2048;                 // numbers, from which on small work is worth a second thread
constexpr int64_t MOST = 4096;                 // numbers in a head, as model.py allows

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

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

// Up to LANES rows of d numbers, what lacks being 0 -> [d][LANES], rows BLOCK apart: squares of registers are riffled
// until they are transposed.
static void transpose(const float *from, int64_t rows, int64_t d, float *to) {
    int64_t i = 0;
    for (; rows >= LANES && i + LANES <= d; i += LANES) {
        Floats some[LANES], next[LANES];
        for (int64_t r = 0; r < LANES; r++)
            some[r] = load(from + r * d + i);
        const auto riffle = [&](Ints low, Ints high) {
            for (int64_t r = 0; r < LANES / 2; r++) {
                next[2 * r] = __builtin_shuffle(some[r], some[r + LANES / 2], low);
                next[2 * r + 1] = __builtin_shuffle(some[r], some[r + LANES / 2], high);
            }
            std::memcpy(some, next, sizeof some);
        };
#ifdef __AVX512F__
        for (int64_t turn = 0; turn < 4; turn++)
            riffle(Ints{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23},
                   Ints{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#else
        // whole halves, and then within them: an instruction each
        riffle(Ints{0, 1, 2, 3, 8, 9, 10, 11}, Ints{4, 5, 6, 7, 12, 13, 14, 15});
        for (int64_t turn = 0; turn < 2; turn++)
            riffle(Ints{0, 8, 1, 9, 4, 12, 5, 13}, Ints{2, 10, 3, 11, 6, 14, 7, 15});
#endif
        for (int64_t r = 0; r < LANES; r++)
            store(to + (i + r) * BLOCK, some[r]);
    }
    for (; i < d; i++)
        for (int64_t r = 0; r < LANES; r++)
            to[i * BLOCK + r] = r < rows ? from[r * d + i] : 0;
}

// ----------------------------------------------------------------------------------------------------------- y = x W^T

static inline Floats plus(Floats sum, Floats weights, float x) { return sum + weights * x; }

// Numbers in bfloat16 come in pairs, one in a word's low half and the next in its high one. To `sum` is added, in each
// lane, what both numbers of x are times both weights.
static inline Floats plus(Floats sum, Words weights, uint32_t x) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(x));
#else
    float low, high;
    const uint32_t bits[] = {x << 16, x & 0xffff0000};
    std::memcpy(&low, bits, sizeof low);
    std::memcpy(&high, bits + 1, sizeof high);
    return sum + (Floats)(weights & 0xffff0000) * high + (Floats)(weights << 16) * low;
#endif
}

// R rows of x, `apart` from each other, times the W registers of weights that `weights` gives for each of its inputs
// -> y [R][W LANES], rows `stride` apart; ADD: to what is there. X: float, or pairs of bfloat16.
template <bool ADD, int W, int R, class X, class Weights>
static inline void block(const X *x, int64_t apart, int64_t inputs, float *y, int64_t stride, Weights weights) {
    static_assert(W > 1);  // of one sum alone GCC may round each product first
    Floats sums[R][W] = {};
    for (int r = 0; ADD && r < R; r++)
        for (int i = 0; i < W; i++)
            sums[r][i] = load(y + r * stride + i * LANES);
    #pragma GCC unroll 2
    for (int64_t k = 0; k < inputs; k++) {
        std::conditional_t<std::is_same_v<X, float>, Floats, Words> some[W];
        weights(k, some);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < W; i++)
                sums[r][i] = plus(sums[r][i], some[i], x[r * apart + k]);
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < W; i++)
            store(y + r * stride + i * LANES, sums[r][i]);
}

// Numbers wanted soon, and which of so many shares of them is to be asked for now.
struct Soon {
    const float *from = nullptr;
    int64_t count = 0, share = 0, shares = 1;
};

// The same for any number of rows, in equal parts whose sums stay in registers. Before each a part of what is wanted
// soon is asked for: memory would rest while the same weights meet the other rows.
template <bool ADD, int W = 2, class X, class Weights>
static inline void blocks(const X *x, int64_t apart, int64_t inputs, float *y, int64_t stride, int64_t rows,
                          Weights weights, Soon soon = {}) {
    constexpr int64_t most = 2 * ROWS / W;
    const int64_t parts = (rows + most - 1) / most, shares = parts * soon.shares;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts, share = parts * soon.share + part;
        // 16: a line of the cache
        for (int64_t i = soon.count * share / shares; i < soon.count * (share + 1) / shares; i += 16)
            __builtin_prefetch(soon.from + i);
        with_constant<most>(end - begin, [&](auto r) {
            block<ADD, W, r>(x + begin * apart, apart, inputs, y + begin * stride, stride, weights);
        });
    }
}

// For `blocks`: W registers of each row of numbers, `apart` from each other.
template <int W>
static inline auto registers(const float *from, int64_t apart) {
    return [from, apart](int64_t k, auto *some) {
        for (int i = 0; i < W; i++)
            std::memcpy(some + i, from + k * apart + i * LANES, sizeof *some);
    };
}

extern "C" const int64_t block_size = BLOCK;

// A matrix [outputs][inputs] -> W as `product` takes it; returns whether bfloat16 holds all of it.
extern "C" int64_t pack(const float *matrix, uint32_t *w, int64_t outputs, int64_t inputs, int64_t narrow) {
    std::vector<float> turned(inputs * BLOCK);
    Words lost{};
    const auto put = [&](int64_t low, int64_t high) {
        const Words one = (Words)load(&turned[low]), other = (Words)load(&turned[high]),
                    pairs = one >> 16 | (other & 0xffff0000);
        lost |= (one | other) << 16;
        std::memcpy(w, &pairs, sizeof pairs);
        w += LANES;
    };
    for (int64_t o = 0; o < outputs; o += BLOCK, matrix += BLOCK * inputs) {
        for (int64_t half = 0; half < BLOCK; half += LANES)
            transpose(matrix + half * inputs, LANES, inputs, turned.data() + half);
        for (int64_t i = 0; i < inputs * BLOCK; i += BLOCK)
            if (!narrow)
                put(i, i + LANES);
            else if (i / BLOCK % 2 == 0)
                for (int64_t half = 0; half < BLOCK; half += LANES)
                    put(i + half, i + half + BLOCK);
    }
    uint32_t any = 0;
    for (int64_t lane = 0; lane < LANES; lane++)
        any |= lost[lane];
    return any == 0;
}

// A block's weights of one input; or, in pairs, of two. (Each register by itself: were they copied at once, GCC would
// keep sums in memory.)
static inline void weigh(const uint32_t *from, Floats *some) {
    Words both;
    std::memcpy(&both, from, sizeof both);
    some[0] = (Floats)(both << 16);
    some[1] = (Floats)(both & 0xffff0000);
}

static inline void weigh(const uint32_t *from, Words *some) {
    for (int i = 0; i < 2; i++)
        std::memcpy(some + i, from + i * LANES, sizeof *some);
}

// x [rows][inputs], y [rows][outputs]; outputs is a multiple of BLOCK. A few rows of a small model wait for W to arrive
// from memory, and a CPU's own prefetching stops at each page: here W is asked for AHEAD words early. It comes as words
// [outputs / BLOCK][inputs][LANES], the weights of an output in their low halves and of the LANES-th after it in their
// high ones, or, for x in pairs, [outputs / BLOCK][inputs / 2][BLOCK], an output's weights of two inputs in each: so it
// is read from front to back, once for up to ROWS rows. Where rows take two TURNS over a block, memory would rest in
// the second: in each, half of the next block is asked for, a little with each weight (a block is large: all at once,
// as `blocks` asks for what is wanted soon, was slower).
template <int TURNS, class X>
static void stream(const uint32_t *w, const X *x, float *y, int64_t rows, int64_t inputs, int64_t outputs) {
    constexpr int64_t EACH = std::is_same_v<X, float> ? 1 : 2, STEP = EACH * LANES;  // inputs in an x; their words
    const int64_t size = inputs * LANES;
    #pragma omp for schedule(guided)
    for (int64_t o = 0; o < outputs; o += BLOCK)
        for (int64_t turn = 0; turn < TURNS; turn++) {
            const uint32_t *own = w + o / BLOCK * size;
            const int64_t begin = rows * turn / TURNS, end = rows * (turn + 1) / TURNS,
                          ahead = TURNS == 1 ? AHEAD : size + turn * size / TURNS;
            blocks<false>(x + begin * inputs, inputs, inputs / EACH, y + begin * outputs + o, outputs, end - begin,
                          [own, ahead](int64_t k, auto *some) {
                              for (int64_t i = 0; i < STEP / TURNS; i += LANES)
                                  __builtin_prefetch(own + ahead + k * (STEP / TURNS) + i, 0, NEAR);
                              weigh(own + k * STEP, some);
                          });
        }
}

// Whether bfloat16 is faster here: an instruction multiplies two numbers by two weights.
#ifdef __AVX512BF16__
extern "C" const int64_t narrows = true;
static inline Halves rounded(Floats x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
#else
extern "C" const int64_t narrows = false;
static inline Halves rounded(Floats x) {
    const Words bits = (Words)x;
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
}
#endif

// x [count], an even number -> rounded to bfloat16, as pairs; they may take its place.
static void round(const float *x, uint32_t *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Halves some = rounded(load(x + i));
        std::memcpy(to + i / 2, &some, sizeof some);
    }
    Floats rest{};
    std::memcpy(&rest, x + i, (count - i) * sizeof(float));
    const Halves some = rounded(rest);
    std::memcpy(to + i / 2, &some, (count - i) * sizeof(uint16_t));
}

// Rows [rows][size] -> rounded, as pairs, a row where it would be in float32; they may take its place.
static void round_rows(const float *x, float *to, int64_t rows, int64_t size) {
    #pragma omp for
    for (int64_t row = 0; row < rows; row++)
        round(x + row * size, (uint32_t *)(to + row * size), size);
}

// narrow: x holds rows as `round_rows` leaves them; the sums are float32's either way.
static void multiply(const uint32_t *w, const float *x, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                     int64_t narrow) {
    const auto run = [&](auto *own) {
        if (rows > ROWS && rows <= 2 * ROWS)
            stream<2>(w, own, y, rows, inputs, outputs);
        else  // with more rows arithmetic is the limit
            stream<1>(w, own, y, rows, inputs, outputs);
    };
    narrow ? run((const uint32_t *)x) : run(x);
}

extern "C" void product(const uint32_t *w, const float *x, float *y, int64_t rows, int64_t inputs, int64_t outputs,
                        int64_t threads, int64_t narrow) {
    std::vector<float> room(narrow ? rows * inputs : 0);
    float *const pairs = room.data();
    #pragma omp parallel num_threads(threads)
    {
        if (narrow)
            round_rows(x, pairs, rows, inputs);
        multiply(w, narrow ? pairs : x, y, rows, inputs, outputs, narrow);
    }
}

// ---------------------------------------------------------------------------------------------------- small operations

static inline float sum(Floats lanes) {
    float all = 0;
    for (int64_t lane = 0; lane < LANES; lane++)
        all += lanes[lane];
    return all;
}

static inline float largest(Floats lanes) {
    float most = lanes[0];
    for (int64_t lane = 1; lane < LANES; lane++)
        most = std::max(most, lanes[lane]);
    return most;
}

// e^x, for x up to 88, to two units in the last place: 2^n times a polynomial in what is left of x (Cephes' expf, its
// terms in pairs, so that few wait for each other); 0 below -87.7, where n is -127. Adding 1.5 * 2^23 rounds to a whole
// number, which stands in the last bits then; with 127 more it is 2^n's exponent.
static inline Floats exponential(Floats x) {
    const float round = 12582912.0f + 127;
    const Floats low = Floats{} - 88.0f, inside = x < low ? low : x;
    const Floats whole = inside * 1.44269504f + round, n = whole - round,
                 r = inside - n * 0.693359375f + n * 2.12194440e-4f, square = r * r;
    const Floats p = (r * 1.9875691500e-4f + 1.3981999507e-3f) * square + (r * 8.3334519073e-3f + 4.1665795894e-2f);
    return ((p * square + (r * 1.6666665459e-1f + 5.0000001201e-1f)) * square + (r + 1.0f))
           * (Floats)((Words)whole << 23);
}

// to = from / sqrt(mean(from^2) + eps) * weight.
static void norm(const float *from, const float *weight, float eps, float *to, int64_t size) {
    Floats lanes{};
    int64_t whole = 0;
    for (; whole + LANES <= size; whole += LANES)
        lanes += load(from + whole) * load(from + whole);
    float squares = sum(lanes);
    for (int64_t i = whole; i < size; i++)
        squares += from[i] * from[i];
    const float scale = 1 / std::sqrt(squares / size + eps);
    for (int64_t i = 0; i < size; i++)
        to[i] = from[i] * scale * weight[i];
}

// x [n][size] grows by what is added; `to` is its norm, rounded where it is to be narrow.
static void add_norm(float *x, const float *added, const float *weight, float eps, float *to, int64_t n, int64_t size,
                     int64_t narrow) {
    #pragma omp for
    for (int64_t row = 0; row < n; row++) {
        float *own = to + row * size;
        #pragma omp simd
        for (int64_t i = row * size; i < (row + 1) * size; i++)
            x[i] += added[i];
        norm(x + row * size, weight, eps, own, size);
        if (narrow)
            round(own, (uint32_t *)own, size);
    }
}

// SwiGLU's middle: rows [n][2 size] of a gate and what it lets through -> [n][size]; size is a multiple of LANES.
static void gate(const float *rows, float *to, int64_t n, int64_t size, int64_t narrow) {
    #pragma omp for collapse(2)
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats x = load(rows + 2 * row * size + i), up = load(rows + (2 * row + 1) * size + i),
                         most = Floats{} + 88.0f, found = x / (1.0f + exponential(-x > most ? most : -x)) * up;
            if (narrow) {
                const Halves some = rounded(found);
                std::memcpy((uint16_t *)(to + row * size) + i, &some, sizeof some);
            } else
                store(to + row * size + i, found);
        }
}

// The `count` largest of each row of x [n][size], best first, of equals the first -> values and
// places [n][count]. logs: the values less the logarithm of the sum of all e^x. Where something in a row is no
// number, none of its values is.
extern "C" void top(const float *x, int64_t n, int64_t size, int64_t count, int64_t logs, int64_t threads,
                    float *values, int64_t *places) {
    constexpr int64_t SPAN = 8 * LANES;  // looked at one by one only where their largest counts
    #pragma omp parallel for num_threads(threads) if (n > 1 && n * size >= MUCH)
    for (int64_t row = 0; row < n; row++) {
        const float *own = x + row * size;
        float *best = values + row * count, *least = best + count - 1;
        int64_t *at = places + row * count;
        const auto lanes = [&](int64_t i) {
            Floats some = Floats{} - INFINITY;
            if (i + LANES <= size)
                return load(own + i);
            std::memcpy(&some, own + i, (size - i) * sizeof(float));
            return some;
        };
        std::fill_n(best, count, -INFINITY);
        std::fill_n(at, count, 0);
        Floats sums{}, numbers{};
        for (int64_t begin = 0; begin < size; begin += SPAN) {
            const int64_t end = std::min(begin + SPAN, size);
            Floats most = Floats{} - INFINITY;
            for (int64_t i = begin; i < end; i += LANES) {
                const Floats some = lanes(i);
                most = some > most ? some : most;
                numbers = some == some ? numbers : some;
            }
            const float candidate = largest(most);
            for (int64_t i = begin; i < end && candidate > *least; i++)
                if (own[i] > *least) {
                    int64_t place = count - 1;
                    for (; place > 0 && own[i] > best[place - 1]; place--) {
                        best[place] = best[place - 1];
                        at[place] = at[place - 1];
                    }
                    best[place] = own[i];
                    at[place] = i;
                }
        }
        for (int64_t i = 0; logs && i < size; i += LANES)
            sums += exponential(lanes(i) - *best);
        const float less = sum(numbers) + (logs ? *best + std::log(sum(sums)) : 0);
        for (int64_t i = 0; i < count; i++)
            best[i] -= less;
    }
}

// ----------------------------------------------------------------------------------------------------------- attention
//
// PANEL columns are read at a time, so that their scores stay near; what a row finds in each panel is added up in their
// order, with the softmax of Milakov and Gimelshein (arXiv 1805.02867). A column's place is the one among those that
// the token attends to. So what a token finds depends on the text before it alone, to the last bit: not on what else is
// in the forward, nor on the pieces that a prompt is read in.

struct Text {
    // tokens; columns, their own n among them; the last w of them have a mask [n][w]; whether a token sees none behind
    // it; rows of the cache
    int64_t n, m, w, causal, capacity;
    void *cache;  // [layers][2k][capacity][d], in float32, or in bfloat16 where products are
    const bool *mask;
};

struct Call {
    // tokens, of all texts one after the other; from which of them on results are wanted (of several texts 0); texts
    int64_t n, first, texts;
    // heads; head size
    int64_t h, k, d, threads;
    // and the sizes of what the first layer reads, of a hidden state and of an MLP's middle; layers to tell of
    int64_t layers, inputs, hidden, middle, taps;
    int64_t narrow;  // whether products take their inputs in bfloat16, attention's too; d is a multiple of BLOCK then
    // of norms; on cos and sin
    float eps, factor;
};

constexpr int64_t MANY = 96, PANEL = 512, TILE = 64;   // rows, columns, and columns whose values stay nearest
constexpr int64_t FEW = 128, ROOM = 1 << 22;           // tokens, and numbers found, up to which threads share panels
// of scores: rows a power of two apart would drive each other out of the cache
constexpr int64_t STRIDE = PANEL + 16;

template <bool NARROW>
using Kept = std::conditional_t<NARROW, uint16_t, float>;

static inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Each of these scores, their number being a multiple of LANES, becomes e^(score - highest); returns their sum.
// highest: the largest of them.
static float soften(float *scores, int64_t count, float &highest) {
    Floats most = Floats{} + std::numeric_limits<float>::lowest(), sums{};
    for (int64_t c = 0; c < count; c += LANES) {
        const Floats some = load(scores + c);
        most = some > most ? some : most;
    }
    highest = largest(most);
    for (int64_t c = 0; c < count; c += LANES) {
        const Floats some = exponential(load(scores + c) - highest);
        store(scores + c, some);
        sums += some;
    }
    return sum(sums);
}

// LANES numbers of two columns in bfloat16 (none: 0), each word taking one of both.
static inline Words pair(const uint16_t *even, const uint16_t *odd) {
    Halves low, high{};
    std::memcpy(&low, even, sizeof low);
    if (odd)
        std::memcpy(&high, odd, sizeof high);
    return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
}

// Numbers of what a row finds: the sum of values [d], each times e^(score - highest), the sum of these factors, and the
// highest score.
static inline int64_t finds(const Call &a) { return a.d + LANES; }

// Up to MANY rows of queries [rows][d], of these tokens, over the panel from column `begin` on of one head's keys and
// values [m][d] -> what they find [rows].
template <bool NARROW>
static void attend(const Call &a, const Text &text, int64_t rows, const int64_t *tokens, const Kept<NARROW> *queries,
                   const Kept<NARROW> *keys, const Kept<NARROW> *values, int64_t begin, float *found) {
    using Given = std::conditional_t<NARROW, uint32_t, float>;
    constexpr int64_t EACH = NARROW ? 2 : 1;  // columns whose values are multiplied at once
    const int64_t d = a.d, size = d / EACH, apart = finds(a), masked = text.m - text.w,
                  base = text.w ? masked / EACH * EACH : text.m,  // from here on a token's columns are its own
                  tail = begin + PANEL > base ? text.m - base : 0, behind = up(tail, BLOCK);
    thread_local std::vector<Floats> room;
    thread_local std::vector<int64_t> places;
    room.resize(std::max<size_t>(room.size(), (rows * (STRIDE + behind) + BLOCK * d + TILE * size) / LANES + 1));
    places.resize(std::max<size_t>(places.size(), rows * tail));
    // tails: scores of the columns from `base` on, first of those that a row attends to; places: which these are
    float *scores = (float *)room.data(), *tails = scores + rows * STRIDE, *turned = tails + rows * behind,
          *pairs = turned + BLOCK * d;
    const auto score = [&](int64_t column, int64_t count, float *to, int64_t stride) {
        const float *own = (const float *)(keys + column * d);
        transpose(own, count, size, turned);
        transpose(own + LANES * size, count - LANES, size, turned + LANES);
        blocks<false>((const Given *)queries, size, size, to, stride, rows, registers<2>(turned, BLOCK),
                      {own + BLOCK * size, BLOCK * size});
    };
    for (int64_t c = 0; c < tail; c += BLOCK)
        score(base + c, std::min(BLOCK, tail - c), tails + c, behind);
    int64_t seen[MANY], most = 0;                                             // columns: of a row, of all
    for (int64_t r = 0; r < rows; r++) {
        seen[r] = text.causal ? text.m - text.n + tokens[r] + 1 : text.m - tail;
        for (int64_t c = 0; c < tail; c++)
            if (base + c < masked || text.mask[tokens[r] * text.w + base + c - masked]) {
                const int64_t at = seen[r]++ - base;
                tails[r * behind + at] = tails[r * behind + c];
                places[r * tail + at] = base + c;
            }
        seen[r] = std::clamp<int64_t>(seen[r] - begin, 0, PANEL);
        most = std::max(most, seen[r]);
    }
    const int64_t shared = std::clamp<int64_t>(base - begin, 0, most);
    for (int64_t c = 0; c < shared; c += BLOCK)
        score(begin + c, std::min(BLOCK, shared - c), scores + c, STRIDE);
    for (int64_t r = 0; r < rows; r++) {
        float *own = scores + r * STRIDE, *to = found + r * apart;
        if (seen[r] > shared)
            std::copy_n(tails + r * behind + begin + shared - base, seen[r] - shared, own + shared);
        std::fill(own + seen[r], own + up(most, BLOCK), -INFINITY);
        std::fill_n(to, d, 0.0f);
        to[d] = soften(own, up(most, BLOCK), to[d + 1]);
        if (NARROW)
            round(own, (uint32_t *)own, up(most, BLOCK));
    }
    const auto *factors = (const Given *)scores;
    for (int64_t c = 0; c < shared; c += TILE) {
        const int64_t count = std::min(TILE, shared - c);
        const Kept<NARROW> *own = values + (begin + c) * d;
        const float *some = (const float *)own;
        if constexpr (NARROW) {
            for (int64_t k = 0; k < count; k += 2)
                for (int64_t i = 0; i < d; i += LANES) {
                    const Words both = pair(own + k * d + i, k + 1 < count ? own + (k + 1) * d + i : nullptr);
                    std::memcpy(pairs + k / 2 * d + i, &both, sizeof both);
                }
            some = pairs;
        }
        int64_t i = 0;
        const auto mix = [&](auto w) {
            for (; i + w * LANES <= d; i += w * LANES)
                blocks<true, w>(factors + c / EACH, STRIDE, up(count, EACH) / EACH, found + i, apart, rows,
                                registers<w>(some + i, d),
                                {(const float *)own + TILE * size, TILE * size, i / (w * LANES), d / (w * LANES)});
        };
        if (rows <= 2 * ROWS / 4)  // few: with more sums at a time none waits for the one before
            mix(std::integral_constant<int, 4>());
        mix(std::integral_constant<int, 2>());
        if constexpr (!NARROW)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t k = 0; k < count; k++)
                    for (int64_t rest = i; rest < d; rest++)
                        found[r * apart + rest] += factors[r * STRIDE + c + k] * own[k * d + rest];
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = shared; c < seen[r]; c += EACH) {
            const int64_t *at = places.data() + r * tail + begin + c - base;
            const auto factor = factors[r * STRIDE + c / EACH];
            const Kept<NARROW> *own = values + at[0] * d;
            float *to = found + r * apart;
            if constexpr (NARROW)
                for (int64_t i = 0; i < d; i += LANES) {
                    const uint16_t *next = c + 1 < seen[r] ? values + at[1] * d + i : nullptr;
                    store(to + i, plus(load(to + i), pair(own + i, next), factor));
                }
            else
                for (int64_t i = 0; i < d; i++)
                    to[i] += factor * own[i];
        }
}

// What a row found so far grows by what it found in the panel behind.
__attribute__((noinline)) static void add(const Call &a, float *found, const float *more) {
    const float highest = std::max(found[a.d + 1], more[a.d + 1]), before = std::exp(found[a.d + 1] - highest),
                behind = std::exp(more[a.d + 1] - highest);
    #pragma omp simd
    for (int64_t i = 0; i <= a.d; i++)
        found[i] = found[i] * before + more[i] * behind;
    found[a.d + 1] = highest;
}

// Positions [n] times frequencies inverse [d / 2] -> cos and sin [n][d / 2].
static void angles(const Call &a, const int64_t *positions, const float *inverse, float *cos, float *sin) {
    const int64_t half = a.d / 2;
    #pragma omp for
    for (int64_t t = 0; t < a.n; t++)
        for (int64_t i = 0; i < half; i++) {
            const float angle = positions[t] * inverse[i];
            cos[t * half + i] = std::cos(angle) * a.factor;
            sin[t * half + i] = std::sin(angle) * a.factor;
        }
}

static inline void put(const float *x, int64_t size, float *to) { std::copy_n(x, size, to); }
static inline void put(const float *x, int64_t size, uint16_t *to) { round(x, (uint32_t *)to, size); }

// rows [n][(h + 2k) d] of queries, keys and values: norms of query and key heads, where there are weights, and rotation
// by cos and sin [n][d / 2]. Keys and values go into the cache, kept [2k][capacity][d], behind m - n others; queries of
// the tokens from `first` on, with attention's scale -> [k][n - first][h / k][d]. Nobody waits at its end.
template <bool NARROW>
static void turn(const Call &a, const Text &text, const float *rows, const float *cos, const float *sin,
                 const float *query_norm, const float *key_norm, int64_t first, Kept<NARROW> *queries,
                 Kept<NARROW> *kept) {
    const int64_t heads = a.h + 2 * a.k, group = a.h / a.k, half = a.d / 2;
    const float scale = 1 / std::sqrt((float)a.d);
    #pragma omp for collapse(2) nowait
    for (int64_t head = 0; head < heads; head++)
        for (int64_t t = 0; t < text.n; t++) {
            const bool asks = head < a.h;
            if (asks && t < first)
                continue;
            const float *x = rows + (t * heads + head) * a.d, *weight = asks ? query_norm : key_norm,
                        *c = cos + t * half, *s = sin + t * half, by = asks ? scale : 1;
            const int64_t row = asks ? (head / group * (text.n - first) + t - first) * group + head % group
                                     : (head - a.h) * text.capacity + text.m - text.n + t;
            Kept<NARROW> *to = (asks ? queries : kept) + row * a.d;
            if (head >= a.h + a.k)
                put(x, a.d, to);
            else {
                float y[MOST];
                if (weight)
                    norm(x, weight, a.eps, y, a.d);
                else
                    std::copy_n(x, a.d, y);
                #pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    const float left = y[i], right = y[i + half];
                    y[i] = (left * c[i] - right * s[i]) * by;
                    y[i + half] = (right * c[i] + left * s[i]) * by;
                }
                put(y, a.d, to);
            }
        }
}

// Panels of a text that threads share, or 1: there each reads all panels of its rows.
static inline int64_t spans(const Call &a, const Text &text) {
    const int64_t panels = up(text.m, PANEL) / PANEL;
    return text.n <= FEW && panels * a.h * text.n * finds(a) <= ROOM ? panels : 1;
}

// Numbers that `read` of a text leaves for `join`.
static inline int64_t left(const Call &a, const Text &text) {
    return spans(a, text) > 1 ? spans(a, text) * a.h * text.n * finds(a) : 0;
}

// Attention's result for a row, of `all` of this text -> to [n - first][h d], as products read it.
template <bool NARROW>
static void give(const Call &a, const float *found, int64_t row, int64_t all, float *to) {
    const int64_t group = a.h / a.k, own = all / a.k;
    float y[MOST];
    for (int64_t i = 0; i < a.d; i++)
        y[i] = found[i] / found[a.d];
    put(y, a.d, (Kept<NARROW> *)(to + row % own / group * a.h * a.d) + (row / own * group + row % group) * a.d);
}

// Attention of queries [k][n - first][h / k][d], under its mask -> to, or, where threads share panels too, what rows
// find [panels][k (n - first) h / k]. Nobody waits at the end.
template <bool NARROW>
static void read(const Call &a, const Text &text, const Kept<NARROW> *queries, const Kept<NARROW> *kept, int64_t first,
                 float *to, float *found) {
    const int64_t group = a.h / a.k, own = group * (text.n - first), all = a.k * own, parted = spans(a, text),
                  share = std::min(MANY, parted > 1 ? own : (all + a.threads - 1) / a.threads),
                  parts = (all + share - 1) / share;
    #pragma omp for schedule(dynamic) nowait
    for (int64_t item = parts * parted - 1; item >= 0; item--) {              // of a prompt those first that see most
        const int64_t part = item / parted, span = item % parted;
        for (int64_t row = share * part, end = std::min(row + share, all); row < end;) {
            const int64_t head = row / own, count = std::min({MANY, end - row, (head + 1) * own - row});
            int64_t tokens[MANY];
            for (int64_t r = 0; r < count; r++)
                tokens[r] = first + (row + r) % own / group;
            const Kept<NARROW> *keys = kept + head * text.capacity * a.d;
            const auto look = [&](int64_t begin, float *there) {
                attend<NARROW>(a, text, count, tokens, queries + row * a.d, keys, keys + a.k * text.capacity * a.d,
                               begin, there);
            };
            if (parted > 1)
                look(span * PANEL, found + (span * all + row) * finds(a));
            else {
                thread_local std::vector<float> room;
                room.resize(std::max<size_t>(room.size(), 2 * MANY * finds(a)));
                float *sums = room.data(), *more = sums + MANY * finds(a);
                look(0, sums);
                const int64_t most = text.causal ? text.m - text.n + tokens[count - 1] + 1 : text.m;
                for (int64_t begin = PANEL; begin < most; begin += PANEL) {
                    look(begin, more);
                    for (int64_t r = 0; r < count; r++)
                        add(a, sums + r * finds(a), more + r * finds(a));
                }
                for (int64_t r = 0; r < count; r++)
                    give<NARROW>(a, sums + r * finds(a), row + r, all, to);
            }
            row += count;
        }
    }
}

// What rows found in each panel, together -> to. Nobody waits at the end.
template <bool NARROW>
static void join(const Call &a, const Text &text, float *found, int64_t first, float *to) {
    const int64_t all = a.h * (text.n - first), parted = spans(a, text);
    #pragma omp for nowait
    for (int64_t row = 0; row < (parted > 1 ? all : 0); row++) {
        for (int64_t span = 1; span < parted; span++)
            add(a, found + row * finds(a), found + (span * all + row) * finds(a));
        give<NARROW>(a, found + row * finds(a), row, all, to);
    }
}

// -------------------------------------------------------------------------------------------------------------- layers

struct Layer {
    const uint32_t *qkv, *o, *gate_up, *down;
    const float *input_norm, *attention_norm, *query_norm, *key_norm, *hidden_norm;
    int64_t index;  // its number: where its part of the cache is
};

// A layer's part of a text's cache.
template <bool NARROW>
static inline Kept<NARROW> *kept(const Call &a, const Text &text, const Layer &layer) {
    return (Kept<NARROW> *)text.cache + layer.index * 2 * a.k * text.capacity * a.d;
}

// Attention of all texts: rows [n][(h + 2k) d] as `turn` takes them -> to [n - first][h d], as products read it.
template <bool NARROW>
static void attention(const Call &a, const Text *texts, const Layer &layer, const float *rows, const float *cos,
                      const float *sin, int64_t first, float *queries, float *found, float *to) {
    bool parted = false;
    const auto each = [&](auto run) {
        for (int64_t row = 0, room = 0, t = 0; t < a.texts; row += texts[t].n, room += left(a, texts[t]), t++)
            run(texts[t], row, (Kept<NARROW> *)queries + row * a.h * a.d, found + room);
        #pragma omp barrier
    };
    each([&](const Text &text, int64_t row, Kept<NARROW> *own, float *) {
        turn<NARROW>(a, text, rows + row * (a.h + 2 * a.k) * a.d, cos + row * a.d / 2, sin + row * a.d / 2,
                     layer.query_norm, layer.key_norm, first, own, kept<NARROW>(a, text, layer));
    });
    each([&](const Text &text, int64_t row, Kept<NARROW> *own, float *room) {
        read<NARROW>(a, text, own, kept<NARROW>(a, text, layer), first, to + row * a.h * a.d, room);
        parted |= spans(a, text) > 1;
    });
    if (parted)
        each([&](const Text &text, int64_t row, Kept<NARROW> *, float *room) {
            join<NARROW>(a, text, room, first, to + row * a.h * a.d);
        });
}

// x [n][hidden] at these positions [n] through these layers -> to [n][hidden], and its last norm ->
// normed [n - first][hidden]; the last layer gives what the tokens from `first` on need. given [n][hidden]: the first
// layer, an EAGLE-3 head's, reads its norm beside x's, instead of x's alone. inverse [d / 2]: frequencies. taps: the
// layers whose outputs are wanted, -1 being x -> features [n][taps][hidden]. An MLP's result is added where the next
// norm is taken.
extern "C" void layers(const Call *call, const Text *texts, const Layer *weights, const float *x, const float *given,
                       const int64_t *positions, const float *inverse, const float *last_norm, const int64_t *taps,
                       float *features, float *to, float *normed) {
    const Call &a = *call;
    const int64_t wide = std::max((a.h + 2 * a.k) * a.d, 2 * a.middle), slim = std::max(a.h * a.d, a.middle),
                  half = a.d / 2, size = a.n * a.hidden;
    int64_t panels = 0;
    for (int64_t t = 0; t < a.texts; t++)
        panels += left(a, texts[t]);
    thread_local std::vector<float> room;  // asking the system for it each time would cost fresh pages
    room.resize(std::max<size_t>(
        room.size(), a.n * (wide + slim + a.inputs + a.hidden + a.h * a.d + a.d) + panels));
    float *rows = room.data(), *middle = rows + a.n * wide, *own = middle + a.n * slim, *added = own + a.n * a.inputs,
          *queries = added + size, *cos = queries + a.n * a.h * a.d, *sin = cos + a.n * half, *found = sin + a.n * half;
    const auto tell = [&](int64_t of) {
        for (int64_t tap = 0; tap < a.taps; tap++)
            if (taps[tap] == of) {
                #pragma omp for
                for (int64_t t = 0; t < a.n; t++)
                    for (int64_t i = 0; i < a.hidden; i++)
                        features[(t * a.taps + tap) * a.hidden + i] = to[t * a.hidden + i] + added[t * a.hidden + i];
            }
    };
    std::copy_n(x, size, to);
    std::fill_n(added, size, 0.0f);
    #pragma omp parallel num_threads(a.threads)
    {
        angles(a, positions, inverse, cos, sin);
        tell(-1);
        for (int64_t l = 0; l < a.layers; l++) {
            const Layer &layer = weights[l];
            const int64_t first = l == a.layers - 1 ? a.first : 0, n = a.n - first;
            float *wanted = to + first * a.hidden;
            if (given && !l) {
                #pragma omp for
                for (int64_t t = 0; t < a.n; t++) {
                    float *both = own + t * a.inputs;
                    norm(given + t * a.hidden, layer.input_norm, a.eps, both, a.hidden);
                    norm(x + t * a.hidden, layer.hidden_norm, a.eps, both + a.hidden, a.hidden);
                    if (a.narrow)
                        round(both, (uint32_t *)both, a.inputs);
                }
            } else
                add_norm(to, added, layer.input_norm, a.eps, own, a.n, a.hidden, a.narrow);
            multiply(layer.qkv, own, rows, a.n, l ? a.hidden : a.inputs, (a.h + 2 * a.k) * a.d, a.narrow);
            (a.narrow ? attention<true> : attention<false>)(a, texts, layer, rows, cos, sin, first, queries, found,
                                                            middle);
            multiply(layer.o, middle, added, n, a.h * a.d, a.hidden, a.narrow);
            add_norm(wanted, added, layer.attention_norm, a.eps, own, n, a.hidden, a.narrow);
            multiply(layer.gate_up, own, rows, n, a.hidden, 2 * a.middle, a.narrow);
            gate(rows, middle, n, a.middle, a.narrow);
            multiply(layer.down, middle, added, n, a.middle, a.hidden, a.narrow);
            tell(layer.index);
        }
        add_norm(to + a.first * a.hidden, added, last_norm, a.eps, normed, a.n - a.first, a.hidden, false);
    }
}

// The keys and values alone that x [n][inputs], of one text, makes in each layer.
extern "C" void context(const Call *call, const Text *text, const Layer *weights, const float *x,
                        const int64_t *positions, const float *inverse) {
    const Call &a = *call;
    const int64_t wide = (a.h + 2 * a.k) * a.d;
    std::vector<float> room(a.n * (wide + a.d + a.inputs));
    float *rows = room.data(), *cos = rows + a.n * wide, *sin = cos + a.n * a.d / 2, *pairs = sin + a.n * a.d / 2;
    #pragma omp parallel num_threads(a.threads)
    {
        angles(a, positions, inverse, cos, sin);
        if (a.narrow)
            round_rows(x, pairs, a.n, a.inputs);
        for (int64_t l = 0; l < a.layers; l++) {
            const Layer &layer = weights[l];
            multiply(layer.qkv, a.narrow ? pairs : x, rows, a.n, a.inputs, wide, a.narrow);
            const auto write = [&](auto narrow) {               // no token's queries are wanted
                turn<narrow>(a, *text, rows, cos, sin, nullptr, layer.key_norm, a.n, nullptr,
                             kept<narrow>(a, *text, layer));
            };
            a.narrow ? write(std::true_type()) : write(std::false_type());
            #pragma omp barrier
        }
    }
}
