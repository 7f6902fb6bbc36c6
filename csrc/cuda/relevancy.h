// What the kernels of relevancy_attention take, for short and for long sequences.
#pragma once

#include "attention.h"

namespace vlattn {

// A weight of each row (B,N), strides in elements; null: 1.
struct RowWeight {
    const float* data;
    int64_t stride_b, stride_n;
    FIELDS(data, stride_b, stride_n)

    __device__ float at(int64_t b, int64_t n) const { return data ? data[b * stride_b + n * stride_n] : 1.0f; }
};

struct Relevancy {
    DType dtype;
    int64_t B, H, key_heads, N, M, T;
    int D, DV;
    StridedTensor query, key, value;  // (B,H,N,D), (B,key_heads,M,D), (B,key_heads,M,DV); value absent where nothing needs it
    Masks masks;
    float scale;
    StridedTensor out;  // (B,H,N,DV)
    float* lse;  // (B,H,N), natural; null in a backward pass: recomputed
    // backward
    bool by_gradient;
    StridedTensor grad_out;  // (B,H,N,DV)
    StridedTensor grad_query, grad_key, grad_value;  // absent: not needed
    const float* relevancy;  // r (B,T,N), contiguous; null: only gradients are needed
    RowWeight residual_weight, attention_weight;  // a, b
    bool residual;  // whether r_abar has its first term
    float* r_abar;  // (B,key_heads,T,M): the share of each key head, and the first term in that of the first
    float* row_sums;  // (B,H,N), of A or max(0, A * dA); null: not needed
    float* rows;  // (3,B,H,N), for the kernel alone: SHIFT, WEIGHT, DELTA
    float* sums;  // of dq, and
    uint32_t* turns;  // whose turn it is to add: relevancy_attention_long.cu alone
    FIELDS(dtype, B, H, key_heads, N, M, T, D, DV, query, key, value, masks, scale, out, lse, by_gradient, grad_out, grad_query,
           grad_key, grad_value, relevancy, residual_weight, attention_weight, residual, r_abar, row_sums, rows, sums, turns)
};

}  // namespace vlattn
