// cp.async and mbarrier.
//
// A copy lands when its lane waits for it, or, where an mbarrier counts it, at a random time; copies land in random order. Until
// then its destination is in flight, and each access to it is reported.
#include "async_copies.h"

#include <algorithm>

#include "memory.h"

namespace ptx {

namespace {

// ---- cp.async: bytes, destination, source, bytes to read (-1: all)

void copy(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int size = o[0];
    u64 destinations[LANES], sources[LANES];
    addresses_of(w, o + 1, destinations);
    addresses_of(w, o + 4, sources);
    const u32* counts = lanes_of<u32>(w, o[7]);
    AsyncCopies& copies = *w.scheduling->copies;
    u32 reading = 0, whole = 0;
    for (int l = 0; l < LANES; ++l) whole |= (u32)(counts[l] == ALL || counts[l] == (u32)size) << l;
    u64 base = 0;
    const u32 quick = whole & lanes && read_global(w, sources, size, whole & lanes, base) ? whole & lanes : 0;
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        const u32 count = counts[l] == ALL ? (u32)size : counts[l];
        if (count > (u32)size)
            fail(w,
                 "cp.async reads " + std::to_string(count) + " bytes of " + std::to_string(size) + ", lane " + std::to_string(l));
        if ((sources[l] | destinations[l]) & (size - 1))
            fail(w, "misaligned cp.async of " + std::to_string(size) + " bytes, lane " + std::to_string(l) + ", from " +
                        hex(sources[l]) + " to " + hex(destinations[l]));
        AsyncCopy copy{(u32)destinations[l], (u8)size, (u8)l, copies.committed[l], {}};
        if (count) {
            const u8* from = quick >> l & 1
                                 ? reinterpret_cast<u8*>(sources[l])
                                 : access(w, GLOBAL, sources[l], (int)count, l, Access::READ, nullptr, Proxy::GENERIC, 1);
            memcpy(copy.data, from, count);
            reading |= 1u << l;
        }
        begin_copy(w, copy.destination, size, l, Proxy::GENERIC);
        copies.in_flight.push_back(copy);
    }
    count_access(w, SHARED, destinations, size, lanes);
    count_access(w, GLOBAL, sources, size, reading);
}

// Copies for which `lands(copy)` holds land, in random order.
template <class Lands> void land(Warp& w, Lands lands) {
    auto& in_flight = w.scheduling->copies->in_flight;
    const auto first = std::partition(in_flight.begin(), in_flight.end(), [&](const AsyncCopy& copy) { return !lands(copy); });
    for (auto n = in_flight.end() - first; n > 1; --n) std::swap(first[n - 1], first[random_bits(w) % n]);
    for (auto copy = first; copy != in_flight.end(); ++copy)
        land_copy(w, copy->destination, copy->size, copy->lane, w.scheduling->clock(w), copy->data);
    in_flight.erase(first, in_flight.end());
}

void commit_group(Warp& w, const Instruction&, u32 lanes) {
    for (int l = 0; l < LANES; ++l) w.scheduling->copies->committed[l] += lanes >> l & 1;
}

void wait_group(Warp& w, const Instruction& i, u32 lanes) {  // all but the last groups
    const AsyncCopies& copies = *w.scheduling->copies;
    const u32 keep = (u32)i.operands[0];
    land(w, [&](const AsyncCopy& copy) { return (lanes >> copy.lane & 1) && copy.group + keep < copies.committed[copy.lane]; });
}

void wait_all(Warp& w, const Instruction&, u32 lanes) {
    land(w, [&](const AsyncCopy& copy) { return lanes >> copy.lane & 1; });
}

void check_copies(Warp& w) {
    if (!w.scheduling->copies->in_flight.empty()) {
        report(w, "copies in flight at the end, which no instruction waits for",
               std::to_string(w.scheduling->copies->in_flight.size()) + " copies, one to shared address " +
                   std::to_string(w.scheduling->copies->in_flight[0].destination));
        wait_all(w, *w.at, ALL);
    }
}

// ---- mbarrier

u32 shared_address(Warp& w, u64 address) {
    if (resolve(w, address >= LOCAL_WINDOW ? GENERIC : SHARED, address) != SHARED)
        fail(w, "an mbarrier must lie in shared memory; its address is " + hex(address));
    return (u32)address;
}

// The block whose mbarrier an address names, and its address there.
Block& owner_of(Warp& w, u32& at) {
    u64 address = at;
    Block& block = owner_of(w, address);
    at = (u32)address;
    return block;
}

// The address of a lane's mbarrier, after the checks of an access to it.
u32 checked(Warp& w, u64 address, int lane) {
    const u32 at = shared_address(w, address);
    access(w, SHARED, at, 8, lane, Access::ATOMIC);
    return at;
}

void complete_phase(Block& block, Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    join(barrier.complete, barrier.arriving);
    barrier.arriving = {};
    barrier.pending = barrier.expected;
    ++barrier.phase;
    tell(block);
}

template <class Action> void for_each_barrier(Warp& w, const Instruction& i, int address_at, u32 lanes, Action action) {
    u64 addresses[LANES];
    addresses_of(w, i.operands + address_at, addresses);
    for (int l = 0; l < LANES; ++l)
        if (lanes >> l & 1) action(l, checked(w, addresses[l], l));
}

void init(Warp& w, const Instruction& i, u32 lanes) {  // address, count
    u64 addresses[LANES];
    addresses_of(w, i.operands, addresses);
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        const u32 at = shared_address(w, addresses[l]), count = lanes_of<u32>(w, i.operands[3])[l];
        if (!count || count >= 1u << 20) fail(w, "an mbarrier for " + std::to_string(count) + " arrivals");
        if (w.block->mbarriers.count(at))
            report(w, "mbarrier made over one that is in use", "shared address " + std::to_string(at));
        memset(access(w, SHARED, at, 8, l, Access::WRITE), 0, 8);
        w.block->mbarriers[at] = Mbarrier{count, count};
    }
}

