/* The element-wise parts of a model on a CPU, each one walk over memory; called by kernels.py.

They compute what the functions of the same names in reference.py do. Tensors are contiguous: float32 or, where `bf16`,
bfloat16; statistics are float32. Rows are shared by the threads, and results do not depend on how many there are.
*/

#include "vector.h"

/* A function of one row, made for float32 and for bfloat16. */
#define EITHER(row, ...) (bf16 ? row(1, __VA_ARGS__) : row(0, __VA_ARGS__))

/* ---------------------------------------------------------------------------------------------------------- RMSNorm */

/* x + y, or x where there is no y. */
INLINE Vector sum_at(int bf16, const void *x, const void *y, long at, long n) {
    Vector v = get(bf16, x, at, n);
    if (y) v += get(bf16, y, at, n);
    return v;
}

INLINE void norm_row(int bf16, long D, float eps, long at, const void *x, const void *y, const void *weight,
                     void *total, void *normed, float *squares) {
    Vector sum = all(0);
    for (long i = 0; i < D; i += WIDTH) {
        Vector v = sum_at(bf16, x, y, at + i, D - i);
        sum += v * v;
    }
    *squares = sum_of(sum);
    float scale = 1 / sqrtf(*squares / D + eps);
    for (long i = 0; i < D; i += WIDTH) {
        Vector v = sum_at(bf16, x, y, at + i, D - i);
        if (total) put(bf16, total, at + i, D - i, v);
        put(bf16, normed, at + i, D - i, v * scale * get(bf16, weight, i, D - i));
    }
}

/* x, y, total and normed (N, D), squares (N,); y and total may be NULL. */
void add_rms_norm(long threads, long bf16, long N, long D, double eps, const void *x, const void *y, const void *weight,
                  void *total, void *normed, float *squares) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < N; row++)
        EITHER(norm_row, D, eps, row * D, x, y, weight, total, normed, squares + row);
}

INLINE void norm_row_backward(int bf16, long D, float eps, long at, const void *grad_total, const void *grad,
                              const void *x, const void *weight, float squares, void *grad_x, float *grad_weight) {
    float scale = 1 / sqrtf(squares / D + eps);
    Vector sum = all(0);
    for (long i = 0; i < D; i += WIDTH) {
        Vector to_unit = get(bf16, grad, at + i, D - i), unit = get(bf16, x, at + i, D - i) * scale;
        put(0, grad_weight, i, D - i, get(0, grad_weight, i, D - i) + to_unit * unit);
        sum += to_unit * get(bf16, weight, i, D - i) * unit;
    }
    float mean = sum_of(sum) / D;
    for (long i = 0; i < D; i += WIDTH) {
        Vector to_unit = get(bf16, grad, at + i, D - i) * get(bf16, weight, i, D - i);
        Vector v = (to_unit - get(bf16, x, at + i, D - i) * scale * mean) * scale;
        if (grad_total) v += get(bf16, grad_total, at + i, D - i);
        put(bf16, grad_x, at + i, D - i, v);
    }
}

/* grad_total, which may be NULL, grad, x and grad_x (N, D); grad_weight (blocks, D), a sum for each `length` rows. */
void add_rms_norm_backward(long threads, long bf16, long N, long D, long length, double eps, const void *grad_total,
                           const void *grad, const void *x, const void *weight, const float *squares, void *grad_x,
                           float *grad_weight) {
#pragma omp parallel for num_threads(threads)
    for (long start = 0; start < N; start += length) {
        float *sums = grad_weight + start / length * D;
        memset(sums, 0, D * sizeof(float));
        for (long row = start; row < N && row < start + length; row++)
            EITHER(norm_row_backward, D, eps, row * D, grad_total, grad, x, weight, squares[row], grad_x, sums);
    }
}

/* ------------------------------------------------------------------------------------ gated linear units: act(gate) up */

INLINE Vector sigmoid(Vector x) { return all(1) / (1 + exponential(-x)); }

/* SiLU or, where `gelu`, GELU by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415); its derivative in `slope`. */
INLINE Vector activation(int gelu, Vector x, Vector *slope) {
    if (gelu) {
        Vector near = smaller(all(20), larger(all(-20), x)), square = near * near; /* beyond, tanh is 1 or -1 */
        Vector t = hyperbolic_tangent(0.7978845608f * near * (1 + 0.044715f * square));
        *slope = 0.5f * (1 + t) + 0.5f * near * (1 - t * t) * 0.7978845608f * (1 + 0.134145f * square);
        return 0.5f * x * (1 + t);
    }
    Vector share = sigmoid(x);
    *slope = share * (1 + x * (1 - share));
    return x * share;
}

INLINE void gate_row(int bf16, int gelu, long F, long row, const void *x, void *y) {
    for (long i = 0; i < F; i += WIDTH) {
        Vector gate = get(bf16, x, 2 * row * F + i, F - i), up = get(bf16, x, (2 * row + 1) * F + i, F - i), slope;
        put(bf16, y, row * F + i, F - i, up * activation(gelu, gate, &slope));
    }
}

/* x (N, 2 F), gate and up; y (N, F). */
void gate_product(long threads, long bf16, long N, long F, long gelu, const void *x, void *y) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < N; row++) gelu ? EITHER(gate_row, 1, F, row, x, y) : EITHER(gate_row, 0, F, row, x, y);
}

