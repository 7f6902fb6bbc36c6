// Global memory: bounds, initialisation, races; order between blocks and warps through memory.
//
// A race is an access and a write of the same byte by two warps, where no chain of barriers, or of releases and acquires, leads
// from the first to the second, and the write changes the byte: warps that write the same value, as Triton's replicated layouts
// do, are no race. Accesses that are both strong (atomic, volatile, relaxed, acquire, release) are none either.
// The shadow keeps two readers for 4 bytes, and one writer: a third one may hide a race, and never makes one up.
#include <array>
#include <bit>
#include <cstdlib>

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

constexpr u64 PAGE = 4096, PART = 32;

// A part of 32 bytes has one record while all its words have the same, as lanes side by side leave them; then each has its own.
struct GlobalPage {
    GlobalWord whole[PAGE / PART];
    GlobalWord* words[PAGE / PART];
};

}  // namespace

struct Place {
    u64 block, address;
    bool operator==(const Place& b) const = default;
    struct Hash {
        size_t operator()(const Place& place) const { return (place.address ^ place.block << 40) * 0x9e3779b97f4a7c15ull; }
    };
};

struct GlobalShadow {
    struct Free {
        void operator()(GlobalPage* page) const { free(page); }
    };
    std::unordered_map<u64, std::unique_ptr<GlobalPage, Free>> pages;
    using Words = std::array<GlobalWord, PART / 4>;
    std::vector<std::unique_ptr<Words[]>> divided;
    size_t unused = 0;  // of the last of them
    u64 last = ~0ull;
    GlobalPage* last_page = nullptr;
    // What was released at an address: to all, or [block, address] to one block alone.
    std::unordered_map<Place, std::shared_ptr<const Orders>, Place::Hash> released;

