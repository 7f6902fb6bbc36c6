// Global memory: bounds, initialisation, races; order between blocks and warps through memory.
//
// A race is an access and a write of the same byte by two warps, where no chain of barriers, or of releases and acquires, leads
// from the first to the second, and the write changes the byte: warps that write the same value, as Triton's replicated layouts
// do, are no race. Accesses that are both strong (atomic, volatile, relaxed, acquire, release) are none either.
// The shadow keeps two readers for 4 bytes, and one writer: a third one may hide a race, and never makes one up.
#include "memory.h"

namespace ptx {

// ---- the shadow: made page by page, where it is touched

namespace {

struct GlobalStamp {
    u64 mask : 4, atomic : 1, same : 1, clock : CLOCK_BITS, warp : 6, block : 32;  // same: the write changed nothing
};

struct GlobalWord {
    GlobalStamp writer, readers[2];  // the last two readers, of two blocks if there were any
};

constexpr u64 PAGE = 4096;

}  // namespace

struct GlobalShadow {
    std::unordered_map<u64, std::unique_ptr<GlobalWord[]>> pages;
    u64 last = ~0ull;
    GlobalWord* last_page = nullptr;
    // What was released at an address: to all, or [block, address] to one block alone.
    std::map<std::pair<u64, u64>, std::shared_ptr<const Orders>> released;

    GlobalWord& word(u64 address) {
        if (address / PAGE != last) {
            last = address / PAGE;
            auto& page = pages[last];
            if (!page) page.reset(new GlobalWord[PAGE / 4]());
            last_page = page.get();
        }
        return last_page[address % PAGE / 4];
    }
};

Machine::Machine() : shadow(std::make_unique<GlobalShadow>()), executed_by_kind(KINDS), lanes_by_kind(KINDS) {}
Machine::~Machine() = default;

namespace {

// Does the warp know what this warp of this block did at this clock?
bool ordered(const Warp& w, const GlobalStamp& earlier) {
    const Knowledge& knowledge = w.scheduling->knowledge;
    if (earlier.block == w.block->number) return earlier.clock <= knowledge.known[earlier.warp];
    if (!knowledge.orders) return false;
    auto place = knowledge.orders->blocks.find(earlier.block);
    return place != knowledge.orders->blocks.end() && earlier.clock <= place->second[earlier.warp];
}

std::string who(const Warp& w, const GlobalStamp& stamp) {
    const u32* grid = w.block->machine->grid;
    const u32 n = stamp.block;
    return "block " + std::to_string(n % grid[0]) + "," + std::to_string(n / grid[0] % grid[1]) + "," +
           std::to_string(n / grid[0] / grid[1]) +
           (stamp.warp < w.block->warps.size() ? " warp " + std::to_string(stamp.warp) : " in a bulk copy");
}

std::string place_in(const Range& range, u64 address) {
    return "byte " + std::to_string(address - range.begin) + " of " + range.name;
}

struct GlobalAccess {
    Warp& w;
    const Range& range;
    u64 address;
    int size, lane;
    bool writes, strong;
    const u8* data;

    int changed = -1;  // not known yet

    bool changes() {
        if (changed < 0) changed = !data || memcmp(data, reinterpret_cast<const u8*>(address), size) != 0 || !all_initialised();
        return changed;
    }
    bool all_initialised() const { return !range.initialised || !memchr(range.initialised + (address - range.begin), 0, size); }

    void race(const char* kind, const char* before, const GlobalStamp& stamp) {
        if (std::string* text = first_finding(w, kind))
            *text += "lane " + std::to_string(lane) + ", " + place_in(range, address) + ", " + before + " by " + who(w, stamp);
    }

    void check() {
        const GlobalStamp now{0, strong, 0, w.scheduling->clock(w), (u64)w.number, w.block->number};
        for (u64 at = address & ~3ull; at < address + size; at += 4)
            check_word(w.block->machine->shadow->word(at), mask_of(at, address, size), now);
    }

    // Whether a warp of the block wrote there and made no proxy fence, before a bulk copy's access. Of fences in other blocks nothing
    // is known.
    bool unfenced(const GlobalStamp& writer) const {
        const size_t warps = w.block->warps.size();
        return (size_t)w.number == warps && writer.block == w.block->number && writer.warp < warps &&
               writer.clock > w.scheduling->knowledge.fenced[writer.warp];
    }

    void check_word(GlobalWord& word, u32 mask, const GlobalStamp& now) {
        if ((word.writer.mask & mask) && unfenced(word.writer))
            race("asynchronous access to global memory after a write without fence.proxy.async", "written", word.writer);
        const bool written = (word.writer.mask & mask) && !(strong && word.writer.atomic) && !ordered(w, word.writer);
        if (written && (writes ? changes() : !word.writer.same))
            race(writes ? "race in global memory: write after write" : "race in global memory: read after write", "written",
                 word.writer);
        if (!writes) return remember_read(word, mask, now);
        for (const GlobalStamp& reader : word.readers)
            if ((reader.mask & mask) && !(strong && reader.atomic) && !ordered(w, reader) && changes())
                race("race in global memory: write after read", "read", reader);
        remember_write(word, mask, now, written);
    }

