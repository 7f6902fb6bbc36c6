// Memory: bounds, alignment, initialisation, races; ld, st and conversions of addresses.
//
// A race is an access and a write of the same byte by two warps, where no chain of barriers, or of releases and acquires, leads
// from the first to the second, and the write changes the byte: warps that write the same value, as Triton's replicated layouts
// do, are no race. Accesses that are both strong (atomic, volatile, relaxed, acquire, release) are none either. Shared memory
// also distinguishes the lanes of a warp: bar.warp.sync and barriers order them, shuffles and votes do not.
// Global memory keeps two readers for 4 bytes, and one writer: a third one may hide a race, and never makes one up.
#include "memory.h"

#include <algorithm>

namespace ptx {

// ---- shadow of global memory: made page by page, where it is touched

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
           std::to_string(n / grid[0] / grid[1]) + " warp " + std::to_string(stamp.warp);
}

std::string place_in(const Range& range, u64 address) {
    return "byte " + std::to_string(address - range.begin) + " of " + range.name;
}

u32 mask_of(u64 word, u64 address, int size) {  // which of the 4 bytes from `word` on are accessed
    const u32 from = word < address ? (u32)(address - word) : 0, to = (u32)std::min<u64>(address + size - word, 4);
    return ((1u << to) - 1) & ~((1u << from) - 1);
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

    void check_word(GlobalWord& word, u32 mask, const GlobalStamp& now) {
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

u8* global(Warp& w, u64 a, int size, int lane, bool reads, bool writes, bool strong, const u8* data) {
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

// ---- shared memory

struct SharedAccess {
    Warp& w;
    u32 address;
    int size, lane;
    bool reads, writes, strong;
    const u8* data;
    Proxy proxy;

    SharedShadow& shadow = *w.block->shadow;
    Reads* const own_reads = shadow.reads.data() + (size_t)w.number * shadow.words;
    const Knowledge& knowledge = w.scheduling->knowledge;
    const u32 clock = knowledge.known[w.number];
    int changed = -1;  // not known yet

    void finding(const char* kind, const std::string& more = "") {
        if (std::string* text = first_finding(w, kind))
            *text += (lane < 0 ? "" : "lane " + std::to_string(lane) + ", ") + "shared address " + std::to_string(address) + more;
    }

    bool known(u32 warp, u32 lane_there, u32 when) const {
        if ((int)warp != w.number) return when <= knowledge.known[warp];
        return lane < 0 || lane_there == Reads::WHOLE_WARP || lanes_ordered(w, lane, (int)lane_there, when);
    }

    bool changes() const { return !data || memcmp(data, shared_memory(*w.block) + address, size) != 0 || !all_written(); }
    bool all_written() const {
        for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k)
            if (const u32 mask = mask_of(4 * k, address, size); (shadow.word[k].written & mask) != mask) return false;
        return true;
    }

    void check() {
        const u32 first = address >> 2, last = (address + size - 1) >> 2;
        for (u32 k = first; k <= last; ++k) {
            const bool whole = 4 * k >= address && 4 * k + 4 <= address + size;
            const u32 mask = whole ? 15 : mask_of(4 * (u64)k, address, size);
            if (writes) check_write(k, mask);
            else check_read(k, mask);
        }
    }

    // Nothing is in flight, all bytes were written by one warp, and that is known: the usual case.
    bool quiet(const SharedWord& word, u32 mask) const {
        if ((word.written & mask) != mask || word.in_flight || word.mixed || proxy == Proxy::ASYNC) return false;
        const Stamp& writer = word.writer;
        return writer.warp == (u32)w.number ? (int)writer.lane == lane || writer.clock <= w.scheduling->lanes_known
                                            : writer.clock <= knowledge.known[writer.warp];
    }

    void check_read(u32 k, u32 mask) {
        if (const SharedWord& word = shadow.word[k]; !quiet(word, mask)) check_before(word, k, mask);
        if (proxy != Proxy::ASYNC) remember_read(k, mask);  // else it goes on until end_reading, which remembers it
    }

    void check_write(u32 k, u32 mask) {
        SharedWord& word = shadow.word[k];
        const bool concurrent = !quiet(word, mask) && check_before(word, k, mask);
        if (word.reading) finding("write to shared memory that a matrix product in flight reads");
        check_readers(k, mask);
        // a write that changes nothing leaves the record of the one before: who knows that one knows the value
        if (changes()) remember_write(word, k, mask, Stamp{(u32)std::max(lane, 0), (u32)w.number, strong, clock});
        else if (concurrent) replicate(word, k);
    }

    void replicate(SharedWord& word, u32 k) {
        shadow.also[k] = (word.replicated ? shadow.also[k] : 0) | 1u << w.number;
        word.replicated = 1;
    }

    // What stands against the access; whether a writer is at the same time.
    bool check_before(const SharedWord& word, u32 k, u32 mask) {
        if (word.in_flight & mask)
            finding(writes ? "write to shared memory that a copy in flight will write"
                           : "read of shared memory that a copy in flight will write");
        else if (reads && (word.written & mask) != mask) finding("read of shared memory that was never written");
        if (!(word.written & mask)) return false;
        if (!word.mixed) return check_writer(word, k, word.writer);
        bool concurrent = false;
        for (int byte = 0; byte < 4; ++byte)
            if (word.written & mask & 1u << byte) concurrent |= check_writer(word, k, shadow.byte_writers[4 * k + byte]);
        return concurrent;
    }

    // Whether the writer is at the same time as this access, so that a write of another value is a race.
    bool check_writer(const SharedWord& word, u32 k, const Stamp& writer) {
        if (proxy == Proxy::ASYNC && writer.clock > knowledge.fenced[writer.warp] && writer.warp < w.block->warps.size())
            finding("asynchronous access to shared memory after a write without fence.proxy.async",
                    ", written by warp " + std::to_string(writer.warp));
        if (known(writer.warp, writer.lane, writer.clock) || (strong && writer.atomic)) return false;
        if (word.replicated && (shadow.also[k] >> w.number & 1)) return !reads;
        if (!writes || changes())
            finding(writes ? "race in shared memory: write after write" : "race in shared memory: read after write",
                    by(writer.warp, writer.lane));
        return true;
    }

    std::string by(u32 warp, u32 lane_there) const {
        const char* verb = ", the earlier access is by ";
        if (warp == w.block->warps.size()) return std::string(verb) + "a bulk copy that nothing waited for";
        if ((int)warp != w.number) return verb + ("warp " + std::to_string(warp));
        return verb + (lane_there < LANES ? "lane " + std::to_string(lane_there) : "lanes") +
               " of the same warp, without bar.warp.sync in between";
    }

    void check_readers(u32 k, u32 mask) {
        const u32 warps = (u32)w.block->warps.size();
        for (u32 v = 0; v <= warps; ++v) {
            const Reads& read = shadow.reads[(size_t)v * shadow.words + k];
            if (!(read.mask & mask) || (strong && read.atomic) || known(v, read.lane, read.clock) || !changes()) continue;
            finding("race in shared memory: write after read", by(v, read.lane));
            return;
        }
    }

    void remember_read(u32 k, u32 mask) {
        Reads& read = own_reads[k];
        const u32 reader = lane < 0 ? (u32)Reads::WHOLE_WARP : (u32)lane;
        if (read.clock == clock && read.mask) {
            read.mask |= mask;
            read.atomic &= strong;
            if (read.lane != reader) read.lane = Reads::SEVERAL;
        } else read = Reads{mask, reader, strong, clock};
    }

    void remember_write(SharedWord& word, u32 k, u32 mask, const Stamp& stamp) {
        const Stamp& last = word.writer;  // a plain write is more than an atomic one of the same time
        if (stamp.atomic && (word.written & mask) == mask && !word.mixed && !last.atomic && last.warp == stamp.warp &&
            last.clock == stamp.clock)
            return;
        word.replicated = 0;
        if (word.mixed || ((word.written & ~mask) && !(word.writer == stamp))) {
            Stamp* bytes = &shadow.byte_writers[4 * (size_t)k];
            if (!word.mixed) std::fill(bytes, bytes + 4, word.writer);
            for (int byte = 0; byte < 4; ++byte)
                if (mask >> byte & 1) bytes[byte] = stamp;
            word.mixed = mask != 15;
        }
        if (!word.mixed) word.writer = stamp;
        word.written |= mask;
    }
};

void check_shared_bounds(Warp& w, u64 a, int size, int lane, bool writes) {
    const u32 end = w.block->machine->shared;
    if (a >= SHARED_BASE && a + size <= end) return;
    fail(w, std::string(writes ? "write" : "read") + " of " + std::to_string(size) + " bytes outside of shared memory, lane " +
                std::to_string(lane) + ", address " + std::to_string(a) + "; it has addresses " + std::to_string(SHARED_BASE) +
                " to " + std::to_string(end));
}

// The usual read: whole words, which one warp wrote, and this lane knows of. It takes half the time of an access, so it has no
// branch for anything else. False: SharedAccess shall look.
inline bool quick_read(const Warp& w, SharedShadow& shadow, u32 address, int size, int lane) {
    if ((address | size) & 3 || lane < 0) return false;
    const Warp::Scheduling& s = *w.scheduling;
    const u32* known = s.knowledge.known.data();
    const u32 clock = known[w.number], number = (u32)w.number, lanes_known = s.lanes_known;
    const SharedWord* word = &shadow.word[address >> 2];
    Reads* read = &shadow.reads[(size_t)number * shadow.words + (address >> 2)];
    for (int n = 0; n < size / 4; ++n) {
        const SharedWord here = word[n];
        if (here.written != 15 || here.in_flight || here.mixed) return false;
        if (here.writer.clock > (here.writer.warp == number ? lanes_known : known[here.writer.warp])) return false;
        const Reads before = read[n];
        const bool again = before.clock == clock && before.mask && before.lane != (u32)lane;
        read[n] = Reads{15, again ? (u32)Reads::SEVERAL : (u32)lane, 0, clock};
    }
    return true;
}

u8* shared(Warp& w, u64 a, int size, int lane, bool reads, bool writes, bool strong, const u8* data, Proxy proxy) {
    check_shared_bounds(w, a, size, lane, writes);
    SharedShadow* shadow = w.block->shadow.get();
    const bool plain = !writes && !strong && proxy == Proxy::GENERIC;
    if (shadow && !(plain && quick_read(w, *shadow, (u32)a, size, lane)))
        SharedAccess{w, (u32)a, size, lane, reads, writes, strong, data, proxy}.check();
    return shared_memory(*w.block) + a;
}

// ---- local memory

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
        case SHARED: return shared(w, a, size, lane, reads, writes, strong, data, proxy);
        case LOCAL: return local(w, a, size, lane, reads, writes);
        case PARAMETER: return parameter(w, a, size, writes);
        default: return global(w, a, size, lane, reads, writes, strong, data);
    }
}

}  // namespace

