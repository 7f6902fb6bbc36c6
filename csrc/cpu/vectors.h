// Vectors of float32 in the width that the translation unit is compiled for, and the functions of one number on them.
//
// Each operator's source is compiled once per instruction set, with -DISA=v4_bf16 (library.cmake has all), and everything lies in a
// namespace of that name: an inline function that two translation units share would be linked once, with the instructions of
// either. For the same reason nothing here comes from the C++ library.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// A library that is built with glibc 2.29 or later runs with older ones: newer exp and log differ in errno alone.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5\n.symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17\n.symver log, log@GLIBC_2.17");
#endif

#if defined(__AVX512F__)
#define VL 16  // lanes of a vector
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif
#define METHOD inline __attribute__((always_inline))
#define INLINE static METHOD

namespace ISA {
namespace {

typedef int64_t Size;
template <int N> struct Constant {
    static constexpr int value = N;
};
typedef float Vector __attribute__((vector_size(VL * 4)));
typedef int32_t Integers __attribute__((vector_size(VL * 4)));
typedef uint32_t Words __attribute__((vector_size(VL * 4)));
typedef float Unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
static const Size GROUP = 16;  // rows are padded to a multiple of this: one line of the cache, whatever the vectors are

INLINE Vector load(const float* p) { return *(const Unaligned*)p; }
INLINE void store(float* p, Vector x) { *(Unaligned*)p = x; }
template <class Numbers, class T> INLINE Numbers first_numbers(const T* p, Size n) {
    Numbers x = {};
    for (int i = 0; i < VL - 1; ++i)
        if (i < n) x[i] = p[i];
    return x;
}
INLINE Vector load_some(const float* p, Size n) {  // n < VL numbers, and zeros
#if VL == 16
    return _mm512_maskz_loadu_ps((1u << n) - 1, p);
#elif VL == 8
    const __m256i lanes = {0x100000000, 0x300000002, 0x500000004, 0x700000006};
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes));
#else
    return first_numbers<Vector>(p, n);
#endif
}
INLINE Vector gather(const float* table, const int32_t* index) {  // table[index[0]], ...
#if VL == 16
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), table, 4);
#elif VL == 8
    return _mm256_i32gather_ps(table, _mm256_loadu_si256((const __m256i*)index), 4);
#else
    Vector x;
    for (int i = 0; i < VL; ++i) x[i] = table[index[i]];
    return x;
#endif
}
INLINE Vector splat(float x) { return x - Vector{}; }  // -0.0 stays -0.0

