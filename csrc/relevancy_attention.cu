#include "relevancy_attention.h"
namespace vlattn {
int64_t relevancy_workspace(const Relevancy&) { return 0; }
cudaError_t relevancy_forward(const Relevancy&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t relevancy_backward(const Relevancy&, cudaStream_t) { return cudaErrorNotSupported; }
}
