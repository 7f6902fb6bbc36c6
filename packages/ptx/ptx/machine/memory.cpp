// ld, st, fences, and conversions of addresses: an access goes to the memory that its address lies in.
#include "memory.h"

namespace ptx {

namespace {

// ---- the small memories

u8* local(Warp& w, u64 a, int size, int lane, bool reads, bool writes) {
    Warp::Scheduling& s = *w.scheduling;
    const u64 each = w.block->machine->local;
    if (a + size > each)
        fail(w, "access of " + std::to_string(size) + " bytes outside of local memory, lane " + std::to_string(lane) +
                    ", address " + std::to_string(a) + " of " + std::to_string(each));
    const u64 at = lane * each + a;
    if (!s.local_written.empty()) {
        if (reads && memchr(&s.local_written[at], 0, size))
            if (std::string* text = first_finding(w, "read of local memory that was never written"))
                *text += "lane " + std::to_string(lane) + ", local address " + std::to_string(a);
        if (writes) memset(&s.local_written[at], 1, size);
    }
    return &s.local[at];
}

u8* parameter(Warp& w, u64 a, int size, bool writes) {
    const Machine& machine = *w.block->machine;
    if (writes || a + size > machine.parameter_bytes)
        fail(w, "access of " + std::to_string(size) + " bytes at " + std::to_string(a) + " of " +
                    std::to_string(machine.parameter_bytes) + " bytes of parameters");
    return const_cast<u8*>(machine.parameters) + a;
}

inline u8* access(Warp& w, Space space, u64 a, int size, int lane, bool reads, bool writes, bool strong, const u8* data,
                  Proxy proxy, int alignment) {
    if (a & (u64)((alignment ? alignment : size) - 1))
        fail(w, "misaligned access of " + std::to_string(size) + " bytes, lane " + std::to_string(lane) + ", address " + hex(a));
    switch (resolve(w, space, a)) {
        case SHARED: return access_shared(w, a, size, lane, reads, writes, strong, data, proxy);
        case LOCAL: return local(w, a, size, lane, reads, writes);
        case PARAMETER: return parameter(w, a, size, writes);
        default: return access_global(w, a, size, lane, reads, writes, strong, data);
    }
}

}  // namespace

u8* access(Warp& w, Space space, u64 a, int size, int lane, Access kind, const u8* data, Proxy proxy, int alignment) {
    return access(
        w, space, a, size, lane, kind != Access::WRITE, kind != Access::READ, kind == Access::ATOMIC, data, proxy, alignment);
}

void fence_proxy(Warp& w) {
    Knowledge& knowledge = w.scheduling->knowledge;
    for (size_t v = 0; v < knowledge.known.size(); ++v) knowledge.fenced[v] = std::max(knowledge.fenced[v], knowledge.known[v]);
    advance(w);
}

void addresses_of(Warp& w, const s32* operands, u64 addresses[LANES]) {
    if (operands[1] == 8) {
        const u64* base = lanes_of<u64>(w, operands[0]);
        for (int l = 0; l < LANES; ++l) addresses[l] = base[l] + (s64)operands[2];
    } else {
        const u32* base = lanes_of<u32>(w, operands[0]);
        for (int l = 0; l < LANES; ++l) addresses[l] = (u32)(base[l] + (u32)operands[2]);
    }
}

// ---- ld, st

namespace {

// The element at `offset` of each lane's data, extended to the register.
template <class Memory, class Register>
void to_register(Warp& w, const u8 data[LANES][LARGEST], int offset, s32 slot, u32 lanes) {
    Register* to = lanes_of<Register>(w, slot);
    for (int l = 0; l < LANES; ++l) {
        Memory value;
        memcpy(&value, data[l] + offset, sizeof value);
        to[l] = lanes >> l & 1 ? (Register)value : to[l];
    }
}

struct Wide {
    u64 words[2];
};

void to_registers(Warp& w, const u8 data[LANES][LARGEST], int offset, int size, bool sign, s32 slot, int bytes, u32 lanes) {
    // a register of 16 bits lies zero-extended in 32: a sign stops there
    const int into = bytes == 8 ? 8 : 4;
    auto extend = [&](auto narrow, auto narrow_signed) {
        using Plain = decltype(narrow);
        using Signed = decltype(narrow_signed);
        if (!sign)
            return into == 8 ? to_register<Plain, u64>(w, data, offset, slot, lanes)
                             : to_register<Plain, u32>(w, data, offset, slot, lanes);
        into == 8 ? to_register<Signed, s64>(w, data, offset, slot, lanes)
                  : to_register<Signed, s32>(w, data, offset, slot, lanes);
        if (bytes != 2) return;
        u32* to = lanes_of<u32>(w, slot);
        for (int l = 0; l < LANES; ++l) to[l] = lanes >> l & 1 ? (u16)to[l] : to[l];
    };
    switch (size) {
        case 1: return extend(u8{}, s8{});
        case 2: return extend(u16{}, s16{});
        case 4: return extend(u32{}, s32{});
        case 8: return to_register<u64, u64>(w, data, offset, slot, lanes);
        default: return to_register<Wide, Wide>(w, data, offset, slot, lanes);
    }
}

// The other way round; `stride`: bytes of a lane in the register.
void from_registers(Warp& w, u8 data[LANES][LARGEST], int offset, int size, s32 slot, int stride) {
    const u8* from = place(w, slot);
    auto copy = [&](auto bytes) {
        for (int l = 0; l < LANES; ++l) memcpy(data[l] + offset, from + stride * l, bytes.value);
    };
    switch (size) {
        case 1: return copy(std::integral_constant<int, 1>{});
        case 2: return copy(std::integral_constant<int, 2>{});
        case 4: return copy(std::integral_constant<int, 4>{});
        case 8: return copy(std::integral_constant<int, 8>{});
        default: return copy(std::integral_constant<int, 16>{});
    }
}

// The element of each lane, zero-extended to the register.
template <class Memory, class Register> void gather(Warp& w, u64 base, const u64 addresses[LANES], s32 slot, u32 lanes) {
    Register values[LANES];
    if (lanes == ALL)
        for (int l = 0; l < LANES; ++l) values[l] = *reinterpret_cast<const Memory*>(base + addresses[l]);
    else
        for (u32 rest = lanes; rest; rest &= rest - 1) {
            const int l = __builtin_ctz(rest);
            values[l] = *reinterpret_cast<const Memory*>(base + addresses[l]);
        }
    write_lanes(lanes_of<Register>(w, slot), values, lanes);
}

bool read_parameters(const Warp& w, const u64 addresses[LANES], int size, u32 lanes, u64& base) {
    const Extent extent(addresses, lanes);
    base = reinterpret_cast<u64>(w.block->machine->parameters);
    return !(extent.bits & (size - 1)) && extent.high + size <= w.block->machine->parameter_bytes;
}

// The usual load: all lanes in one loop, from where the bytes lie to the registers. False: nothing happened.
template <Space space> bool quick_load(Warp& w, const s32* o, const u64 addresses[LANES], u32 lanes) {
    const int size = o[0], count = o[2], bytes = size * count, width = std::max(size, 4);
    for (int k = 0; k < count; ++k)
        if (o[1] || std::max(o[7 + 2 * k], 4) != width) return false;
    u64 base = 0;
    if (space == GLOBAL && !read_global(w, addresses, bytes, lanes, base)) return false;
    if (space == SHARED && !read_shared(w, addresses, bytes, lanes, base)) return false;
    if (space == PARAMETER && !read_parameters(w, addresses, bytes, lanes, base)) return false;
    for (int k = 0; k < count; ++k, base += size) {
        const s32 slot = o[6 + 2 * k];
        if (size == 1) gather<u8, u32>(w, base, addresses, slot, lanes);
        else if (size == 2) gather<u16, u32>(w, base, addresses, slot, lanes);
        else if (size == 4) gather<u32, u32>(w, base, addresses, slot, lanes);
        else if (size == 8) gather<u64, u64>(w, base, addresses, slot, lanes);
        else gather<Wide, Wide>(w, base, addresses, slot, lanes);
    }
    return true;
}

template <Space space, int order>  // order: -1 for plain accesses
void load(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int size = o[0], count = o[2], bytes = size * count;
    u64 addresses[LANES];
    addresses_of(w, o + 3, addresses);
    if constexpr (order < 0 && (space == GLOBAL || space == SHARED || space == PARAMETER))
        if (quick_load<space>(w, o, addresses, lanes)) {
            if (space <= SHARED) count_access(w, space, addresses, bytes, lanes);
            return;
        }
    u8 data[LANES][LARGEST];
    if (lanes != ALL) memset(data, 0, sizeof data);
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        if (order >= 0) synchronise(w, space, addresses[l], (Order)order, true, false);
        const u8* from = access(w, space, addresses[l], bytes, l, true, false, order >= 0, nullptr, Proxy::GENERIC, 0);
        switch (bytes) {
            case 16: memcpy(data[l], from, 16); break;
            case 8: memcpy(data[l], from, 8); break;
            case 4: memcpy(data[l], from, 4); break;
            default: memcpy(data[l], from, bytes);
        }
    }
    if (space <= SHARED) count_access(w, space, addresses, bytes, lanes);
    for (int k = 0; k < count; ++k) to_registers(w, data, k * size, size, o[1], o[6 + 2 * k], o[7 + 2 * k], lanes);
}

template <Space space, int order> void store(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int size = o[0], count = o[1], bytes = size * count;
    u64 addresses[LANES];
    addresses_of(w, o + 2, addresses);
    u8 all[LANES][LARGEST];
    for (int k = 0; k < count; ++k) from_registers(w, all, k * size, size, o[5 + 2 * k], o[6 + 2 * k] <= 4 ? 4 : o[6 + 2 * k]);
    const bool done = order >= 0        ? false
                      : space == GLOBAL ? write_global(w, addresses, bytes, lanes, all)
                      : space == SHARED ? write_shared(w, addresses, bytes, lanes, all)
                                        : false;
    for (int l = 0; l < LANES && !done; ++l) {
        if (!(lanes >> l & 1)) continue;
        const u8* data = all[l];
        if (order >= 0) synchronise(w, space, addresses[l], (Order)order, false, true);
        memcpy(access(w, space, addresses[l], bytes, l, false, true, order >= 0, data, Proxy::GENERIC, 0), data, bytes);
    }
    if (space <= SHARED) count_access(w, space, addresses, bytes, lanes);
}

// ---- conversions of addresses

template <u64 window, bool to> void convert_address(Warp& w, const Instruction& i, u32 lanes) {
    const u64* from = lanes_of<u64>(w, i.operands[1]);
    u64 result[LANES];
    for (int l = 0; l < LANES; ++l) result[l] = to ? from[l] - window : from[l] + window;
    write_lanes(lanes_of<u64>(w, i.operands[0]), result, lanes);
}

template <Space space> void is_space(Warp& w, const Instruction& i, u32 lanes) {
    const u64* from = lanes_of<u64>(w, i.operands[1]);
    u32 result = 0;
    for (int l = 0; l < LANES; ++l) {
        u64 address = from[l];
        result |= (u32)(resolve(w, GENERIC, address) == space) << l;
    }
    set_predicate(w, i.operands[0], result, lanes);
}

template <bool block_only> void fence_handler(Warp& w, const Instruction&, u32) { fence(w, block_only); }

void fence_proxy_handler(Warp& w, const Instruction&, u32) { fence_proxy(w); }

void nothing(Warp&, const Instruction&, u32) {}

template <Space space> void register_space(const std::string& name) {
    add_handler("ld." + name, load<space, -1>);
    if (space != PARAMETER) add_handler("st." + name, store<space, -1>);
    if (space > SHARED) return;
    for (const char* relaxed : {"relaxed", "volatile", "mmio"}) {
        if (space == SHARED && !strcmp(relaxed, "mmio")) continue;
        add_handler(std::string("ld.") + relaxed + "." + name, load<space, RELAXED>);
        add_handler(std::string("st.") + relaxed + "." + name, store<space, RELAXED>);
    }
    add_handler("ld.acquire." + name, load<space, ACQUIRE>);
    add_handler("st.release." + name, store<space, RELEASE>);
}

template <u64 window> void register_window(const std::string& name) {
    add_handler("cvta." + name + ".u64", convert_address<window, false>);
    add_handler("cvta.to." + name + ".u64", convert_address<window, true>);
}

const int registered = [] {
    register_space<GENERIC>("generic");
    register_space<GLOBAL>("global");
    register_space<SHARED>("shared");
    register_space<LOCAL>("local");
    register_space<PARAMETER>("param");
    register_window<0>("global");
    register_window<SHARED_WINDOW>("shared");
    register_window<LOCAL_WINDOW>("local");
    register_window<PARAMETER_WINDOW>("param");
    add_handler("isspacep.global", is_space<GLOBAL>);
    add_handler("isspacep.shared", is_space<SHARED>);
    add_handler("isspacep.local", is_space<LOCAL>);
    add_handler("fence.gpu", fence_handler<false>);
    add_handler("fence.cta", fence_handler<true>);
    add_handler("fence.proxy.async", fence_proxy_handler);
    add_handler("nop", nothing);
    return 0;
}();

}  // namespace

}  // namespace ptx
