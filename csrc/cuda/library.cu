// What the library has once, whatever its operators are.
#include "device.h"

// The versions of CUDA that the library is built with and that the driver runs, as 1000 major + 10 minor; 0: none.
EXPORT void vlattn_cuda_versions(int* built, int* driver) {
    *built = CUDART_VERSION;
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}
