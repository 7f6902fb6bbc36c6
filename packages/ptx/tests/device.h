// What the kernels of these tests use of CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace small {

constexpr unsigned ALL_LANES = 0xffffffffu;

// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

// 2^x in one instruction. Results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x in one instruction for x in [1, 2^126].
__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The status of a launch with `shared` bytes of dynamic shared memory a block, for which it asks; without blocks nothing runs.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream, Params... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    if (shared > 48 * 1024) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (status != cudaSuccess) return status;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace small

#define EXPORT extern "C" __attribute__((visibility("default")))
