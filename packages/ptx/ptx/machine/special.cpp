// Approximations. They are as exact as a float is, or, with noise, off by up to the error that the PTX ISA documents: by the same
// amount for the same input, as on a device.
#include "lanes.h"

namespace ptx {
namespace {

enum Bound { RELATIVE, ABSOLUTE };

// A number in [-1, 1) that depends on the inputs and on which noise there is.
double drawn(u64 noise, u64 inputs) {
    u64 bits = (inputs ^ (2 * noise + 1)) * 0x9e3779b97f4a7c15ull;
    bits = (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9ull;
    return (double)(s32)((bits ^ bits >> 32) & 0xffffffff) / 2147483648.0;
}
double disturbed(double x, double error, Bound bound, double draw) {
    if (x == 0 || !std::isfinite(x)) return x;  // documented exactly
    return bound == RELATIVE ? x * (1 + error * draw) : x + error * draw;
}

// Each: the function, and its largest error.
struct Exp2 {
    static double of(double a) { return std::exp2(a); }
    static constexpr double ERROR = 0x1p-22;
    static Bound bound(double) { return RELATIVE; }
};
struct Log2 {
    static double of(double a) { return std::log2(a); }
    static constexpr double ERROR = 0x1p-22;
    static Bound bound(double a) { return a > 0.5 && a < 2 ? ABSOLUTE : RELATIVE; }
};
struct Sine {
    static double of(double a) { return std::sin(a); }
    static constexpr double ERROR = 0x1p-20;
    static Bound bound(double) { return ABSOLUTE; }
};
struct Cosine {
    static double of(double a) { return std::cos(a); }
    static constexpr double ERROR = 0x1p-20;
    static Bound bound(double) { return ABSOLUTE; }
};
struct ReciprocalRoot {
    static double of(double a) { return 1 / std::sqrt(a); }
    static constexpr double ERROR = 0x1p-22;
    static Bound bound(double) { return RELATIVE; }
};
struct Reciprocal {
    static double of(double a) { return 1 / a; }
    static constexpr double ERROR = 0x1p-23;
    static Bound bound(double) { return RELATIVE; }
};
struct SquareRoot {
    static double of(double a) { return std::sqrt(a); }
    static constexpr double ERROR = 0x1p-23;
    static Bound bound(double) { return RELATIVE; }
};
struct Tanh {
    static double of(double a) { return std::tanh(a); }
    static constexpr double ERROR = 0x1p-11;
    static Bound bound(double) { return RELATIVE; }
};

template <class Function, bool flush> void approximate(Warp& w, const Instruction& i, u32 lanes) {
    const u32* a = lanes_of<u32>(w, i.operands[1]);
    const u64 noise = noise_of(w);
    write_each<float>(w, i.operands[0], lanes, [=](int l) {
        const float input = flush ? flushed(bits_as<float>(a[l])) : bits_as<float>(a[l]);
        double x = Function::of((double)input);
        if (noise && input != 0) x = disturbed(x, Function::ERROR, Function::bound(input), drawn(noise, bits_as<u32>(input)));
        return flush ? flushed((float)x) : (float)x;
    });
}
// Of 16 bits; `error` is documented for each format.
template <class H, class Function> float of_half(float a, double error, u64 noise) {
    double x = Function::of((double)a);
    if (noise && a != 0) x = disturbed(x, error, RELATIVE, drawn(noise, bits_as<u32>(a)));
    return to_float(narrowed<H>(x, NEAREST));
}
template <class H, class Function, int parts, int inverse_error>
void approximate_halves(Warp& w, const Instruction& i, u32 lanes) {
    constexpr bool flush = std::is_same_v<H, bf16> && std::is_same_v<Function, Exp2>;  // ex2.approx.ftz.bf16 says so
    const u32* a = lanes_of<u32>(w, i.operands[1]);
    const u64 noise = noise_of(w);
    write_each<u32>(w, i.operands[0], lanes, [=](int l) {
        u32 result = 0;
        for (int shift = 0; shift < 16 * parts; shift += 16) {
            float x = to_float(H{(u16)(a[l] >> shift)});
            if (flush) x = flushed(x);
            float y = of_half<H, Function>(x, 1.0 / inverse_error, noise);
            if (flush) y = flushed(y);
            result |= (u32)narrowed<H>(y).bits << shift;
        }
        return result;
    });
}

template <bool flush, bool full> void divide(Warp& w, const Instruction& i, u32 lanes) {
    const u32 *a = lanes_of<u32>(w, i.operands[1]), *b = lanes_of<u32>(w, i.operands[2]);
    const u64 noise = noise_of(w);
    write_each<float>(w, i.operands[0], lanes, [=](int l) {
        float x = bits_as<float>(a[l]), y = bits_as<float>(b[l]);
        if (flush) x = flushed(x), y = flushed(y);
        if (!full && std::fabs(y) > 0x1p126f && std::isfinite(y)) return x * 0;  // documented: 0, and NaN of an infinite x
        double quotient = (double)x / y;
        if (noise) quotient = disturbed(quotient, 0x1p-23, RELATIVE, drawn(noise, (u64)bits_as<u32>(x) << 32 | bits_as<u32>(y)));
        return flush ? flushed((float)quotient) : (float)quotient;
    });
}
// Of f64: only the upper half of the bits is kept, with a relative error of 2^-20, subnormal inputs and results are 0 with ftz.
template <class Function, bool flush> void approximate_double(Warp& w, const Instruction& i, u32 lanes) {
    auto a = values<double>(w, i.operands[1]);
    auto flushed_double = [](double x) { return flush && std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; };
    write_each<double>(w, i.operands[0], lanes, [=](int l) {
        const double x = flushed_double(Function::of(flushed_double(a(l))));
        return x != x ? x : bits_as<double>(bits_as<u64>(x) & 0xffffffff00000000);
    });
}

template <class Function> void add_function(const std::string& name) {
    add_handler(name + ".approx.f32", approximate<Function, false>);
    add_handler(name + ".approx.ftz.f32", approximate<Function, true>);
}

const bool added = [] {
    add_function<Exp2>("ex2");
    add_function<Log2>("lg2");
    add_function<Sine>("sin");
    add_function<Cosine>("cos");
    add_function<ReciprocalRoot>("rsqrt");
    add_function<Reciprocal>("rcp");
    add_function<SquareRoot>("sqrt");
    add_handler("tanh.approx.f32", approximate<Tanh, false>);
    add_handler("tanh.approx.f16", approximate_halves<f16, Tanh, 1, 2029>);  // 2^-10.987
    add_handler("tanh.approx.f16x2", approximate_halves<f16, Tanh, 2, 2029>);
    add_handler("tanh.approx.bf16", approximate_halves<bf16, Tanh, 1, 256>);
    add_handler("tanh.approx.bf16x2", approximate_halves<bf16, Tanh, 2, 256>);
    add_handler("ex2.approx.f16", approximate_halves<f16, Exp2, 1, 955>);  // 2^-9.9
    add_handler("ex2.approx.f16x2", approximate_halves<f16, Exp2, 2, 955>);
    add_handler("ex2.approx.ftz.bf16", approximate_halves<bf16, Exp2, 1, 128>);
    add_handler("ex2.approx.ftz.bf16x2", approximate_halves<bf16, Exp2, 2, 128>);
    add_handler("div.full.f32", divide<false, true>);
    add_handler("div.full.ftz.f32", divide<true, true>);
    add_handler("div.approx.f32", divide<false, false>);
    add_handler("div.approx.ftz.f32", divide<true, false>);
    add_handler("rcp.approx.ftz.f64", approximate_double<Reciprocal, true>);
    add_handler("rsqrt.approx.ftz.f64", approximate_double<ReciprocalRoot, true>);
    add_handler("rsqrt.approx.f64", approximate_double<ReciprocalRoot, false>);
    return true;
}();

}  // namespace
}  // namespace ptx
