// cvt. Plain operands say how a conversion rounds, whether it flushes subnormal numbers (ftz), and what it does with numbers that
// are too large; see the rows of opcodes.txt for their order.
#include <algorithm>
#include <cfenv>

#include "lanes.h"

namespace ptx {
namespace {

template <class T> constexpr bool IS_FLOATING = std::is_floating_point_v<T> || std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T> constexpr bool IS_HALF = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

// ---- between integers: cut or extended, or with `sat` clamped

template <class D, class T> void between_integers(Warp& w, const Instruction& i, u32 lanes) {  // plain: sat
    using Limits = std::numeric_limits<D>;
    const bool clamps = i.operands[0];
    auto a = values<T>(w, i.operands[2]);
    write_each<D>(w, i.operands[1], lanes, [=](int l) {
        const T x = a(l);
        if (!clamps) return (D)x;
        const __int128 wide = x;
        return (D)std::clamp<__int128>(wide, Limits::min(), Limits::max());
    });
}

// ---- to integers: clamped; NaN gives 0, or the highest bit alone where one of the two has 64 bits

template <class D> D integer_of(double x, int rounding, bool nan_is_zero) {
    using Limits = std::numeric_limits<D>;
    if (x != x) return nan_is_zero ? 0 : (D)((std::make_unsigned_t<D>)1 << (8 * sizeof(D) - 1));
    const double y = to_integer(x, rounding);
    if (y <= (double)Limits::min()) return Limits::min();
    return y >= (double)Limits::max() ? Limits::max() : (D)y;
}
template <class D, class T> void to_integers(Warp& w, const Instruction& i, u32 lanes) {  // plain: rounding, ftz, sat
    const int rounding = i.operands[0];
    const bool flush = i.operands[1];
    auto a = values<T>(w, i.operands[4]);
    write_each<D>(w, i.operands[3], lanes, [=](int l) {
        auto x = a(l);
        if constexpr (std::is_same_v<T, float>) x = flush ? flushed(x) : x;
        return integer_of<D>((double)x, rounding, sizeof(D) < 8 && !std::is_same_v<T, double>);
    });
}

// ---- from integers

// In one rounding by the processor, which is told how; noipa keeps the conversion in its place.
template <class D, class T> [[gnu::noipa]] D converted(T x) { return (D)x; }
class RoundingMode {
   public:
    explicit RoundingMode(int rounding) {
        constexpr int MODES[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
        std::fesetround(MODES[rounding]);
    }
    ~RoundingMode() { std::fesetround(FE_TONEAREST); }
};
template <class D, class T> D rounded_by_processor(T x, int rounding) {
    if (rounding == NEAREST) return (D)x;
    RoundingMode mode(rounding);
    return converted<D>(x);
}
// As a double, whose last bit says that there was a rest: a second rounding to fewer bits is then that of the number itself.
template <class T> double with_sticky_bit(T x) {
    if constexpr (sizeof(T) < 8) return (double)x;
    const double cut = rounded_by_processor<double>(x, TO_ZERO);
    return (__int128)cut == (__int128)x ? cut : bits_as<double>(bits_as<u64>(cut) | 1);
}
template <class D, class T> void from_integers(Warp& w, const Instruction& i, u32 lanes) {  // plain: rounding, ftz, sat
    const int rounding = i.operands[0];
    const bool saturates = i.operands[2];
    auto a = values<T>(w, i.operands[4]);
    write_each<D>(w, i.operands[3], lanes, [=](int l) {
        if constexpr (IS_HALF<D>) {
            const float x = to_float(narrowed<D>(with_sticky_bit(a(l)), rounding));
            return saturates ? saturated(x) : x;
        } else {
            const D x = rounded_by_processor<D>(a(l), rounding);
            return saturates ? (D)saturated((float)x) : x;
        }
    });
}

// ---- between floating-point numbers

template <class T> T bounded(T x) { return x > 0 ? (x < 1 ? x : T(1)) : T(0); }
// To the same or a wider type. `operands` are destination and source; round: 0, or 1 + how it rounds to an integer.
template <class D, class T> void widen(Warp& w, const s32* operands, u32 lanes, int round, bool flush, bool saturates) {
    auto a = values<T>(w, operands[1]);
    write_each<D>(w, operands[0], lanes, [=](int l) {
        auto x = a(l);
        if constexpr (std::is_same_v<T, float>) x = flush ? flushed(x) : x;
        using Value = decltype(Type<D>::get(Lane<D>()));
        Value y = round ? (Value)to_integer(x, round - 1) : (Value)x;
        return saturates ? bounded(y) : y;
    });
}
template <class T> void same_float(Warp& w, const Instruction& i, u32 lanes) {  // plain: round, ftz, sat
    widen<T, T>(w, i.operands + 3, lanes, i.operands[0], i.operands[1], i.operands[2]);
}
void same_double(Warp& w, const Instruction& i, u32 lanes) {  // plain: round, sat
    widen<double, double>(w, i.operands + 2, lanes, i.operands[0], false, i.operands[1]);
}
void same_bf16(Warp& w, const Instruction& i, u32 lanes) {  // plain: round
    widen<bf16, bf16>(w, i.operands + 1, lanes, i.operands[0], false, false);
}
template <class D, class T> void wider(Warp& w, const Instruction& i, u32 lanes) {  // plain: ftz, sat
    widen<D, T>(w, i.operands + 2, lanes, 0, i.operands[0], i.operands[1]);
}
void double_to_float(Warp& w, const Instruction& i, u32 lanes) {  // plain: rounding, ftz, sat
    const int rounding = i.operands[0];
    const bool flush = i.operands[1], saturates = i.operands[2];
    auto a = values<double>(w, i.operands[4]);
    write_each<float>(w, i.operands[3], lanes, [=](int l) {
        float x = rounded_by_processor<float>(a(l), rounding);
        if (flush) x = flushed(x);
        return saturates ? saturated(x) : x;
    });
}

// What a conversion to few bits does beside rounding.
struct Limits {
    bool relu, finite;
    explicit Limits(int modifiers) : relu(modifiers & 1), finite(modifiers & 2) {}  // ,relu,satfinite,relu.satfinite
};
double limited(const Format& format, double x, int rounding, Limits limits) {
    double y = rounded_to(format, x, rounding);
    if (limits.relu && y <= 0) y = 0;
    return limits.finite && y == y ? std::clamp(y, -format.largest, format.largest) : y;
}
template <class D, class T>
void to_half(Warp& w, const Instruction& i, u32 lanes) {  // plain: rounding, ftz, one of the row's modifiers
    const int rounding = i.operands[0], modifier = i.operands[2];
    const bool flush = i.operands[1];
    auto a = values<T>(w, i.operands[4]);
    const Limits limits(modifier < 2 ? 0 : modifier - 1);
    write_each<D>(w, i.operands[3], lanes, [=](int l) {
        double x = a(l);
        if (flush && std::is_same_v<T, float>) x = flushed((float)x);
        const double y = limited(FORMAT<D>, x, rounding, limits);
        return modifier == 1 ? saturated((float)y) : (float)y;
    });
}
template <class D>
void to_float_half(Warp& w, const Instruction& i, u32 lanes) {  // the same from f32; most round to nearest and no more
    if (i.operands[0] || i.operands[1] || i.operands[2]) return to_half<D, float>(w, i, lanes);
    auto a = values<float>(w, i.operands[4]);
    write_each<D>(w, i.operands[3], lanes, [=](int l) { return a(l); });
}
template <class D>
void to_halves(Warp& w, const Instruction& i, u32 lanes) {  // plain: rounding, modifiers; the first becomes the upper
    const int rounding = i.operands[0];
    const Limits limits(i.operands[1]);
    auto upper = values<float>(w, i.operands[3]), lower = values<float>(w, i.operands[4]);
    if (!rounding && !i.operands[1])
        return write_each<u32>(
            w, i.operands[2], lanes, [=](int l) { return (u32)narrowed<D>(upper(l)).bits << 16 | narrowed<D>(lower(l)).bits; });
    auto bits = [=](double x) { return (u32)narrowed<D>((float)limited(FORMAT<D>, x, rounding, limits)).bits; };
    write_each<u32>(w, i.operands[2], lanes, [=](int l) { return bits(upper(l)) << 16 | bits(lower(l)); });
}
void to_tf32(Warp& w, const Instruction& i,
             u32 lanes) {  // plain: rounding (to nearest even, to zero, half away from zero), modifiers
    const int rounding = i.operands[0];
    const Limits limits(i.operands[1]);
    const u32* a = lanes_of<u32>(w, i.operands[3]);
    write_each<u32>(w, i.operands[2], lanes, [=](int l) {
        u32 x = a[l];
        if ((x & 0x7fffffff) > 0x7f800000) return 0x7fffffffu;
        if ((x & 0x7fffffff) < 0x7f800000) {
            x += rounding == 0 ? 0xfff + (x >> 13 & 1) : rounding == 2 ? 0x1000 : 0;
            x &= ~0x1fffu;
        }
        if (limits.finite && (x & 0x7fffffff) >= 0x7f800000) x = (x & 0x80000000) | 0x7f7fe000;
        return limits.relu && x >> 31 ? 0u : x;
    });
}

// ---- 8 bits

constexpr Format E4M3 = {3, -6, 448}, E5M2 = {2, -14, 57344};
constexpr u32 E4M3_NAN = 0x7f, E5M2_NAN = 0x7f;

u32 bits_of(const Format& format, double x, u32 nan) {  // x is a number of the format, or NaN
    if (x != x) return nan;
    const u32 sign = std::signbit(x) ? 0x80 : 0;
    const double size = std::fabs(x);
    if (size < std::ldexp(1.0, format.least_exponent))
        return sign | (u32)std::ldexp(size, format.mantissa - format.least_exponent);
    const int exponent = std::ilogb(size);
    const u32 mantissa = (u32)std::ldexp(size, format.mantissa - exponent) - (1u << format.mantissa);
    return sign | (u32)(exponent - format.least_exponent + 1) << format.mantissa | mantissa;
}
float value_of(const Format& format, u32 bits) {
    const int exponent = (int)(bits & 0x7f) >> format.mantissa;
    const int mantissa = (int)(bits & ((1u << format.mantissa) - 1));
    const bool few = format.mantissa == 2;  // E5M2 has infinities and several NaN, E4M3 one NaN
    if (few ? exponent == 31 && mantissa : (bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
    double size = std::ldexp(exponent ? (1 << format.mantissa) + mantissa : mantissa,
                             std::max(exponent, 1) - 1 + format.least_exponent - format.mantissa);
    if (few && exponent == 31) size = std::numeric_limits<double>::infinity();
    return (float)(bits & 0x80 ? -size : size);
}
template <bool e4m3> u32 to_byte(double x, bool relu) {
    const Format& format = e4m3 ? E4M3 : E5M2;
    return bits_of(format, limited(format, x, NEAREST, Limits(2 | relu)), e4m3 ? E4M3_NAN : E5M2_NAN);
}
template <bool e4m3> void floats_to_bytes(Warp& w, const Instruction& i, u32 lanes) {  // plain: relu
    const bool relu = i.operands[0];
    auto upper = values<float>(w, i.operands[2]), lower = values<float>(w, i.operands[3]);
    write_each<u32>(
        w, i.operands[1], lanes, [=](int l) { return to_byte<e4m3>(upper(l), relu) << 8 | to_byte<e4m3>(lower(l), relu); });
}
template <bool e4m3> void halves_to_bytes(Warp& w, const Instruction& i, u32 lanes) {  // plain: relu
    const bool relu = i.operands[0];
    const u32* a = lanes_of<u32>(w, i.operands[2]);
    write_each<u32>(w, i.operands[1], lanes, [=](int l) {
        return to_byte<e4m3>(to_float(f16{(u16)(a[l] >> 16)}), relu) << 8 | to_byte<e4m3>(to_float(f16{(u16)a[l]}), relu);
    });
}
template <bool e4m3> void bytes_to_halves(Warp& w, const Instruction& i, u32 lanes) {  // plain: relu
    const bool relu = i.operands[0];
    const u32* a = lanes_of<u32>(w, i.operands[2]);
    auto half = [=](u32 byte) {
        const float x = value_of(e4m3 ? E4M3 : E5M2, byte);
        return (u32)narrowed<f16>(relu && x <= 0 ? 0.0f : x).bits;
    };
    write_each<u32>(w, i.operands[1], lanes, [=](int l) { return half(a[l] >> 8 & 255) << 16 | half(a[l] & 255); });
}

template <class D, class T> std::string name() { return std::string("cvt.") + NAME<D> + "." + NAME<T>; }
template <class Use> void for_integers(Use use) { for_types<u8, s8, u16, s16, u32, s32, u64, s64>(use); }

const bool added = [] {
    for_integers([](auto to) {
        using D = decltype(to);
        for_integers([](auto from) { add_handler(name<D, decltype(from)>(), between_integers<D, decltype(from)>); });
        for_types<float, f16, bf16, double>([](auto floating) {
            using F = decltype(floating);
            add_handler(name<D, F>(), to_integers<D, F>);
            add_handler(name<F, D>(), from_integers<F, D>);
        });
    });
    add_handler("cvt.f32.f32", same_float<float>);
    add_handler("cvt.f16.f16", same_float<f16>);
    add_handler("cvt.f64.f64", same_double);
    add_handler("cvt.bf16.bf16", same_bf16);
    add_handler("cvt.f32.f16", wider<float, f16>);
    add_handler("cvt.f32.bf16", wider<float, bf16>);
    add_handler("cvt.f64.f32", wider<double, float>);
    add_handler("cvt.f64.f16", wider<double, f16>);
    add_handler("cvt.f64.bf16", wider<double, bf16>);
    add_handler("cvt.f32.f64", double_to_float);
    add_handler("cvt.f16.f32", to_float_half<f16>);
    add_handler("cvt.bf16.f32", to_float_half<bf16>);
    add_handler("cvt.f16.f64", to_half<f16, double>);
    add_handler("cvt.bf16.f64", to_half<bf16, double>);
    add_handler("cvt.f16x2.f32", to_halves<f16>);
    add_handler("cvt.bf16x2.f32", to_halves<bf16>);
    add_handler("cvt.tf32.f32", to_tf32);
    add_handler("cvt.e4m3x2.f32", floats_to_bytes<true>);
    add_handler("cvt.e5m2x2.f32", floats_to_bytes<false>);
    add_handler("cvt.e4m3x2.f16x2", halves_to_bytes<true>);
    add_handler("cvt.e5m2x2.f16x2", halves_to_bytes<false>);
    add_handler("cvt.f16x2.e4m3x2", bytes_to_halves<true>);
    add_handler("cvt.f16x2.e5m2x2", bytes_to_halves<false>);
    return true;
}();

}  // namespace
}  // namespace ptx