u8* access(Warp& w, Space space, u64 a, int size, int lane, Access kind, const u8* data, Proxy proxy, int alignment) {
    return access(
        w, space, a, size, lane, kind != Access::WRITE, kind != Access::READ, kind == Access::ATOMIC, data, proxy, alignment);
}

Space resolve(const Warp&, Space space, u64& address) {
    if (space != GENERIC) return space;
    if (address >= SHARED_WINDOW && address < SHARED_WINDOW + WINDOW_SIZE) return address -= SHARED_WINDOW, SHARED;
    if (address >= LOCAL_WINDOW && address < LOCAL_WINDOW + WINDOW_SIZE) return address -= LOCAL_WINDOW, LOCAL;
    return GLOBAL;
}

u8* shared_memory(Block& block) { return block.shared.data(); }
u32 shared_size(const Block& block) { return block.machine->shared; }

SharedShadow::SharedShadow(u32 bytes, int warps)
    : words(bytes / 4 + 8), word(words), byte_writers(4 * (size_t)words), also(words), reads((size_t)words * (warps + 1)) {}

void SharedShadow::clear() {
    std::fill(word.begin(), word.end(), SharedWord{});
    std::fill(reads.begin(), reads.end(), Reads{});
}

// ---- asynchronous accesses

void begin_copy(Warp& w, u32 address, int size, int lane, Proxy proxy) {
    shared(w, address, size, lane, false, true, false, nullptr, proxy);
    if (SharedShadow* shadow = w.block->shadow.get())
        for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k)
            shadow->word[k].in_flight |= mask_of(4 * (u64)k, address, size);
}

