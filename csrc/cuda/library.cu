// What the library has once, whatever its operators are.
#include "device.h"

namespace vlattn {

#ifdef VLATTN_HOST
const char* error_string(cudaError_t status) { return emulation::error_string(status); }
#else
const char* error_string(cudaError_t status) { return cudaGetErrorString(status); }
#endif

}  // namespace vlattn
