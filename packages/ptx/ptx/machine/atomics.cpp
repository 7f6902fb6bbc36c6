// atom and red: an operation on memory that no other lane sees half done.
#include <algorithm>
#include <cmath>

#include "memory.h"

namespace ptx {

namespace {

// ---- types: how a value lies in a register and in memory

struct Half {  // float16
    u16 bits;
};
struct Brain {  // bfloat16
    u16 bits;
};
template <class Number> struct Pair {  // two in 32 bits
    Number numbers[2];
};
struct Wide {  // 128 bits, for exch and cas
    u64 words[2];
    bool operator==(const Wide& b) const { return words[0] == b.words[0] && words[1] == b.words[1]; }
};

float value(Half h) {
    _Float16 x;
    memcpy(&x, &h, 2);
    return (float)x;
}
float value(Brain h) {
    const u32 bits = (u32)h.bits << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
template <class T> T value(T x) { return x; }

Half rounded(float x, Half) {
    const _Float16 h = (_Float16)x;
    Half out;
    memcpy(&out, &h, 2);
    return out;
}
Brain rounded(float x, Brain) {
    u32 bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {(u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T> T rounded(T x, T) { return x; }

// ---- operations

struct Add {
    template <class T> static T of(T a, T b) { return a + b; }
    static s32 of(s32 a, s32 b) { return (s32)((u32)a + (u32)b); }
    static s64 of(s64 a, s64 b) { return (s64)((u64)a + (u64)b); }
};
// Of a number and NaN the number, as min and max without .NaN have it; -0 is less than 0.
template <bool largest> struct Extreme {
    template <class T> static T of(T a, T b) { return largest ? std::max(a, b) : std::min(a, b); }
    static float of(float a, float b) {
        if (a != a || b != b) return a != a ? b : a;
        if (a == b) return std::signbit(a) == largest ? b : a;
        return (a > b) == largest ? a : b;
    }
};
struct And {
    template <class T> static T of(T a, T b) { return a & b; }
};
struct Or {
    template <class T> static T of(T a, T b) { return a | b; }
};
struct Xor {
    template <class T> static T of(T a, T b) { return a ^ b; }
};
struct Exchange {
    template <class T> static T of(T, T b) { return b; }
};
struct Increment {
    template <class T> static T of(T a, T b) { return a >= b ? 0 : a + 1; }
};
struct Decrement {
    template <class T> static T of(T a, T b) { return a == 0 || a > b ? b : a - 1; }
};

template <class Operation, class T> T apply(T before, T operand) {
    return rounded(Operation::of(value(before), value(operand)), before);
}
template <class Operation, class T> Pair<T> apply(Pair<T> before, Pair<T> operand) {
    return {apply<Operation>(before.numbers[0], operand.numbers[0]), apply<Operation>(before.numbers[1], operand.numbers[1])};
}

// ---- handlers. Operands: order, n, address, [n destinations,] n values [, n values for cas]

template <class T> T from_register(Warp& w, s32 slot, int lane) {
    T x;
    memcpy(&x, place(w, slot) + std::max<size_t>(sizeof(T), 4) * lane, sizeof(T));
    return x;
}
template <class T> void to_register(Warp& w, s32 slot, int lane, T x) {
    u8* to = place(w, slot) + std::max<size_t>(sizeof(T), 4) * lane;
    if (sizeof(T) < 4) memset(to, 0, 4);
    memcpy(to, &x, sizeof(T));
}

template <Space space, class T, class Operation, bool returns, bool compares>
void atomic(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int count = o[1];
    const s32 *destinations = o + 5, *values = destinations + (returns ? count : 0), *replacements = values + count;
    const Order order = (Order)o[0];
    u64 addresses[LANES];
    addresses_of(w, o + 2, addresses);
    u8 before[LANES][64];
    u32 rest = lanes;
    while (rest) {  // in random order
        int lane = (int)(random_bits(w) % LANES);
        while (!(rest >> lane & 1)) lane = (lane + 1) % LANES;
        rest &= ~(1u << lane);
        // each element is atomic by itself, the whole vector need only be aligned
        u8* at = access(w, space, addresses[lane], (int)sizeof(T) * count, lane, Access::ATOMIC);
        synchronise(w, space, addresses[lane], order, true, true);
        for (int k = 0; k < count; ++k) {
            T old, next;
            memcpy(&old, at + k * sizeof(T), sizeof(T));
            const T operand = from_register<T>(w, values[k], lane);
            if constexpr (compares) next = old == operand ? from_register<T>(w, replacements[k], lane) : old;
            else next = apply<Operation>(old, operand);
            memcpy(at + k * sizeof(T), &next, sizeof(T));
            memcpy(before[lane] + k * sizeof(T), &old, sizeof(T));
        }
    }
    count_access(w, space, addresses, (int)sizeof(T) * count, lanes);
    if (!returns) return;
    for (int l = 0; l < LANES; ++l)
        for (int k = 0; k < count && (lanes >> l & 1); ++k) {
            T old;
            memcpy(&old, before[l] + k * sizeof(T), sizeof(T));
            to_register<T>(w, destinations[k], l, old);
        }
}

template <class T, class Operation, bool compares = false> void add(const std::string& name) {
    add_handler("atom.generic." + name, atomic<GENERIC, T, Operation, true, compares>);
    add_handler("atom.global." + name, atomic<GLOBAL, T, Operation, true, compares>);
    add_handler("atom.shared." + name, atomic<SHARED, T, Operation, true, compares>);
    if (compares || std::is_same<Operation, Exchange>::value) return;
    add_handler("red.generic." + name, atomic<GENERIC, T, Operation, false, compares>);
    add_handler("red.global." + name, atomic<GLOBAL, T, Operation, false, compares>);
    add_handler("red.shared." + name, atomic<SHARED, T, Operation, false, compares>);
}

template <class T> void add_number(const std::string& type) {
    add<T, Add>("add." + type);
    add<T, Extreme<false>>("min." + type);
    add<T, Extreme<true>>("max." + type);
}

// 16-bit floats; min and max occur in vectors alone, which lie in global memory.
template <class T> void add_half(const std::string& type) {
    add<T, Add>("add." + type);
    add_handler("atom.global.min." + type, atomic<GLOBAL, T, Extreme<false>, true, false>);
    add_handler("atom.global.max." + type, atomic<GLOBAL, T, Extreme<true>, true, false>);
    add_handler("red.global.min." + type, atomic<GLOBAL, T, Extreme<false>, false, false>);
    add_handler("red.global.max." + type, atomic<GLOBAL, T, Extreme<true>, false, false>);
}

template <class T> void add_bits(const std::string& type) {
    add<T, And>("and." + type);
    add<T, Or>("or." + type);
    add<T, Xor>("xor." + type);
    add<T, Exchange>("exch." + type);
    add<T, Exchange, true>("cas." + type);
}

const int registered = [] {
    add_number<u32>("u32");
    add_number<s32>("s32");
    add_number<u64>("u64");
    add_number<s64>("s64");
    add<float, Add>("add.f32");
    add<double, Add>("add.f64");
    add_half<Half>("f16");
    add_half<Brain>("bf16");
    add_half<Pair<Half>>("f16x2");
    add_half<Pair<Brain>>("bf16x2");
    add_bits<u32>("b32");
    add_bits<u64>("b64");
    add<u16, Exchange, true>("cas.b16");
    add<Wide, Exchange>("exch.b128");
    add<Wide, Exchange, true>("cas.b128");
    add<u32, Increment>("inc.u32");
    add<u32, Decrement>("dec.u32");
    return 0;
}();

}  // namespace

}  // namespace ptx
