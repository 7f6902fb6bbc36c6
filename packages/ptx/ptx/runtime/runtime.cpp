// A stand-in for CUDA's runtime library, under the host code that nvcc writes for a library of kernels, into which it is linked:
// what a launch needs (the kernel's PTX, out of the fat binary, grid, block, shared memory, parameters) goes to ptx/cuda.py, which
// applies CUDA's limits and emulates it. It has the entry points that this host code calls and no others: without one the link
// fails.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "emulator.h"

namespace {

const Emulator* emulator = nullptr;

// Host code names a kernel by the address of the host's function of that name. Handles are addresses of the values.
std::map<const void*, Kernel>& kernels() {
    static std::map<const void*, Kernel> all;
    return all;
}

const Kernel* find(const void* function_or_handle) {
    for (const auto& [function, kernel] : kernels())
        if (function == function_or_handle || &kernel == function_or_handle) return &kernel;
    return nullptr;
}

// What nvcc puts in front of all code of a source, and of each part of it.
struct Binary {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // of what follows
};
struct Part {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;  // of what follows
    uint8_t others[24];
    uint64_t flags;
};
constexpr uint32_t MAGIC = 0xba55ed50;
constexpr int PTX = 1;
constexpr uint64_t COMPRESSED = 0xa000;  // by LZ4 or Zstandard

const char* ptx_of(const char* binary) {
    const auto* all = reinterpret_cast<const Binary*>(binary);
    const char* at = binary + all->header_bytes;
    for (const char* end = at + all->bytes; all->magic == MAGIC && at < end;) {
        const auto* part = reinterpret_cast<const Part*>(at);
        const char* text = at + part->header_bytes;
        if (part->kind == PTX && !(part->flags & COMPRESSED) && memchr(text, 0, part->bytes)) return text;
        at = text + part->bytes;
    }
    return nullptr;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // of launches whose arguments are being computed

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
    const Kernel* kernel = find(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    if (!kernel->text) return cudaErrorNoKernelImageForDevice;
    if (!emulator) return cudaErrorNoDevice;
    const Launch launch = {kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments};
    return static_cast<cudaError_t>(emulator->launch(&launch));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_connect(const Emulator* with) { emulator = with; }

void** __cudaRegisterFatBinary(void* wrapper) {
    struct Wrapper {
        uint32_t magic, version;
        const char* binary;
    };
    return reinterpret_cast<void**>(const_cast<char*>(ptx_of(static_cast<Wrapper*>(wrapper)->binary)));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}  // the library is being unloaded
void __cudaRegisterFunction(void** text, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    const char* title = abi::__cxa_demangle(name, nullptr, nullptr, nullptr);  // kept as long as the library
    kernels()[function] = {reinterpret_cast<const char*>(text), name, title ? title : name};
}

// kernel<<<grid, block, shared, stream>>>(arguments): pushed before the arguments are computed, and popped after that.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    if (configurations.empty()) return cudaErrorMissingConfiguration;
    const Configuration& last = configurations.back();
    *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<cudaStream_t*>(stream) = last.stream;
    configurations.pop_back();
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* function) {
    const Kernel* kernel = find(function);
    *handle = reinterpret_cast<cudaKernel_t>(const_cast<Kernel*>(kernel));
    return kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
    return launch(kernel, grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    if (config->numAttrs > 0) return cudaErrorNotSupported;  // clusters and the like
    return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const Kernel* kernel = find(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    return emulator ? static_cast<cudaError_t>(emulator->set(kernel, attribute, value)) : cudaErrorNoDevice;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorMissingConfiguration: return "__global__ function call is not configured";
        case cudaErrorInvalidDeviceFunction: return "invalid device function";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
        case cudaErrorLaunchFailure: return "unspecified launch failure";
        case cudaErrorNotSupported: return "operation not supported";
        default: return "an error for which the stand-in for CUDA's runtime has no text";
    }
}

}  // extern "C"