    GlobalPage& page(u64 address) {
        if (address / PAGE != last) {
            last = address / PAGE;
            auto& page = pages[last];
            if (!page) page.reset(static_cast<GlobalPage*>(calloc(1, sizeof(GlobalPage))));
            last_page = page.get();
        }
        return *last_page;
    }
    // The record of a part, or null where its words have their own.
    GlobalWord* whole(u64 address) {
        GlobalPage& here = page(address);
        return here.words[address % PAGE / PART] ? nullptr : &here.whole[address % PAGE / PART];
    }
    GlobalWord& word(u64 address) {
        GlobalPage& here = page(address);
        const u64 part = address % PAGE / PART;
        if (!here.words[part]) {
            if (!unused) divided.emplace_back(new Words[unused = 128]);
            Words& words = divided.back()[--unused];
            words.fill(here.whole[part]);
            here.words[part] = words.data();
        }
        return here.words[part][address % PART / 4];
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
    const u32* clocks = knowledge.orders->of(earlier.block);
    return clocks && earlier.clock <= clocks[earlier.warp];
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

    const char* space = "global memory";
    const u8* there = reinterpret_cast<const u8*>(address);
    bool own = false;  // the block's own shared memory: the order of its own accesses is checked elsewhere
    int changed = -1;  // not known yet

    bool changes() {
        if (changed < 0) changed = !data || differ(data, there, size) || !all_initialised();
        return changed;
    }
    bool all_initialised() const { return !range.initialised || !memchr(range.initialised + (address - range.begin), 0, size); }

    bool known(const GlobalStamp& earlier) const { return (own && earlier.block == w.block->number) || ordered(w, earlier); }

    void race(const char* kind, const char* before, const GlobalStamp& stamp) {
        finding("race in " + std::string(space) + ": " + kind, before, stamp);
    }
    void finding(const std::string& kind, const char* before, const GlobalStamp& stamp) {
        if (std::string* text = first_finding(w, kind.c_str()))
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
            finding("asynchronous access to global memory after a write without fence.proxy.async", "written", word.writer);
        const bool written = (word.writer.mask & mask) && !(strong && word.writer.atomic) && !known(word.writer);
        if (written && (writes ? changes() : !word.writer.same))
            race(writes ? "write after write" : "read after write", "written", word.writer);
        if (!writes) return remember_read(word, mask, now);
        for (const GlobalStamp& reader : word.readers)
            if ((reader.mask & mask) && !(strong && reader.atomic) && !known(reader) && changes())
                race("write after read", "read", reader);
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

// ---- all lanes of a plain access

// The argument that has the bytes of all lanes, if they are aligned and one has.
const Range* range_of_all(Warp& w, const u64 addresses[LANES], int size, u32 lanes, bool writes) {
    const Extent extent(addresses, lanes);
    if (extent.bits & (size - 1)) return nullptr;
    const auto& ranges = w.block->machine->ranges;
    int& last = w.scheduling->last_range;
    auto fits = [&](const Range& r) { return extent.low >= r.begin && extent.high + size <= r.end && (!writes || r.writable); };
    if (last < (int)ranges.size() && fits(ranges[last])) return &ranges[last];
    auto first = std::partition_point(ranges.begin(), ranges.end(), [&](const Range& r) { return r.end <= extent.low; });
    first = std::find_if(first, ranges.end(), fits);
    if (first == ranges.end()) return nullptr;
    last = (int)(first - ranges.begin());
    return &*first;
}

const u64 WHO = std::bit_cast<u64>(GlobalStamp{0, 1, 0, 0, 63, ~0u}), WHEN = std::bit_cast<u64>(GlobalStamp{0, 0, 0, ~0u, 0, 0});

// A word that no warp of another block touched, nor one of this block at the same time. False: check_word shall look.
struct QuickWords {
    const u32 block;
    const u32* known;
    const GlobalStamp now;

    explicit QuickWords(const Warp& w)
        : block(w.block->number),
          known(w.scheduling->knowledge.known.data()),
          now{0, 0, 0, known[w.number], (u64)w.number, block} {}

    bool ordered(const GlobalStamp& earlier, u32 mask) const {
        return !(earlier.mask & mask) || (earlier.block == block && earlier.clock <= known[earlier.warp]);
    }
    bool read(GlobalWord& word, u32 mask) const {
        if (!ordered(word.writer, mask)) return false;
        const u64 last = std::bit_cast<u64>(word.readers[0]), here = std::bit_cast<u64>(now);
        if (word.readers[0].mask && ((last ^ here) & WHO)) return false;
        word.readers[0] = now;
        word.readers[0].mask = mask | ((last ^ here) & WHEN ? 0 : last & 15);
        return true;
    }
    bool write(const GlobalWord& word, u32 mask) const {
        return ordered(word.writer, mask) && ordered(word.readers[0], mask) && ordered(word.readers[1], mask);
    }
};

// Calls part(at, first lane, last lane) for each part of 32 bytes that lanes side by side have whole; where it is false, and for
// all other lanes, rest(lane).
template <class Part, class Rest> void each_part(const u64 addresses[LANES], int size, u32 lanes, Part part, Rest rest) {
    const int together = (int)PART / size;  // a part never ends within an access: both are aligned
    const u32 all = (u32)((1ull << together) - 1);
    auto side_by_side = [&](int l) {
        if (l + together > LANES || (~lanes >> l & all) || addresses[l] % PART) return false;
        for (int k = 1; k < together; ++k)
            if (addresses[l + k] != addresses[l] + (u64)(k * size)) return false;
        return true;
    };
    for (int l = 0; l < LANES;)
        if (side_by_side(l) && part(addresses[l], l, l + together - 1)) l += together;
        else {
            if (lanes >> l & 1) rest(l);
            ++l;
        }
}

}  // namespace

bool read_global(Warp& w, const u64 addresses[LANES], int size, u32 lanes, u64& base) {
    const Range* range = range_of_all(w, addresses, size, lanes, false);
    if (!range || range->initialised) return false;
    base = 0;
    if (!checks_races(w)) return true;
    const QuickWords quick(w);
    GlobalShadow& shadow = *w.block->machine->shadow;
    each_part(
        addresses, size, lanes,
        [&](u64 at, int, int) {
            GlobalWord* whole = shadow.whole(at);
            return whole && quick.read(*whole, 15);
        },
        [&](int lane) {
            const u64 address = addresses[lane];
            for (u64 at = address & ~3ull; at < address + size; at += 4) {
                const u32 mask = size >= 4 ? 15 : mask_of(at, address, size);
                GlobalWord& word = shadow.word(at);
                if (!quick.read(word, mask))
                    GlobalAccess{w, *range, address, size, lane, false, false, nullptr}.check_word(word, mask, quick.now);
            }
        });
    return true;
}

bool write_global(Warp& w, const u64 addresses[LANES], int size, u32 lanes, const u8 data[LANES][LARGEST]) {
    const Range* range = range_of_all(w, addresses, size, lanes, true);
    if (!range) return false;
    const bool races = checks_races(w);
    const QuickWords quick(w);
    GlobalShadow& shadow = *w.block->machine->shadow;
    auto write = [&](int lane) {
        if (range->initialised) memset(range->initialised + (addresses[lane] - range->begin), 1, size);
        memcpy(reinterpret_cast<u8*>(addresses[lane]), data[lane], size);
    };
    each_part(
        addresses, size, lanes,
        [&](u64 at, int first, int last) {
            if (races) {
                GlobalWord* whole = shadow.whole(at);
                if (!whole || !quick.write(*whole, 15)) return false;
                for (int lane = first; lane <= last; ++lane)
                    if (!GlobalAccess{w, *range, addresses[lane], size, lane, true, false, data[lane]}.changes()) return false;
                GlobalAccess{w, *range, at, (int)PART, first, true, false, nullptr}.remember_write(*whole, 15, quick.now, false);
            }
            for (int lane = first; lane <= last; ++lane) write(lane);
            return true;
        },
        [&](int lane) {
            const u64 address = addresses[lane];
            GlobalAccess access{w, *range, address, size, lane, true, false, data[lane]};
            for (u64 at = address & ~3ull; races && at < address + size; at += 4) {
                const u32 mask = size >= 4 ? 15 : mask_of(at, address, size);
                GlobalWord& word = shadow.word(at);
                if (quick.write(word, mask)) access.remember_write(word, mask, quick.now, false);
                else access.check_word(word, mask, quick.now);
            }
            write(lane);
        });
    return true;
}

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

void check_cluster(Warp& w, Block& owner, u32 address, int size, int lane, bool writes, bool strong, const u8* data) {
    const u32* place = owner.place;
    const u64 begin = SHARED_WINDOW + ((u64)owner.number << RANK_SHIFT);
    const Range range{begin, begin + w.block->machine->shared, true,
                      "the shared memory of block " + std::to_string(place[0]) + "," + std::to_string(place[1]) + "," +
                          std::to_string(place[2]),
                      nullptr};
    GlobalAccess{w,
                 range,
                 begin + address,
                 size,
                 lane,
                 writes,
                 strong,
                 data,
                 "a cluster's shared memory",
                 shared_memory(owner) + address,
                 &owner == w.block}
        .check();
}

// ---- order through memory

namespace {

// What the warp could release now: what it knows of other blocks, and its own block's clocks.
std::shared_ptr<const Orders> releasable(Warp& w, bool block_only) {
    block_only &= w.block->cluster->blocks.size() == 1;
    const Knowledge& knowledge = w.scheduling->knowledge;
    auto orders = !block_only && knowledge.orders ? std::make_shared<Orders>(*knowledge.orders) : std::make_shared<Orders>();
    orders->width = knowledge.known.size();
    orders->add(w.block->number, knowledge.known.data());
    advance(w);
    return orders;
}

}  // namespace

void acquire(Warp& w, const std::shared_ptr<const Orders>& orders) {
    if (!orders) return;
    Warp::Scheduling& s = *w.scheduling;
    if (const u32* here = orders->of(w.block->number)) {
        for (size_t v = 0; v < orders->width; ++v) s.knowledge.known[v] = std::max(s.knowledge.known[v], here[v]);
        s.lanes_known = std::max(s.lanes_known, here[w.number]);
    }
    join(s.knowledge.orders, orders);
}

std::shared_ptr<const Orders> released_by(Warp& w) { return releasable(w, false); }

void synchronise(Warp& w, Space space, u64 address, Order order, bool reads, bool writes) {
    if (!checks_races(w)) return;
    Warp::Scheduling& s = *w.scheduling;
    auto& released = w.block->machine->shadow->released;
    space = resolve(w, space, address);
    if (space != GLOBAL && space != SHARED) return;
    const u64 mine = (space == SHARED ? owner_of(w, address) : *w.block).number + 1ull;
    for (int block_only = space == SHARED; block_only < 2; ++block_only) {
        const Place place{block_only ? mine : 0, space == SHARED ? SHARED_WINDOW + address : address};
        const auto found = released.find(place);
        if (reads && found != released.end()) {
            const auto at = found->second;
            if (order & ACQUIRE) acquire(w, at);
            else join(s.to_acquire[block_only], at);
        }
        const bool full = block_only == (space == SHARED);
        if (writes && (order & RELEASE) && full) join(released[place], releasable(w, block_only));
        else if (writes && s.to_release[block_only]) join(released[place], s.to_release[block_only]);
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
