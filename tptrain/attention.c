/* Causal attention on a CPU, forward and backward, in whole tiles of registers; compiled and called by attention.py.

A problem is one KV head and the G query heads that share it. Its scores exist for BLOCK queries at a time, over the
keys up to the last of them, and stay in the core's cache; those of the backward pass are computed again, as in flash
attention (Dao et al. 2022, arXiv:2205.14135). Inputs are packed as float32: d rounded up to whole tiles (D), T to whole
blocks (N), both filled with zeros. Rows of scores and of transposed inputs are S floats apart.

Tensors: q, y and their gradients (B, T, K, G, d), k, v and theirs (B, T, K, d), float32 or, where `half`, bfloat16.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 16, ROWS = 8, COLUMNS = 2 * WIDTH, BLOCK = 32 }; /* a tile: 8 x 32 sums, in 16 of the 32 registers */

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH), aligned(4)));

static const Integers PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Vector load(const float *x) { return *(const Vector *)x; }
static inline void store(float *x, Vector v) { *(Vector *)x = v; }
static inline Vector all(float x) { return x - (Vector){0}; }
static inline Vector choose(Integers which, Vector x, Vector y) {
    return (Vector)((which & (Integers)x) | (~which & (Integers)y));
}

static inline float sum_of(Vector x) {
    for (int half = WIDTH / 2; half > 0; half /= 2) /* a tree: additions one after another would wait for each other */
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

static inline float greatest_of(Vector x) {
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

/* e^x for x <= 0: 2^n times Cephes' polynomial in the rest, |rest| <= ln(2) / 2; zero where it would not be normal. */
static inline Vector exponential(Vector x) {
    Integers tiny = x < -87.0f;
    x = choose(tiny, all(-87.0f), x);
    Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23 rounds to the nearest whole number */
    Vector rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    Vector power = (Vector)((__builtin_convertvector(n, Integers) + 127) << 23);
    return choose(tiny, all(0.0f), p * power);
}

/* ------------------------------------------------------------------------------------------------- matrix products */

/* c (ROWS, COLUMNS) = x (ROWS, k) y (k, COLUMNS), or more of it; x[i, j] lies at i * row + j * step. */
static inline void tile(long k, const float *x, long row, long step, const float *y, long ldy, float *c, long ldc,
                        int more) {
    Vector sum[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = more ? load(c + i * ldc + j * WIDTH) : all(0.0f);
    for (long at = 0; at < k; at++, x += step, y += ldy) {
        Vector left = load(y), right = load(y + WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += x[i * row] * left;
            sum[i][1] += x[i * row] * right;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 2; j++) store(c + i * ldc + j * WIDTH, sum[i][j]);
}

/* c (m, n) = x (m, k) y (k, n), or more of it. */
static void product(long m, long n, long k, const float *x, long row, long step, const float *y, long ldy, float *c,
                    long ldc, int more) {
    for (long j = 0; j < n; j += COLUMNS)
        for (long i = 0; i < m; i += ROWS) tile(k, x + i * row, row, step, y + j, ldy, c + i * ldc + j, ldc, more);
}

/* -------------------------------------------------------------------------------------------------------- packing */

/* x (rows, d), whose rows are ld apart from `at` on -> packed (up to, D). */
static void pack(const void *x, long at, long ld, int half, long rows, long up_to, long d, float *packed, long D) {
    if (rows < up_to || d < D) memset(packed, 0, up_to * D * sizeof(float));
    for (long t = 0; t < rows; t++, at += ld, packed += D) {
        if (half)
            for (long i = 0; i < d; i++) ((uint32_t *)packed)[i] = (uint32_t)((const uint16_t *)x)[at + i] << 16;
        else
            memcpy(packed, (const float *)x + at, d * sizeof(float));
    }
}

static void unpack(const float *packed, long D, long rows, long d, void *x, long at, long ld, int half) {
    for (long t = 0; t < rows; t++, at += ld, packed += D) {
        if (half)
            for (long i = 0; i < d; i++) { /* to the nearest, ties to even */
                uint32_t bits = ((const uint32_t *)packed)[i];
                ((uint16_t *)x)[at + i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            }
        else
            memcpy((float *)x + at, packed, d * sizeof(float));
    }
}

/* x (N, D) -> y (D, N), rows S apart. */
static void transpose(long N, long D, const float *x, float *y, long S) {
    for (long t = 0; t < N; t += WIDTH)
        for (long i = 0; i < D; i++)
            for (long s = t; s < t + WIDTH; s++) y[i * S + s] = x[s * D + i];
}

/* ----------------------------------------------------------------------------------------------------- attention */

/* Row i of the scores of queries that begin at `start`: later keys hidden, and the greatest of the others returned. */
static inline float hide(float *row, long start, long i) {
    for (long j = 0; j < BLOCK; j += WIDTH) {
        Integers later = PLACES > (int32_t)(i - j);
        store(row + start + j, choose(later, all(-INFINITY), load(row + start + j)));
    }
    Vector greatest = load(row);
    for (long j = WIDTH; j < start + BLOCK; j += WIDTH) greatest = choose(load(row + j) > greatest, load(row + j), greatest);
    return greatest_of(greatest);
}

/* y of the problems from `first` to `last` of B * K, in float32. Returns 1 where there is no memory. */
int attention_forward(long first, long last, long T, long K, long G, long d, const float *q, const float *k,
                      const float *v, float *y) {
    long N = (T + BLOCK - 1) / BLOCK * BLOCK, D = (d + COLUMNS - 1) / COLUMNS * COLUMNS, S = N + WIDTH;
    float *memory = malloc((2 * N * D + S * D + BLOCK * (S + 2 * D)) * sizeof(float));
    if (memory == NULL) return 1;
    float *keys = memory, *values = keys + N * D, *keys_t = values + N * D, *p = keys_t + S * D, *mine = p + S * BLOCK,
          *out = mine + BLOCK * D, share[BLOCK], scale = 1 / sqrtf(d);
    for (long problem = first; problem < last; problem++) {
        long kv = (problem / K * T * K + problem % K) * d;
        pack(k, kv, K * d, 0, T, N, d, keys, D);
        pack(v, kv, K * d, 0, T, N, d, values, D);
        transpose(N, D, keys, keys_t, S);
        for (long start = 0; start < T; start += BLOCK)
            for (long g = 0; g < G; g++) {
                long n = start + BLOCK, rows = T < n ? T - start : BLOCK, at = G * kv + g * d + start * K * G * d;
                pack(q, at, K * G * d, 0, rows, BLOCK, d, mine, D);
                product(BLOCK, n, D, mine, D, 1, keys_t, S, p, S, 0);
                for (long i = 0; i < BLOCK; i++) {
                    float *row = p + i * S, top = hide(row, start, i) * scale;
                    Vector sum = all(0.0f);
                    for (long j = 0; j < n; j += WIDTH) {
                        Vector e = exponential(load(row + j) * scale - top);
                        store(row + j, e);
                        sum += e;
                    }
                    share[i] = 1 / sum_of(sum);
                }
                product(BLOCK, D, n, p, S, 1, values, D, out, D, 0);
                for (long i = 0; i < BLOCK; i++)
                    for (long j = 0; j < D; j++) out[i * D + j] *= share[i];
                unpack(out, D, rows, d, y, at, K * G * d, 0);
            }
    }
    free(memory);
    return 0;
}

/* The gradients of the problems from `first` to `last` of B * K. Returns 1 where there is no memory. */
int attention_backward(long first, long last, long T, long K, long G, long d, long half, const void *q, const void *k,
                       const void *v, const void *grad, void *grad_q, void *grad_k, void *grad_v) {
    long N = (T + BLOCK - 1) / BLOCK * BLOCK, D = (d + COLUMNS - 1) / COLUMNS * COLUMNS, S = N + WIDTH;
    float *memory = malloc((3 * N * D + 2 * S * D + BLOCK * (2 * S + 3 * D)) * sizeof(float));
    if (memory == NULL) return 1;
    float *keys = memory, *to_keys = keys + N * D, *to_values = to_keys + N * D, *keys_t = to_values + N * D,
          *values_t = keys_t + S * D, *p = values_t + S * D, *to_scores = p + S * BLOCK,
          *mine = to_scores + S * BLOCK, *given = mine + BLOCK * D, *to_mine = given + BLOCK * D, scale = 1 / sqrtf(d);
    for (long problem = first; problem < last; problem++) {
        long kv = (problem / K * T * K + problem % K) * d;
        pack(v, kv, K * d, half, T, N, d, keys, D);
        transpose(N, D, keys, values_t, S);
        pack(k, kv, K * d, half, T, N, d, keys, D);
        transpose(N, D, keys, keys_t, S);
        memset(to_keys, 0, 2 * N * D * sizeof(float)); /* to_values follows */
        for (long start = 0; start < T; start += BLOCK)
            for (long g = 0; g < G; g++) {
                long n = start + BLOCK, rows = T < n ? T - start : BLOCK, at = G * kv + g * d + start * K * G * d;
                pack(q, at, K * G * d, half, rows, BLOCK, d, mine, D);
                pack(grad, at, K * G * d, half, rows, BLOCK, d, given, D);
                product(BLOCK, n, D, mine, D, 1, keys_t, S, p, S, 0);
                product(BLOCK, n, D, given, D, 1, values_t, S, to_scores, S, 0); /* the gradient to p, as yet */
                for (long i = 0; i < BLOCK; i++) {
                    float *row = p + i * S, *to_row = to_scores + i * S, top = hide(row, start, i) * scale;
                    Vector sum = all(0.0f), product_sum = all(0.0f);
                    for (long j = 0; j < n; j += WIDTH) {
                        Vector e = exponential(load(row + j) * scale - top);
                        store(row + j, e);
                        sum += e;
                        product_sum += e * load(to_row + j);
                    }
                    float share = 1 / sum_of(sum), mean = sum_of(product_sum) * share;
                    for (long j = 0; j < n; j += WIDTH) {
                        Vector weight = load(row + j) * share;
                        store(row + j, weight);
                        store(to_row + j, weight * (load(to_row + j) - mean) * scale);
                    }
                }
                product(n, D, BLOCK, p, 1, S, given, D, to_values, D, 1);
                product(n, D, BLOCK, to_scores, 1, S, mine, D, to_keys, D, 1);
                product(BLOCK, D, n, to_scores, S, 1, keys, D, to_mine, D, 0);
                unpack(to_mine, D, rows, d, grad_q, at, K * G * d, half);
            }
        unpack(to_keys, D, T, d, grad_k, kv, K * d, half);
        unpack(to_values, D, T, d, grad_v, kv, K * d, half);
    }
    free(memory);
    return 0;
}
