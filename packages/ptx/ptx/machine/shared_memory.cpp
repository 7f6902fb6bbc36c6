// Shared memory: bounds, initialisation, races; copies and matrix products in flight.
//
// A race is what it is in global memory, between the warps of a block; and between the lanes of a warp, which bar.warp.sync and
// barriers order, shuffles and votes do not.
#include <bit>

#include "memory.h"

namespace ptx {

namespace {

struct SharedAccess {
    Warp& w;
    u32 address;
    int size, lane;
    bool reads, writes, strong;
    const u8* data;
    Proxy proxy;

    SharedShadow& shadow = *w.block->shadow;
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

    bool changes() const { return !data || differ(data, w.block->shared.data() + address, size) || !all_written(); }
    bool all_written() const {
        for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k)
            if (const u32 mask = mask_of(4 * k, address, size); (shadow.word[k].written & mask) != mask) return false;
        return true;
    }

    void check() {
        const u32 first = address >> 2, last = (address + size - 1) >> 2;
        const bool aligned = !((address | (u32)size) & 3);
        shadow.used = std::max<size_t>(shadow.used, last + 1);
        for (u32 k = first; k <= last; ++k) {
            const bool whole = aligned || (4 * k >= address && 4 * k + 4 <= address + size);
            if (whole && !strong && (writes ? quick_write(k) : proxy == Proxy::ASYNC && quick_async_read(k))) continue;
            const u32 mask = whole ? 15 : mask_of(4 * (u64)k, address, size);
            shadow.touch(k, shadow.epoch);
            if (writes) check_write(k, mask);
            else check_read(k, mask);
        }
    }

    // The usual write of a whole word: nothing is in flight, nothing reads it, and all earlier accesses are known.
    bool quick_write(u32 k) {
        SharedWord& word = shadow.word[k];
        if (word.in_flight || word.mixed || word.reading || proxy == Proxy::ASYNC || (word.written & 15) % 15) return false;
        if (shadow.touched[k] >= shadow.epoch && !all_earlier(word, k)) return false;
        shadow.touch(k, shadow.epoch);
        if (!changes()) return true;
        word.writer = Stamp{(u32)std::max(lane, 0), (u32)w.number, 0, clock};
        word.replicated = 0;
        word.written = 15;
        return true;
    }

    bool all_earlier(const SharedWord& word, u32 k) const {
        const u32 number = (u32)w.number, lanes_known = lane < 0 ? ~0u : w.scheduling->lanes_known;
        const u32* known = knowledge.known.data();
        auto earlier = [&](u32 warp, u32 lane_there, u32 when) {
            return warp == number ? when <= lanes_known || (int)lane_there == lane : when <= known[warp];
        };
        if (word.written && !earlier(word.writer.warp, word.writer.lane, word.writer.clock)) return false;
        const Reads* reads = shadow.reads_of(k);
        for (u32 v = 0; v < shadow.readers; ++v)
            if (reads[v].mask && !earlier(v, reads[v].lane, reads[v].clock)) return false;
        return true;
    }

    // The usual word that a matrix product reads: written whole before a proxy fence.
    [[gnu::always_inline]] bool quick_async_read(u32 k) const {
        const SharedWord& word = shadow.word[k];
        const Stamp writer = word.writer;
        if (word.written != 15 || word.in_flight || word.mixed || lane >= 0) return false;
        return writer.warp == (u32)w.number
                   ? writer.clock <= knowledge.fenced[writer.warp]
                   : writer.clock <= knowledge.known[writer.warp] &&
                         (writer.warp >= w.block->warps.size() || writer.clock <= knowledge.fenced[writer.warp]);
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
        if (word.reading)
            finding(word.stored ? "write to shared memory that a bulk copy in flight reads"
                                : "write to shared memory that a matrix product in flight reads");
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
            const Reads& read = shadow.reads_of(k)[v];
            if (!(read.mask & mask) || (strong && read.atomic) || known(v, read.lane, read.clock) || !changes()) continue;
            finding("race in shared memory: write after read", by(v, read.lane));
            return;
        }
    }

