// A stand-in for CUDA's driver library, libcuda.so, under a host program that loads modules and launches their kernels by the
// driver's API: modules are PTX text, and each launch goes to ptx/cuda.py, which applies CUDA's limits and emulates it. It has the
// entry points of such a program and no others. Without an emulator launches do nothing, which times the host.
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <string>

#include "emulator.h"

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_SUPPORTED = 801
};

const Emulator* emulator = nullptr;
thread_local void* context = nullptr;
int primary[8];  // by device: its address is the context
std::mutex mutex;

// Modules and functions are never unloaded: ptx/cuda.py knows a kernel by its address. Numbers of functions are never used again.
struct Function {
    std::string name, title;
    void* context;  // in which it was loaded
    Kernel kernel;
};
std::set<std::string>& modules() {
    static std::set<std::string> all;
    return all;
}
std::deque<Function>& functions() {
    static std::deque<Function> all;
    return all;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT void ptx_connect(const Emulator* with) { emulator = with; }

EXPORT int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: *name = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case 9: *name = "CUDA_ERROR_INVALID_CONFIGURATION"; break;
        case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case NO_BINARY: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
        case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case 701: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
        case 719: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        case NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
EXPORT int cuCtxGetCurrent(void** current) { return *current = context, SUCCESS; }
EXPORT int cuCtxSetCurrent(void* current) { return context = current, SUCCESS; }
EXPORT int cuDevicePrimaryCtxRetain(void** retained, int device) {
    if (device < 0 || device >= 8) return INVALID_DEVICE;
    return *retained = &primary[device], SUCCESS;
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
    if (!context) return INVALID_CONTEXT;
    const char* text = (const char*)image;
    if (!strncmp(text, "\177ELF", 4)) {  // machine code: a launch that is emulated needs its PTX
        if (emulator) return NO_BINARY;
        text = ".entry";
    }
    if (!strstr(text, ".entry")) return NO_BINARY;
    const std::lock_guard<std::mutex> lock(mutex);
    *module = (void*)&*modules().insert(text).first;
    return SUCCESS;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    const std::string& text = *(const std::string*)module;
    if (emulator && text.find(std::string(".entry ") + name + "(") == std::string::npos) return NOT_FOUND;
    const std::lock_guard<std::mutex> lock(mutex);
    functions().push_back({name, std::string(name) + "()", context, {}});
    Function& made = functions().back();
    made.kernel = {text.c_str(), made.name.c_str(), made.title.c_str()};
    *function = &made;
    return SUCCESS;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    return emulator ? emulator->set(&((Function*)function)->kernel, attribute, value) : SUCCESS;
}
EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                          unsigned block_z, unsigned shared, void*, void** arguments, void** packed) {
    if (!context) return INVALID_CONTEXT;
    if (packed) return NOT_SUPPORTED;
    if (context != ((Function*)function)->context) return INVALID_HANDLE;
    if (!emulator) return SUCCESS;
    const Launch launch = {
        &((Function*)function)->kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, arguments};
    return emulator->launch(&launch);
}

}  // extern "C"
