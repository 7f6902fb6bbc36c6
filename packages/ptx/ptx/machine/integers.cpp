// Integer arithmetic. Sums and products wrap: they are taken without sign, because overflow with one is undefined in C++.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

template <class T> using Unsigned = std::make_unsigned_t<T>;
template <class T> constexpr u32 BITS = 8 * sizeof(T);
template <class T> struct Doubled;
template <> struct Doubled<u16> {
    using type = u32;
};
template <> struct Doubled<s16> {
    using type = s32;
};
template <> struct Doubled<u32> {
    using type = u64;
};
template <> struct Doubled<s32> {
    using type = s64;
};
template <> struct Doubled<u64> {
    using type = unsigned __int128;
};
template <> struct Doubled<s64> {
    using type = __int128;
};
template <class T> using Wide = typename Doubled<T>::type;

template <class T> T high_half(T a, T b) { return (T)((Wide<T>)a * (Wide<T>)b >> BITS<T>); }
// u64 holds all products of 32 bits, and the low half of those of 64
template <class T> T low_half(T a, T b) { return (T)((u64)a * (u64)b); }
template <class T> T plus(T a, T b) { return (T)((u64)a + (u64)b); }
template <class T> T minus(T a, T b) { return (T)((u64)a - (u64)b); }
template <class T> T magnitude(T a) { return a < T(0) ? minus(T(0), a) : a; }

#define OPERATION(name, parameters, result)                                \
    struct name {                                                          \
        template <class T> static auto of parameters { return T(result); } \
    };
OPERATION(Add, (T a, T b), plus(a, b))
OPERATION(Subtract, (T a, T b), minus(a, b))
OPERATION(MultiplyLow, (T a, T b), low_half(a, b))
OPERATION(MultiplyHigh, (T a, T b), high_half(a, b))
OPERATION(MultiplyAddLow, (T a, T b, T c), plus(low_half(a, b), c))
OPERATION(MultiplyAddHigh, (T a, T b, T c), plus(high_half(a, b), c))
OPERATION(Minimum, (T a, T b), std::min(a, b))
OPERATION(Maximum, (T a, T b), std::max(a, b))
OPERATION(AbsoluteDifference, (T a, T b, T c), plus(c, a < b ? minus(b, a) : minus(a, b)))
OPERATION(Negate, (T a), minus(T(0), a))
OPERATION(Absolute, (T a), magnitude(a))
OPERATION(And, (T a, T b), a& b)
OPERATION(Or, (T a, T b), a | b)
OPERATION(Xor, (T a, T b), a ^ b)
OPERATION(Not, (T a), ~a)
OPERATION(LogicalNot, (T a), a == 0)
// Division by zero is unspecified in PTX; GPUs give all ones, and the dividend as remainder.
OPERATION(Divide, (T a, T b), b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? minus(T(0), a) : a / b)
OPERATION(Remainder, (T a, T b), b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? 0 : a % b)

s32 clamped(s64 x) { return (s32)std::clamp<s64>(x, INT32_MIN, INT32_MAX); }
struct AddSaturated {
    static s32 of(s32 a, s32 b) { return clamped((s64)a + b); }
};
struct SubtractSaturated {
    static s32 of(s32 a, s32 b) { return clamped((s64)a - b); }
};
template <class Operation> struct Positive {  // .relu: negative results are 0
    template <class T> static T of(T a, T b) { return std::max(T(0), Operation::of(a, b)); }
};
struct MultiplyAddHighSaturated {
    static s32 of(s32 a, s32 b, s32 c) { return clamped((s64)high_half(a, b) + c); }
};
struct MultiplyWide {
    template <class T> static Wide<T> of(T a, T b) { return (Wide<T>)a * (Wide<T>)b; }
};
struct MultiplyAddWide {
    template <class T> static Wide<T> of(T a, T b, Wide<T> c) { return plus<Wide<T>>((Wide<T>)a * (Wide<T>)b, c); }
};

// ---- shifts and fields of bits