// Bulk copies must have ended before their shared memory serves another purpose, or another block.
void check_seen(Warp& w, u32 at, const Mbarrier& barrier) {
    if (barrier.copies >= (s64)barrier.seen)
        report(w, "copies in flight at the end, which no instruction waits for",
               "bulk copies that the mbarrier at shared address " + std::to_string(at) + " counts");
}

void check_bulk_copies(Warp& w) {
    if (!w.block->alive)
        for (auto& [at, barrier] : w.block->mbarriers) check_seen(w, at, barrier);
}

void invalidate(Warp& w, const Instruction& i, u32 lanes) {
    for_each_barrier(w, i, 0, lanes, [&](int, u32 at) {
        check_seen(w, at, mbarrier_at(w, at));
        w.block->mbarriers.erase(at);
    });
}

void arrive(Warp& w, const Block* owner, Mbarrier& barrier, u32 count) {
    if (!count || count > barrier.pending)
        fail(w, std::to_string(count) + " arrivals at an mbarrier that expects " + std::to_string(barrier.pending) + " more");
    if (owner == w.block) join(barrier.arriving, w.scheduling->knowledge);
    else if (checks_races(w)) join(barrier.arriving.orders, released_by(w));
    barrier.pending -= count;
}

// The token of a phase, as arrive gives it: the phase and what is pending.
u64 token(const Mbarrier& barrier) { return barrier.phase << 20 | barrier.pending; }

// address, count or bytes [, destination]
template <bool bytes, bool drops> void arrive(Warp& w, const Instruction& i, u32 lanes) {
    for_each_barrier(w, i, 0, lanes, [&](int l, u32 at) {
        Mbarrier& barrier = mbarrier_at(w, at);
        const u32 number = lanes_of<u32>(w, i.operands[3])[l];
        if (i.count > 4) lanes_of<u64>(w, i.operands[4])[l] = token(barrier);
        if (bytes) expect_transaction(w, barrier, number);
        Block& owner = owner_of(w, at);
        arrive(w, &owner, barrier, bytes ? 1 : number);
        if (drops) barrier.expected -= bytes ? 1 : number;
        complete_phase(owner, barrier);
    });
    advance(w);
}

void expect(Warp& w, const Instruction& i, u32 lanes) {
    for_each_barrier(
        w, i, 0, lanes, [&](int l, u32 at) { expect_transaction(w, mbarrier_at(w, at), lanes_of<u32>(w, i.operands[3])[l]); });
}

void complete(Warp& w, const Instruction& i, u32 lanes) {
    for_each_barrier(w, i, 0, lanes, [&](int l, u32 at) {
        mbarrier_at(w, at);
        complete_transaction(*w.block, at, lanes_of<u32>(w, i.operands[3])[l]);
    });
}

// Destination predicate, address, token or parity. `waits`: lanes may wait until the phase is complete.
template <bool parity, bool waits> void test(Warp& w, const Instruction& i, u32 lanes) {
    u32 done = 0;
    for_each_barrier(w, i, 1, lanes, [&](int l, u32 at) {
        Mbarrier& barrier = mbarrier_at(w, at);
        const u64 phase = parity ? lanes_of<u32>(w, i.operands[4])[l] & 1 : lanes_of<u64>(w, i.operands[4])[l] >> 20;
        if (parity ? (barrier.phase & 1) == phase : barrier.phase == phase) return;
        done |= 1u << l;
        barrier.seen = barrier.phase;
        acquire_from(w, barrier.complete);
    });
    if (waits && done != lanes && random_bits(w) % 4) return try_again(w);  // else its time is up
    set_predicate(w, i.operands[0], done, lanes);
}

