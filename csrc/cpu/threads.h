// Threads and memory of a call. The threads are torch's own, so torch.set_num_threads, nested regions and DataLoader workers
// behave as for its kernels.
#pragma once
#include "../layout.h"
#include "tiles.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" {
typedef void (*RangeFunction)(int64_t begin, int64_t end, void* context);
// of libtorch, handed over when the library is loaded (library.cpp); without them a call runs on one thread
extern int32_t (*vlattn_parallel_for)(int64_t begin, int64_t end, int64_t grain, RangeFunction run, void* context);
extern int32_t (*vlattn_get_num_threads)(uint32_t* count);
}

// extern "C" int64_t vlattn_<ISA>_<name>(call): `name(const Type&)` of this file for Python, which packs Type's fields;
// vlattn_<ISA>_<name>_fields(text, size) writes where Type has them.
#define EXPORT extern "C" __attribute__((visibility("default")))
#define JOIN3(a, b, c) a##b##c
#define SYMBOL(isa, name) JOIN3(vlattn_, isa, _##name)
#define OPERATOR(name, Type)                                                             \
    EXPORT int64_t SYMBOL(ISA, name)(const ISA::Type* call) { return ISA::name(*call); } \
    EXPORT void SYMBOL(ISA, name##_fields)(char* text, int64_t size) { Layout<ISA::Type>{text, size}.describe(); }

namespace ISA {
namespace {

enum : Size { DONE = 0, NO_MEMORY = 1 };  // what an operator returns

INLINE Size round_up(Size x, Size to) { return (x + to - 1) / to * to; }
INLINE Size least(Size a, Size b) { return a < b ? a : b; }
INLINE Size most(Size a, Size b) { return a > b ? a : b; }
static Size greatest_divisor(Size a, Size b) { return b > 0 ? greatest_divisor(b, a % b) : a; }

static Size thread_count() {
    uint32_t count = 1;
    if (vlattn_get_num_threads) vlattn_get_num_threads(&count);
    return count > 0 ? count : 1;
}

// The share of `task` out of `tasks` in [0, items): `share(items, task, tasks)` up to `share(items, task + 1, tasks)`.
INLINE Size share(Size items, Size task, Size tasks) { return items * task / tasks; }

// task(context, 0) ... task(context, tasks - 1), side by side. Results depend on the number of tasks alone, not on
// which thread runs which: so a call gives the same bits for the same number of threads.
template <class Context> static void run(Size tasks, Context& context, void (*task)(Context&, Size)) {
    struct Call {
        Context& context;
        void (*task)(Context&, Size);
        static void range(int64_t begin, int64_t end, void* p) {
            Call& call = *(Call*)p;
            const TileState state;
            for (Size n = begin; n < end; ++n) call.task(call.context, n);
        }
    } call = {context, task};
    if (tasks > 1 && vlattn_parallel_for) vlattn_parallel_for(0, tasks, 1, Call::range, &call);
    else Call::range(0, tasks, &call);
}

// Items of a call, which tasks take one after the other. No result depends on who takes an item.
struct Queue {
    Size next = 0;
    Size take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};
template <class Job>  // a Queue
static void run_queue(Size tasks, Job& job, void (*task)(Job&, Size)) {
    job.next = 0;
    run(tasks, job, task);
}

// Memory of so many bytes that nothing was written to comes in pages of two megabytes, which Linux clears several times as fast as
// as many small ones.
static const Size LARGE_PAGE = 1 << 21;
static void take_large_pages(void* data, Size bytes) {
#if defined(__linux__)
    const Size page = LARGE_PAGE, first = round_up((Size)data, page), last = ((Size)data + bytes) / page * page;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// One allocation, handed out in pieces. `place` calls a function that takes them twice: first they are null and are counted.
class Memory {
    void* allocated = nullptr;
    float* base = nullptr;  // aligned in it
    Size used = 0;

   public:
    ~Memory() { free(allocated); }
    bool counts() const { return !base; }  // nothing can be written yet
    float* take(Size floats) {
        float* p = base ? base + used : nullptr;
        used += round_up(floats, 16);
        return p;
    }
    double* take_doubles(Size count) { return (double*)take(2 * count); }
    template <class Space, class Plan> Space* take_spaces(Size count, const Plan& plan) {  // plan(space) takes the pieces of one
        Space* spaces = (Space*)take(count * sizeof(Space) / sizeof(float));
        for (Size n = 0; n < count; ++n) {
            Space space;
            plan(space);
            if (base) spaces[n] = space;
        }
        return spaces;
    }
    template <class Plan> bool place(const Plan& plan) {  // plan() takes every piece; false where there is not enough
        plan();
        const Size counted = used, bytes = most(used, 16) * sizeof(float), page = bytes < 2 * LARGE_PAGE ? 64 : LARGE_PAGE;
#if defined(__SANITIZE_ADDRESS__)  // sees what is read right behind the end, so no room is left there
        allocated = aligned_alloc(page, round_up(bytes, page));
#else  // aligned by hand: glibc below 2.38 seldom uses again what aligned_alloc gave (its bug 14581), so kept results hold it
        allocated = malloc(round_up(bytes, page) + page);
#endif
        if (allocated) base = (float*)round_up((Size)allocated, page), take_large_pages(base, round_up(bytes, page));
        used = 0;
        if (base) plan();
        return base && used == counted;  // a plan that asks whether its pieces are null counts less than it takes
    }
};

// task(context, space, 0) ... as `run`, each with a Space of its own, whose memory space.plan(context, memory) takes
template <class Space, class Context>
static Size run_with_space(Size tasks, Context& context, void (*task)(Context&, Space&, Size)) {
    struct Call {
        Context& context;
        void (*task)(Context&, Space&, Size);
        bool failed;
        static void one(Call& call, Size n) {
            Space space;
            Memory memory;
            if (memory.place([&] { space.plan(call.context, memory); })) call.task(call.context, space, n);
            else __atomic_store_n(&call.failed, true, __ATOMIC_RELAXED);
        }
    } call = {context, task, false};
    run(tasks, call, Call::one);
    return call.failed ? NO_MEMORY : DONE;
}

}  // namespace
}  // namespace ISA