struct ShiftLeft {
    template <class T> static T of(T a, u32 count) { return count < BITS<T> ? T((u64)a << count) : T(0); }
};
struct ShiftRight {  // of a signed number: copies of its sign come in
    template <class T> static T of(T a, u32 count) { return count < BITS<T> ? T(a >> count) : T(a < T(0) ? -1 : 0); }
};
template <bool left, bool wrap> struct Funnel {
    static u32 of(u32 low, u32 high, u32 count) {
        count = wrap ? count & 31 : std::min(count, 32u);
        const u64 both = (u64)high << 32 | low;
        return left ? (u32)(both << count >> 32) : (u32)(both >> count);
    }
};
struct CountOnes {
    template <class T> static u32 of(T a) { return (u32)__builtin_popcountll(a); }
};
struct LeadingZeros {
    template <class T> static u32 of(T a) { return a ? (u32)__builtin_clzll(a) - (64 - BITS<T>) : BITS<T>; }
};
struct Reverse {
    template <class T> static T of(T a) {
        T reversed = 0;
        for (u32 bit = 0; bit < BITS<T>; ++bit) reversed |= (a >> bit & 1) << (BITS<T> - 1 - bit);
        return reversed;
    }
};
struct ExtractField {  // `length` bits from `position` on; behind the top bit come copies of the sign
    template <class T> static T of(T a, u32 position, u32 length) {
        position &= 255;
        length &= 255;
        if (!length) return 0;
        const Unsigned<T> bits = (Unsigned<T>)a;
        const bool sign = std::is_signed_v<T> && (bits >> std::min(position + length - 1, BITS<T> - 1) & 1);
        const u32 count = position < BITS<T> ? std::min(length, BITS<T> - position) : 0;  // bits that are there
        const Unsigned<T> mask = count < BITS<T> ? ((Unsigned<T>)1 << count) - 1 : ~(Unsigned<T>)0;
        const Unsigned<T> field = count ? bits >> position & mask : 0;
        return T(sign ? field | ~mask : field);
    }
};
struct InsertField {
    template <class T> static T of(T field, T into, u32 position, u32 length) {
        position &= 255;
        length &= 255;
        if (position >= BITS<T> || !length) return into;
        const T mask = (length < BITS<T> ? ((T)1 << length) - 1 : ~(T)0) << position;
        return (into & ~mask) | (field << position & mask);
    }
};
template <bool wrap> struct FieldMask {
    static u32 of(u32 position, u32 width) {
        position = wrap ? position & 31 : std::min(position, 32u);
        width = wrap ? width & 31 : std::min(width, 32u);
        return (u32)((((u64)1 << width) - 1) << position);
    }
};
template <bool wrap> struct Extend {  // the low `bits` bits, with or without sign
    template <class T> static T of(T a, u32 bits) {
        bits = wrap ? bits & 31 : std::min(bits, 32u);
        if (!bits) return 0;
        const u32 up = (u32)a << (32 - bits);
        return std::is_signed_v<T> ? T((s32)up >> (32 - bits)) : T(up >> (32 - bits));
    }
};
struct NthSetBit {  // the |offset|-th set bit from `base` on, upwards or downwards
    static u32 of(u32 mask, u32 base, s32 offset) {
        if (offset == 0) return base < 32 && (mask >> base & 1) ? base : ~0u;
        s64 missing = offset < 0 ? -(s64)offset : offset;
        for (s64 at = base; at >= 0 && at < 32; at += offset > 0 ? 1 : -1)
            if ((mask >> at & 1) && --missing == 0) return (u32)at;
        return ~0u;
    }
};
template <class T>
void highest_bit(Warp& w, const Instruction& i, u32 lanes) {  // plain: 1 for the shift that moves it to the top
    const bool as_shift = i.operands[0];
    auto a = values<T>(w, i.operands[2]);
    write_each<u32>(w, i.operands[1], lanes, [=](int l) {
        const Unsigned<T> bits = a(l) < T(0) ? ~(Unsigned<T>)a(l) : (Unsigned<T>)a(l);
        const u32 zeros = LeadingZeros::of(bits);
        return zeros == BITS<T> ? ~0u : as_shift ? zeros : BITS<T> - 1 - zeros;
    });
}

// ---- bytes and logic