    // A write that changes nothing leaves the record of the one before: who knows that one knows the value. Reads beside it are
    // no race.
    void remember_write(GlobalWord& word, u32 mask, const GlobalStamp& now, bool concurrent) {
        const bool same = !changes();
        if (same && (word.writer.mask & mask)) {
            word.writer.same |= concurrent;
            return;
        }
        const bool continues = word.writer.block == now.block && word.writer.warp == now.warp && word.writer.clock == now.clock;
        const u64 before = continues && word.writer.same == same ? word.writer.mask : 0;
        if (now.atomic && !word.writer.atomic && (before & mask) == mask) return;  // a plain write is more than an atomic one
        word.writer = now;
        word.writer.mask = before | mask;
        word.writer.same = same;
    }

    static void remember_read(GlobalWord& word, u32 mask, const GlobalStamp& now) {
        GlobalStamp& last = word.readers[0];
        if (last.mask && last.block == now.block && last.warp == now.warp && last.atomic == now.atomic) {
            const u64 before = last.clock == now.clock ? last.mask : 0;
            last = now;
            last.mask = before | mask;
            return;
        }
        const bool keep = word.readers[1].mask && last.block == now.block && word.readers[1].block != now.block;
        if (last.mask && !keep) word.readers[1] = last;
        last = now;
        last.mask = mask;
    }
};

[[noreturn]] void outside(Warp& w, u64 a, int size, int lane, bool writes) {
    const auto& ranges = w.block->machine->ranges;
    const std::string what = std::string(writes ? "write" : "read") + " of " + std::to_string(size) + " bytes, lane " +
                             std::to_string(lane) + ", address " + hex(a);
    std::string near = "; there is no argument in global memory";
    u64 nearest = ~0ull;
    for (const Range& r : ranges) {
        if (a >= r.begin && a + size <= r.end) fail(w, what + ": " + r.name + " may not be written");
        const u64 distance = a < r.begin ? r.begin - a : a + size - r.end;
        if (distance >= nearest) continue;
        nearest = distance;
        near = a < r.begin ? "; " + r.name + " begins " + std::to_string(distance) + " bytes after this address"
                           : "; " + r.name + " has " + std::to_string(r.end - r.begin) + " bytes, and the access ends " +
                                 std::to_string(distance) + " bytes behind them";
    }
    fail(w, what + ", lies outside of all arguments" + near);
}

const Range& range_of(Warp& w, u64 a, int size, int lane, bool writes) {
    const auto& ranges = w.block->machine->ranges;
    int& last = w.scheduling->last_range;
    auto fits = [&](const Range& r) { return a >= r.begin && a + size <= r.end && (!writes || r.writable); };
    if (last < (int)ranges.size() && fits(ranges[last])) return ranges[last];
    auto first = std::partition_point(ranges.begin(), ranges.end(), [&](const Range& r) { return r.end <= a; });  // sorted by end
    for (; first != ranges.end(); ++first)
        if (fits(*first)) {
            last = (int)(first - ranges.begin());
            return *first;
        }
    outside(w, a, size, lane, writes);
}

}  // namespace

u8* access_global(Warp& w, u64 a, int size, int lane, bool reads, bool writes, bool strong, const u8* data) {
    const Range& range = range_of(w, a, size, lane, writes);
    if (w.block->machine->options.races) {
        GlobalAccess access{w, range, a, size, lane, writes, strong, data};
        if (reads && !access.all_initialised())
            if (std::string* text = first_finding(w, "read of global memory that was never written"))
                *text += "lane " + std::to_string(lane) + ", " + place_in(range, a);
        access.check();
    }
    if (writes && range.initialised) memset(range.initialised + (a - range.begin), 1, size);
    return reinterpret_cast<u8*>(a);
}

// ---- order through memory

namespace {

// What the warp could release now: what it knows of other blocks, and its own block's clocks.
std::shared_ptr<const Orders> releasable(Warp& w, bool block_only) {
    const Knowledge& knowledge = w.scheduling->knowledge;
    auto orders = !block_only && knowledge.orders ? std::make_shared<Orders>(*knowledge.orders) : std::make_shared<Orders>();
    orders->blocks[w.block->number] = knowledge.known;
    advance(w);
    return orders;
}

void acquire(Warp& w, const std::shared_ptr<const Orders>& orders) {
    if (!orders) return;
    Knowledge knowledge;
    auto here = orders->blocks.find(w.block->number);
    if (here != orders->blocks.end()) knowledge.known = here->second;
    knowledge.orders = orders;
    acquire_from(w, knowledge);
}

}  // namespace

void synchronise(Warp& w, Space space, u64 address, Order order, bool reads, bool writes) {
    if (!checks_races(w)) return;
    Warp::Scheduling& s = *w.scheduling;
    auto& released = w.block->machine->shadow->released;
    space = resolve(w, space, address);
    if (space != GLOBAL && space != SHARED) return;
    const u64 mine = w.block->number + 1ull;
    for (int block_only = space == SHARED; block_only < 2; ++block_only) {
        auto& at = released[{block_only ? mine : 0, space == SHARED ? SHARED_WINDOW + address : address}];
        if (reads && (order & ACQUIRE)) acquire(w, at);
        else if (reads) join(s.to_acquire[block_only], at);
        const bool full = block_only == (space == SHARED);
        if (writes && (order & RELEASE) && full) join(at, releasable(w, block_only));
        else if (writes) join(at, s.to_release[block_only]);
    }
}

void fence(Warp& w, bool block_only) {
    if (!checks_races(w)) return;
    Warp::Scheduling& s = *w.scheduling;
    for (int n = block_only; n < 2; ++n) {
        acquire(w, s.to_acquire[n]);
        s.to_acquire[n].reset();
    }
    for (int n = block_only; n < 2; ++n) s.to_release[n] = releasable(w, n);
}

}  // namespace ptx
