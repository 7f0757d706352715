/* Causal attention on a CPU, forward and backward, in whole tiles of registers; called by kernels.py.

A problem is one KV head and the G query heads that share it. Its scores exist for BLOCK queries at a time, over the
keys up to the last of them, and stay in the core's cache; those of the backward pass are computed again, as in flash
attention (Dao et al. 2022, arXiv:2205.14135). Inputs are packed as float32: d rounded up to whole tiles (D), T to whole
blocks (N), both filled with zeros. Rows of scores and of transposed inputs are S floats apart.

A score is the product of query and key times `scale`, and with a `cap` other than 0 cap * tanh(that / cap). A query
sees itself and the window - 1 keys before it.

Tensors: q, y and their gradients (B, T, K, G, d), k, v and theirs (B, T, K, d), float32 or, where `bf16`, bfloat16.
*/

#include "vector.h"

#include <stdlib.h>

enum { COLUMNS = 2 * WIDTH, BLOCK = 32 }; /* a tile: ROWS x COLUMNS sums; a block is a multiple of both */

/* ------------------------------------------------------------------------------------------------- matrix products */

/* c (ROWS, COLUMNS) = x (ROWS, k) y (k, COLUMNS), or c and that; x[i, j] lies at i * row + j * step. */
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

/* c (m, n) = x (m, k) y (k, n), or, with `more`, c and that. */
static void product(long m, long n, long k, const float *x, long row, long step, const float *y, long ldy, float *c,
                    long ldc, int more) {
    for (long j = 0; j < n; j += COLUMNS)
        for (long i = 0; i < m; i += ROWS) tile(k, x + i * row, row, step, y + j, ldy, c + i * ldc + j, ldc, more);
}

/* -------------------------------------------------------------------------------------------------------- packing */

/* x (rows, d), whose rows are ld apart from `at` on -> packed (up to, D). */
static void pack(const void *x, long at, long ld, int bf16, long rows, long up_to, long d, float *packed, long D) {
    if (rows < up_to || d < D) memset(packed, 0, up_to * D * sizeof(float));
    for (long t = 0; t < rows; t++, at += ld, packed += D)
        for (long i = 0; i < d; i += WIDTH) store(packed + i, get(bf16, x, at + i, d - i));
}

static void unpack(const float *packed, long D, long rows, long d, void *x, long at, long ld, int bf16) {
    for (long t = 0; t < rows; t++, at += ld, packed += D)
        for (long i = 0; i < d; i += WIDTH) put(bf16, x, at + i, d - i, load(packed + i));
}

/* x (N, D) -> y (D, N), rows S apart. */
static void transpose(long N, long D, const float *x, float *y, long S) {
    for (long t = 0; t < N; t += WIDTH)
        for (long i = 0; i < D; i++)
            for (long s = t; s < t + WIDTH; s++) y[i * S + s] = x[s * D + i];
}

/* ----------------------------------------------------------------------------------------------------- attention */

typedef struct {
    long window;
    float scale, cap;
} Scores;

/* The first key that a block of queries may see, rounded down to a whole tile. */
static long begin(Scores s, long start) { return start < s.window ? 0 : (start - s.window + 1) / COLUMNS * COLUMNS; }

/* Row i of the products of queries that begin at `start` and keys that begin at `from`, one after another, to scores;
of hidden keys minus infinity. Returns the largest. `slopes`, where there is a cap: the scores' derivatives. */
static inline float score(Scores s, float *row, long start, long i, long from, float *slopes) {
    Vector largest = all(-INFINITY);
    for (long j = from; j < start + BLOCK; j += WIDTH, row += WIDTH) {
        Vector x = load(row) * s.scale;
        if (s.cap != 0) {
            Vector t = hyperbolic_tangent(x / s.cap);
            if (slopes) store(slopes + j - from, 1 - t * t);
            x = t * s.cap;
        }
        if (j + WIDTH > start) x = choose(first(start + i + 1 - j), x, all(-INFINITY));
        if (j <= start + i - s.window) x = choose(first(start + i - s.window + 1 - j), all(-INFINITY), x);
        store(row, x);
        largest = larger(x, largest);
    }
    return largest_of(largest);
}