static void land(Block& block, u32 address, int size, const Stamp& stamp, const u8* data) {
    memcpy(shared_memory(block) + address, data, size);
    if (!block.shadow) return;
    for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) {
        SharedWord& word = block.shadow->word[k];
        const u32 mask = mask_of(4 * (u64)k, address, size);
        word.in_flight &= ~mask;
        SharedAccess{block.warps[0], address, size, -1, false, true, false, nullptr, Proxy::GENERIC}.remember_write(
            word, k, mask, stamp);
    }
}

void land_copy(Warp& w, u32 address, int size, int lane, u32 clock, const u8* data) {
    land(*w.block, address, size, Stamp{(u32)lane, (u32)w.number, 0, clock}, data);
}

void land_bulk_copy(Block& block, u32 address, int size, const u8* data) {
    land(block, address, size, Stamp{0, (u32)block.warps.size(), 0, ++block.copy_clock}, data);
}

void begin_reading(Warp& w, u32 address, int size) {
    shared(w, address, size, -1, true, false, false, nullptr, Proxy::ASYNC);
    if (SharedShadow* shadow = w.block->shadow.get())
        for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) ++shadow->word[k].reading;
}

static void end_reading(Block& block, u32 warp, u32 clock, u32 address, int size) {
    for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) {
        --block.shadow->word[k].reading;
        block.shadow->reads[(size_t)warp * block.shadow->words + k] =
            Reads{mask_of(4 * (u64)k, address, size), Reads::WHOLE_WARP, 0, clock};
    }
}

void end_reading(Warp& w, u32 address, int size) {
    if (w.block->shadow) end_reading(*w.block, w.number, w.scheduling->clock(w), address, size);
}

