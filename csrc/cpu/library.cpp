// Parts that the library has once: torch's threads, and which instruction set this processor runs.
#include <stdint.h>
#include <string.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__x86_64__)
#include <time.h>
#if defined(VLATTN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if !defined(VLATTN_SETS)
#define VLATTN_SETS "baseline v3 v4 v4_bf16 bf16"
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
int32_t (*vlattn_parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) = nullptr;
int32_t (*vlattn_get_num_threads)(uint32_t*) = nullptr;
}

// torch_parallel_for and torch_get_num_threads of libtorch
EXPORT void vlattn_set_threads(decltype(vlattn_parallel_for) parallel_for, decltype(vlattn_get_num_threads) get_num_threads) {
    vlattn_parallel_for = parallel_for, vlattn_get_num_threads = get_num_threads;
}

// Torch before 2.10 has neither function. The same from the OpenMP runtime that it has loaded, and two functions of ATen
static struct OpenMP {
    void (*parallel)(void (*region)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
    int (*get_num_threads)();                                                               // of the team
    int (*get_thread_num)();
    int (*threads_of_torch)();
    bool (*in_parallel_region)();
} openmp;

static int32_t openmp_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*),
                                   void* context) {
    struct Region {
        int64_t begin, end, grain;
        void (*run)(int64_t, int64_t, void*);
        void* context;
        static void share(void* p) {
            const Region& region = *(Region*)p;
            const int64_t team = openmp.get_num_threads(), count = region.end - region.begin;
            const int64_t equal = (count + team - 1) / team, size = equal < region.grain ? region.grain : equal;
            const int64_t begin = region.begin + openmp.get_thread_num() * size, end = begin + size;
            if (begin < region.end) region.run(begin, end < region.end ? end : region.end, region.context);
        }
    } region = {begin, end, grain, run, context};
    // the first of the questions lets torch set the number of threads of this thread's teams
    if (openmp.threads_of_torch() > 1 && end - begin > grain && !openmp.in_parallel_region())
        openmp.parallel(Region::share, &region, 0, 0);
    else if (begin < end) run(begin, end, context);
    return 0;
}

static int32_t openmp_get_num_threads(uint32_t* count) {
    *count = openmp.threads_of_torch();
    return 0;
}

EXPORT void vlattn_set_openmp(decltype(OpenMP::parallel) parallel, decltype(OpenMP::get_num_threads) get_num_threads,
                              decltype(OpenMP::get_thread_num) get_thread_num,
                              decltype(OpenMP::threads_of_torch) threads_of_torch,
                              decltype(OpenMP::in_parallel_region) in_parallel_region) {
    openmp = {parallel, get_num_threads, get_thread_num, threads_of_torch, in_parallel_region};
    vlattn_set_threads(openmp_parallel_for, openmp_get_num_threads);
}

#if defined(VLATTN_AMX)
extern "C" bool vlattn_amx_is_right();
#endif
#if defined(VLATTN_TILES)
extern "C" {
__attribute__((visibility("default"))) uint64_t vlattn_tile_counts[4];  // of the stand-in (tiles.h)
}
#endif

// Whether the set `amx` runs: with the stand-in it does. Else the processor must have AMX-TILE, AMX-BF16 and what v4_bf16 asks, and
// Linux must give this process the permission for tiles, whose state is large; then a product by tiles must be right, since no
// test runs them on such a processor.
static bool runs_amx(const char* others) {
#if !defined(VLATTN_AMX)
    (void)others;
    return false;
#else
#if defined(VLATTN_TILES)
    (void)others;
#else
    unsigned a, b, c, d;
    if (!strstr(others, "v4_bf16") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & 1u << 22) || !(d & 1u << 24)) return false;  // AMX-BF16, AMX-TILE
    const long REQUEST_PERMISSION = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, which older headers lack
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILES) != 0) return false;
#endif
    return vlattn_amx_is_right();
#endif
}