void pending_count(Warp& w, const Instruction& i, u32 lanes) {
    u32 counts[LANES];
    for (int l = 0; l < LANES; ++l) counts[l] = (u32)lanes_of<u64>(w, i.operands[1])[l] & 0xfffff;
    write_lanes(lanes_of<u32>(w, i.operands[0]), counts, lanes);
}

// cp.async.mbarrier.arrive: an arrival when the lane's copies until now have landed.
template <bool counts_more> void arrive_after_copies(Warp& w, const Instruction& i, u32 lanes) {
    auto& in_flight = w.scheduling->copies->in_flight;
    for_each_barrier(w, i, 0, lanes, [&](int lane, u32 at) {
        Mbarrier& barrier = mbarrier_at(w, at);
        if (counts_more) ++barrier.pending;
        std::vector<AsyncCopy> copies;
        for (const AsyncCopy& copy : in_flight)
            if (copy.lane == lane) copies.push_back(copy);
        in_flight.erase(
            std::remove_if(in_flight.begin(), in_flight.end(), [&](const AsyncCopy& copy) { return copy.lane == lane; }),
            in_flight.end());
        join(barrier.arriving, w.scheduling->knowledge);
        const u32 clock = w.scheduling->clock(w);
        later(*w.block, [&w, at, copies, clock, number = i.number] {
            for (const AsyncCopy& copy : copies) land_copy(w, copy.destination, copy.size, copy.lane, clock, copy.data);
            auto place = w.block->mbarriers.find(at);
            if (place == w.block->mbarriers.end() || !place->second.pending) {
                w.at = &w.block->machine->program->code[number];
                fail(w, "its arrival finds no mbarrier that expects one");
            }
            --place->second.pending;
            complete_phase(*w.block, place->second);
        });
    });
    advance(w);
}

const int registered = [] {
    add_at_exit(check_copies);
    add_at_exit(check_bulk_copies);
    add_handler("cp.async", copy);
    add_handler("cp.async.commit_group", commit_group);
    add_handler("cp.async.wait_group", wait_group);
    add_handler("cp.async.wait_all", wait_all);
    add_handler("cp.async.mbarrier.arrive", arrive_after_copies<true>);
    add_handler("cp.async.mbarrier.arrive.noinc", arrive_after_copies<false>);
    add_handler("mbarrier.init", init);
    add_handler("mbarrier.inval", invalidate);
    add_handler("mbarrier.arrive", arrive<false, false>);
    add_handler("mbarrier.arrive.noComplete", arrive<false, false>);
    add_handler("mbarrier.arrive_drop", arrive<false, true>);
    add_handler("mbarrier.arrive.expect_tx", arrive<true, false>);
    add_handler("mbarrier.expect_tx", expect);
    add_handler("mbarrier.complete_tx", complete);
    add_handler("mbarrier.test_wait", test<false, false>);
    add_handler("mbarrier.test_wait.parity", test<true, false>);
    add_handler("mbarrier.try_wait", test<false, true>);
    add_handler("mbarrier.try_wait.parity", test<true, true>);
    add_handler("mbarrier.pending_count", pending_count);
    return 0;
}();

}  // namespace

Mbarrier& mbarrier_at(Warp& w, u64 address) {
    u32 at = (u32)address;
    auto& all = owner_of(w, at).mbarriers;
    auto place = all.find(at);
    if (place == all.end()) fail(w, "no mbarrier was made at shared address " + std::to_string(address));
    return place->second;
}

void expect_transaction(Warp&, Mbarrier& barrier, u32 bytes) { barrier.bytes += bytes; }

// The mbarrier that hears of a copy or of products that have ended; who waits for it knows all that ended before.
static Mbarrier& told(Block& block, u32 address) {
    auto place = block.mbarriers.find(address);
    if (place == block.mbarriers.end())
        throw std::runtime_error("@-1 no mbarrier is at shared address " + std::to_string(address) +
                                 ", where a copy or product ends");
    for (Clocks* clocks : {&place->second.arriving.known, &place->second.arriving.fenced}) {
        clocks->resize(block.warps.size() + 1);
        clocks->back() = block.copy_clock;
    }
    return place->second;
}

void complete_transaction(Block& block, u32 address, u32 bytes) {
    Mbarrier& barrier = told(block, address);
    barrier.bytes -= bytes;
    complete_phase(block, barrier);
}

void arrive(Block& block, u32 address) {
    Mbarrier& barrier = told(block, address);
    if (!barrier.pending)
        throw std::runtime_error("@-1 products end at an mbarrier that expects no arrival, shared address " +
                                 std::to_string(address));
    --barrier.pending;
    complete_phase(block, barrier);
}

}  // namespace ptx