void end_reading(Block& block, u32 address, int size) {
    if (block.shadow) end_reading(block, (u32)block.warps.size(), ++block.copy_clock, address, size);
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

// ---- counts

namespace {

// Lanes are served 32 at a time for 4 bytes, 16 for 8, 8 for 16; each of 32 banks gives one word of 4 bytes a wavefront.
void count_wavefronts(Counts& counts, const u64 addresses[LANES], int size, u32 lanes) {
    const int together = size >= 16 ? 8 : size == 8 ? 16 : 32;
    for (int start = 0; start < LANES; start += together) {
        u32 words[LANES][LANES];
        int used[LANES] = {}, most = 0;
        for (int l = start; l < start + together; ++l) {
            if (!(lanes >> l & 1)) continue;
            for (u32 k = (u32)addresses[l] >> 2; k <= ((u32)addresses[l] + size - 1) >> 2; ++k) {
                const int bank = k % 32;
                if (std::find(words[bank], words[bank] + used[bank], k) != words[bank] + used[bank]) continue;
                if (used[bank] < LANES) words[bank][used[bank]++] = k;
                most = std::max(most, used[bank]);
            }
        }
        counts.wavefronts += most;
        counts.least_wavefronts += most > 0;
    }
}

// Sectors of 32 bytes that the lanes touch, and how many would hold the bytes that they touch.
void count_sectors(Block& block, Counts& counts, const u64 addresses[LANES], int size, u32 lanes) {
    std::pair<u64, u32> sectors[2 * LANES];  // number, touched bytes
    int used = 0;
    for (int l = 0; l < LANES; ++l) {
        if (!(lanes >> l & 1)) continue;
        for (u64 sector = addresses[l] / 32; sector <= (addresses[l] + size - 1) / 32; ++sector) {
            const int from = (int)std::max<s64>(addresses[l] - 32 * sector, 0),
                      to = (int)std::min<u64>(addresses[l] + size - 32 * sector, 32);
            const u32 bytes = (u32)(((1ull << to) - 1) & ~((1ull << from) - 1));
            int n = used - 1;
            while (n >= 0 && sectors[n].first != sector) --n;
            if (n < 0) sectors[n = used++] = {sector, 0};
            sectors[n].second |= bytes;
        }
    }
    int bytes = 0;
    for (int n = 0; n < used; ++n) {
        bytes += __builtin_popcount(sectors[n].second);
        block.sectors[sectors[n].first] |= sectors[n].second;
    }
    counts.sectors += used;
    counts.least_sectors += (bytes + 31) / 32;
}

}  // namespace

void count_access(Warp& w, Space space, const u64 addresses[LANES], int size, u32 lanes) {
    Machine& machine = *w.block->machine;
    if (!machine.options.counts || !lanes) return;
    u64 inside[LANES];
    for (int l = 0; l < LANES; ++l)
        if (lanes >> l & 1) {
            inside[l] = addresses[l];
            const Space here = resolve(w, space, inside[l]);
            if (l == __builtin_ctz(lanes)) space = here == space ? space : here;
        } else inside[l] = 0;
    Counts counts;
    if (space == SHARED) count_wavefronts(counts, inside, size, lanes);
    else if (space == GLOBAL || space == GENERIC) count_sectors(*w.block, counts, inside, size, lanes);
    for (Counts* to : {&machine.total, &machine.by_instruction[w.at->number]}) {
        to->wavefronts += counts.wavefronts;
        to->least_wavefronts += counts.least_wavefronts;
        to->sectors += counts.sectors;
        to->least_sectors += counts.least_sectors;
    }
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

constexpr int LARGEST = 32;  // bytes of one access

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

template <Space space, int order>  // order: -1 for plain accesses
void load(Warp& w, const Instruction& i, u32 lanes) {
    const s32* o = i.operands;
    const int size = o[0], count = o[2], bytes = size * count;
    u64 addresses[LANES];
    addresses_of(w, o + 3, addresses);
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
    for (int l = 0; l < LANES; ++l) {
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

void fence_proxy(Warp& w, const Instruction&, u32) {
    Knowledge& knowledge = w.scheduling->knowledge;
    for (size_t v = 0; v < knowledge.known.size(); ++v) knowledge.fenced[v] = std::max(knowledge.fenced[v], knowledge.known[v]);
    advance(w);
}

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
    add_handler("isspacep.global", is_space<GLOBAL>);
    add_handler("isspacep.shared", is_space<SHARED>);
    add_handler("isspacep.local", is_space<LOCAL>);
    add_handler("fence.gpu", fence_handler<false>);
    add_handler("fence.cta", fence_handler<true>);
    add_handler("fence.proxy.async", fence_proxy);
    add_handler("nop", nothing);
    return 0;
}();

}  // namespace

}  // namespace ptx