    void remember_read(u32 k, u32 mask) {
        Reads& read = shadow.reads_of(k)[w.number];
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

// The usual read: whole words, which one warp wrote, and this lane knows of. It has no branch for anything else. False:
// SharedAccess shall look.
struct QuickReads {
    const SharedWord* const words;
    SharedShadow& shadow;
    const u32* known;
    const u32 number, clock, lanes_known;

    QuickReads(Warp& w, SharedShadow& shadow)
        : words(shadow.word.data()),
          shadow(shadow),
          known(w.scheduling->knowledge.known.data()),
          number((u32)w.number),
          clock(known[number]),
          lanes_known(w.scheduling->lanes_known) {}

    bool operator()(u32 address, int size, int lane) const {
        if ((address | size) & 3 || lane < 0) return false;
        const Reads now{15, (u32)lane, 0, clock};
        if (size == 16) {  // four words, which one warp wrote at one time
            const SharedWord* four = words + (address >> 2);
            const u64 first = std::bit_cast<u64>(four[0]);
            const u64 differs = (first ^ std::bit_cast<u64>(four[1])) | (first ^ std::bit_cast<u64>(four[2])) |
                                (first ^ std::bit_cast<u64>(four[3]));
            const Stamp writer = four[0].writer;
            if (!differs && (first & USUAL_MASK) == USUAL &&
                writer.clock <= (writer.warp == number ? lanes_known : known[writer.warp])) {
                const u32 k = address >> 2;
                Reads* read = shadow.reads_of(k) + number;
                for (int n = 0; n < 4; ++n, read += shadow.readers) {
                    const bool again = read->clock == clock && read->mask && read->lane != (u32)lane;
                    *read = again ? Reads{15, Reads::SEVERAL, 0, clock} : now;
                    shadow.touch(k + n, shadow.epoch);
                }
                return true;
            }
        }
        for (u32 k = address >> 2; k < (address + size) >> 2; ++k) {
            const u64 here = std::bit_cast<u64>(words[k]);
            if ((here & USUAL_MASK) != USUAL) return false;
            const Stamp writer = words[k].writer;
            if (writer.clock > (writer.warp == number ? lanes_known : known[writer.warp])) return false;
            Reads& read = shadow.reads_of(k)[number];
            const Reads before = read;
            const bool again = before.clock == clock && before.mask && before.lane != (u32)lane;
            shadow.touch(k, shadow.epoch);
            read = again ? Reads{15, Reads::SEVERAL, 0, clock} : now;
        }
        return true;
    }
    // written whole, not mixed, nothing in flight
    inline static const u64 USUAL = std::bit_cast<u64>(SharedWord{{}, 15, 0, 0, 0, 0, 0}),
                            USUAL_MASK = std::bit_cast<u64>(SharedWord{{}, 15, 15, 1, 0, 0, 0});
};

// Whether all lanes are within shared memory, and aligned.
bool all_inside(const Warp& w, const u64 addresses[LANES], int size, u32 lanes) {
    const Extent extent(addresses, lanes);
    return w.block->cluster->blocks.size() == 1 && !(extent.bits & (size - 1)) && extent.low >= SHARED_BASE &&
           extent.high + size <= w.block->machine->shared;
}

}  // namespace

// What the shadow of another block's memory says and hears; the order of the accesses is check_cluster's.
static void access_other(Warp& w, SharedShadow& shadow, u32 address, int size, int lane, bool reads, bool writes) {
    for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) {
        SharedWord& word = shadow.word[k];
        const u32 mask = mask_of(4 * (u64)k, address, size);
        const char* kind = word.in_flight & mask                    ? "access to shared memory that a copy in flight will write"
                           : reads && (word.written & mask) != mask ? "read of shared memory that was never written"
                                                                    : nullptr;
        if (kind)
            report(w, kind, "lane " + std::to_string(lane) + ", shared address " + std::to_string(address) + " of another block");
        if (!writes) continue;
        if (!word.written) word.writer = Stamp{};
        word.written |= mask;
        shadow.used = std::max<size_t>(shadow.used, k + 1);
    }
}

u8* access_shared(Warp& w, u64 a, int size, int lane, bool reads, bool writes, bool strong, const u8* data, Proxy proxy) {
    Block& owner = owner_of(w, a);
    check_shared_bounds(w, a, size, lane, writes);
    SharedShadow* shadow = owner.shadow.get();
    if (shadow && w.block->cluster->blocks.size() > 1)
        check_cluster(w, owner, (u32)a, size, std::max(lane, 0), writes, strong, data);
    const bool plain = !writes && !strong && proxy == Proxy::GENERIC;
    if (shadow && &owner != w.block) access_other(w, *shadow, (u32)a, size, lane, reads, writes);
    else if (shadow && !(plain && QuickReads(w, *shadow)((u32)a, size, lane)))
        SharedAccess{w, (u32)a, size, lane, reads, writes, strong, data, proxy}.check();
    return shared_memory(owner) + a;
}

bool read_shared(Warp& w, const u64 addresses[LANES], int size, u32 lanes, u64& base) {
    if (!all_inside(w, addresses, size, lanes)) return false;
    base = reinterpret_cast<u64>(shared_memory(*w.block));
    SharedShadow* shadow = w.block->shadow.get();
    if (!shadow) return true;
    const QuickReads quick(w, *shadow);
    for (u32 rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const u32 address = (u32)addresses[lane];
        if (!quick(address, size, lane))
            SharedAccess{w, address, size, lane, true, false, false, nullptr, Proxy::GENERIC}.check();
    }
    return true;
}

