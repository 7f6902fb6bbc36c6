// Small kernels for test_cuda.py: many have a wrong twin, of which the emulator must say what is wrong.
#include "device.h"

namespace small {
namespace {

// Sixteen bytes from global to shared memory in the background, both addresses multiples of 16: the first `bytes` of them, then
// zeros. Copies since the last commit_copies are a group. This thread has those of all groups but the last PENDING after
// wait_for_copies, the others after a barrier besides.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(shared), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// sums[b] = the sum of the block's numbers; without BARRIER a thread may read what another has not written yet.
template <bool BARRIER> __global__ void block_sum(const float* x, float* sums) {
    float* shared = static_cast<float*>(shared_memory());
    shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if constexpr (BARRIER) __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

// Every lane takes its right neighbour's number out of shared memory.
template <bool BARRIER> __global__ void neighbours(float* x) {
    float* shared = static_cast<float*>(shared_memory());
    shared[threadIdx.x] = x[threadIdx.x];
    if constexpr (BARRIER) __syncwarp();
    x[threadIdx.x] = shared[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// The same with a shuffle for a barrier: the lanes meet, and nothing says that they know what the others wrote.
__global__ void neighbours_by_shuffle(float* x) {
    float* shared = static_cast<float*>(shared_memory());
    shared[threadIdx.x] = x[threadIdx.x];
    const float zero = 0.0f * __shfl_xor_sync(ALL_LANES, x[threadIdx.x], 1);
    x[threadIdx.x] = shared[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32] + zero;
}

// y = x through two tiles in shared memory: while one is read, the next is on its way. A thread reads what others copied.
enum Flaw { NONE, NO_WAIT, WRONG_GROUP, NO_COMMIT, NO_BARRIER, NO_BARRIER_AFTER };
template <Flaw FLAW> __global__ void through_tiles(const float* x, float* y, int tiles) {
    float* shared = static_cast<float*>(shared_memory());
    const int size = 4 * blockDim.x;
    const auto copy = [&](int tile) {
        if (tile < tiles) copy_async(shared + tile % 2 * size + 4 * threadIdx.x, x + tile * size + 4 * threadIdx.x, 16);
        if (FLAW != NO_COMMIT) commit_copies();
    };
    copy(0);
    for (int tile = 0; tile < tiles; ++tile) {
        copy(tile + 1);
        if (FLAW != NO_WAIT) wait_for_copies<FLAW == WRONG_GROUP ? 2 : 1>();
        if (FLAW != NO_BARRIER) __syncthreads();
        for (int i = threadIdx.x; i < size; i += blockDim.x) y[tile * size + i] = shared[tile % 2 * size + i];
        if (FLAW != NO_BARRIER_AFTER) __syncthreads();
    }
}

// The first `bytes` of every 16 of x.
__global__ void copy_some(const float* x, float* y, int bytes) {
    float* shared = static_cast<float*>(shared_memory());
    copy_async(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, bytes);
    commit_copies();
    wait_for_copies<0>();
    for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}

__global__ void barrier_for_some(int threads) {
    if (threadIdx.x < static_cast<unsigned>(threads)) __syncthreads();
}

__global__ void __launch_bounds__(64) at_most_64(int* x) { x[threadIdx.x] = threadIdx.x; }

__global__ void with_static(int* x) {
    __shared__ int some[1024];
    some[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = some[31 - threadIdx.x];
}

__global__ void shuffle_for_some(int* x) {
    if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x), 0);
}

// order[n] = the n-th block to run, where blocks run one after the other.
__global__ void note_order(int* order, int* next) {
    if (threadIdx.x == 0) order[(*next)++] = blockIdx.x;
}

__global__ void approximate(const float* x, float* powers, float* reciprocals) {
    powers[threadIdx.x] = fast_exp2(x[threadIdx.x]);
    reciprocals[threadIdx.x] = fast_reciprocal(x[threadIdx.x]);
}

__global__ void shuffles(int* x) {
    const int lane = threadIdx.x;
    x[lane] = __shfl_xor_sync(ALL_LANES, lane, 5) + 100 * __shfl_sync(ALL_LANES, lane, (lane * 7 + 3) % 32);
}

struct Three {
    int8_t x[3];
};

// x[n] of the n-th thread of the grid = its number, and 7 + 1 + 2 + 3
__global__ void number(int* x, Three three, int64_t more) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned n = block * blockDim.x * blockDim.y * blockDim.z + thread;
    x[n] = n + static_cast<int>(more) + three.x[0] + three.x[1] + three.x[2];
}

void not_a_kernel(int) {}

// What a block finds in shared memory.
__global__ void uninitialised(float* x) {
    float* shared = static_cast<float*>(shared_memory());
    x[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
    shared[threadIdx.x] = 1.0f;
}

__global__ void write_shared(int at) {
    float* shared = static_cast<float*>(shared_memory());
    if (threadIdx.x == 0) shared[at] = 1.0f;
}

__global__ void write_global(float* x, int at) {
    if (threadIdx.x == 0) x[at] = 1.0f;
}

}  // namespace
}  // namespace small

using namespace small;

#pragma GCC visibility push(default)
extern "C" {
int run_block_sum(const float* x, float* sums, int blocks, int threads, bool barrier) {
    auto kernel = barrier ? block_sum<true> : block_sum<false>;
    return launch(kernel, blocks, threads, threads * sizeof(float), cudaStream_t(), x, sums);
}
int run_neighbours(float* x, bool barrier) {
    return launch(barrier ? neighbours<true> : neighbours<false>, 1, 64, 64 * sizeof(float), cudaStream_t(), x);
}
int run_neighbours_by_shuffle(float* x) { return launch(neighbours_by_shuffle, 1, 64, 64 * sizeof(float), cudaStream_t(), x); }
int run_through_tiles(const float* x, float* y, int flaw) {
    void (*const kernels[])(const float*, float*, int) = {through_tiles<NONE>,        through_tiles<NO_WAIT>,
                                                          through_tiles<WRONG_GROUP>, through_tiles<NO_COMMIT>,
                                                          through_tiles<NO_BARRIER>,  through_tiles<NO_BARRIER_AFTER>};
    return launch(kernels[flaw], 1, 64, 2 * 4 * 64 * sizeof(float), cudaStream_t(), x, y, 4);
}
int run_copy_some(const float* x, float* y, int bytes) {
    return launch(copy_some, 1, 32, 4 * 32 * sizeof(float), cudaStream_t(), x, y, bytes);
}
int run_barrier_for_some(int threads) { return launch(barrier_for_some, 1, 64, 0, cudaStream_t(), threads); }
int run_shuffle_for_some(int* x) { return launch(shuffle_for_some, 1, 64, 0, cudaStream_t(), x); }
int run_at_most_64(int* x, int threads) { return launch(at_most_64, 1, threads, 0, cudaStream_t(), x); }
int run_with_static(int* x, int64_t shared) { return launch(with_static, 1, 32, shared, cudaStream_t(), x); }
// as kernel<<<...>>> launches, with three dimensions
int run_grid(int* x, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz) {
    number<<<dim3(gx, gy, gz), dim3(bx, by, bz)>>>(x, Three{{1, 2, 3}}, 7);
    return 0;
}
int run_unasked(int64_t shared) {
    void (*kernel)(int) = barrier_for_some;
    cudaLaunchConfig_t config = {};
    config.gridDim = config.blockDim = dim3(1);
    config.dynamicSmemBytes = shared;
    return cudaLaunchKernelEx(&config, kernel, 0);
}
int run_cluster() {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = config.blockDim = dim3(1);
    config.attrs = &cluster;
    config.numAttrs = 1;
    void (*kernel)(int) = barrier_for_some;
    return cudaLaunchKernelEx(&config, kernel, 0);
}
int run_no_kernel() {
    void (*function)(int) = not_a_kernel;
    cudaLaunchConfig_t config = {};
    config.gridDim = config.blockDim = dim3(1);
    return cudaLaunchKernelEx(&config, function, 0);
}
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
int run_note_order(int* order, int* next, int blocks) { return launch(note_order, blocks, 32, 0, cudaStream_t(), order, next); }
int run_approximate(const float* x, float* powers, float* reciprocals, int threads) {
    return launch(approximate, 1, threads, 0, cudaStream_t(), x, powers, reciprocals);
}
int run_shuffles(int* x) { return launch(shuffles, 1, 32, 0, cudaStream_t(), x); }
int run_uninitialised(float* x) { return launch(uninitialised, 2, 32, 32 * sizeof(float), cudaStream_t(), x); }
int run_write_shared(int at) { return launch(write_shared, 1, 32, 32 * sizeof(float), cudaStream_t(), at); }
int run_write_global(float* x, int at) { return launch(write_global, 1, 32, 0, cudaStream_t(), x, at); }
int run_empty(int64_t blocks, int threads, int64_t shared) {
    return launch(barrier_for_some, blocks, threads, shared, cudaStream_t(), 0);
}
}
