// The instructions of AMX tiles on a processor that has none: each one traps, and the handler carries it out. So the library's own
// machine code of the set `amx` runs, for tests (tests/helpers/cpu/trapped_tiles.py). The program ends where the processor would
// refuse an instruction.
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

static thread_local uint8_t tiles[8][16][64];
static thread_local bool configured;
static uint64_t products;

static void refuse(const char* why) {
    fprintf(stderr, "tiles: %s\n", why);
    abort();
}

static float as_read(uint32_t bits) {
    if (!(bits & 0x7f800000)) bits &= 0x80000000;  // subnormal
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static void multiply(int to, int a, int b) {
    if (to == a || to == b || a == b) refuse("one tile twice in a product");
    for (int m = 0; m < 16; ++m) {
        float first[16] = {}, second[16] = {}, sums[16];
        uint32_t x, y[16];
        for (int k = 0; k < 16; ++k) {
            memcpy(&x, tiles[a][m] + 4 * k, 4);
            memcpy(y, tiles[b][k], 64);
            for (int n = 0; n < 16; ++n) {
                first[n] = fmaf(as_read(x << 16), as_read(y[n] << 16), first[n]);
                second[n] = fmaf(as_read(x & 0xffff0000), as_read(y[n] & 0xffff0000), second[n]);
            }
        }
        memcpy(sums, tiles[to][m], 64);
        for (int n = 0; n < 16; ++n) sums[n] += first[n] + second[n];
        memcpy(tiles[to][m], sums, 64);
    }
    __atomic_fetch_add(&products, 1, __ATOMIC_RELAXED);
}
// The library has whole tiles alone.
static void configure(const uint8_t* from) {
    uint8_t whole[64] = {1};
    for (int n = 0; n < 8; ++n) whole[16 + 2 * n] = 64, whole[48 + n] = 16;
    if (memcmp(from, whole, 64) != 0) refuse("another configuration than eight whole tiles");
    memset(tiles, 0, sizeof tiles);
    configured = true;
}

// An instruction with a VEX prefix of three bytes, and the address of its operand in memory
struct Instruction {
    const uint8_t* next;
    int prefix, map, code, third, reg, rm;
    bool memory, scaled;
    uint64_t base, index;
};
static Instruction decode(const uint8_t* p, const greg_t* registers) {
    static const int ORDER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const int mode = p[4] >> 6, high_index = (p[1] & 0x40) ? 0 : 8, high_base = (p[1] & 0x20) ? 0 : 8;
    Instruction x = {p + 5, p[2] & 3, p[1] & 31, p[3], ~(p[2] >> 3) & 15, p[4] >> 3 & 7, p[4] & 7, mode != 3, false, 0, 0};
    if (p[0] != 0xc4 || x.map != 2 || p[2] & 0x84) refuse("an instruction that is not one of tiles");
    if (!x.memory) return x;
    int base = x.rm;
    if ((x.scaled = base == 4)) {
        const int number = (*x.next >> 3 & 7) | high_index;
        if (number != 4) x.index = (uint64_t)registers[ORDER[number]] << (*x.next >> 6);
        base = *x.next++ & 7;
    }
    const bool absolute = base == 5 && mode == 0;
    if (!absolute) x.base = registers[ORDER[base | high_base]];
    int32_t displacement = 0;
    if (mode == 1) displacement = *(const int8_t*)x.next++;
    if (mode == 2 || absolute) memcpy(&displacement, x.next, 4), x.next += 4;
    if (absolute && !x.scaled) x.base = (uint64_t)x.next;
    x.base += (int64_t)displacement;
    return x;
}

static void carry_out(int, siginfo_t*, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const Instruction x = decode((const uint8_t*)registers[REG_RIP], registers);
    enum { NONE = 0, F3 = 2, F2 = 3 };
    if (x.code == 0x49 && x.prefix == NONE && x.memory) configure((const uint8_t*)(x.base + x.index));
    else if (!configured) refuse("an instruction before LDTILECFG");
    else if (x.code == 0x49 && x.prefix == NONE) configured = false;
    else if (x.code == 0x49 && x.prefix == F2 && !x.memory) memset(tiles[x.reg], 0, 1024);
    else if (x.code == 0x4b && x.prefix == F2 && x.scaled)
        for (int r = 0; r < 16; ++r) memcpy(tiles[x.reg][r], (const void*)(x.base + r * x.index), 64);
    else if (x.code == 0x4b && x.prefix == F3 && x.scaled)
        for (int r = 0; r < 16; ++r) memcpy((void*)(x.base + r * x.index), tiles[x.reg][r], 64);
    else if (x.code == 0x5c && x.prefix == F3 && !x.memory) multiply(x.reg, x.rm, x.third);
    else refuse("an unknown instruction");
    registers[REG_RIP] = (greg_t)x.next;
}

extern "C" void trap_tiles() {
    struct sigaction action = {};
    action.sa_sigaction = carry_out, action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}
extern "C" uint64_t products_of_tiles() { return products; }
