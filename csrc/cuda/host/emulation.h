// CUDA's execution model on one CPU thread, so that the kernels themselves can be tested without a GPU.
//
// Blocks run one after the other, in random order. The threads of a block are fibers: each runs until it waits for others (a
// barrier, or an instruction of the whole warp), and then another goes on. From one barrier to the next a warp runs as far as it
// can before another starts; the order of blocks, of warps, and of the lanes of a warp, is drawn anew each time, from a seed
// (VLATTN_EMULATION_SEED): threads that do not wait for each other where they should then see each other's past or future.
// Shared memory has exactly the size asked for, at most what every GPU since sm_80 has, and is full of NaN when a block starts.
// A block whose threads wait for something that cannot come (some have returned, or are elsewhere) ends with
// cudaErrorLaunchFailure. So does one in which the lanes of a warp meet in different instructions, or the threads of the block at
// different barriers: each has a tag, its line and how many of them the lane has come by.
// Results of the special function unit that are subnormal are 0. VLATTN_EMULATION_NOISE=1 makes them off by an ulp, up, down or
// not at all, as their operand has it; -DVLATTN_FMA=ON compiles products and sums into one instruction, as nvcc does.
//
// What it cannot catch:
// - A missing barrier that no order drawn here shows; compute-sanitizer's racecheck sees those.
// - What lanes of one warp do at the same time: they run one after the other here.
// - Memory order: a write is seen at once, by every thread. There are no caches, fences, atomics or asynchronous copies.
// - Alignment of vector loads, bank conflicts, uncoalesced access, registers, stack, occupancy.
// - What nvcc makes of the source: its instructions, their order, where divergent lanes meet again (tests/compiled/).
// - Sums inside a matrix instruction: the tensor cores add 16 products at once and cut them off, here they are added one by one.
// - exp2 and the reciprocal beyond an ulp; expf, logf and their like, which are the host's.
// - The launch itself: streams, graphs, several devices.
#pragma once

#include <cuda_runtime_api.h>
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define VLATTN_ASAN 1
#else
#define VLATTN_ASAN 0
#endif

#define __launch_bounds__(...)

namespace emulation {

constexpr size_t STACK_BYTES = VLATTN_ASAN ? 512 * 1024 : 128 * 1024;
constexpr int LANES = 32;
constexpr size_t LANE_BYTES = 64;  // of one lane's input or output of a warp-wide instruction
constexpr size_t SHARED_BYTES = 99 * 1024;  // of a block, at most: sm_86 and sm_89 have the least

// Where threads wait for each other.
struct Tag {
    const char* file;
    int line;
    uint64_t count;  // of such places that this thread has come by

