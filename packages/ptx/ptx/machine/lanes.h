// How handlers see the values of 32 lanes: types, and loops over lanes.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

template <class To, class From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// ---- numbers of 16 bits; the NaN of the device is all ones but for the sign (CUDA C++ Programming Guide; of f64 0xfff8...)

inline float to_float(f16 h) { return (float)bits_as<_Float16>(h.bits); }
inline float to_float(bf16 h) { return bits_as<float>((u32)h.bits << 16); }

template <class H> H narrowed(float x);
template <> inline f16 narrowed<f16>(float x) {
    const u16 bits = bits_as<u16>((_Float16)x);
    return {(bits & 0x7fff) > 0x7c00 ? (u16)0x7fff : bits};
}
template <> inline bf16 narrowed<bf16>(float x) {
    const u32 bits = bits_as<u32>(x);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return {nan ? (u16)0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

enum Rounding { NEAREST, TO_ZERO, DOWN, UP };

// A floating-point format: bits of the mantissa, exponent of the smallest normal number, largest finite number.
struct Format {
    int mantissa, least_exponent;
    double largest;
};
template <class H> constexpr Format FORMAT = {};
template <> inline constexpr Format FORMAT<f16> = {10, -14, 65504};
template <> inline constexpr Format FORMAT<bf16> = {7, -126, 3.3895313892515355e38};

inline double to_integer(double x, int rounding) {
    switch (rounding) {
        case TO_ZERO: return std::trunc(x);
        case DOWN: return std::floor(x);
        case UP: return std::ceil(x);
        default: return std::nearbyint(x);
    }
}

// The number of a format next to x, in one rounding; infinite where x is too large, unless it is rounded back.
inline double rounded_to(const Format& format, double x, int rounding) {
    if (x == 0 || !std::isfinite(x)) return x;
    const double step = std::ldexp(1.0, std::max(std::ilogb(x), format.least_exponent) - format.mantissa);
    const double y = to_integer(x / step, rounding) * step;
    if (std::fabs(y) <= format.largest) return y;
    const bool back = rounding == TO_ZERO || (rounding == DOWN && x > 0) || (rounding == UP && x < 0);
    return std::copysign(back ? format.largest : std::numeric_limits<double>::infinity(), x);
}
template <class H> H narrowed(double x, int rounding) { return narrowed<H>((float)rounded_to(FORMAT<H>, x, rounding)); }

inline float flushed(float x) {
    const u32 bits = bits_as<u32>(x);
    return bits & 0x7f800000 ? x : bits_as<float>(bits & 0x80000000);
}
inline float saturated(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }  // NaN gives 0

// ---- values by type: how they lie in a lane, and what handlers calculate with

template <class T> struct Type {
    using Lane = T;
    static T get(T lane) { return lane; }
    static T put(T value) { return value; }
};
template <class T> struct Narrow {
    using Lane = u32;
    static T get(u32 lane) { return (T)lane; }
    static u32 put(T value) { return (std::make_unsigned_t<T>)value; }
};
template <> struct Type<u8> : Narrow<u8> {};
template <> struct Type<s8> : Narrow<s8> {};
template <> struct Type<u16> : Narrow<u16> {};
template <> struct Type<s16> : Narrow<s16> {};
template <class H> struct Half {
    using Lane = u32;
    static float get(u32 lane) { return to_float(H{(u16)lane}); }
    static u32 put(float value) { return narrowed<H>(value).bits; }
};
template <> struct Type<f16> : Half<f16> {};
template <> struct Type<bf16> : Half<bf16> {};
template <> struct Type<float> {
    using Lane = u32;
    static float get(u32 lane) { return bits_as<float>(lane); }
    static u32 put(float value) { return value != value ? 0x7fffffffu : bits_as<u32>(value); }
};
template <> struct Type<double> {
    using Lane = u64;
    static double get(u64 lane) { return bits_as<double>(lane); }
    static u64 put(double value) { return value != value ? 0xfff8000000000000ull : bits_as<u64>(value); }
};
template <class T> using Lane = typename Type<T>::Lane;

// The lanes of an operand as values of T: `values<T>(w, operand)(lane)`.
template <class T> auto values(Warp& w, s32 operand) {
    const Lane<T>* lanes = lanes_of<Lane<T>>(w, operand);
    return [lanes](int lane) { return Type<T>::get(lanes[lane]); };
}

// Writes value(lane) to each lane that executes.
template <class T, class Value> void write_each(Warp& w, s32 operand, u32 lanes, Value value) {
    Lane<T> results[LANES];
    for (int l = 0; l < LANES; ++l) results[l] = Type<T>::put(value(l));
    write_lanes(lanes_of<Lane<T>>(w, operand), results, lanes);
}

// A handler of destination, sources: Operation::of(values of types T...) in each lane.
template <class D, class Operation, class... T, size_t... N>
void map_lanes(Warp& w, const Instruction& i, u32 lanes, std::index_sequence<N...>) {
    auto sources = std::make_tuple(values<T>(w, i.operands[1 + N])...);
    write_each<D>(w, i.operands[0], lanes, [&](int l) { return Operation::of(std::get<N>(sources)(l)...); });
}
template <class D, class Operation, class... T> void map(Warp& w, const Instruction& i, u32 lanes) {
    map_lanes<D, Operation, T...>(w, i, lanes, std::index_sequence_for<T...>());
}

// The same for two values of 16 bits (or of N bits, N half of a lane) in one register.
template <class T, class Word, class Operation, class... Words> void map_pairs(Warp& w, const Instruction& i, u32 lanes) {
    constexpr int BITS = 4 * sizeof(Word);
    static_assert((std::is_same_v<Words, Word> && ...));
    const Word* sources[sizeof...(Words)];
    for (size_t n = 0; n < sizeof...(Words); ++n) sources[n] = lanes_of<Word>(w, i.operands[1 + n]);
    Word results[LANES];
    for (int l = 0; l < LANES; ++l) {
        results[l] = 0;
        for (int part = 0; part < 2; ++part) {
            auto value = [&](size_t n) {
                return Type<T>::get((Lane<T>)(sources[n][l] >> BITS * part & (((Word)1 << BITS) - 1)));
            };
            auto all = [&]<size_t... N>(std::index_sequence<N...>) { return Operation::of(value(N)...); };
            results[l] |= (Word)Type<T>::put(all(std::index_sequence_for<Words...>())) << BITS * part;
        }
    }
    write_lanes(lanes_of<Word>(w, i.operands[0]), results, lanes);
}

// ---- names of types

template <class T> inline const char* NAME = nullptr;
template <> inline const char* NAME<u8> = "u8";
template <> inline const char* NAME<s8> = "s8";
template <> inline const char* NAME<u16> = "u16";
template <> inline const char* NAME<s16> = "s16";
template <> inline const char* NAME<u32> = "u32";
template <> inline const char* NAME<s32> = "s32";
template <> inline const char* NAME<u64> = "u64";
template <> inline const char* NAME<s64> = "s64";
template <> inline const char* NAME<float> = "f32";
template <> inline const char* NAME<double> = "f64";
template <> inline const char* NAME<f16> = "f16";
template <> inline const char* NAME<bf16> = "bf16";

// Calls use(T()) for each type.
template <class... T, class Use> void for_types(Use use) { (use(T()), ...); }

}  // namespace ptx
