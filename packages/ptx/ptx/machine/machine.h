// What the parts of the machine share: registers of a warp, instructions, warps, blocks, reports.
//
// A program is a list of instructions. An instruction names a handler, which computes all lanes of a warp at once. Registers and
// constants hold 32 lanes side by side: 4 bytes a lane up to 32 bits, 8 bytes a lane for 64, 16 for 128; a predicate is one word
// with a bit a lane. A value narrower than 32 bits lies zero-extended in 4 bytes. An operand is the offset of a register in the
// warp's file, or ~offset of a constant, or a plain number where the handler says so.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffffu;

struct Warp;
struct Block;
struct Machine;
struct Instruction;

using Handler = void (*)(Warp&, const Instruction&, u32 lanes);  // lanes: those that execute it, never none

struct Instruction {
    Handler handler;
    const s32* operands;
    int count;      // of operands
    int number;     // its place in the program
    int predicate;  // offset of the predicate that guards it, or -1
    bool negated;
    u8 kind;         // index of its class in KINDS, for counts
    u8 control;      // Control: who moves the program counter
    bool converged;  // all lanes of the warp that still run must be here together: barriers, matrix products, ldmatrix
    int reconverge;  // of a branch: where its lanes meet again (the immediate post-dominator), or -1: at the end
};

// PLAIN, WAITS and RETRIES call their handler and go on to the next instruction; the scheduler does the others. Operands:
//   BRANCH target            INDIRECT register of the index, targets...
//   BARRIER id [, threads]   ARRIVE id, threads                               WARP_BARRIER member mask
//   BARRIER_REDUCE 0 (popc) 1 (and) 2 (or), destination, id, threads (constant 0: all), predicate, 1 if it is negated
//   WAITS ..., member mask: the instruction waits for these lanes, and its handler runs once for all of them
//   RETRIES: the handler may call try_again (scheduler.h); then these lanes wait, and the instruction runs again later
enum Control : u8 { PLAIN, BRANCH, INDIRECT, EXIT, TRAP, BARRIER, ARRIVE, BARRIER_REDUCE, WARP_BARRIER, WAITS, RETRIES };

// ---- registers

struct Warp {
    u8* registers;
    const u8* constants;
    Block* block;
    int number;  // in its block
    const Instruction* at = nullptr;
    struct Scheduling;  // groups of lanes, calls, waits, clocks, copies in flight (scheduler.h)
    Scheduling* scheduling = nullptr;
};

inline u8* place(Warp& w, s32 operand) { return operand >= 0 ? w.registers + operand : const_cast<u8*>(w.constants) + ~operand; }
// The 32 lanes of an operand; T has 4, 8 or 16 bytes.
template <class T> T* lanes_of(Warp& w, s32 operand) { return reinterpret_cast<T*>(place(w, operand)); }
inline u32& predicate(Warp& w, s32 operand) { return *reinterpret_cast<u32*>(place(w, operand)); }
inline void set_predicate(Warp& w, s32 operand, u32 values, u32 lanes) {
    u32& p = predicate(w, operand);
    p = (p & ~lanes) | (values & lanes);
}
template <class T> void write_lanes(T* to, const T* from, u32 lanes) {
    if (lanes == ALL) {  // neither overlaps the other in part
#pragma GCC ivdep
        for (int l = 0; l < LANES; ++l) to[l] = from[l];
    } else
        for (int l = 0; l < LANES; ++l) to[l] = lanes >> l & 1 ? from[l] : to[l];
}

// ---- what handlers of one file ask of another (memory.cpp, scheduler.cpp)

enum Space : s32 { GENERIC, GLOBAL, SHARED, LOCAL, PARAMETER };
enum class Access { READ, WRITE, ATOMIC };
enum class Proxy { GENERIC, ASYNC };

// The memory behind an address, after all checks of `size` bytes: bounds, alignment to `alignment` (0: to `size`), races,
// initialisation. `data`: what will be written there; an equal value is no race. The caller copies.
u8* access(Warp&, Space, u64 address, int size, int lane, Access, const u8* data = nullptr, Proxy = Proxy::GENERIC,
           int alignment = 0);

// Addresses of the lanes from three operands: register, its bytes (4 or 8), a plain offset.
void addresses_of(Warp&, const s32* operands, u64 addresses[LANES]);

// Counts of one memory instruction: wavefronts of shared memory, sectors of global memory.
void count_access(Warp&, Space, const u64 addresses[LANES], int size, u32 lanes);

u8* shared_memory(Block&);
u32 shared_size(const Block&);
u64 random_bits(Warp&);
u64 noise_of(const Warp&);     // special functions err as much as documented: which draw, or 0
bool checks_races(const Warp&);

// A finding: the program goes on. `kind` is the same for all findings of a sort, `text` has addresses and warps.
void report(Warp&, const char* kind, const std::string& text);
// What cannot go on. It ends the launch, with the instruction's line.
[[noreturn]] void fail(Warp&, const std::string& text);

std::string hex(u64);

// ---- handlers by name

void add_handler(const std::string& name, Handler);
struct Registered {
    Registered(const std::string& name, Handler handler) { add_handler(name, handler); }
};

}  // namespace ptx