typedef struct {
    long T, K, G, d, N, D, S; /* see the top */
} Sizes;

static Sizes sizes(long T, long K, long G, long d) {
    long N = (T + BLOCK - 1) / BLOCK * BLOCK, D = (d + COLUMNS - 1) / COLUMNS * COLUMNS;
    return (Sizes){T, K, G, d, N, D, N + WIDTH};
}

/* Where k and v of a problem begin; its queries begin at G times that, their heads d apart, their tokens K * G * d. */
static long begins(Sizes z, long problem) { return (problem / z.K * z.T * z.K + problem % z.K) * z.d; }

/* Memory for one thread, whose rows begin where cache lines do. */
static float *floats(long count) { return aligned_alloc(64, count * sizeof(float)); }

static void forward(Sizes z, Scores s, long problem, int bf16, const void *q, const void *k, const void *v, void *y,
                    float *memory) {
    float *keys = memory, *values = keys + z.N * z.D, *keys_t = values + z.N * z.D, *p = keys_t + z.S * z.D,
          *queries = p + z.S * BLOCK, *out = queries + BLOCK * z.D, share[BLOCK];
    long kv = begins(z, problem), ld = z.K * z.G * z.d;
    pack(k, kv, z.K * z.d, bf16, z.T, z.N, z.d, keys, z.D);
    pack(v, kv, z.K * z.d, bf16, z.T, z.N, z.d, values, z.D);
    transpose(z.N, z.D, keys, keys_t, z.S);
    for (long start = 0; start < z.T; start += BLOCK)
        for (long g = 0; g < z.G; g++) {
            long from = begin(s, start), n = start + BLOCK - from; /* keys that are seen */
            long rows = z.T < start + BLOCK ? z.T - start : BLOCK, at = z.G * kv + g * z.d + start * ld;
            pack(q, at, ld, bf16, rows, BLOCK, z.d, queries, z.D);
            product(BLOCK, n, z.D, queries, z.D, 1, keys_t + from, z.S, p, z.S, 0);
            for (long i = 0; i < BLOCK; i++) {
                float *row = p + i * z.S, top = score(s, row, start, i, from, NULL);
                Vector sum = all(0.0f);
                for (long j = 0; j < n; j += WIDTH) {
                    Vector e = exponential(load(row + j) - top);
                    store(row + j, e);
                    sum += e;
                }
                share[i] = 1 / sum_of(sum);
            }
            product(BLOCK, z.D, n, p, z.S, 1, values + from * z.D, z.D, out, z.D, 0);
            for (long i = 0; i < BLOCK; i++)
                for (long j = 0; j < z.D; j++) out[i * z.D + j] *= share[i];
            unpack(out, z.D, rows, z.d, y, at, ld, bf16);
        }
}

