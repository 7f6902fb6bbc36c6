// What the library has once, whatever its operators are.
#include "device.h"

namespace vlattn {

#ifdef VLATTN_HOST
const char* error_string(cudaError_t status) { return emulation::error_string(status); }
#else
const char* error_string(cudaError_t status) { return cudaGetErrorString(status); }
#endif

}  // namespace vlattn

// The versions of CUDA that the library is built with and that the driver runs, as 1000 major + 10 minor; 0: none.
EXPORT void vlattn_cuda_versions(int* built, int* driver) {
    *built = *driver = 0;
#ifndef VLATTN_HOST
    *built = CUDART_VERSION;
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
#endif
}
