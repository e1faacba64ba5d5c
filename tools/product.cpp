// y = x W^T in float32, for matrices W whose elements bfloat16 holds; called by tools/kernels.py through ctypes.
//
// A few rows x of a small model wait for W to arrive from memory, and a CPU's own prefetching stops at each page: here W is asked for
// AHEAD words early. It comes as words [outputs / BLOCK][inputs][LANES], the weights of an output in their low halves and of the LANES-th
// after it in their high ones, so that it is read from front to back, once for up to ROWS rows of x, whose sums stay in registers. Each sum
// is taken over the inputs in order, so a row's result does not depend on how many there are.

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 14;       // floats in a register; rows, twice of which are sums in 32 registers
#else
constexpr int64_t LANES = 8, ROWS = 6;         // 16 registers
#endif
constexpr int64_t BLOCK = 2 * LANES, AHEAD = 1024;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

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
        std::memcpy(y + r * outputs, &low[r], sizeof low[r]);
        std::memcpy(y + r * outputs + LANES, &high[r], sizeof high[r]);
    }
}

template <int R>
static void few(int64_t rows, const uint32_t *w, const float *x, float *y, int64_t inputs, int64_t outputs) {
    if (rows == R)
        block<R>(w, x, y, inputs, outputs);
    else if constexpr (R > 1)
        few<R - 1>(rows, w, x, y, inputs, outputs);
}

extern "C" const int64_t block_size = BLOCK;

// x [rows][inputs], y [rows][outputs]; outputs is a multiple of BLOCK.
extern "C" void product(const uint32_t *w, const float *x, float *y, int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    #pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < outputs; o += BLOCK)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
            few<ROWS>(end - begin, w + o / 2 * inputs, x + begin * inputs, y + begin * outputs + o, inputs, outputs);
        }
}