// The second argument where either is NaN, as the instructions of x86 have it: an accumulator that comes first takes up a NaN.
INLINE Vector minimum(Vector a, Vector b) {
#if VL == 16
    return _mm512_min_ps(a, b);
#elif VL == 8
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
INLINE Vector maximum(Vector a, Vector b) {
#if VL == 16
    return _mm512_max_ps(a, b);
#elif VL == 8
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
INLINE Vector absolute(Vector x) { return (Vector)((Integers)x & 0x7fffffff); }
// The bfloat16 numbers in the upper halves, as the processor's products of bfloat16 read them: subnormal numbers count as 0.
INLINE Vector bfloat16_lanes(Words bits) {
    const Vector x = (Vector)(bits & 0xffff0000);
    return absolute(x) < splat(FLT_MIN) ? Vector{} : x;
}

// The first n lanes of x, and 0 in the others, whatever they hold
INLINE Vector first_lanes(Vector x, Size n) {
    Integers lane;
    for (int i = 0; i < VL; ++i) lane[i] = i;
    const Integers inside = lane < Integers{} + (int32_t)n;
    return inside ? x : Vector{};
}

INLINE float sum(Vector x) {
#if VL == 16
    return _mm512_reduce_add_ps(x);  // in the order of the loop below, without its way through memory
#else
    float s[VL];
    store(s, x);
    for (int width = VL / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
#endif
}
// to = the sums of four vectors, with fewer instructions than four times `sum`
INLINE void sums_of_four(const Vector (&x)[4], float* to) {
#if VL == 16
    const Vector ab = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
    const Vector cd = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
    const Vector all =
        (Vector)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (Vector)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    const __m256 half = _mm512_castps512_ps256(all) + (__m256)_mm512_extractf64x4_pd((__m512d)all, 1);
    _mm_storeu_ps(to, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif VL == 8
    const Vector ab = _mm256_unpacklo_ps(x[0], x[1]) + _mm256_unpackhi_ps(x[0], x[1]);
    const Vector cd = _mm256_unpacklo_ps(x[2], x[3]) + _mm256_unpackhi_ps(x[2], x[3]);
    const Vector all =
        (Vector)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd) + (Vector)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd);
    _mm_storeu_ps(to, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
#else
    for (int i = 0; i < 4; ++i) to[i] = sum(x[i]);
#endif
}
INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN where either is NaN
INLINE float largest(Vector x) {  // NaN where a lane is NaN
#if VL == 16
    return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps(x);
#else
    float s = x[0];
    for (int i = 1; i < VL; ++i) s = larger(s, x[i]);
    return s;
#endif
}

// f(0) + ... + f(n - 1) as a sum of sums of SHORT terms: equal terms would round the same way each time
static const Size SHORT_SUM = 32;
template <Size SHORT = SHORT_SUM, class F> INLINE Vector sum_over(Size n, const F& f) {
    Vector total = Vector{};
    for (Size chunk = 0; chunk < n; chunk += SHORT) {
        Vector part = Vector{};
        for (Size i = chunk; i < (chunk + SHORT < n ? chunk + SHORT : n); ++i) part += f(i);
        total += part;
    }
    return total;
}
// The largest of n > 0 vectors
INLINE Vector top_of(const float* S, Size n, Size stride) {
    Vector top = load(S);
    for (Size i = 1; i < n; ++i) top = maximum(top, load(S + i * stride));
    return top;
}

// x = n ln 2 + r with |r| <= ln 2 / 2, for x in [-87.33, 88.72283]: r and the bits of 2^n. NaN gives r = NaN.
struct Reduced {
    Vector r;
    Words scale;
};
INLINE Reduced reduce(Vector x) {
    const Vector shifter = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Vector shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    const Vector r = x - n * 0.693359375f;  // ln 2 in two parts, the first with few bits, so that the product is exact
    return {r - n * -2.12194440e-4f, ((Words)shifted << 23) + 0x3f800000u};
}
static const float LARGEST_REDUCED = 0.346f;  // a little less than ln 2 / 2
// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, 1/2 at 0: with it 1 + r + r^2 p has the least largest error of e^r, 4e-9
INLINE Vector exp_curve(Vector r) {
    Vector p = splat(1.3863756964e-3f);
    p = p * r + 8.3675092467e-3f;
    p = p * r + 4.1667238773e-2f;
    p = p * r + 1.6666533803e-1f;
    return p * r + 0.5f;
}
// e^r - 1 for |r| <= ln 2 / 2
INLINE Vector expm1_reduced(Vector r) { return exp_curve(r) * (r * r) + r; }
// e^x to 1 ulp for |x| <= 87, where 2^n is a normal number
INLINE Vector exp_bounded(Vector x) {
    const Reduced c = reduce(x);
    return expm1_reduced(c.r) * (Vector)c.scale + (Vector)c.scale;
}
// e^x to 1 ulp for x <= 0: 0 below -87.3, NaN for NaN
INLINE Vector exp_negative(Vector x) {
    const Vector lowest = splat(-87.33f);
    Vector y = exp_bounded(maximum(lowest, x));
    return x < lowest ? Vector{} : y;
}
// to = e^(S - top), n vectors, and their sum. `to` may be S.
INLINE Vector exponentials(const float* S, Size n, Size stride, Vector top, float* to) {
    return sum_over<64>(n, [=](Size i) {
        const Vector e = exp_negative(load(S + i * stride) - top);
        store(to + i * stride, e);
        return e;
    });
}
// e^x to 1 ulp: 0 below -87.3, Inf above 88.7
INLINE Vector exp_all(Vector x) {
    const Vector lowest = splat(-87.33f), highest = splat(88.72283f);
    const Reduced c = reduce(minimum(highest, maximum(lowest, x)));
    const Vector first = (Vector)(c.scale - (1u << 23));  // 2^(n - 1): 2^128 is not a number
    Vector y = expm1_reduced(c.r) * first + first;
    y = x < lowest ? Vector{} : y + y;
    return x > highest ? splat(INFINITY) : y;
}
// 2^(a b) to 2 ulp for |a b| <= 126; where there are fused multiply-adds a b is not rounded
INLINE Vector exp2_product(Vector a, Vector b) {
    const Vector shifter = splat(12582912.f), shifted = a * b + shifter, r = a * b - (shifted - shifter);
    Vector p = splat(1.5353258118e-4f);  // 2^r = 1 + r p(r) with the least largest error, 2e-9
    p = p * r + 1.3399003605e-3f;
    p = p * r + 9.6184386017e-3f;
    p = p * r + 5.5503321626e-2f;
    p = p * r + 2.4022647897e-1f;
    p = p * r + 6.9314720299e-1f;
    const Vector scale = (Vector)(((Words)shifted << 23) + 0x3f800000u);
    return p * r * scale + scale;
}
// e^x to 3e-6, a seven-hundredth of what bfloat16 rounds off, for x <= 0: exactly 1 for 0, exactly 0 below -87, NaN for NaN, and never
// subnormal, which costs processors a hundred cycles
INLINE Vector exp_to_round(Vector x) {
    const Vector power = maximum(splat(-87.f), x), log2e = splat(1.44269504f), shifter = splat(12582912.f + 126.f);
    const Vector shifted = power * log2e + shifter, r = power * log2e - (shifted - shifter);
    Vector p = splat(1.9165706338e-2f);  // 2^(r + 1) = 2 + r p(r) with the least largest error
    p = p * r + 1.1181285007e-1f;
    p = p * r + 4.8048197223e-1f;
    p = p * r + 1.3862483867f;
    return (p * r + 2.f) * (Vector)((Words)shifted << 23);  // 2^(n - 1), or 0 for n = -126
}
// a b, rounded: no compiler fuses it with the sum that follows
INLINE Vector rounded_product(Vector a, Vector b) {
    Vector x = a * b;
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}
// e^x - 1 to 2 ulp for |x| <= 87
INLINE Vector expm1_bounded(Vector x) {
    const Reduced c = reduce(x);
    return expm1_reduced(c.r) * (Vector)c.scale + ((Vector)c.scale - 1.f);
}
// tanh x to 2 ulp, and to 1 ulp from 0.5 on, where 1 - tanh^2 x needs it
INLINE Vector tanh_all(Vector x) {
    const Vector size = absolute(x), e = expm1_bounded(minimum(splat(20.f), size + size));
    const Integers small = size < splat(0.5f);
    const Vector part = (small ? e : splat(-2.f)) / (e + 2.f), y = small ? part : 1.f + part;
    return (Vector)((Integers)y | ((Integers)x & (int32_t)0x80000000));
}
// 1 / (1 + e^-x) to 3 ulp where that is above 1e-37
INLINE Vector sigmoid(Vector x) { return 1.f / (exp_bounded(minimum(splat(87.f), maximum(splat(-87.f), -x))) + 1.f); }
// The natural logarithm to 2 ulp (Cephes' logf): -Inf for 0, NaN below
INLINE Vector log_all(Vector x) {
    Integers subnormal = x < splat(FLT_MIN);
    Vector scaled = subnormal ? x * 8388608.f : x;  // 2^23
    Integers bits = (Integers)scaled;
    Vector e = __builtin_convertvector(((bits >> 23) & 0xff) - 126, Vector) - (subnormal ? splat(23.f) : Vector{});
    Vector m = (Vector)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
    Integers low = m < splat(0.707106781f);
    e = e - (low ? splat(1.f) : Vector{});
    m = (low ? m + m : m) - 1.f;
    Vector p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    Vector square = m * m, y = p * m * square;
    y = y + e * -2.12194440e-4f;
    y = y - 0.5f * square;
    y = m + y + e * 0.693359375f;
    y = x == splat(INFINITY) ? x : y;
    y = x == Vector{} ? splat(-INFINITY) : y;
    return x >= Vector{} ? y : splat(NAN);
}
// ln(1 + x) to a few ulp for x > -1: the rounding of 1 + x is made good by the factor
INLINE Vector log1p_all(Vector x) {
    const Vector u = x + 1.f, rounded = u - 1.f;
    return rounded == Vector{} ? x : log_all(u) * (x / rounded);
}

}  // namespace
}  // namespace ISA
