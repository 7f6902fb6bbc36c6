// Rows of tensors in float32: widened, narrowed and transposed.
#pragma once
#include "threads.h"

namespace ISA {
namespace {

enum Dtype : Size { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BOOL = 3, FLOAT64 = 4 };  // the last two of masks alone

// (B, H, N, *) with a last stride of 1; strides count elements.
struct StridedTensor {
    void* data;
    Size stride_b, stride_h, stride_n;
    FIELDS(data, stride_b, stride_h, stride_n)
    Size at(Size b, Size h, Size n) const { return b * stride_b + h * stride_h + n * stride_n; }
};

static constexpr Size bytes_of(Size dtype) { return dtype == FLOAT32 ? 4 : dtype == BOOL ? 1 : 2; }
INLINE const void* element(const void* data, Size dtype, Size index) { return (const char*)data + index * bytes_of(dtype); }
INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
INLINE float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    return as_float(sign | as_bits(as_float(magnitude << 13) * 5.192296858534828e33f));  // 2^112
}
INLINE uint16_t float_to_half(float x) {  // rounds to nearest even
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;                                        // 65520 and above
    if (bits < 0x38800000) return sign | (as_bits(as_float(bits) + 0.5f) - 0x3f000000);  // below 2^-14: the sum rounds
    return sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
INLINE uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = as_bits(x);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// The rows [first, first + rows) of a tile, which are rounded up to GROUP: `width`. All rows are shared out evenly, in groups.
struct RowTile {
    Size first, rows, width;
};
INLINE Size row_tiles(Size rows, Size most) { return (rows + most - 1) / most; }
INLINE RowTile row_tile(Size rows, Size most, Size index) {
    const Size groups = (rows + GROUP - 1) / GROUP, tiles = row_tiles(rows, most);
    const Size first = share(groups, index, tiles) * GROUP, last = least(share(groups, index + 1, tiles) * GROUP, rows);
    return {first, last - first, round_up(last - first, GROUP)};
}

// ---- VL numbers of 16 bits

typedef uint16_t Halves __attribute__((vector_size(VL * 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(VL * 2), aligned(2), may_alias));
INLINE Halves load(const uint16_t* p) { return *(const UnalignedHalves*)p; }
INLINE void store(uint16_t* p, Halves x) { *(UnalignedHalves*)p = x; }
INLINE Halves load_some(const uint16_t* p, Size n) {  // n < VL numbers, and zeros
#if VL == 16
    return (Halves)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
#else
    return first_numbers<Halves>(p, n);
#endif
}
INLINE Words as_words(Halves x) {
#if VL == 16
    return (Words)_mm512_cvtepu16_epi32((__m256i)x);  // GCC makes seven instructions of the last line
#elif VL == 8
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}
INLINE Vector widened(Halves x, bool is_bfloat16) {
    if (is_bfloat16) return (Vector)(as_words(x) << 16);
#if VL == 16
    return _mm512_cvtph_ps((__m256i)x);
#elif VL == 8
    return _mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u16(x));
#else  // half_to_float
    const Words magnitude = as_words(x) & 0x7fff, sign = (as_words(x) & 0x8000) << 16;
    const Words finite = (Words)((Vector)(magnitude << 13) * 5.192296858534828e33f), other = 0x7f800000 | (magnitude & 0x3ff)
                                                                                                              << 13;
    return (Vector)(sign | (magnitude >= 0x7c00 ? other : finite));
#endif
}

// n elements into float32
static void widen(const void* from, Size dtype, Size n, float* to) {
    if (n == 0) return;  // an empty tensor has no address
    if (dtype == FLOAT32) {
        memcpy(to, from, n * sizeof(float));
        return;
    }
    const uint16_t* x = (const uint16_t*)from;
    Size i = 0;
    for (; i + VL <= n; i += VL) store(to + i, widened(load(x + i), dtype == BFLOAT16));
    for (; i < n; ++i) to[i] = dtype == BFLOAT16 ? as_float((uint32_t)x[i] << 16) : half_to_float(x[i]);
}

// n elements of float32 into `dtype`
static void narrow(const float* from, Size n, Size dtype, void* to) {
    if (n == 0) return;
    if (dtype == FLOAT32) {
        memcpy(to, from, n * sizeof(float));
        return;
    }
    uint16_t* x = (uint16_t*)to;
    if (dtype == BFLOAT16) {
        for (Size i = 0; i < n; ++i) x[i] = float_to_bfloat16(from[i]);
        return;
    }
    Size i = 0;
#if VL == 16
    for (; i + VL <= n; i += VL)
        _mm256_storeu_si256((__m256i*)(x + i), _mm512_cvtps_ph(load(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif VL == 8
    for (; i + VL <= n; i += VL) _mm_storeu_si128((__m128i*)(x + i), _mm256_cvtps_ph(load(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    for (; i + VL <= n; i += VL) vst1_u16(x + i, vreinterpret_u16_f16(vcvt_f16_f32(load(from + i))));
#endif
    for (; i < n; ++i) x[i] = float_to_half(from[i]);
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourIntegers __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FourIntegers){__VA_ARGS__})
#endif

// to (columns, rows) = x (rows, columns) transposed, by four at most
static void transpose_few(const float* x, Size ldx, Size rows, Size columns, float* to, Size ldto) {
    const Size rows4 = rows / 4 * 4, columns4 = columns / 4 * 4;
    for (Size r = 0; r < rows4; r += 4)
        for (Size c = 0; c < columns4; c += 4) {
            const float* p = x + r * ldx + c;
            const Four a = *(const Four*)p, b = *(const Four*)(p + ldx), d = *(const Four*)(p + 2 * ldx),
                       e = *(const Four*)(p + 3 * ldx);
            const Four ab = SHUFFLE(a, b, 0, 4, 1, 5), ab2 = SHUFFLE(a, b, 2, 6, 3, 7);
            const Four de = SHUFFLE(d, e, 0, 4, 1, 5), de2 = SHUFFLE(d, e, 2, 6, 3, 7);
            float* q = to + c * ldto + r;
            *(Four*)q = SHUFFLE(ab, de, 0, 1, 4, 5);
            *(Four*)(q + ldto) = SHUFFLE(ab, de, 2, 3, 6, 7);
            *(Four*)(q + 2 * ldto) = SHUFFLE(ab2, de2, 0, 1, 4, 5);
            *(Four*)(q + 3 * ldto) = SHUFFLE(ab2, de2, 2, 3, 6, 7);
        }
    for (Size r = 0; r < rows; ++r)
        for (Size c = r < rows4 ? columns4 : 0; c < columns; ++c) to[c * ldto + r] = x[r * ldx + c];
}

#if VL > 4
#if VL == 16
#define WIDE(name) _mm512_##name
#else
#define WIDE(name) _mm256_##name
#endif
// Four numbers of every fourth row from p
INLINE Vector every_fourth(const float* p, Size ld) {
#if VL == 16
    Vector x = _mm512_castps128_ps512(_mm_loadu_ps(p));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 4 * ld), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 8 * ld), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(p + 12 * ld), 3);
#else
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
#endif
}
INLINE void transpose_block(const float* x, Size ldx, float* to, Size ldto) {  // (VL, VL)
#pragma GCC unroll 4
    for (int c = 0; c < VL; c += 4) {
        const Vector a = every_fourth(x + c, ldx), b = every_fourth(x + ldx + c, ldx);
        const Vector d = every_fourth(x + 2 * ldx + c, ldx), e = every_fourth(x + 3 * ldx + c, ldx);
        const Vector ab = WIDE(unpacklo_ps)(a, b), ab2 = WIDE(unpackhi_ps)(a, b), de = WIDE(unpacklo_ps)(d, e),
                     de2 = WIDE(unpackhi_ps)(d, e);
        float* q = to + c * ldto;
        store(q, WIDE(shuffle_ps)(ab, de, 0x44));
        store(q + ldto, WIDE(shuffle_ps)(ab, de, 0xee));
        store(q + 2 * ldto, WIDE(shuffle_ps)(ab2, de2, 0x44));
        store(q + 3 * ldto, WIDE(shuffle_ps)(ab2, de2, 0xee));
    }
}
#endif

// to (columns, rows) = x (rows, columns) transposed
static void transpose(const float* x, Size ldx, Size rows, Size columns, float* to, Size ldto) {
#if VL > 4
    const Size wide_rows = rows / VL * VL, wide_columns = columns / VL * VL;
    for (Size c = 0; c < wide_columns; c += VL)
        for (Size r = 0; r < wide_rows; r += VL) transpose_block(x + r * ldx + c, ldx, to + c * ldto + r, ldto);
    transpose_few(x + wide_columns, ldx, wide_rows, columns - wide_columns, to + wide_columns * ldto, ldto);
    x += wide_rows * ldx, to += wide_rows, rows -= wide_rows;
#endif
    transpose_few(x, ldx, rows, columns, to, ldto);
}

}  // namespace
}  // namespace ISA
