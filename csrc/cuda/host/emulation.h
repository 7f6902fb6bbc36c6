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
// An asynchronous copy (cp.async) reads and writes when it is issued or when its thread waits for its group, drawn from the seed;
// in the second case its place is full of NaN in between. To whom does not wait, or waits for another group, nothing has come.
// Results of the special function unit that are subnormal are 0. VLATTN_EMULATION_NOISE=1 (or 2, 3, ...) makes them off by an ulp,
// up, down or not at all, as their operand and that number have it. Products and sums are one instruction, as nvcc makes them,
// where the processor has it (CMakeLists.txt).
// Under ThreadSanitizer each fiber is a thread to it, and nothing orders them but what does on a GPU: __syncthreads the threads of
// a block, __syncwarp the lanes of a warp, the ends of a launch everything. A missing barrier is then reported in any order of
// threads, and so are two blocks that touch the same place. Shuffles and matrix instructions order no memory. An asynchronous
// copy is a write of its thread both where it is issued and where it is waited for.
//
// What it cannot catch:
// - Without ThreadSanitizer, a missing barrier that no order drawn here shows.
// - Races of blocks that do not run one right after the other, nor beyond the few accesses that ThreadSanitizer remembers of a
//   place.
// - What lanes of one warp do at the same time: they run one after the other here.
// - Memory order: a write is seen at once, by every thread. There are no caches, fences or atomics.
// - To ThreadSanitizer, an asynchronous copy that is waited for too late, with a barrier in between: it shows in the numbers alone.
// - Asynchronous copies that are under way when their thread returns; old contents of a place that a copy is on its way to.
// - Alignment of vector loads other than asynchronous copies, bank conflicts, uncoalesced access, registers, stack, occupancy.
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
namespace emulation {  // ThreadSanitizer's header declares them, and its library lacks them
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
}  // namespace emulation
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define VLATTN_UNSEEN __attribute__((no_sanitize_thread))
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#else
#define VLATTN_UNSEEN
constexpr unsigned __tsan_switch_to_fiber_no_sync = 0;
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_release(void*) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_ignore_thread_begin() {}
inline void __tsan_ignore_thread_end() {}
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

// An asynchronous copy of a thread: `bytes` of global memory, then zeros.
struct Copy {
    static constexpr size_t BYTES = 16;
    unsigned char *to, value[BYTES];
    const unsigned char* from;
    size_t bytes;
    uint64_t group;
    bool early;

    void read() {
        memset(value, 0, BYTES);
        if (bytes > 0) memcpy(value, from, bytes);
    }
    void write() const { memcpy(to, value, BYTES); }
};

// ThreadSanitizer's view of a fiber
struct Context {
    void* of_fiber = nullptr;