static void backward(Sizes z, Scores s, long problem, int bf16, const void *q, const void *k, const void *v,
                     const void *grad, void *grad_q, void *grad_k, void *grad_v, float *memory) {
    float *keys = memory, *to_keys = keys + z.N * z.D, *to_values = to_keys + z.N * z.D,
          *keys_t = to_values + z.N * z.D, *values_t = keys_t + z.S * z.D, *p = values_t + z.S * z.D,
          *to_scores = p + z.S * BLOCK, *queries = to_scores + z.S * BLOCK, *to_output = queries + BLOCK * z.D,
          *to_queries = to_output + BLOCK * z.D, *slopes = to_queries + BLOCK * z.D;
    long kv = begins(z, problem), ld = z.K * z.G * z.d;
    pack(v, kv, z.K * z.d, bf16, z.T, z.N, z.d, keys, z.D);
    transpose(z.N, z.D, keys, values_t, z.S);
    pack(k, kv, z.K * z.d, bf16, z.T, z.N, z.d, keys, z.D);
    transpose(z.N, z.D, keys, keys_t, z.S);
    memset(to_keys, 0, 2 * z.N * z.D * sizeof(float)); /* to_values follows */
    for (long start = 0; start < z.T; start += BLOCK)
        for (long g = 0; g < z.G; g++) {
            long from = begin(s, start), n = start + BLOCK - from; /* keys that are seen */
            long rows = z.T < start + BLOCK ? z.T - start : BLOCK, at = z.G * kv + g * z.d + start * ld;
            pack(q, at, ld, bf16, rows, BLOCK, z.d, queries, z.D);
            pack(grad, at, ld, bf16, rows, BLOCK, z.d, to_output, z.D);
            product(BLOCK, n, z.D, queries, z.D, 1, keys_t + from, z.S, p, z.S, 0);
            product(BLOCK, n, z.D, to_output, z.D, 1, values_t + from, z.S, to_scores, z.S, 0); /* to p, as yet */
            for (long i = 0; i < BLOCK; i++) {
                float *row = p + i * z.S, *to_row = to_scores + i * z.S, top = score(s, row, start, i, from, slopes);
                Vector sum = all(0.0f), weighted = all(0.0f);
                for (long j = 0; j < n; j += WIDTH) {
                    Vector e = exponential(load(row + j) - top);
                    store(row + j, e);
                    sum += e;
                    weighted += e * load(to_row + j);
                }
                float share = 1 / sum_of(sum), mean = sum_of(weighted) * share;
                for (long j = 0; j < n; j += WIDTH) {
                    Vector weight = load(row + j) * share, to_score = weight * (load(to_row + j) - mean) * s.scale;
                    store(row + j, weight);
                    if (s.cap != 0) to_score *= load(slopes + j);
                    store(to_row + j, to_score);
                }
            }
            product(n, z.D, BLOCK, p, 1, z.S, to_output, z.D, to_values + from * z.D, z.D, 1);
            product(n, z.D, BLOCK, to_scores, 1, z.S, queries, z.D, to_keys + from * z.D, z.D, 1);
            product(BLOCK, z.D, n, to_scores, z.S, 1, keys + from * z.D, z.D, to_queries, z.D, 0);
            unpack(to_queries, z.D, rows, z.d, grad_q, at, ld, bf16);
        }
    unpack(to_keys, z.D, z.T, z.d, grad_k, kv, z.K * z.d, bf16);
    unpack(to_values, z.D, z.T, z.d, grad_v, kv, z.K * z.d, bf16);
}

/* The kernels: B * K problems, shared by the threads. They return 1 where there is no memory. */

int attention_forward(long threads, long problems, long T, long K, long G, long d, long bf16, long window,
                      double scale, double cap, const void *q, const void *k, const void *v, void *y) {
    Sizes z = sizes(T, K, G, d);
    Scores s = {window, scale, cap};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = floats(2 * z.N * z.D + z.S * z.D + BLOCK * (z.S + 2 * z.D));
        failed = memory == NULL;
#pragma omp for schedule(static)
        for (long problem = 0; problem < problems; problem++)
            if (!failed) forward(z, s, problem, bf16, q, k, v, y, memory);
        free(memory);
    }
    return failed;
}

int attention_backward(long threads, long problems, long T, long K, long G, long d, long bf16, long window,
                       double scale, double cap, const void *q, const void *k, const void *v, const void *grad,
                       void *grad_q, void *grad_k, void *grad_v) {
    Sizes z = sizes(T, K, G, d);
    Scores s = {window, scale, cap};
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = floats(3 * z.N * z.D + 2 * z.S * z.D + BLOCK * (2 * z.S + 3 * z.D) + z.S);
        failed = memory == NULL;
#pragma omp for schedule(static)
        for (long problem = 0; problem < problems; problem++)
            if (!failed) backward(z, s, problem, bf16, q, k, v, grad, grad_q, grad_k, grad_v, memory);
        free(memory);
    }
    return failed;
}
