// Kernels of clusters, whose planted faults are macros' arguments.
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

// out[cluster] = sum of x over the cluster: rank 0 reads the sums of the others, mapped.
template <bool before, bool after> __device__ void sum(const float* x, float* out) {
    auto cluster = cg::this_cluster();
    __shared__ float total;
    if (threadIdx.x == 0) {
        total = 0;
        for (int n = 0; n < 4; ++n) total += x[4 * blockIdx.x + n];
    }
    if (before) cluster.sync();
    else __syncthreads();
    if (cluster.block_rank() == 0 && threadIdx.x == 0) {
        float all = 0;
        for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) all += *cluster.map_shared_rank(&total, rank);
        out[blockIdx.x / cluster.num_blocks()] = all;
    }
    if (after) cluster.sync();
}
extern "C" __global__ void __cluster_dims__(4) sums(const float* x, float* out) { sum<true, true>(x, out); }
extern "C" __global__ void __cluster_dims__(4) sums_too_early(const float* x, float* out) { sum<false, true>(x, out); }
extern "C" __global__ void __cluster_dims__(4) sums_of_ended(const float* x, float* out) { sum<true, false>(x, out); }

// Each block hands its value to the next one by a store, and counts all threads of the cluster by atomics in rank 1's memory.
template <bool waits> __device__ void pass(const int* x, int* out, int* count) {
    auto cluster = cg::this_cluster();
    __shared__ int from, arrivals;
    const unsigned rank = cluster.block_rank(), size = cluster.num_blocks();
    if (threadIdx.x == 0) from = -1, arrivals = 0;
    cluster.sync();
    atomicAdd(cluster.map_shared_rank(&arrivals, 1), 1);
    if (threadIdx.x == 0) *cluster.map_shared_rank(&from, (rank + 1) % size) = x[cg::this_grid().block_rank()];
    cluster.barrier_arrive();
    if (waits) cluster.barrier_wait();
    if (threadIdx.x == 0) out[cg::this_grid().block_rank()] = from;
    if (threadIdx.x == 0 && rank == 1) *count = arrivals;
    if (!waits) cluster.barrier_wait();
    cluster.sync();
}
extern "C" __global__ void passed(const int* x, int* out, int* count) { pass<true>(x, out, count); }
extern "C" __global__ void passed_unwaited(const int* x, int* out, int* count) { pass<false>(x, out, count); }

// Rank 1 writes to rank 0's memory and arrives at its mbarrier, on which rank 0 waits.
template <bool arrives_first> __device__ void signal(int* out) {
    __shared__ int value;
    __shared__ alignas(8) unsigned long long barrier;
    auto cluster = cg::this_cluster();
    const unsigned here = (unsigned)__cvta_generic_to_shared(&barrier), data = (unsigned)__cvta_generic_to_shared(&value);
    if (cluster.block_rank() == 0 && threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here));
    cluster.sync();
    if (threadIdx.x == 0 && cluster.block_rank() == 1) {
        unsigned there, to;
        asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
        asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(to) : "r"(data));
        if (!arrives_first) asm volatile("st.shared::cluster.u32 [%0], 7;" ::"r"(to) : "memory");
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
        if (arrives_first) asm volatile("st.shared::cluster.u32 [%0], 7;" ::"r"(to) : "memory");
    }
    if (cluster.block_rank() == 0) {
        unsigned done = 0;
        while (!done)
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                : "=r"(done)
                : "r"(here)
                : "memory");
        if (!arrives_first || threadIdx.x == 0) out[threadIdx.x] = value;
    }
    cluster.sync();
}
extern "C" __global__ void __cluster_dims__(2) signalled(int* out) { signal<false>(out); }
extern "C" __global__ void __cluster_dims__(2) signalled_too_early(int* out) { signal<true>(out); }