#if defined(__x86_64__)
// Instructions a second of 12 chains of `loop`, which fill the pipes of every processor, over `count` steps: the most of eight tries,
// as others use the core, too
template <typename Loop> static double rate_of(Loop loop, int count) {
    double most = 0;
    for (int t = 0; t < 8; ++t) {
        timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        loop(count);
        clock_gettime(CLOCK_MONOTONIC, &end);
        const double rate = 12. * count / ((end.tv_sec - begin.tv_sec) + 1e-9 * (end.tv_nsec - begin.tv_nsec));
        most = rate > most ? rate : most;
    }
    return most;
}

// The registers of the chains: every instruction reads and writes its own. Those that they multiply hold zeros.
#define CHAINS(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define CLEAR(N) "vxorps %%ymm" #N ", %%ymm" #N ", %%ymm" #N "\n"
#define ADD_PRODUCTS_OF_8(N) "vfmadd231ps %%ymm12, %%ymm12, %%ymm" #N "\n"
#define ADD_PRODUCTS_OF_16(N) "vfmadd231ps %%zmm12, %%zmm12, %%zmm" #N "\n"
#define ADD_PAIRS(N) "vdpbf16ps %%zmm12, %%zmm12, %%zmm" #N "\n"
#define LOOP(STEP)                                                                                                        \
    [](int count) {                                                                                                       \
        asm volatile(CHAINS(CLEAR) CLEAR(12) "1:\n" CHAINS(STEP) "dec %0\njnz 1b\nvzeroupper\n"                           \
                     : "+r"(count)::"cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                       "xmm10", "xmm11", "xmm12");                                                                        \
    }
#endif

static double measured_rate_of_pairs() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16")) return 2 * rate_of(LOOP(ADD_PAIRS), 400) / rate_of(LOOP(ADD_PRODUCTS_OF_16), 400);
#endif
    return 0;
}

// How many times as many numbers a second this core multiplies by vdpbf16ps, in pairs of bfloat16, as by FMA in float32; 0 where it
// lacks the instruction. A Xeon of the Sapphire Rapids kind has 0.57, and converts to float32 sooner. Measured once in a process, in
// 50 microseconds; near 1 two processes may find either, and then round differently.
EXPORT double vlattn_rate_of_pairs() {
    static const double rate = measured_rate_of_pairs();
    return rate;
}

// Multiply-adds of float32 numbers a second that this core does by FMA, for the benchmarks; 0 where it lacks the instruction, and on
// other processors than x86
EXPORT double vlattn_multiply_adds_a_second() {
    double most = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("fma")) most = 8 * rate_of(LOOP(ADD_PRODUCTS_OF_8), 40000);
    const double wide = __builtin_cpu_supports("avx512f") ? 16 * rate_of(LOOP(ADD_PRODUCTS_OF_16), 40000) : 0;
    most = wide > most ? wide : most;
#endif
    return most;
}

// All that this processor runs but `amx`, the fastest first
static const char* common_sets() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool v4_bf16 = v4 && __builtin_cpu_supports("avx512bf16");
    if (v4_bf16) return vlattn_rate_of_pairs() > 1 ? "v4_bf16 v4 v3 baseline" : "v4 v4_bf16 v3 baseline";
    return v4 ? "v4 v3 baseline" : v3 ? "v3 baseline" : "baseline";
#else
    bool bf16 = false;
#if defined(__aarch64__) && defined(__linux__)
    bf16 = getauxval(AT_HWCAP2) & 1 << 14;  // HWCAP2_BF16, which older headers lack
#elif defined(__aarch64__) && defined(__APPLE__)
    int32_t has = 0;
    size_t size = sizeof has;
    bf16 = !sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) && has;
#endif
    return bf16 ? "bf16 baseline" : "baseline";
#endif
}

// The names of the instruction sets that this processor runs and this library has, the fastest first
EXPORT const char* vlattn_instruction_sets() {
    struct Names {
        char text[40] = "";
        Names() {
            const char* common = common_sets();
            if (runs_amx(common)) strcpy(text, "amx ");
            for (const char* name = common; *name; name += strspn(name, " ")) {
                char word[16] = " ";
                strcat(strncat(word, name, strcspn(name, " ")), " ");
                if (strstr(" " VLATTN_SETS " ", word)) strcat(text, word + 1);
                name += strcspn(name, " ");
            }
        }
    };
    static const Names names;
    return names.text;
}