    Context() = default;
    Context(Context&& other) noexcept { std::swap(of_fiber, other.of_fiber); }
    ~Context() {
        if (of_fiber) __tsan_destroy_fiber(of_fiber);
    }
    VLATTN_UNSEEN static void enter(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
};

// While it lives, what this thread reads and writes is the emulation's own.
struct Unseen {
    Unseen() { __tsan_ignore_thread_begin(); }
    ~Unseen() { __tsan_ignore_thread_end(); }
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
    Context seen;
    unsigned barriers, warp_barriers;  // that it has come by
    std::vector<Copy> copies;  // that it has not waited for, in order
    uint64_t groups;  // of copies that it has committed
};

struct Warp {
    int arrived = 0;
    alignas(16) unsigned char inputs[LANES][LANE_BYTES], outputs[LANES][LANE_BYTES];
};

struct Machine {
    std::mutex busy;
    std::vector<Fiber> teams[2], *team = nullptr;  // blocks take turns, so that nothing orders one and the next
    std::vector<Warp> warps;
    std::unique_ptr<uint64_t[]> places;  // two for the block's barriers and two for each warp's, in turns
    uint64_t begin, end;  // of the launch
    std::unique_ptr<unsigned char[]> shared;
    std::function<void()> body;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    void* seen_scheduler = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    void* asan_scheduler = nullptr;
    uint3 block = {0, 0, 0};
    dim3 threads;
    uint64_t random = 0;
    uint64_t noise = 0;
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
// not, by x and the kind of noise alone: equal operands have equal results.
inline float approximate(float x, float exact) {
    const Machine& m = machine();
    if (fabsf(exact) < FLT_MIN) return copysignf(0.0f, exact);
    if (!m.noise || !(fabsf(exact) < INFINITY)) return exact;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint64_t mixed = (bits + m.noise) * 0x9e3779b97f4a7c15u;
    const int which = static_cast<int>((mixed >> 40) % 3);
    return which == 0 ? exact : nextafterf(exact, which == 1 ? 0.0f : INFINITY);
}

// To the scheduler, until it comes back here.
VLATTN_UNSEEN inline void yield(State state) {
    Machine& m = machine();
    Fiber* self = m.current;
    self->state = state;
    void** kept = state == State::done ? nullptr : &self->asan_stack;
    __sanitizer_start_switch_fiber(kept, m.scheduler_stack, m.scheduler_stack_bytes);
    if (_setjmp(self->context) == 0) {
        Context::enter(m.seen_scheduler);
        _longjmp(m.scheduler, 1);
    }
    __sanitizer_finish_switch_fiber(self->asan_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
}

VLATTN_UNSEEN inline void enter() {
    Machine& m = machine();
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
    __tsan_acquire(&m.begin);
    m.body();
    __tsan_release(&m.end);
    yield(State::done);
}

VLATTN_UNSEEN inline void resume(Fiber& fiber) {
    Machine& m = machine();
    m.current = &fiber;
    __sanitizer_start_switch_fiber(&m.asan_scheduler, fiber.stack.get(), STACK_BYTES);
    if (_setjmp(m.scheduler) == 0) {
        Context::enter(fiber.seen.of_fiber);
        if (fiber.started) _longjmp(fiber.context, 1);
        fiber.started = true;
        setcontext(&fiber.entry);
    }
    __sanitizer_finish_switch_fiber(m.asan_scheduler, nullptr, nullptr);
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
    m.places.reset(new uint64_t[2 + 2 * m.warps.size()]);
    std::vector<Fiber>& fibers = *m.team;
    for (Warp& warp : m.warps) warp.arrived = 0;
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get();
        fiber.entry.uc_stack.ss_size = STACK_BYTES;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, enter, 0);
        fiber.started = false;
        fiber.state = State::runnable;
        fiber.at = {"", 0, 0};
        fiber.barriers = fiber.warp_barriers = 0;
        fiber.copies.clear();
        fiber.groups = 0;
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
                    Fiber& fiber = fibers[warp * LANES + lane];
                    if (fiber.state != State::runnable) continue;
                    resume(fiber);
                    progress = true;
                }
            }
        }
        size_t done = 0, waiting = 0;
        for (const Fiber& fiber : fibers) {
            done += fiber.state == State::done;
            waiting += fiber.state == State::at_barrier;
        }
        if (done == fibers.size()) return true;
        if (waiting != fibers.size()) {
            fprintf(stderr, "block %u: of %zu threads %zu returned, %zu wait at a barrier, the others for their warp\n",
                    m.block.x, fibers.size(), done, waiting);
            return false;
        }
        for (Fiber& fiber : fibers) {
            if (fiber.at.elsewhere(fibers[0].at)) return differ("barriers", fibers[0].at, fiber.at);
            fiber.state = State::runnable;
        }
    }
}

inline const char* error_string(cudaError_t status) {
    if (status == cudaErrorNotSupported) return "this type and size are not among the kernels of this library (VLATTN_SOME)";
    return status == cudaErrorLaunchFailure ? "threads wait for what cannot come" : "invalid configuration";
}