// The byte of (high, low) that the four bytes of the result take, lowest first, for each mode of prmt and the low bits of its selector.
int chosen_byte(int mode, u32 selector, int byte) {
    const int n = (int)(selector & 3);
    switch (mode) {
        case 1: return n + byte;  // f4e
        case 2: return (n - byte) & 7;  // b4e
        case 3: return n;  // rc8
        case 4: return std::max(n, byte);  // ecl
        case 5: return std::min(n, byte);  // ecr
        case 6: return 2 * (n & 1) + (byte & 1);  // rc16
        default: return (int)(selector >> 4 * byte & 15);  // with bit 3: copies of the byte's sign
    }
}
void permute_bytes(Warp& w, const Instruction& i, u32 lanes) {  // plain: the mode
    const int mode = i.operands[0];
    auto low = values<u32>(w, i.operands[2]), high = values<u32>(w, i.operands[3]), selector = values<u32>(w, i.operands[4]);
    write_each<u32>(w, i.operands[1], lanes, [=](int l) {
        const u64 both = (u64)high(l) << 32 | low(l);
        u32 result = 0;
        for (int byte = 0; byte < 4; ++byte) {
            const int chosen = chosen_byte(mode, selector(l), byte);
            u32 value = (u32)(both >> 8 * (chosen & 7)) & 255;
            if (chosen & 8) value = value & 128 ? 255 : 0;
            result |= value << 8 * byte;
        }
        return result;
    });
}
void logic_of_three(Warp& w, const Instruction& i, u32 lanes) {  // bit 4a + 2b + c of the table is the result
    auto a = values<u32>(w, i.operands[1]), b = values<u32>(w, i.operands[2]), c = values<u32>(w, i.operands[3]);
    const int table = i.operands[4];
    write_each<u32>(w, i.operands[0], lanes, [=](int l) {
        u32 result = 0;
        for (int n = 0; n < 8; ++n)
            if (table >> n & 1) result |= (n & 4 ? a(l) : ~a(l)) & (n & 2 ? b(l) : ~b(l)) & (n & 1 ? c(l) : ~c(l));
        return result;
    });
}
template <class A, class B> struct DotOfBytes {
    static s32 of(u32 a, u32 b, s32 c) {
        u32 sum = (u32)c;
        for (int byte = 0; byte < 4; ++byte) sum += (u32)((s32)(A)(a >> 8 * byte) * (s32)(B)(b >> 8 * byte));
        return (s32)sum;
    }
};

// ---- sums over several registers: the carry is a predicate, the last operand

template <class T, bool subtract, bool multiply, bool high, bool reads, bool writes>
void with_carry(Warp& w, const Instruction& i, u32 lanes) {
    using U = Unsigned<T>;
    auto a = values<T>(w, i.operands[1]), b = values<T>(w, i.operands[2]), c = values<T>(w, i.operands[multiply ? 3 : 2]);
    const s32 carry = i.operands[multiply ? 4 : 3];
    const u32 before = reads ? predicate(w, carry) : 0;
    u32 after = 0;
    U results[LANES];
    for (int l = 0; l < LANES; ++l) {
        const U first = (U)(multiply ? high ? high_half(a(l), b(l)) : low_half(a(l), b(l)) : a(l)), second = (U)c(l);
        const unsigned __int128 in = before >> l & 1, x = first, y = second;
        const unsigned __int128 sum = subtract ? x - y - in : x + y + in;
        results[l] = (U)sum;
        after |= (u32)(sum >> BITS<T> & 1) << l;
    }
    write_lanes(lanes_of<U>(w, i.operands[0]), results, lanes);
    if (writes) set_predicate(w, carry, after, lanes);
}

template <class T> void add_carries() {
    const std::string type = NAME<T>;
    add_handler("add.cc." + type, with_carry<T, false, false, false, false, true>);
    add_handler("addc." + type, with_carry<T, false, false, false, true, false>);
    add_handler("addc.cc." + type, with_carry<T, false, false, false, true, true>);
    add_handler("sub.cc." + type, with_carry<T, true, false, false, false, true>);
    add_handler("subc." + type, with_carry<T, true, false, false, true, false>);
    add_handler("subc.cc." + type, with_carry<T, true, false, false, true, true>);
    add_handler("mad.lo.cc." + type, with_carry<T, false, true, false, false, true>);
    add_handler("mad.hi.cc." + type, with_carry<T, false, true, true, false, true>);
    add_handler("madc.lo." + type, with_carry<T, false, true, false, true, false>);
    add_handler("madc.hi." + type, with_carry<T, false, true, true, true, false>);
    add_handler("madc.lo.cc." + type, with_carry<T, false, true, false, true, true>);
    add_handler("madc.hi.cc." + type, with_carry<T, false, true, true, true, true>);
}

template <class T> void add_arithmetic() {
    const std::string type = NAME<T>;
    add_handler("add." + type, map<T, Add, T, T>);
    add_handler("sub." + type, map<T, Subtract, T, T>);
    add_handler("mul.lo." + type, map<T, MultiplyLow, T, T>);
    add_handler("mul.hi." + type, map<T, MultiplyHigh, T, T>);
    add_handler("mad.lo." + type, map<T, MultiplyAddLow, T, T, T>);
    add_handler("mad.hi." + type, map<T, MultiplyAddHigh, T, T, T>);
    add_handler("div." + type, map<T, Divide, T, T>);
    add_handler("rem." + type, map<T, Remainder, T, T>);
    add_handler("min." + type, map<T, Minimum, T, T>);
    add_handler("max." + type, map<T, Maximum, T, T>);
    add_handler("sad." + type, map<T, AbsoluteDifference, T, T, T>);
    add_handler("shr." + type, map<T, ShiftRight, T, u32>);
    if constexpr (sizeof(T) < 8) {
        add_handler("mul.wide." + type, map<Wide<T>, MultiplyWide, T, T>);
        add_handler("mad.wide." + type, map<Wide<T>, MultiplyAddWide, T, T, Wide<T>>);
    }
    if constexpr (sizeof(T) > 2) {
        add_handler("bfe." + type, map<T, ExtractField, T, u32, u32>);
        add_handler("bfind." + type, highest_bit<T>);
        add_carries<T>();
    }
    if constexpr (std::is_signed_v<T>) {
        add_handler("neg." + type, map<T, Negate, T>);
        add_handler("abs." + type, map<T, Absolute, T>);
    }
}

