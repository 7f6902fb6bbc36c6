// Threads for a library under ThreadSanitizer, which does not see how those of OpenMP, torch's, wait for each other.
#include <stdint.h>

#include <thread>
#include <vector>

static const int COUNT = 3;

extern "C" __attribute__((visibility("default"))) int32_t own_get_num_threads(uint32_t* count) {
    *count = COUNT;
    return 0;
}

// As torch_parallel_for: contiguous ranges, one per thread, the first on this one
extern "C" __attribute__((visibility("default"))) int32_t own_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                                                           void (*run)(int64_t, int64_t, void*), void* context) {
    int64_t share = (end - begin + COUNT - 1) / COUNT;
    if (share < grain) share = grain;
    std::vector<std::thread> threads;
    for (int64_t from = begin + share; from < end; from += share)
        threads.emplace_back(run, from, from + share < end ? from + share : end, context);
    if (begin < end) run(begin, begin + share < end ? begin + share : end, context);
    for (std::thread& thread : threads) thread.join();
    return 0;
}
