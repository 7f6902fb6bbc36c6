// Copies in flight (cp.async, cp.async.bulk), and barriers that count arrivals and bytes (mbarrier).
#pragma once

#include <memory>
#include <vector>

#include "scheduler.h"

namespace ptx {

struct AsyncCopy {
    u32 destination;
    u8 size, lane;
    u32 group;  // of its lane
    u8 data[16];
};

struct BulkStore;  // tensor_copies.cpp

struct AsyncCopies {
    std::vector<AsyncCopy> in_flight;
    u32 committed[LANES] = {};  // groups of each lane
    std::vector<std::shared_ptr<BulkStore>> stores;  // that no instruction has waited for to their end
    u32 bulk_committed[LANES] = {};
};

struct Mbarrier {
    u32 expected, pending;  // arrivals
    s64 bytes = 0;          // that copies still have to bring
    u64 phase = 0;          // how many are complete
    Knowledge arriving, complete;
    s64 copies = -1;  // the last phase that bulk copies complete
    u64 seen = 0;     // how many phases an instruction has seen complete
};

// The mbarrier at an address; an error where there is none.
Mbarrier& mbarrier_at(Warp&, u64 address);
// A copy has brought bytes to it. `address`: in shared memory.
void complete_transaction(Block&, u32 address, u32 bytes);
// An arrival there that no warp makes: products have ended.
void arrive(Block&, u32 address);
// More bytes will come.
void expect_transaction(Warp&, Mbarrier&, u32 bytes);

}  // namespace ptx
