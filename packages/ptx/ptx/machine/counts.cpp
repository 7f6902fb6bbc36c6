// Counts of memory instructions: wavefronts of shared memory, sectors of global memory.
#include "memory.h"

namespace ptx {

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

}  // namespace ptx
