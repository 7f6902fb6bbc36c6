// CUDA's execution model on one CPU thread, so that the kernels themselves can be tested without a GPU.
//
// Blocks run one after the other. The threads of a block are fibers: each runs until it waits for others (a barrier, or an
// instruction of the whole warp), and then another goes on. From one barrier to the next a warp runs as far as it can before
// another starts; the order of warps, and of the lanes of a warp, is drawn anew each time, from a seed (VLATTN_EMULATION_SEED):
// threads that do not wait for each other where they should then see each other's past or future.
// Shared memory has exactly the size asked for and is full of NaN when a block starts. A block whose threads wait for
// something that cannot come (some have returned, or are at another barrier) ends with cudaErrorLaunchFailure.
#pragma once

#include <cuda_runtime_api.h>
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

enum class State { runnable, at_barrier, in_warp, done };

struct Fiber {
    ucontext_t entry;
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    State state;
    bool started;
    unsigned index;
    void* asan_stack;
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
    uint64_t random = 0;
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
        for (Fiber& fiber : m.fibers) fiber.state = State::runnable;
    }
}

inline const char* error_string(cudaError_t status) {
    return status == cudaErrorLaunchFailure ? "threads wait for what cannot come" : "invalid configuration";
}

inline cudaError_t run(int64_t blocks, int threads, size_t shared, std::function<void()> body) {
    if (blocks < 1 || blocks > 0x7fffffff || threads <= 0 || threads > 1024 || threads % LANES != 0 || shared > 227 * 1024)
        return cudaErrorInvalidConfiguration;
    Machine& m = machine();
    std::lock_guard<std::mutex> lock(m.busy);
    const char* seed = getenv("VLATTN_EMULATION_SEED");
    m.random = 0x9e3779b97f4a7c15u ^ (seed ? strtoull(seed, nullptr, 10) : 0);
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
    for (int64_t i = 0; i < blocks; ++i) {
        m.block.x = static_cast<unsigned>(i);
        if (!run_block(shared)) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

inline void* shared_memory() { return machine().shared.get(); }
inline uint3 thread_index() { return {machine().current->index, 0, 0}; }

// An instruction of the whole warp: each lane gives a value and gets one back. The last lane to come does the work of all:
// exchange(inputs, outputs) sees one value of each lane.
template <class Input, class Output, class Exchange>
Output warp_wide(const Input& input, Exchange exchange) {
    static_assert(sizeof(Input) <= LANE_BYTES && sizeof(Output) <= LANE_BYTES, "a lane gives and gets at most LANE_BYTES");
    Machine& m = machine();
    const unsigned index = m.current->index, first = index / LANES * LANES;
    Warp& warp = m.warps[index / LANES];
    memcpy(warp.inputs[index % LANES], &input, sizeof(Input));
    if (++warp.arrived < LANES) {
        yield(State::in_warp);
    } else {
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

inline void __syncthreads() { emulation::yield(emulation::State::at_barrier); }

inline void __syncwarp(unsigned = 0xffffffffu) {
    emulation::warp_wide<int, int>(0, [](const int*, int* outputs) { memset(outputs, 0, emulation::LANES * sizeof(int)); });
}

template <class V>
V __shfl_sync(unsigned, V input, int lane) {
    struct Input {
        V value;
        int lane;
    };
    return emulation::warp_wide<Input, V>({input, lane}, [](const Input* inputs, V* outputs) {
        for (int i = 0; i < emulation::LANES; ++i) outputs[i] = inputs[inputs[i].lane & 31].value;
    });
}

template <class V>
V __shfl_xor_sync(unsigned mask, V input, int bits) {
    return __shfl_sync(mask, input, static_cast<int>(threadIdx.x % 32) ^ bits);
}