bool write_shared(Warp& w, const u64 addresses[LANES], int size, u32 lanes, const u8 data[LANES][LARGEST]) {
    if (!all_inside(w, addresses, size, lanes)) return false;
    u8* memory = shared_memory(*w.block);
    for (u32 rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const u32 address = (u32)addresses[lane];
        if (w.block->shadow) SharedAccess{w, address, size, lane, false, true, false, data[lane], Proxy::GENERIC}.check();
        memcpy(memory + address, data[lane], size);
    }
    return true;
}

u8* shared_memory(Block& block) { return block.shared.data(); }
u32 shared_size(const Block& block) { return block.machine->shared; }

SharedShadow::SharedShadow(u32 bytes, int warps)
    : readers((size_t)warps + 1),
      word(bytes / 4 + 8),
      byte_writers(4 * word.size()),
      also(word.size()),
      reads(word.size() * readers),
      touched(word.size()) {}

void SharedShadow::clear() {
    std::fill(word.begin(), word.begin() + used, SharedWord{});
    std::fill(reads.begin(), reads.begin() + used * readers, Reads{});
    std::fill(touched.begin(), touched.begin() + used, 0);
    used = 0;
    epoch = 1;
}

// ---- asynchronous accesses

void begin_copy(Warp& w, u32 address, int size, int lane, Proxy proxy) {
    access_shared(w, address, size, lane, false, true, false, nullptr, proxy);
    if (SharedShadow* shadow = w.block->shadow.get())
        for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k)
            shadow->word[k].in_flight |= mask_of(4 * (u64)k, address, size);
}

static void land(Block& block, u32 address, int size, const Stamp& stamp, const u8* data) {
    memcpy(shared_memory(block) + address, data, size);
    if (!block.shadow) return;
    SharedAccess access{block.warps[0], address, size, -1, false, true, false, nullptr, Proxy::GENERIC};
    for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) {
        SharedWord& word = block.shadow->word[k];
        const u32 mask = mask_of(4 * (u64)k, address, size);
        block.shadow->touch(k, stamp.warp == block.warps.size() ? ~0u : block.shadow->epoch);
        word.in_flight &= ~mask;
        if (mask == 15 && !word.mixed && !stamp.atomic) {
            word.replicated = 0;
            word.writer = stamp;
            word.written = 15;
        } else access.remember_write(word, k, mask, stamp);
    }
}

void land_copy(Warp& w, u32 address, int size, int lane, u32 clock, const u8* data) {
    land(*w.block, address, size, Stamp{(u32)lane, (u32)w.number, 0, clock}, data);
}

void land_bulk_copy(Block& block, u32 address, int size, u32 clock, const u8* data) {
    land(block, address, size, Stamp{0, (u32)block.warps.size(), 0, clock}, data);
}

u32 next_copy(Block& block) {
    if (++block.copy_clock >= 1u << CLOCK_BITS) throw std::runtime_error("@-1 too many bulk copies for the check of races");
    return block.copy_clock;
}

void begin_reading(Warp& w, u32 address, int size) {
    access_shared(w, address, size, -1, true, false, false, nullptr, Proxy::ASYNC);
    SharedShadow* shadow = w.block->shadow.get();
    if (!shadow) return;
    for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) ++shadow->word[k].reading;
}

static void end_reading(Block& block, u32 warp, u32 clock, u32 address, int size) {
    SharedShadow& shadow = *block.shadow;
    const bool whole = !((address | (u32)size) & 3), bulk = warp == block.warps.size();
    Reads* reads = shadow.reads_of(address >> 2) + warp;
    for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k, reads += shadow.readers) {
        --shadow.word[k].reading;
        shadow.touch(k, bulk ? ~0u : shadow.epoch);
        *reads = Reads{whole ? 15 : mask_of(4 * (u64)k, address, size), Reads::WHOLE_WARP, 0, clock};
    }
}

void end_reading(Warp& w, u32 address, int size) {
    if (w.block->shadow) end_reading(*w.block, w.number, w.scheduling->clock(w), address, size);
}

void end_reading(Block& block, u32 address, int size) {
    if (block.shadow) end_reading(block, (u32)block.warps.size(), ++block.copy_clock, address, size);
}

static void mark_stored(Block& block, u32 address, int size, bool stored) {
    if (SharedShadow* shadow = block.shadow.get())
        for (u32 k = address >> 2; k <= (address + size - 1) >> 2; ++k) shadow->word[k].stored = stored;
}

void begin_storing(Warp& w, u32 address, int size) {
    begin_reading(w, address, size);
    mark_stored(*w.block, address, size, true);
}

void end_storing(Block& block, u32 address, int size) {
    next_copy(block);
    if (block.shadow) end_reading(block, (u32)block.warps.size(), block.copy_clock, address, size);
    mark_stored(block, address, size, false);
}

}  // namespace ptx
