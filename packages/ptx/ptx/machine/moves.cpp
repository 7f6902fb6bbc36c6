// Moves between registers, choices by a predicate or a sign, and logic of predicates.
#include "lanes.h"

namespace ptx {
namespace {

struct u128 {
    u64 low, high;
};

template <class T> void move(Warp& w, const Instruction& i, u32 lanes) {
    write_lanes(lanes_of<T>(w, i.operands[0]), lanes_of<T>(w, i.operands[1]), lanes);
}

// Parts of 8 to 64 bits in one register, the first of them lowest. `T` is how the whole lies in a lane, `BYTES` what it has.
template <class T, int BYTES> void pack(Warp& w, const Instruction& i, u32 lanes) {
    const int parts = i.count - 1, bytes = BYTES / parts;
    T results[LANES] = {};
    if (BYTES == 4 && parts == 2) {  // two halves, the usual case
        const u32 *low = lanes_of<u32>(w, i.operands[1]), *high = lanes_of<u32>(w, i.operands[2]);
        u32 both[LANES];
        for (int l = 0; l < LANES; ++l) both[l] = (low[l] & 0xffff) | high[l] << 16;
        return write_lanes(lanes_of<u32>(w, i.operands[0]), both, lanes);
    }
    for (int part = 0; part < parts; ++part)
        for (int l = 0; l < LANES; ++l) {
            const u64 value = bytes == 8 ? lanes_of<u64>(w, i.operands[1 + part])[l] : lanes_of<u32>(w, i.operands[1 + part])[l];
            memcpy(reinterpret_cast<u8*>(&results[l]) + part * bytes, &value, bytes);
        }
    write_lanes(lanes_of<T>(w, i.operands[0]), results, lanes);
}
template <class T, int BYTES> void unpack(Warp& w, const Instruction& i, u32 lanes) {
    const int parts = i.count - 1, bytes = BYTES / parts;
    if constexpr (BYTES == 4 && sizeof(T) == 4)
        if (parts == 2) {  // two halves, the usual case
            u32 halves[2][LANES];
            const u32* from = lanes_of<u32>(w, i.operands[0]);
            for (int l = 0; l < LANES; ++l) halves[0][l] = from[l] & 0xffff, halves[1][l] = from[l] >> 16;
            for (int part = 0; part < 2; ++part) write_lanes(lanes_of<u32>(w, i.operands[1 + part]), halves[part], lanes);
            return;
        }
    T whole[LANES];  // a copy: a part may go to the same register
    memcpy(whole, place(w, i.operands[0]), sizeof whole);
    for (int part = 0; part < parts; ++part) {
        u64 values[LANES] = {};
        u32 narrow[LANES];
        for (int l = 0; l < LANES; ++l) {
            memcpy(&values[l], reinterpret_cast<u8*>(&whole[l]) + part * bytes, bytes);
            narrow[l] = (u32)values[l];
        }
        if (bytes == 8) write_lanes(lanes_of<u64>(w, i.operands[1 + part]), values, lanes);
        else write_lanes(lanes_of<u32>(w, i.operands[1 + part]), narrow, lanes);
    }
}

template <class T> void select(Warp& w, const Instruction& i, u32 lanes) {
    const T *a = lanes_of<T>(w, i.operands[1]), *b = lanes_of<T>(w, i.operands[2]);
    const u32 chosen = predicate(w, i.operands[3]);
    T results[LANES];
    for (int l = 0; l < LANES; ++l) results[l] = chosen >> l & 1 ? a[l] : b[l];
    write_lanes(lanes_of<T>(w, i.operands[0]), results, lanes);
}
// The first where the last operand is not negative; -0 is not, NaN is.
template <class T, class Sign, bool flush> void select_by_sign(Warp& w, const Instruction& i, u32 lanes) {
    const T *a = lanes_of<T>(w, i.operands[1]), *b = lanes_of<T>(w, i.operands[2]);
    auto sign = values<Sign>(w, i.operands[3]);
    T results[LANES];
    for (int l = 0; l < LANES; ++l) {
        Sign x = sign(l);
        if constexpr (flush) x = flushed(x);
        results[l] = x >= 0 ? a[l] : b[l];
    }
    write_lanes(lanes_of<T>(w, i.operands[0]), results, lanes);
}

void move_predicate(Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(w, i.operands[0], predicate(w, i.operands[1]), lanes);
}
void not_predicate(Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(w, i.operands[0], ~predicate(w, i.operands[1]), lanes);
}
void and_predicates(Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(w, i.operands[0], predicate(w, i.operands[1]) & predicate(w, i.operands[2]), lanes);
}
void or_predicates(Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(w, i.operands[0], predicate(w, i.operands[1]) | predicate(w, i.operands[2]), lanes);
}
void xor_predicates(Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(w, i.operands[0], predicate(w, i.operands[1]) ^ predicate(w, i.operands[2]), lanes);
}

// createpolicy: a policy of the cache changes no result.
void policy(Warp& w, const Instruction& i, u32 lanes) {
    write_each<u64>(w, i.operands[0], lanes, [](int) { return (u64)0; });
}

template <class T> void add_moves(const char* type) {
    add_handler(std::string("mov.") + type, move<T>);
    if (type[0] == 'b' && type[1] == 'f') return;
    if (std::string(type) == "f16") return;
    add_handler(std::string("selp.") + type, select<T>);
    add_handler(std::string("slct.") + type + ".s32", select_by_sign<T, s32, false>);
    add_handler(std::string("slct.") + type + ".f32", select_by_sign<T, float, false>);
    add_handler(std::string("slct.ftz.") + type + ".f32", select_by_sign<T, float, true>);
}

const bool added = [] {
    for (const char* type : {"b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32"}) add_moves<u32>(type);
    for (const char* type : {"b64", "u64", "s64", "f64"}) add_moves<u64>(type);
    add_handler("mov.b128", move<u128>);
    add_handler("pack.b16", pack<u32, 2>);
    add_handler("pack.b32", pack<u32, 4>);
    add_handler("pack.b64", pack<u64, 8>);
    add_handler("pack.b128", pack<u128, 16>);
    add_handler("unpack.b16", unpack<u32, 2>);
    add_handler("unpack.b32", unpack<u32, 4>);
    add_handler("unpack.b64", unpack<u64, 8>);
    add_handler("unpack.b128", unpack<u128, 16>);
    add_handler("mov.pred", move_predicate);
    add_handler("not.pred", not_predicate);
    add_handler("and.pred", and_predicates);
    add_handler("or.pred", or_predicates);
    add_handler("xor.pred", xor_predicates);
    add_handler("policy", policy);
    return true;
}();

}  // namespace
}  // namespace ptx
