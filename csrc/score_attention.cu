#include "score_attention.h"
namespace vlattn {
int64_t score_attention_blocks(int64_t M) { return divide_up(M, 64); }
int64_t score_attention_workspace(const ScoreAttention&, bool) { return 0; }
cudaError_t score_attention_forward(const ScoreAttention&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t score_attention_backward(const ScoreAttention&, cudaStream_t) { return cudaErrorNotSupported; }
}
