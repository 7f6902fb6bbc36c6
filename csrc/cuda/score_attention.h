// score_attention with exact additive scores: s_ij = sum_a u_a tanh(x_ia + y_ja). Packed by vlattn_fast/backends/cuda/score_attention.py.
#pragma once

#include "attention.h"

namespace vlattn {

struct ScoreAttention {
    DType dtype;
    int64_t B, H, key_heads, value_heads, N, M;
    int A, DV;  // hidden units, value size
    StridedTensor query, key, value;  // x (B,H,N,A), y (B,key_heads,M,A), (B,value_heads,M,DV)
    const void* vector;  // u (H,A), contiguous
    Masks masks;
    float scale;
    StridedTensor out;  // (B,H,N,DV)
    float* lse;  // (B,H,N), natural
    // backward
    StridedTensor grad_out;  // (B,H,N,DV)
    const float* grad_lse;  // (B,H,N), contiguous; null: zero
    StridedTensor grad_query, grad_key, grad_value;  // heads: H, and as many key heads as max(key_heads, value_heads) for both
    bool wide_grad_key, wide_grad_value;  // grad_key, grad_value in float32, to be summed over heads outside
    int64_t ranges;  // into how many the keys of a head are divided
    float* grad_vector;  // (B,H,ceil(M / 16),A), to be summed over the first and third
    // for the kernels alone
    float* rows;  // (3,B,H,N): delta, norm and shift of each row
    float* sums;  // (B,H,ranges,N,A), N and A made even: of the query's gradient; zeros
    float* parts;  // (B,key heads of grad_key,M,A), where query heads share a key
};

}  // namespace vlattn
