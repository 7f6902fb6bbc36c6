// setp, set and testp. A comparison may be combined with another predicate, by a plain operand: 0 not at all, 1 and, 2 or, 3 xor.
#include "lanes.h"

namespace ptx {
namespace {

// With NaN all of these are false ("ordered") but `ne` of integers; `Or<...>` is true with NaN.
struct Equal {
    template <class T> static bool of(T a, T b) { return a == b; }
};
struct Different {
    template <class T> static bool of(T a, T b) { return a < b || a > b; }
};
struct Less {
    template <class T> static bool of(T a, T b) { return a < b; }
};
struct LessOrEqual {
    template <class T> static bool of(T a, T b) { return a <= b; }
};
struct Greater {
    template <class T> static bool of(T a, T b) { return a > b; }
};
struct GreaterOrEqual {
    template <class T> static bool of(T a, T b) { return a >= b; }
};
struct Numbers {
    template <class T> static bool of(T a, T b) { return a == a && b == b; }
};
template <class Opposite> struct Not {
    template <class T> static bool of(T a, T b) { return !Opposite::of(a, b); }
};
template <class Comparison> struct Flushed {
    static bool of(float a, float b) { return Comparison::of(flushed(a), flushed(b)); }
};
template <class Comparison> struct HalfFlushed {
    static float flushed(float x) { return std::fabs(x) < 0x1p-14f ? std::copysign(0.0f, x) : x; }
    static bool of(float a, float b) { return Comparison::of(flushed(a), flushed(b)); }
};

template <class T, class Comparison> u32 compared(Warp& w, s32 first, s32 second) {
    auto a = values<T>(w, first), b = values<T>(w, second);
    u32 result = 0;
    for (int l = 0; l < LANES; ++l) result |= (u32)Comparison::of(a(l), b(l)) << l;
    return result;
}
// `operands`: the other predicate and whether it is negated
u32 combined(Warp& w, int how, u32 result, const s32* operands) {
    if (how == 0) return result;
    const u32 second = predicate(w, operands[0]) ^ (operands[1] ? ALL : 0);
    return how == 1 ? result & second : how == 2 ? result | second : result ^ second;
}

// plain how, p, q or -1, a, b [, c, plain negated]: p is the comparison and q its opposite, both combined with c
void write_predicates(Warp& w, const s32* o, u32 result, u32 lanes) {
    const u32 first = combined(w, o[0], result, o + 5), second = o[2] >= 0 ? combined(w, o[0], ~result, o + 5) : 0;
    set_predicate(w, o[1], first, lanes);
    if (o[2] >= 0) set_predicate(w, o[2], second, lanes);
}
template <class T, class Comparison> void set_predicates(Warp& w, const Instruction& i, u32 lanes) {
    write_predicates(w, i.operands, compared<T, Comparison>(w, i.operands[3], i.operands[4]), lanes);
}

template <class D> constexpr Lane<D> TRUE = (Lane<D>)(std::make_unsigned_t<D>)-1;
template <> inline constexpr u32 TRUE<float> = 0x3f800000;
template <> inline constexpr u32 TRUE<f16> = 0x3c00;
template <> inline constexpr u32 TRUE<bf16> = 0x3f80;

// plain how, destination, a, b [, c, plain negated]
void write_value(Warp& w, const s32* o, u32 result, u32 truth, u32 lanes) {
    result = combined(w, o[0], result, o + 4);
    u32 values[LANES];
    for (int l = 0; l < LANES; ++l) values[l] = result >> l & 1 ? truth : 0;
    write_lanes(lanes_of<u32>(w, o[1]), values, lanes);
}
template <class D, class T, class Comparison> void set_value(Warp& w, const Instruction& i, u32 lanes) {
    write_value(w, i.operands, compared<T, Comparison>(w, i.operands[2], i.operands[3]), TRUE<D>, lanes);
}

// ---- pairs of half numbers: the halves that begin at bit `shift`

template <class H, class Comparison> u32 compared_halves(Warp& w, s32 first, s32 second, int shift) {
    const u32 *a = lanes_of<u32>(w, first), *b = lanes_of<u32>(w, second);
    u32 result = 0;
    for (int l = 0; l < LANES; ++l)
        result |= (u32)Comparison::of(to_float(H{(u16)(a[l] >> shift)}), to_float(H{(u16)(b[l] >> shift)})) << l;
    return result;
}
// as write_predicates, but p is the comparison of the low halves and q that of the high ones
template <class H, class Comparison> void set_predicates_of_pair(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    u32 results[2];
    for (int n = 0; n < 2; ++n) results[n] = combined(w, o[0], compared_halves<H, Comparison>(w, o[3], o[4], 16 * n), o + 5);
    set_predicate(w, o[1], results[0], lanes);
    if (o[2] >= 0) set_predicate(w, o[2], results[1], lanes);
}
template <class H, class Comparison> void set_pair(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    u32 values[LANES] = {};
    for (int shift = 0; shift < 32; shift += 16) {
        const u32 result = combined(w, o[0], compared_halves<H, Comparison>(w, o[2], o[3], shift), o + 4);
        for (int l = 0; l < LANES; ++l) values[l] |= (result >> l & 1 ? TRUE<H> : 0) << shift;
    }
    write_lanes(lanes_of<u32>(w, o[1]), values, lanes);
}

// `setp.lt.ftz.f32`, `set.lt.ftz.u32.f32`. Templates that put names together would take the compiler longer than their handlers.
void add_named(const char* operation, const char* word, const char* modifier, const char* result, const char* type,
               Handler handler) {
    add_handler(std::string(operation) + word + modifier + result + type, handler);
}
template <class D> constexpr const char* RESULT = nullptr;
template <> inline constexpr const char* RESULT<u16> = "u16.";
template <> inline constexpr const char* RESULT<s16> = "s16.";
template <> inline constexpr const char* RESULT<u32> = "u32.";
template <> inline constexpr const char* RESULT<s32> = "s32.";
template <> inline constexpr const char* RESULT<float> = "f32.";
template <> inline constexpr const char* RESULT<f16> = "f16.";
template <> inline constexpr const char* RESULT<bf16> = "bf16.";

// `modifier`: ".", or ".ftz."
template <class T, template <class> class Modified, class Comparison>
void add_comparison(const char* word, const char* modifier, const char* type) {
    using Compared = Modified<Comparison>;
    add_named("setp.", word, modifier, "", type, set_predicates<T, Compared>);
    auto add = [&]<class... D>(D...) { (add_named("set.", word, modifier, RESULT<D>, type, set_value<D, T, Compared>), ...); };
    if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
        add(T(), u16(), s16(), u32(), s32());
        const bool brain = std::is_same_v<T, bf16>;
        add_named("set.", word, modifier, brain ? "bf16x2." : "f16x2.", brain ? "bf16x2" : "f16x2", set_pair<T, Compared>);
        add_named("setp.", word, modifier, "", brain ? "bf16x2" : "f16x2", set_predicates_of_pair<T, Compared>);
    } else {
        add(u32(), s32(), float());
    }
}
template <class Comparison> using Plain = Comparison;

template <class T, template <class> class Modified = Plain> void add_floating(const char* modifier = ".") {
    const char* type = NAME<T>;
    add_comparison<T, Modified, Equal>("eq", modifier, type);
    add_comparison<T, Modified, Different>("ne", modifier, type);
    add_comparison<T, Modified, Less>("lt", modifier, type);
    add_comparison<T, Modified, LessOrEqual>("le", modifier, type);
    add_comparison<T, Modified, Greater>("gt", modifier, type);
    add_comparison<T, Modified, GreaterOrEqual>("ge", modifier, type);
    add_comparison<T, Modified, Not<Different>>("equ", modifier, type);
    add_comparison<T, Modified, Not<Equal>>("neu", modifier, type);
    add_comparison<T, Modified, Not<GreaterOrEqual>>("ltu", modifier, type);
    add_comparison<T, Modified, Not<Greater>>("leu", modifier, type);
    add_comparison<T, Modified, Not<LessOrEqual>>("gtu", modifier, type);
    add_comparison<T, Modified, Not<Less>>("geu", modifier, type);
    add_comparison<T, Modified, Numbers>("num", modifier, type);
    add_comparison<T, Modified, Not<Numbers>>("nan", modifier, type);
}
template <class T> void add_integers() {
    const char* type = NAME<T>;
    add_comparison<T, Plain, Equal>("eq", ".", type);
    add_comparison<T, Plain, Different>("ne", ".", type);
    add_comparison<T, Plain, Less>("lt", ".", type);
    add_comparison<T, Plain, LessOrEqual>("le", ".", type);
    add_comparison<T, Plain, Greater>("gt", ".", type);
    add_comparison<T, Plain, GreaterOrEqual>("ge", ".", type);
    if constexpr (std::is_unsigned_v<T>) {
        const char* bits = sizeof(T) == 2 ? "b16" : sizeof(T) == 4 ? "b32" : "b64";
        add_comparison<T, Plain, Equal>("eq", ".", bits);
        add_comparison<T, Plain, Different>("ne", ".", bits);
        add_named("setp.", "lo", ".", "", type, set_predicates<T, Less>);
        add_named("setp.", "ls", ".", "", type, set_predicates<T, LessOrEqual>);
        add_named("setp.", "hi", ".", "", type, set_predicates<T, Greater>);
        add_named("setp.", "hs", ".", "", type, set_predicates<T, GreaterOrEqual>);
    }
}

// ---- testp: one number alone

template <class T> bool is_normal(T x) { return std::fabs(x) >= std::numeric_limits<T>::min() && std::isfinite(x); }
template <class T> bool is_subnormal(T x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); }
template <class T> bool is_finite(T x) { return std::isfinite(x); }
template <class T> bool is_infinite(T x) { return std::isinf(x); }
template <class T> bool is_number(T x) { return x == x; }
template <class T> bool is_nan(T x) { return x != x; }
template <class T, bool (*holds)(T)> void test(Warp& w, const Instruction& i, u32 lanes) {
    auto a = values<T>(w, i.operands[1]);
    u32 result = 0;
    for (int l = 0; l < LANES; ++l) result |= (u32)holds(a(l)) << l;
    set_predicate(w, i.operands[0], result, lanes);
}
template <class T> void add_tests() {
    const std::string type = NAME<T>;
    add_handler("testp.finite." + type, test<T, is_finite<T>>);
    add_handler("testp.infinite." + type, test<T, is_infinite<T>>);
    add_handler("testp.number." + type, test<T, is_number<T>>);
    add_handler("testp.notanumber." + type, test<T, is_nan<T>>);
    add_handler("testp.normal." + type, test<T, is_normal<T>>);
    add_handler("testp.subnormal." + type, test<T, is_subnormal<T>>);
}

const bool added = [] {
    for_types<u16, s16, u32, s32, u64, s64>([](auto zero) { add_integers<decltype(zero)>(); });
    add_floating<float>();
    add_floating<float, Flushed>(".ftz.");
    add_floating<double>();
    add_floating<f16>();
    add_floating<f16, HalfFlushed>(".ftz.");
    add_floating<bf16>();
    add_tests<float>();
    add_tests<double>();
    return true;
}();

}  // namespace
}  // namespace ptx
