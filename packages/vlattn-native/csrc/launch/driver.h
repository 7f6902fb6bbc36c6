// The entry points of CUDA's driver that a launch needs, found in libcuda at run time: a machine without a GPU loads this library.
#pragma once
#include <dlfcn.h>

#include <atomic>
#include <string>

struct Driver {
    using Result = int;
    using Handle = void*;  // of a context, module, function or stream
    static constexpr int MAX_DYNAMIC_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    static constexpr int CARVEOUT = 9;  // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
    static constexpr int UNASKED = 48 * 1024;  // bytes of shared memory that a block has without the attribute
    static constexpr int DEVICES = 64, INVALID_DEVICE = 101;

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

    // What `use` returns, called in the device's primary context, which is torch's. The thread then has the context that it had,
    // unless that was none: autograd's threads begin without.
    template <class Use> Result within(int device, Use use) const {
        static std::atomic<Handle> primaries[DEVICES];
        if (device >= DEVICES) return INVALID_DEVICE;
        std::atomic<Handle>& primary = primaries[device];
        Handle before = nullptr, context = primary;
        if (const Result result = cuCtxGetCurrent(&before)) return result;
        if (!context) {
            if (const Result result = cuDevicePrimaryCtxRetain(&context, device)) return result;
            primary = context;
        }
        if (before == context) return use();
        if (const Result result = cuCtxSetCurrent(context)) return result;
        const Result result = use(), left = before ? cuCtxSetCurrent(before) : 0;
        return result ? result : left;
    }

    // With all of an SM's shared memory for its blocks: tiles were chosen for so many programs an SM
    Result load(const char* image, const char* name, int shared, Handle* function) const {
        Handle module = nullptr;
        if (const Result result = cuModuleLoadData(&module, image)) return result;
        if (const Result result = cuModuleGetFunction(function, module, name)) return result;
        if (shared > UNASKED)
            if (const Result result = cuFuncSetAttribute(*function, MAX_DYNAMIC_SHARED, shared)) return result;
        return shared > 0 ? cuFuncSetAttribute(*function, CARVEOUT, 100) : 0;
    }
};
