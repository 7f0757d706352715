/* Sixteen float32 at a time, in AVX-512; read from and written to float32 or, where `bf16`, bfloat16. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { WIDTH = 16 };
typedef __m512 Vector;

INLINE Vector all(float x) { return _mm512_set1_ps(x); }
INLINE Vector load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store(float *x, Vector v) { _mm512_storeu_ps(x, v); }

/* The first n of sixteen places; n may be negative, or more than that. */
INLINE __mmask16 first(long n) { return n >= WIDTH ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }

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

/* e^x: 2^n times Cephes' polynomial in the rest, |rest| <= ln(2) / 2; zero where it would be denormal, which is slow. */
INLINE Vector exponential(Vector x) {
    __mmask16 normal = _mm512_cmp_ps_mask(x, all(-87.0f), _CMP_NLT_UQ); /* or no number */
    x = _mm512_min_ps(all(89.0f), x);                                   /* beyond, infinity; NaN stays */
    Vector n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vector rest = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    return _mm512_maskz_scalef_ps(normal, p * rest * rest + rest + 1.0f, n);
}
