/* Float32 by the vector, 16 in AVX-512 and 8 in AVX2; read from and written to float32 or, where `bf16`, bfloat16.

Both halves have the same functions. `first(n)` is a mask of the first n places; n may be negative, or beyond the last.
*/

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__

enum { WIDTH = 16, ROWS = 8 }; /* rows of a matrix product's tile: its sums take 16 of the 32 registers */
typedef __m512 Vector;
typedef __mmask16 Mask;

INLINE Vector all(float x) { return _mm512_set1_ps(x); }
INLINE Vector load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store(float *x, Vector v) { _mm512_storeu_ps(x, v); }
INLINE Mask first(long n) { return n >= WIDTH ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }
INLINE Vector choose(Mask mask, Vector yes, Vector no) { return _mm512_mask_blend_ps(mask, no, yes); }
INLINE Mask at_least(Vector x, float y) { return _mm512_cmp_ps_mask(x, all(y), _CMP_NLT_UQ); } /* or no number */
INLINE Vector larger(Vector x, Vector y) { return _mm512_max_ps(x, y); }
INLINE Vector smaller(Vector x, Vector y) { return _mm512_min_ps(x, y); } /* y where one is no number */
INLINE float sum_of(Vector v) { return _mm512_reduce_add_ps(v); }
INLINE float largest_of(Vector v) { return _mm512_reduce_max_ps(v); }
INLINE Vector nearest(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vector times_power_of_two(Vector x, Vector n) { return _mm512_maskz_scalef_ps(0xffff, x, n); }

/* The first n elements from x[at] on; zeros beyond. */
INLINE Vector get(int bf16, const void *x, long at, long n) {
    if (!bf16) return _mm512_maskz_loadu_ps(first(n), (const float *)x + at);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), (const uint16_t *)x + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* The first n elements into x[at] and on; bfloat16 to the nearest, ties to even. */
INLINE void put(int bf16, void *x, long at, long n, Vector v) {
    if (!bf16) {
        _mm512_mask_storeu_ps((float *)x + at, first(n), v);
        return;
    }
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_mask_storeu_epi16((uint16_t *)x + at, first(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

#else

enum { WIDTH = 8, ROWS = 4 }; /* 8 of the 16 registers */
typedef __m256 Vector;
typedef __m256 Mask;

INLINE Vector all(float x) { return _mm256_set1_ps(x); }
INLINE Vector load(const float *x) { return _mm256_loadu_ps(x); }
INLINE void store(float *x, Vector v) { _mm256_storeu_ps(x, v); }
INLINE Mask first(long n) {
    int count = n > WIDTH ? WIDTH : n < 0 ? 0 : n;
    __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), places));
}
INLINE Vector choose(Mask mask, Vector yes, Vector no) { return _mm256_blendv_ps(no, yes, mask); }
INLINE Mask at_least(Vector x, float y) { return _mm256_cmp_ps(x, all(y), _CMP_NLT_UQ); }
INLINE Vector larger(Vector x, Vector y) { return _mm256_max_ps(x, y); }
INLINE Vector smaller(Vector x, Vector y) { return _mm256_min_ps(x, y); }
INLINE float sum_of(Vector v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
INLINE float largest_of(Vector v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INLINE Vector nearest(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vector power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
INLINE Vector times_power_of_two(Vector x, Vector n) { /* in two steps: 2^128 alone is no float32 */
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return x * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}

INLINE Vector get(int bf16, const void *x, long at, long n) {
    if (!bf16 && n >= WIDTH) return load((const float *)x + at);
    if (!bf16) return _mm256_maskload_ps((const float *)x + at, _mm256_castps_si256(first(n)));
    uint16_t part[WIDTH] = {0};
    if (n > 0) memcpy(part, (const uint16_t *)x + at, 2 * (n < WIDTH ? n : WIDTH));
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)part));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

INLINE void put(int bf16, void *x, long at, long n, Vector v) {
    if (!bf16 && n >= WIDTH) {
        store((float *)x + at, v);
        return;
    }
    if (!bf16) {
        _mm256_maskstore_ps((float *)x + at, _mm256_castps_si256(first(n)), v);
        return;
    }
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_srli_epi32(bits, 16);
    __m128i part = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    if (n > 0) memcpy((uint16_t *)x + at, &part, 2 * (n < WIDTH ? n : WIDTH));
}

#endif

/* e^x: 2^n times Cephes' polynomial in the rest, |rest| <= ln(2) / 2; zero where it would be denormal, which is slow. */
INLINE Vector exponential(Vector x) {
    Mask normal = at_least(x, -87.0f);
    x = smaller(all(89.0f), x); /* beyond, infinity; NaN stays */
    Vector n = nearest(x * 1.44269504f);
    Vector rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    return choose(normal, times_power_of_two(p * rest * rest + rest + 1.0f, n), all(0.0f));
}

/* To 1e-7 absolutely. */
INLINE Vector hyperbolic_tangent(Vector x) { return 1 - 2 / (exponential(2 * x) + 1); }
