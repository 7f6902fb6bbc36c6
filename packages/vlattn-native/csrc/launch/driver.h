// The entry points of CUDA's driver that a launch needs, found in libcuda at run time: a machine without a GPU loads this library.
#pragma once
#include <dlfcn.h>

#include <string>

struct Driver {
    using Result = int;
    using Handle = void*;  // of a context, module, function or stream
    static constexpr int MAX_DYNAMIC_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    static constexpr unsigned UNASKED = 48 * 1024;  // bytes of shared memory that a block has without the attribute

    Result (*cuGetErrorName)(Result, const char**) = nullptr;
    Result (*cuCtxGetCurrent)(Handle*) = nullptr;
    Result (*cuCtxSetCurrent)(Handle) = nullptr;
    Result (*cuDevicePrimaryCtxRetain)(Handle*, int) = nullptr;
    Result (*cuModuleLoadData)(Handle*, const void*) = nullptr;
    Result (*cuModuleGetFunction)(Handle*, Handle, const char*) = nullptr;
    Result (*cuFuncSetAttribute)(Handle, int, int) = nullptr;
    Result (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                             void**) = nullptr;

    // Empty, or why it cannot be used
    std::string open(const char* path) {
        void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library) return dlerror();
        const struct {
            const char* name;
            void* to;
        } all[] = {{"cuGetErrorName", &cuGetErrorName},         {"cuCtxGetCurrent", &cuCtxGetCurrent},
                   {"cuCtxSetCurrent", &cuCtxSetCurrent},       {"cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain},
                   {"cuModuleLoadData", &cuModuleLoadData},     {"cuModuleGetFunction", &cuModuleGetFunction},
                   {"cuFuncSetAttribute", &cuFuncSetAttribute}, {"cuLaunchKernel", &cuLaunchKernel}};
        for (const auto& one : all) {
            void* function = dlsym(library, one.name);
            if (!function) return std::string(path) + " has no " + one.name;
            *(void**)one.to = function;
        }
        return "";
    }

    std::string error(Result result) const {
        const char* name = nullptr;
        if (cuGetErrorName(result, &name) != 0 || !name) return "error " + std::to_string(result);
        return name;
    }

    // The device's primary context, which torch uses, on this thread if it has none: autograd's threads begin without.
    Result enter(int device) const {
        Handle context = nullptr;
        if (const Result result = cuCtxGetCurrent(&context)) return result;
        if (context) return 0;
        if (const Result result = cuDevicePrimaryCtxRetain(&context, device)) return result;
        return cuCtxSetCurrent(context);
    }

    Result load(const char* image, const char* name, int shared, Handle* function) const {
        Handle module = nullptr;
        if (const Result result = cuModuleLoadData(&module, image)) return result;
        if (const Result result = cuModuleGetFunction(function, module, name)) return result;
        return (unsigned)shared > UNASKED ? cuFuncSetAttribute(*function, MAX_DYNAMIC_SHARED, shared) : 0;
    }
};