    bool elsewhere(const Tag& other) const { return line != other.line || (file != other.file && strcmp(file, other.file) != 0); }
};

enum class State { runnable, at_barrier, in_warp, done };

struct Fiber {
    ucontext_t entry;
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    State state;
    bool started;
    unsigned index;
    void* asan_stack;
    Tag at;
};

struct Warp {
    int arrived = 0;
    alignas(16) unsigned char inputs[LANES][LANE_BYTES], outputs[LANES][LANE_BYTES];
};

struct Machine {
    std::mutex busy;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> shared;
    std::function<void()> body;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    void* asan_scheduler = nullptr;
    uint3 block = {0, 0, 0};
    dim3 blocks, threads;
    uint64_t random = 0, seed = 0;
    bool noise = false;
};

inline Machine& machine() {
    static Machine one;
    return one;
}

inline uint64_t draw() {
    uint64_t& x = machine().random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

inline void shuffle(std::vector<unsigned>& order) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
}

// What the special function unit gives for x, where `exact` is right: subnormal results are 0. With noise it is an ulp off, or
// not, by x and the seed alone: equal operands have equal results.
inline float approximate(float x, float exact) {
    const Machine& m = machine();
    if (fabsf(exact) < FLT_MIN) return copysignf(0.0f, exact);
    if (!m.noise || !(fabsf(exact) < INFINITY)) return exact;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint64_t mixed = (bits + m.seed) * 0x9e3779b97f4a7c15u;
    const int which = static_cast<int>((mixed >> 40) % 3);
    return which == 0 ? exact : nextafterf(exact, which == 1 ? 0.0f : INFINITY);
}

// To the scheduler, until it comes back here.
inline void yield(State state) {
    Machine& m = machine();
    Fiber* self = m.current;
    self->state = state;
#if VLATTN_ASAN
    void** kept = state == State::done ? nullptr : &self->asan_stack;
    __sanitizer_start_switch_fiber(kept, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
    if (_setjmp(self->context) == 0) _longjmp(m.scheduler, 1);
#if VLATTN_ASAN
    __sanitizer_finish_switch_fiber(self->asan_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

inline void enter() {
    Machine& m = machine();
#if VLATTN_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
    m.body();
    yield(State::done);
}

inline void resume(Fiber& fiber) {
    Machine& m = machine();
    m.current = &fiber;
#if VLATTN_ASAN
    __sanitizer_start_switch_fiber(&m.asan_scheduler, fiber.stack.get(), STACK_BYTES);
#endif
    if (_setjmp(m.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.context, 1);
        fiber.started = true;
        setcontext(&fiber.entry);
    }
#if VLATTN_ASAN
    __sanitizer_finish_switch_fiber(m.asan_scheduler, nullptr, nullptr);
#endif
}

inline bool differ(const char* what, const Tag& one, const Tag& other) {
    fprintf(stderr, "block %u: threads meet at different %s: %s:%d (number %llu) and %s:%d (number %llu)\n", machine().block.x,
            what, one.file, one.line, static_cast<unsigned long long>(one.count), other.file, other.line,
            static_cast<unsigned long long>(other.count));
    return false;
}

// One block; false where its threads wait for ever.
inline bool run_block(size_t shared) {
    Machine& m = machine();
    m.shared.reset(new unsigned char[shared]);
    memset(m.shared.get(), 0xff, shared);
    for (Warp& warp : m.warps) warp.arrived = 0;
    for (Fiber& fiber : m.fibers) {
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get();
        fiber.entry.uc_stack.ss_size = STACK_BYTES;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, enter, 0);
        fiber.started = false;
        fiber.state = State::runnable;
        fiber.at = {"", 0, 0};
    }
    std::vector<unsigned> warps(m.warps.size()), lanes(LANES);
    std::iota(warps.begin(), warps.end(), 0u);
    std::iota(lanes.begin(), lanes.end(), 0u);
    for (;;) {
        shuffle(warps);
        for (unsigned warp : warps) {
            bool progress = true;
            while (progress) {
                progress = false;
                shuffle(lanes);
                for (unsigned lane : lanes) {
                    Fiber& fiber = m.fibers[warp * LANES + lane];
                    if (fiber.state != State::runnable) continue;
                    resume(fiber);
                    progress = true;
                }
            }
        }
        size_t done = 0, waiting = 0;
        for (const Fiber& fiber : m.fibers) {
            done += fiber.state == State::done;
            waiting += fiber.state == State::at_barrier;
        }
        if (done == m.fibers.size()) return true;
        if (waiting != m.fibers.size()) {
            fprintf(stderr, "block %u: of %zu threads %zu returned, %zu wait at a barrier, the others for their warp\n",
                    m.block.x, m.fibers.size(), done, waiting);
            return false;
        }
        for (Fiber& fiber : m.fibers) {
            if (fiber.at.elsewhere(m.fibers[0].at)) return differ("barriers", m.fibers[0].at, fiber.at);
            fiber.state = State::runnable;
        }
    }
}

inline const char* error_string(cudaError_t status) {
    return status == cudaErrorLaunchFailure ? "threads wait for what cannot come" : "invalid configuration";
}

inline cudaError_t run(int64_t blocks, int threads, size_t shared, std::function<void()> body) {
    if (blocks < 1 || blocks > 0x7fffffff || threads <= 0 || threads > 1024 || threads % LANES != 0 || shared > SHARED_BYTES)
        return cudaErrorInvalidConfiguration;
    Machine& m = machine();
    std::lock_guard<std::mutex> lock(m.busy);
    const char *seed = getenv("VLATTN_EMULATION_SEED"), *noise = getenv("VLATTN_EMULATION_NOISE");
    m.seed = seed ? strtoull(seed, nullptr, 10) : 0;
    m.random = 0x9e3779b97f4a7c15u ^ m.seed;
    m.noise = noise && strcmp(noise, "1") == 0;
    m.body = std::move(body);
    m.blocks = dim3(static_cast<unsigned>(blocks));
    m.threads = dim3(threads);
    while (m.fibers.size() < static_cast<size_t>(threads)) {
        m.fibers.emplace_back();
        m.fibers.back().stack.reset(new char[STACK_BYTES]);
    }
    m.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) m.fibers[i].index = i;
    m.warps.resize(threads / LANES);
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    shuffle(order);
    for (unsigned block : order) {
        m.block.x = block;
        if (!run_block(shared)) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

inline void* shared_memory() { return machine().shared.get(); }
inline uint3 thread_index() { return {machine().current->index, 0, 0}; }

// An instruction of the whole warp: each lane gives a value and gets one back. The last lane to come does the work of all:
// exchange(inputs, outputs) sees one value of each lane.
template <class Input, class Output, class Exchange>
Output warp_wide(const Input& input, Exchange exchange, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static_assert(sizeof(Input) <= LANE_BYTES && sizeof(Output) <= LANE_BYTES, "a lane gives and gets at most LANE_BYTES");
    Machine& m = machine();
    const unsigned index = m.current->index, first = index / LANES * LANES;
    Warp& warp = m.warps[index / LANES];
    m.current->at = {file, line, m.current->at.count + 1};
    memcpy(warp.inputs[index % LANES], &input, sizeof(Input));
    if (++warp.arrived < LANES) {
        yield(State::in_warp);
    } else {
        for (unsigned i = first; i < first + LANES; ++i) {
            const Tag &here = m.current->at, &there = m.fibers[i].at;
            if (there.count != here.count || there.elsewhere(here)) {
                differ("instructions of a warp", here, there);
                yield(State::in_warp);  // for ever
            }
        }
        Input inputs[LANES];
        Output outputs[LANES];
        for (int i = 0; i < LANES; ++i) memcpy(&inputs[i], warp.inputs[i], sizeof(Input));
        exchange(inputs, outputs);
        for (int i = 0; i < LANES; ++i) memcpy(warp.outputs[i], &outputs[i], sizeof(Output));
        warp.arrived = 0;
        for (int i = 0; i < LANES; ++i) m.fibers[first + i].state = State::runnable;
    }
    Output result;
    memcpy(&result, warp.outputs[index % LANES], sizeof(Output));
    return result;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::machine().block)
#define blockDim (emulation::machine().threads)
#define gridDim (emulation::machine().blocks)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::Tag& at = emulation::machine().current->at;
    at = {file, line, at.count + 1};
    emulation::yield(emulation::State::at_barrier);
}

inline void __syncwarp(unsigned = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const auto nothing = [](const int*, int* outputs) { memset(outputs, 0, emulation::LANES * sizeof(int)); };
    emulation::warp_wide<int, int>(0, nothing, file, line);
}

template <class V>
V __shfl_sync(unsigned, V input, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    struct Input {
        V value;
        int lane;
    };
    const auto exchange = [](const Input* inputs, V* outputs) {
        for (int i = 0; i < emulation::LANES; ++i) outputs[i] = inputs[inputs[i].lane & 31].value;
    };
    return emulation::warp_wide<Input, V>({input, lane}, exchange, file, line);
}

template <class V>
V __shfl_xor_sync(unsigned mask, V input, int bits, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return __shfl_sync(mask, input, static_cast<int>(threadIdx.x % 32) ^ bits, file, line);
}