template <class T> void add_bits() {
    const std::string type = "b" + std::to_string(BITS<T>);
    add_handler("and." + type, map<T, And, T, T>);
    add_handler("or." + type, map<T, Or, T, T>);
    add_handler("xor." + type, map<T, Xor, T, T>);
    add_handler("not." + type, map<T, Not, T>);
    add_handler("cnot." + type, map<T, LogicalNot, T>);
    add_handler("shl." + type, map<T, ShiftLeft, T, u32>);
    add_handler("shr." + type, map<T, ShiftRight, T, u32>);
    if constexpr (sizeof(T) > 2) {
        add_handler("popc." + type, map<u32, CountOnes, T>);
        add_handler("clz." + type, map<u32, LeadingZeros, T>);
        add_handler("brev." + type, map<T, Reverse, T>);
        add_handler("bfi." + type, map<T, InsertField, T, T, u32, u32>);
    }
}

template <class T> void add_pairs() {
    const std::string type = std::string(NAME<T>) + "x2";
    add_handler("add." + type, map_pairs<T, u32, Add, u32, u32>);
    add_handler("sub." + type, map_pairs<T, u32, Subtract, u32, u32>);
    add_handler("min." + type, map_pairs<T, u32, Minimum, u32, u32>);
    add_handler("max." + type, map_pairs<T, u32, Maximum, u32, u32>);
}

const bool added = [] {
    for_types<u16, s16, u32, s32, u64, s64>([](auto zero) { add_arithmetic<decltype(zero)>(); });
    for_types<u16, u32, u64>([](auto zero) { add_bits<decltype(zero)>(); });
    for_types<u16, s16>([](auto zero) { add_pairs<decltype(zero)>(); });
    add_handler("min.relu.s32", map<s32, Positive<Minimum>, s32, s32>);
    add_handler("max.relu.s32", map<s32, Positive<Maximum>, s32, s32>);
    add_handler("min.relu.s16x2", map_pairs<s16, u32, Positive<Minimum>, u32, u32>);
    add_handler("max.relu.s16x2", map_pairs<s16, u32, Positive<Maximum>, u32, u32>);
    add_handler("add.sat.s32", map<s32, AddSaturated, s32, s32>);
    add_handler("sub.sat.s32", map<s32, SubtractSaturated, s32, s32>);
    add_handler("mad.hi.sat.s32", map<s32, MultiplyAddHighSaturated, s32, s32, s32>);
    add_handler("shf.l.wrap.b32", map<u32, Funnel<true, true>, u32, u32, u32>);
    add_handler("shf.r.wrap.b32", map<u32, Funnel<false, true>, u32, u32, u32>);
    add_handler("shf.l.clamp.b32", map<u32, Funnel<true, false>, u32, u32, u32>);
    add_handler("shf.r.clamp.b32", map<u32, Funnel<false, false>, u32, u32, u32>);
    add_handler("fns.b32", map<u32, NthSetBit, u32, u32, s32>);
    add_handler("bmsk.wrap.b32", map<u32, FieldMask<true>, u32, u32>);
    add_handler("bmsk.clamp.b32", map<u32, FieldMask<false>, u32, u32>);
    add_handler("szext.wrap.u32", map<u32, Extend<true>, u32, u32>);
    add_handler("szext.wrap.s32", map<s32, Extend<true>, s32, u32>);
    add_handler("szext.clamp.u32", map<u32, Extend<false>, u32, u32>);
    add_handler("szext.clamp.s32", map<s32, Extend<false>, s32, u32>);
    add_handler("prmt.b32", permute_bytes);
    add_handler("lop3.b32", logic_of_three);
    add_handler("dp4a.u32.u32", map<s32, DotOfBytes<u8, u8>, u32, u32, s32>);
    add_handler("dp4a.u32.s32", map<s32, DotOfBytes<u8, s8>, u32, u32, s32>);
    add_handler("dp4a.s32.u32", map<s32, DotOfBytes<s8, u8>, u32, u32, s32>);
    add_handler("dp4a.s32.s32", map<s32, DotOfBytes<s8, s8>, u32, u32, s32>);
    return true;
}();

}  // namespace
}  // namespace ptx
