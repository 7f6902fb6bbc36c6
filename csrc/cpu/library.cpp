// What the library has once: torch's threads, and which instruction set this processor runs.
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
int32_t (*vlattn_parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) = nullptr;
int32_t (*vlattn_get_num_threads)(uint32_t*) = nullptr;
}

// torch_parallel_for and torch_get_num_threads of libtorch
EXPORT void vlattn_set_threads(decltype(vlattn_parallel_for) parallel_for, decltype(vlattn_get_num_threads) get_num_threads) {
    vlattn_parallel_for = parallel_for, vlattn_get_num_threads = get_num_threads;
}

// The names of the instruction sets that this processor runs and this library has, the widest first
EXPORT const char* vlattn_instruction_sets() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? "v4 v3 baseline" : v3 ? "v3 baseline" : "baseline";
#else
    return "baseline";
#endif
}
