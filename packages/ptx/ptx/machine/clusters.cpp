// Clusters: addresses in the shared memory of their blocks, and barrier.cluster.
//
// An address has the rank of its block, plus one, above 24 bits; without a rank it is in the block's own memory. Order between the
// blocks is what it is through global memory: releases and acquires, here of a barrier. A phase of the barrier is complete when all
// lanes of the cluster that run have arrived.
#include "lanes.h"
#include "memory.h"

namespace ptx {
namespace {

// Destination, address, rank.
template <class T> void map_address(Warp& w, const Instruction& i, u32 lanes) {
    const T* addresses = lanes_of<T>(w, i.operands[1]);
    const u32 *ranks = lanes_of<u32>(w, i.operands[2]), size = w.block->machine->cluster_size();
    T results[LANES];
    for (int l = 0; l < LANES; ++l) {
        if ((lanes >> l & 1) && ranks[l] >= size)
            fail(w, "mapa to block " + std::to_string(ranks[l]) + " of a cluster of " + std::to_string(size));
        results[l] = (addresses[l] & ~((T)RANKS << RANK_SHIFT)) | (T)(ranks[l] + 1) << RANK_SHIFT;
    }
    write_lanes(lanes_of<T>(w, i.operands[0]), results, lanes);
}
template <class T> void rank_of(Warp& w, const Instruction& i, u32 lanes) {
    auto addresses = values<T>(w, i.operands[1]);
    write_each<u32>(w, i.operands[0], lanes, [&](int l) {
        const u32 rank = (u32)(addresses(l) >> RANK_SHIFT) & RANKS;
        return rank ? rank - 1 : w.block->rank;
    });
}

template <bool releases> void arrive(Warp& w, const Instruction&, u32 lanes) {
    Cluster& cluster = *w.block->cluster;
    Warp::Scheduling& s = *w.scheduling;
    if (s.at_cluster & lanes) fail(w, "barrier.cluster.arrive twice, without barrier.cluster.wait in between");
    s.at_cluster |= lanes;
    for (int l = 0; l < LANES; ++l)
        if (lanes >> l & 1) s.cluster_phase[l] = cluster.phase;
    cluster.arrived += __builtin_popcount(lanes);
    if (releases && checks_races(w)) join(cluster.arriving, released_by(w));
    check_cluster_barrier(*w.block);
}
void wait(Warp& w, const Instruction&, u32 lanes) {
    Cluster& cluster = *w.block->cluster;
    Warp::Scheduling& s = *w.scheduling;
    if (lanes & ~s.at_cluster) fail(w, "barrier.cluster.wait without barrier.cluster.arrive before it");
    for (int l = 0; l < LANES; ++l)
        if ((lanes >> l & 1) && s.cluster_phase[l] == cluster.phase) return try_again(w);
    s.at_cluster &= ~lanes;
    acquire(w, cluster.complete);
}

const bool added = [] {
    add_handler("mapa.u32", map_address<u32>);
    add_handler("mapa.u64", map_address<u64>);
    add_handler("getctarank.u32", rank_of<u32>);
    add_handler("getctarank.u64", rank_of<u64>);
    add_handler("barrier.cluster.arrive", arrive<true>);
    add_handler("barrier.cluster.arrive.relaxed", arrive<false>);
    add_handler("barrier.cluster.wait", wait);
    return true;
}();

}  // namespace

Block& other_block(Warp& w, u64& address) {
    const u64 rank = (address >> RANK_SHIFT & RANKS) - 1;
    const auto& blocks = w.block->cluster->blocks;
    if (rank >= blocks.size() || address >> 32) fail(w, "shared address " + hex(address) + " is in no block of the cluster");
    address &= (1u << RANK_SHIFT) - 1;
    Block& block = *blocks[rank];
    if (!block.alive)
        report(w, "access to shared memory of a block that has ended", "block " + std::to_string(rank) + " of the cluster");
    return block;
}

}  // namespace ptx