INLINE void gate_row_backward(int bf16, int gelu, long F, long row, const void *grad, const void *x, void *grad_x) {
    for (long i = 0; i < F; i += WIDTH) {
        long at = 2 * row * F + i, n = F - i;
        Vector gate = get(bf16, x, at, n), up = get(bf16, x, at + F, n), to_y = get(bf16, grad, row * F + i, n), slope;
        Vector active = activation(gelu, gate, &slope);
        put(bf16, grad_x, at, n, to_y * up * slope);
        put(bf16, grad_x, at + F, n, to_y * active);
    }
}

void gate_product_backward(long threads, long bf16, long N, long F, long gelu, const void *grad, const void *x,
                           void *grad_x) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < N; row++)
        gelu ? EITHER(gate_row_backward, 1, F, row, grad, x, grad_x)
             : EITHER(gate_row_backward, 0, F, row, grad, x, grad_x);
}

/* ------------------------------------------------------------------------------------------------------------- rotary */

INLINE void turn(int bf16, long d, const void *x, long at, void *y, long to, const float *cos, const float *sin,
                 float way) {
    for (long i = 0; i < d / 2; i += WIDTH) {
        long n = d / 2 - i;
        Vector left = get(bf16, x, at + i, n), right = get(bf16, x, at + d / 2 + i, n);
        Vector c = get(0, cos, i, n), s = get(0, sin, i, n) * way;
        put(bf16, y, to + i, n, left * c - right * s);
        put(bf16, y, to + d / 2 + i, n, right * c + left * s);
    }
}

INLINE void copy(int bf16, long d, const void *x, long at, void *y, long to) {
    for (long i = 0; i < d; i += WIDTH) put(bf16, y, to + i, d - i, get(bf16, x, at + i, d - i));
}

/* A token's heads: those of q and k turned by its position and v's as they are, out of qkv or, if `back`, into it. */
INLINE void rotate_row(int bf16, long H, long K, long d, int back, long row, const float *cos, const float *sin,
                       void *qkv, void *q, void *k, void *v) {
    void *parts[] = {q, k, v};
    long heads[] = {H, K, K}, at = row * (H + 2 * K) * d;
    for (int part = 0; part < 3; part++)
        for (long head = row * heads[part]; head < (row + 1) * heads[part]; head++, at += d) {
            const void *from = back ? parts[part] : qkv;
            void *to = back ? qkv : parts[part];
            long source = back ? head * d : at, target = back ? at : head * d;
            if (part < 2)
                turn(bf16, d, from, source, to, target, cos, sin, back ? -1 : 1);
            else
                copy(bf16, d, from, source, to, target);
        }
}

/* qkv (N, H + 2 K, d), q (N, H, d), k and v (N, K, d) of N tokens in sequences of T; cos and sin (T, d / 2). */
void rotate_qkv(long threads, long bf16, long N, long T, long H, long K, long d, long back, const float *cos,
                const float *sin, void *qkv, void *q, void *k, void *v) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < N; row++) {
        long angle = row % T * (d / 2);
        EITHER(rotate_row, H, K, d, back, row, cos + angle, sin + angle, qkv, q, k, v);
    }
}

/* --------------------------------------------------------------------------------------------------------------- loss */

INLINE float log_sum_exp(int bf16, long v, long at, const void *logits) {
    Vector top = all(-INFINITY), sum = all(0);
    for (long i = 0; i < v; i += WIDTH)
        top = choose(first(v - i), larger(get(bf16, logits, at + i, v - i), top), top);
    float greatest = largest_of(top);
    for (long i = 0; i < v; i += WIDTH)
        sum += choose(first(v - i), exponential(get(bf16, logits, at + i, v - i) - greatest), all(0));
    return greatest + logf(sum_of(sum));
}

INLINE float one(int bf16, const void *x, long at) { return get(bf16, x, at, 1)[0]; }

/* logits (c, v), local (c,) column of each target, outside where it is another rank's; lse and at_target (c,). */
void statistics(long threads, long bf16, long c, long v, const void *logits, const int64_t *local, float *lse,
                float *at_target) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < c; row++) {
        lse[row] = EITHER(log_sum_exp, v, row * v, logits);
        int inside = local[row] >= 0 && local[row] < v;
        at_target[row] = inside ? EITHER(one, logits, row * v + local[row]) : 0;
    }
}

INLINE void gradient_row(int bf16, long v, long at, long target, float lse, float scale, void *logits) {
    int inside = target >= 0 && target < v;
    float at_target = inside ? one(bf16, logits, at + target) : 0;
    for (long i = 0; i < v; i += WIDTH)
        put(bf16, logits, at + i, v - i, exponential(get(bf16, logits, at + i, v - i) - lse) * scale);
    if (inside) put(bf16, logits, at + target, 1, all((expf(at_target - lse) - 1) * scale));
}

/* In place: scale * (exp(logits - lse) - 1 at the target). */
void logit_gradient(long threads, long bf16, long c, long v, double scale, void *logits, const float *lse,
                    const int64_t *local) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < c; row++) EITHER(gradient_row, v, row * v, local[row], lse[row], scale, logits);
}
