// Instructions that pass values between the lanes of a warp: shfl, vote, match, redux, elect, activemask.
//
// The scheduler has gathered the lanes of the member mask, the last operand, before a handler runs.
#include <algorithm>
#include <cmath>

#include "scheduler.h"

namespace ptx {

namespace {

u32 members(Warp& w, const Instruction& i, int lane) { return lanes_of<u32>(w, i.operands[i.count - 1])[lane]; }

// ---- shfl. Operands: destination, a, b, c, [destination predicate,] mask

enum Mode { UP, DOWN, BUTTERFLY, INDEX };

// Where a lane reads; `inside`: whether that lies in its segment.
template <Mode mode> int source_lane(int lane, u32 b, u32 c, bool& inside) {
    const int offset = b & 31, clamp = c & 31, segment = c >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int source = lane;
    switch (mode) {
        case UP: source = lane - offset; break;
        case DOWN: source = lane + offset; break;
        case BUTTERFLY: source = lane ^ offset; break;
        case INDEX: source = first | (offset & ~segment); break;
    }
    inside = mode == UP ? source >= last : source <= last;
    return inside ? source : lane;
}

template <Mode mode> void shuffle(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    u32 a[LANES], result[LANES], inside = 0;
    memcpy(a, place(w, o[1]), sizeof a);
    const u32 *b = lanes_of<u32>(w, o[2]), *c = lanes_of<u32>(w, o[3]);
    if (mode == BUTTERFLY && lanes == ALL && o[2] < 0 && o[3] < 0 && *c == LANES - 1) {  // constants, one segment: the usual case
        for (int l = 0; l < LANES; ++l) result[l] = a[l ^ (*b & 31)];
        write_lanes(lanes_of<u32>(w, o[0]), result, lanes);
        if (i.count == 6) set_predicate(w, o[4], ALL, lanes);
        return;
    }
    for (int l = 0; l < LANES; ++l) {
        bool in_segment;
        const int source = source_lane<mode>(l, b[l], c[l], in_segment);
        if ((lanes >> l & 1) && !(lanes >> source & 1))
            report(w, "shuffle from a lane that does not take part",
                   "lane " + std::to_string(l) + " reads lane " + std::to_string(source));
        result[l] = a[source];
        inside |= (u32)in_segment << l;
    }
    write_lanes(lanes_of<u32>(w, o[0]), result, lanes);
    if (i.count == 6) set_predicate(w, o[4], inside, lanes);
}

// ---- vote. Operands: destination, predicate, 1 if it is negated, mask

u32 votes(Warp& w, const Instruction& i) {
    const u32 p = predicate(w, i.operands[1]);
    return i.operands[2] ? ~p : p;
}

// Calls `set(lane, voters, yes)` for each lane.
template <class Set> void for_each_vote(Warp& w, const Instruction& i, u32 lanes, Set set) {
    const u32 yes = votes(w, i) & lanes;
    for (int l = 0; l < LANES; ++l)
        if (lanes >> l & 1) {
            const u32 voters = members(w, i, l) & lanes;
            set(l, voters, yes & voters);
        }
}

enum Vote { EVERY, ANY, UNIFORM };

template <Vote kind> void vote(Warp& w, const Instruction& i, u32 lanes) {
    u32 result = 0;
    for_each_vote(w, i, lanes, [&](int l, u32 voters, u32 yes) {
        const bool r = kind == ANY ? yes != 0 : kind == EVERY ? yes == voters : yes == voters || !yes;
        result |= (u32)r << l;
    });
    set_predicate(w, i.operands[0], result, lanes);
}

void ballot(Warp& w, const Instruction& i, u32 lanes) {
    u32* destination = lanes_of<u32>(w, i.operands[0]);
    for_each_vote(w, i, lanes, [&](int l, u32, u32 yes) { destination[l] = yes; });
}

// ---- match. Operands: destination, value, [destination predicate,] mask

template <class T> u32 equals(const T* values, int lane, u32 lanes) {
    u32 same = 0;
    for (int k = 0; k < LANES; ++k) same |= (u32)((lanes >> k & 1) && values[k] == values[lane]) << k;
    return same;
}

template <class T, bool all> void match(Warp& w, const Instruction& i, u32 lanes) {
    T values[LANES];
    memcpy(values, place(w, i.operands[1]), sizeof values);
    u32 result[LANES] = {}, agrees = 0;
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        const u32 mask = members(w, i, l) & lanes, same = equals(values, l, mask);
        result[l] = all && same != mask ? 0 : same;
        agrees |= (u32)(same == mask) << l;
    }
    write_lanes(lanes_of<u32>(w, i.operands[0]), result, lanes);
    if (all && i.count == 4) set_predicate(w, i.operands[2], agrees, lanes);
}

// ---- redux. Operands: destination, value, mask

struct Add {
    static u32 of(u32 a, u32 b) { return a + b; }
};
struct And {
    static u32 of(u32 a, u32 b) { return a & b; }
};
struct Or {
    static u32 of(u32 a, u32 b) { return a | b; }
};
struct Xor {
    static u32 of(u32 a, u32 b) { return a ^ b; }
};
template <bool largest> struct Extreme {
    template <class T> static T of(T a, T b) { return largest ? std::max(a, b) : std::min(a, b); }
};
// Of floats; `propagates`: NaN wins, else a number does.
template <bool largest, bool absolute, bool propagates> struct FloatExtreme {
    static float of(float a, float b) {
        if (absolute) a = std::fabs(a), b = std::fabs(b);
        if (a != a || b != b) return propagates ? NAN : a != a ? b : a;
        if (a == b) return std::signbit(a) == largest ? b : a;
        return (a > b) == largest ? a : b;
    }
};

template <class T, class Operation> void reduce(Warp& w, const Instruction& i, u32 lanes) {
    T values[LANES], result[LANES] = {};
    memcpy(values, place(w, i.operands[1]), sizeof values);
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        const u32 mask = members(w, i, l) & lanes;
        const int first = __builtin_ctz(mask);
        T sum = Operation::of(values[first], values[first]);  // takes the absolute value of one lane, too
        if (std::is_same<Operation, Add>::value || std::is_same<Operation, Xor>::value) sum = values[first];
        for (int k = first + 1; k < LANES; ++k)
            if (mask >> k & 1) sum = Operation::of(sum, values[k]);
        result[l] = sum;
    }
    write_lanes(lanes_of<T>(w, i.operands[0]), result, lanes);
}