inline cudaError_t run(int64_t blocks, int threads, size_t shared, std::function<void()> body) {
    if (blocks < 1 || blocks > 0x7fffffff || threads <= 0 || threads > 1024 || threads % LANES != 0 || shared > SHARED_BYTES)
        return cudaErrorInvalidConfiguration;
    Machine& m = machine();
    std::lock_guard<std::mutex> lock(m.busy);
    __tsan_release(&m.begin);
    const Unseen unseen;
    const char *seed = getenv("VLATTN_EMULATION_SEED"), *noise = getenv("VLATTN_EMULATION_NOISE");
    m.random = 0x9e3779b97f4a7c15u ^ (seed ? strtoull(seed, nullptr, 10) : 0);
    m.noise = noise ? strtoull(noise, nullptr, 10) : 0;
    m.body = std::move(body);
    m.threads = dim3(threads);
    m.seen_scheduler = __tsan_get_current_fiber();
    for (std::vector<Fiber>& team : m.teams) {
        while (team.size() > static_cast<size_t>(threads)) team.pop_back();
        while (team.size() < static_cast<size_t>(threads)) {
            team.emplace_back();
            team.back().stack.reset(new char[STACK_BYTES]);
            team.back().index = static_cast<unsigned>(team.size() - 1);
            team.back().seen.of_fiber = __tsan_create_fiber(0);
        }
    }
    m.warps.resize(threads / LANES);
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    shuffle(order);
    for (unsigned block : order) {
        m.block.x = block;
        m.team = m.team == m.teams ? m.teams + 1 : m.teams;
        if (!run_block(shared)) return cudaErrorLaunchFailure;
    }
    __tsan_acquire(&m.end);
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
    std::vector<Fiber>& fibers = *m.team;
    const unsigned index = m.current->index, first = index / LANES * LANES;
    Warp& warp = m.warps[index / LANES];
    bool last, same = true;
    {
        const Unseen unseen;
        m.current->at = {file, line, m.current->at.count + 1};
        memcpy(warp.inputs[index % LANES], &input, sizeof(Input));
        last = ++warp.arrived == LANES;
        for (unsigned i = first; last && same && i < first + LANES; ++i) {
            const Tag &here = m.current->at, &there = fibers[i].at;
            if (there.count != here.count || there.elsewhere(here)) same = differ("instructions of a warp", here, there);
        }
        if (last && same) {
            Input inputs[LANES];
            Output outputs[LANES];
            for (int i = 0; i < LANES; ++i) memcpy(&inputs[i], warp.inputs[i], sizeof(Input));
            exchange(inputs, outputs);
            for (int i = 0; i < LANES; ++i) memcpy(warp.outputs[i], &outputs[i], sizeof(Output));
            warp.arrived = 0;
            for (int i = 0; i < LANES; ++i) fibers[first + i].state = State::runnable;
        }
    }
    if (!last || !same) yield(State::in_warp);  // for ever, where they differ
    const Unseen unseen;
    Output result;
    memcpy(&result, warp.outputs[index % LANES], sizeof(Output));
    return result;
}

// cp.async, cp.async.commit_group and cp.async.wait_group. What the copies are kept in is the emulation's own, what they copy is
// this thread's doing.
inline void copy_async(void* to, const void* from, size_t bytes) {
    Machine& m = machine();
    Fiber& self = *m.current;
    Copy copy = {static_cast<unsigned char*>(to), {}, static_cast<const unsigned char*>(from), bytes, self.groups, false};
    if (reinterpret_cast<uintptr_t>(to) % Copy::BYTES != 0 || reinterpret_cast<uintptr_t>(from) % Copy::BYTES != 0) {
        fprintf(stderr, "block %u: an asynchronous copy from or to an address that is no multiple of 16\n", m.block.x);
        yield(State::in_warp);  // for ever
    }
    {
        const Unseen unseen;
        copy.early = draw() % 4 == 0;
    }
    memset(copy.value, 0xff, Copy::BYTES);
    if (copy.early) copy.read();
    copy.write();
    const Unseen unseen;
    self.copies.push_back(copy);
}

inline void commit_copies() { ++machine().current->groups; }

// For all but the last `pending` groups.
inline void wait_for_copies(uint64_t pending) {
    Fiber& self = *machine().current;
    size_t done = 0;
    for (; done < self.copies.size() && self.copies[done].group + pending < self.groups; ++done) {
        Copy& copy = self.copies[done];
        if (!copy.early) copy.read();
        copy.write();
    }
    const Unseen unseen;
    self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::machine().block)
#define blockDim (emulation::machine().threads)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::Machine& m = emulation::machine();
    emulation::Fiber& self = *m.current;
    self.at = {file, line, self.at.count + 1};
    uint64_t* place = &m.places[self.barriers++ % 2];
    __tsan_release(place);
    emulation::yield(emulation::State::at_barrier);
    __tsan_acquire(place);
}

inline void __syncwarp(unsigned = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulation::Machine& m = emulation::machine();
    emulation::Fiber& self = *m.current;
    uint64_t* place = &m.places[2 + self.index / emulation::LANES * 2 + self.warp_barriers++ % 2];
    __tsan_release(place);
    const auto nothing = [](const int*, int* outputs) { memset(outputs, 0, emulation::LANES * sizeof(int)); };
    emulation::warp_wide<int, int>(0, nothing, file, line);
    __tsan_acquire(place);
}

template <class V> V __shfl_sync(unsigned, V input, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
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

inline unsigned __ballot_sync(unsigned, bool input, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const auto exchange = [](const bool* inputs, unsigned* outputs) {
        unsigned bits = 0;
        for (int i = 0; i < emulation::LANES; ++i) bits |= static_cast<unsigned>(inputs[i]) << i;
        for (int i = 0; i < emulation::LANES; ++i) outputs[i] = bits;
    };
    return emulation::warp_wide<bool, unsigned>(input, exchange, file, line);
}
