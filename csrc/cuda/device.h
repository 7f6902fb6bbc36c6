// What the kernels use of CUDA, and the few instructions that C++ has no name for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../layout.h"

namespace vlattn {

enum class DType : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

// Calls use(T(), width) with the type of that name and the width of tiles for `size` columns, 64 or 128, as a constant.
template <class Use> cudaError_t with_shape(DType dtype, int64_t size, Use use) {
    const std::integral_constant<int, 64> narrow;
    const std::integral_constant<int, 128> wide;
    const auto with_width = [&](auto type) { return size <= 64 ? use(type, narrow) : use(type, wide); };
    if (dtype == DType::FLOAT16) return with_width(__half());
    if (dtype == DType::BFLOAT16) return with_width(__nv_bfloat16());
    return with_width(float());
}

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

// 2^x in one instruction, to about 2 ulp. Results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x in one instruction for x in [1, 2^126], at most an ulp off.
__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh x in one instruction, to 2^-11 of it.
__device__ __forceinline__ float fast_tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Launches `kernel`, unless it has no blocks, with `shared` bytes of dynamic shared memory per block, and all of an SM's for its
// blocks. Returns the status of this launch: an earlier error of other code is neither reported nor cleared.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream, Params... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    const auto set = [&](cudaFuncAttribute attribute, int value) { return cudaFuncSetAttribute(kernel, attribute, value); };
    cudaError_t status = cudaSuccess;
    if (shared > 48 * 1024) status = set(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (shared > 0 && status == cudaSuccess) status = set(cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (status != cudaSuccess) return status;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__host__ __device__ constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
__host__ __device__ constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

}  // namespace vlattn

// extern "C" const char* vlattn_cuda_<name>(call, stream): vlattn::name(const Type&, cudaStream_t) for Python, which packs Type's
// fields. The result is null, or says what went wrong. vlattn_cuda_<name>_fields(text, size) writes where Type has them.
#define EXPORT extern "C" __attribute__((visibility("default")))
#define OPERATOR(name, Type)                                                              \
    EXPORT const char* vlattn_cuda_##name(const void* packed, void* stream) {             \
        vlattn::Type call;                                                                \
        memcpy(&call, packed, sizeof(call));                                              \
        const cudaError_t status = vlattn::name(call, static_cast<cudaStream_t>(stream)); \
        return status == cudaSuccess ? nullptr : cudaGetErrorString(status);              \
    }                                                                                     \
    EXPORT void vlattn_cuda_##name##_fields(char* text, int64_t size) { Layout<vlattn::Type>{text, size}.describe(); }