// ---- elect: destination, destination predicate or -1, mask; activemask: destination

void elect(Warp& w, const Instruction& i, u32 lanes) {
    u32 leaders[LANES], leads = 0;
    for (int l = 0; l < LANES; ++l) {
        const u32 mask = members(w, i, l) & lanes;
        leaders[l] = mask ? __builtin_ctz(mask) : 0;
        leads |= (u32)((int)leaders[l] == l) << l;
    }
    write_lanes(lanes_of<u32>(w, i.operands[0]), leaders, lanes);
    if (i.operands[1] != -1) set_predicate(w, i.operands[1], leads, lanes);
}

void active_mask(Warp& w, const Instruction& i, u32 lanes) {
    u32 mask[LANES];
    std::fill(mask, mask + LANES, lanes);
    write_lanes(lanes_of<u32>(w, i.operands[0]), mask, lanes);
}

template <bool largest> void add_float(const std::string& name) {
    add_handler("redux.sync." + name + ".f32", reduce<float, FloatExtreme<largest, false, false>>);
    add_handler("redux.sync." + name + ".abs.f32", reduce<float, FloatExtreme<largest, true, false>>);
    add_handler("redux.sync." + name + ".NaN.f32", reduce<float, FloatExtreme<largest, false, true>>);
    add_handler("redux.sync." + name + ".abs.NaN.f32", reduce<float, FloatExtreme<largest, true, true>>);
}

const int registered = [] {
    add_handler("shfl.sync.up", shuffle<UP>);
    add_handler("shfl.sync.down", shuffle<DOWN>);
    add_handler("shfl.sync.bfly", shuffle<BUTTERFLY>);
    add_handler("shfl.sync.idx", shuffle<INDEX>);
    add_handler("vote.sync.all", vote<EVERY>);
    add_handler("vote.sync.any", vote<ANY>);
    add_handler("vote.sync.uni", vote<UNIFORM>);
    add_handler("vote.sync.ballot", ballot);
    add_handler("match.sync.any.b32", match<u32, false>);
    add_handler("match.sync.any.b64", match<u64, false>);
    add_handler("match.sync.all.b32", match<u32, true>);
    add_handler("match.sync.all.b64", match<u64, true>);
    add_handler("redux.sync.add.u32", reduce<u32, Add>);
    add_handler("redux.sync.add.s32", reduce<u32, Add>);
    add_handler("redux.sync.min.u32", reduce<u32, Extreme<false>>);
    add_handler("redux.sync.max.u32", reduce<u32, Extreme<true>>);
    add_handler("redux.sync.min.s32", reduce<s32, Extreme<false>>);
    add_handler("redux.sync.max.s32", reduce<s32, Extreme<true>>);
    add_handler("redux.sync.and.b32", reduce<u32, And>);
    add_handler("redux.sync.or.b32", reduce<u32, Or>);
    add_handler("redux.sync.xor.b32", reduce<u32, Xor>);
    add_float<false>("min");
    add_float<true>("max");
    add_handler("elect.sync", elect);
    add_handler("activemask", active_mask);
    return 0;
}();

}  // namespace

}  // namespace ptx
