// Floating-point arithmetic as IEEE 754 has it, with the modifiers of PTX: directed rounding, ftz (subnormal numbers are 0), sat.
#include <cfenv>

#include "lanes.h"

namespace ptx {
namespace {

struct Add {
    template <class T> static T of(T a, T b) { return a + b; }
};
struct Subtract {
    template <class T> static T of(T a, T b) { return a - b; }
};
struct Multiply {
    template <class T> static T of(T a, T b) { return a * b; }
};
struct Divide {
    template <class T> static T of(T a, T b) { return a / b; }
};
struct MultiplyAdd {
    template <class T> static T of(T a, T b, T c) { return std::fma(a, b, c); }
};
struct Reciprocal {
    template <class T> static T of(T a) { return 1 / a; }
};
struct SquareRoot {
    template <class T> static T of(T a) { return std::sqrt(a); }
};
struct Negate {
    static float of(float a) { return bits_as<float>(bits_as<u32>(a) ^ 0x80000000); }
    static double of(double a) { return bits_as<double>(bits_as<u64>(a) ^ 0x8000000000000000); }
};
struct Absolute {
    static float of(float a) { return bits_as<float>(bits_as<u32>(a) & 0x7fffffff); }
    static double of(double a) { return bits_as<double>(bits_as<u64>(a) & 0x7fffffffffffffff); }
};
struct CopySign {  // the sign of a on b
    template <class T> static T of(T a, T b) { return std::copysign(b, a); }
};
// A NaN loses against a number; -0 is less than 0.
struct Maximum {
    template <class T> static T of(T a, T b) { return a != a ? b : b != b ? a : a > b ? a : a < b ? b : std::signbit(a) ? b : a; }
};
struct Minimum {
    template <class T> static T of(T a, T b) { return a != a ? b : b != b ? a : a < b ? a : a > b ? b : std::signbit(a) ? a : b; }
};
template <class Operation> struct OrNan {
    template <class T> static T of(T a, T b) {
        return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : Operation::of(a, b);
    }
};
template <class Operation> struct OfMagnitudes {  // the result gets the product of the signs
    static float of(float a, float b) {
        const float result = Operation::of(Absolute::of(a), Absolute::of(b));
        return bits_as<float>(bits_as<u32>(result) ^ ((bits_as<u32>(a) ^ bits_as<u32>(b)) & 0x80000000));
    }
};
template <class Operation> struct OfThree {
    static float of(float a, float b, float c) { return Operation::of(Operation::of(a, b), c); }
};

// ---- modifiers

template <class Operation> struct Flushed {
    template <class... T> static float of(T... a) { return flushed(Operation::of(flushed(a)...)); }
};
template <class Operation> struct Saturated {
    template <class... T> static float of(T... a) { return saturated(Operation::of(a...)); }
};
template <class Operation> struct Positive {  // .relu: negative results are 0
    template <class... T> static float of(T... a) {
        const float result = Operation::of(a...);
        return result < 0 || result == 0 ? 0.0f : result;
    }
};
// Subnormal numbers of 16 bits are normal floats, so these know the format.
inline float flushed_half(float x) { return std::fabs(x) < 0x1p-14f ? std::copysign(0.0f, x) : x; }
template <class Operation> struct HalfFlushed {
    template <class... T> static float of(T... a) {
        return flushed_half(to_float(narrowed<f16>(Operation::of(flushed_half(a)...))));
    }
};
// The sum of a product of halves and a half, in one rounding: exact in double where it matters (see rounded_to).
template <class H> struct HalfMultiplyAdd {
    static float of(float a, float b, float c) { return to_float(narrowed<H>((double)a * b + (double)c, NEAREST)); }
};

// The processor rounds as it is told. noipa keeps the compiler from moving the arithmetic out of the place where that holds.
template <class Operation, class... T> [[gnu::noipa]] auto opaque(T... a) { return Operation::of(a...); }
template <Rounding rounding, class Operation> struct Directed {
    template <class... T> static auto of(T... a) {
        constexpr int MODES[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
        std::fesetround(MODES[rounding]);
        const auto result = opaque<Operation>(a...);
        std::fesetround(FE_TONEAREST);
        return result;
    }
};

// Neither calculates: they change the sign of all that there is, also of NaN.
template <class Word, bool flush> void change_sign(Warp& w, const Instruction& i, u32 lanes, Word keep, Word flip) {
    const Word* a = lanes_of<Word>(w, i.operands[1]);
    Word results[LANES];
    for (int l = 0; l < LANES; ++l) {
        Word x = a[l];
        if (flush) x = bits_as<u32>(flushed(bits_as<float>((u32)x)));
        results[l] = (x & keep) ^ flip;
    }
    write_lanes(lanes_of<Word>(w, i.operands[0]), results, lanes);
}
template <class Word, u64 sign, bool flush = false> void negate(Warp& w, const Instruction& i, u32 lanes) {
    change_sign<Word, flush>(w, i, lanes, ~(Word)0, (Word)sign);
}
template <class Word, u64 sign, bool flush = false> void absolute(Warp& w, const Instruction& i, u32 lanes) {
    change_sign<Word, flush>(w, i, lanes, (Word)~sign, 0);
}
template <bool absolute, int halves> void change_sign_flushed(Warp& w, const Instruction& i, u32 lanes) {  // of f16
    const u32* a = lanes_of<u32>(w, i.operands[1]);
    u32 results[LANES];
    for (int l = 0; l < LANES; ++l) {
        results[l] = 0;
        for (int part = 0; part < 16 * halves; part += 16) {
            u32 x = a[l] >> part & 0xffff;
            if (!(x & 0x7c00)) x &= 0x8000;
            results[l] |= (absolute ? x & 0x7fff : x ^ 0x8000) << part;
        }
    }
    write_lanes(lanes_of<u32>(w, i.operands[0]), results, lanes);
}

// ---- handlers by name: `add.rz.ftz.sat.f32`

template <class Operation, class... T> void add_modified(const std::string& name) {
    add_handler(name + ".f32", map<float, Operation, T...>);
    add_handler(name + ".ftz.f32", map<float, Flushed<Operation>, T...>);
}
template <class Operation, class... T> void add_saturated(const std::string& name) {
    add_modified<Operation, T...>(name);
    add_handler(name + ".sat.f32", map<float, Saturated<Operation>, T...>);
    add_handler(name + ".ftz.sat.f32", map<float, Saturated<Flushed<Operation>>, T...>);
}

template <class Operation, bool saturates, class... Of> struct Rounded {  // Of: one type for each source, float in all of them
    template <class Op> static void one(const std::string& name) {
        if constexpr (saturates) add_saturated<Op, Of...>(name);
        else add_modified<Op, Of...>(name);
        add_handler(name + ".f64", map<double, Op, std::conditional_t<true, double, Of>...>);
    }
    static void all(const std::string& name) {
        one<Operation>(name);
        one<Directed<TO_ZERO, Operation>>(name + ".rz");
        one<Directed<DOWN, Operation>>(name + ".rm");
        one<Directed<UP, Operation>>(name + ".rp");
    }
};

template <class H, class Operation, class... Of> void add_half(const std::string& name, const std::string& modifiers) {
    add_handler(name + modifiers + "." + NAME<H>, map<H, Operation, std::conditional_t<true, H, Of>...>);
    add_handler(name + modifiers + "." + NAME<H> + "x2", map_pairs<H, u32, Operation, std::conditional_t<true, u32, Of>...>);
}
template <class Operation> void add_half_arithmetic(const std::string& name) {
    add_half<f16, Operation, f16, f16>(name, "");
    add_half<f16, HalfFlushed<Operation>, f16, f16>(name, ".ftz");
    add_half<f16, Saturated<Operation>, f16, f16>(name, ".sat");
    add_half<f16, Saturated<HalfFlushed<Operation>>, f16, f16>(name, ".ftz.sat");
    add_half<bf16, Operation, bf16, bf16>(name, "");
    add_handler(name + ".f32x2", map_pairs<float, u64, Operation, u64, u64>);
    add_handler(name + ".ftz.f32x2", map_pairs<float, u64, Flushed<Operation>, u64, u64>);
}
template <class Operation> void add_extremum(const std::string& name) {
    auto add_all = [&]<class Op>(Op, const std::string& modifiers) {
        add_handler(name + modifiers + ".f32", map<float, Op, float, float>);
        add_handler(name + ".ftz" + modifiers + ".f32", map<float, Flushed<Op>, float, float>);
        add_half<f16, Op, f16, f16>(name, modifiers);
        add_half<f16, HalfFlushed<Op>, f16, f16>(name, ".ftz" + modifiers);
        add_half<bf16, Op, bf16, bf16>(name, modifiers);
    };
    add_all(Operation(), "");
    add_all(OrNan<Operation>(), ".NaN");
    add_all(OfMagnitudes<Operation>(), ".xorsign.abs");
    add_all(OfMagnitudes<OrNan<Operation>>(), ".NaN.xorsign.abs");
    add_handler(name + ".f64", map<double, Operation, double, double>);
    auto add_three = [&]<class Op>(Op, const std::string& modifiers) {
        add_handler(name + "3" + modifiers + ".f32", map<float, OfThree<Op>, float, float, float>);
        add_handler(name + "3.ftz" + modifiers + ".f32", map<float, Flushed<OfThree<Op>>, float, float, float>);
    };
    add_three(Operation(), "");
    add_three(OrNan<Operation>(), ".NaN");
}
template <class H> void add_mixed() {  // f32 from a narrow first operand, or two narrow factors
    const std::string type = std::string(".f32.") + NAME<H>;
    add_handler("add" + type, map<float, Add, H, float>);
    add_handler("sub" + type, map<float, Subtract, H, float>);
    add_handler("fma" + type, map<float, MultiplyAdd, H, H, float>);
    add_handler("add.sat" + type, map<float, Saturated<Add>, H, float>);
    add_handler("sub.sat" + type, map<float, Saturated<Subtract>, H, float>);
    add_handler("fma.sat" + type, map<float, Saturated<MultiplyAdd>, H, H, float>);
}

const bool added = [] {
    Rounded<Add, true, float, float>::all("add");
    Rounded<Subtract, true, float, float>::all("sub");
    Rounded<Multiply, true, float, float>::all("mul");
    Rounded<MultiplyAdd, true, float, float, float>::all("fma");
    Rounded<Divide, false, float, float>::all("div");
    Rounded<Reciprocal, false, float>::all("rcp");
    Rounded<SquareRoot, false, float>::all("sqrt");
    add_handler("copysign.f32", map<float, CopySign, float, float>);
    add_handler("copysign.f64", map<double, CopySign, double, double>);

    add_half_arithmetic<Add>("add");
    add_half_arithmetic<Subtract>("sub");
    add_half_arithmetic<Multiply>("mul");
    add_handler("fma.f32x2", map_pairs<float, u64, MultiplyAdd, u64, u64, u64>);
    add_handler("fma.ftz.f32x2", map_pairs<float, u64, Flushed<MultiplyAdd>, u64, u64, u64>);
    using Fma = HalfMultiplyAdd<f16>;
    add_half<f16, Fma, f16, f16, f16>("fma", "");
    add_half<f16, HalfFlushed<Fma>, f16, f16, f16>("fma", ".ftz");
    add_half<f16, Saturated<Fma>, f16, f16, f16>("fma", ".sat");
    add_half<f16, Saturated<HalfFlushed<Fma>>, f16, f16, f16>("fma", ".ftz.sat");
    add_half<f16, Positive<Fma>, f16, f16, f16>("fma", ".relu");
    add_half<f16, Positive<HalfFlushed<Fma>>, f16, f16, f16>("fma", ".ftz.relu");
    add_half<bf16, HalfMultiplyAdd<bf16>, bf16, bf16, bf16>("fma", "");
    add_half<bf16, Positive<HalfMultiplyAdd<bf16>>, bf16, bf16, bf16>("fma", ".relu");
    add_mixed<f16>();
    add_mixed<bf16>();

    add_extremum<Minimum>("min");
    add_extremum<Maximum>("max");

    add_handler("neg.f32", negate<u32, 0x80000000>);
    add_handler("neg.ftz.f32", negate<u32, 0x80000000, true>);
    add_handler("neg.f64", negate<u64, 0x8000000000000000>);
    add_handler("abs.f32", absolute<u32, 0x80000000>);
    add_handler("abs.ftz.f32", absolute<u32, 0x80000000, true>);
    add_handler("abs.f64", absolute<u64, 0x8000000000000000>);
    for (const char* type : {"f16", "bf16"}) {
        add_handler(std::string("neg.") + type, negate<u32, 0x8000>);
        add_handler(std::string("neg.") + type + "x2", negate<u32, 0x80008000>);
        add_handler(std::string("abs.") + type, absolute<u32, 0x8000>);
        add_handler(std::string("abs.") + type + "x2", absolute<u32, 0x80008000>);
    }
    add_handler("neg.ftz.f16", change_sign_flushed<false, 1>);
    add_handler("neg.ftz.f16x2", change_sign_flushed<false, 2>);
    add_handler("abs.ftz.f16", change_sign_flushed<true, 1>);
    add_handler("abs.ftz.f16x2", change_sign_flushed<true, 2>);
    return true;
}();

}  // namespace
}  // namespace ptx
