// Attention over short sequences, its backward pass and r Abar; Abar = mean_h relu(A * dA) or mean_h A. Packed by
// vlattn_fast/backends/cuda/relevancy_attention.py.
#pragma once

#include "attention.h"

namespace vlattn {

// A weight of each row (B,N), strides in elements; null: 1.
struct RowWeight {
    const float* data;
    int64_t batch, row;
};

struct Relevancy {
    DType dtype;
    int64_t B, H, key_heads, N, M, T;
    int D, DV, parts;        // parts: ranges of key heads into which a backward pass cuts a sample
    StridedTensor query, key, value;  // (B,H,N,D), (B,key_heads,M,D), (B,key_heads,M,DV); value absent where nothing needs it
    Masks masks;
    float scale;
    StridedTensor out;    // (B,H,N,DV)
    float* lse;  // (B,H,N), natural; null in a backward pass: recomputed
    // backward
    bool by_gradient, row_normalize;
    StridedTensor grad_out;                                // (B,H,N,DV)
    StridedTensor grad_query, grad_key, grad_value;        // absent: not needed
    const float* relevancy;                       // r (B,T,N), contiguous; null: only gradients are needed
    RowWeight residual_weight, attention_weight;  // a, b
    bool residual;                                // r_abar = r * a + (r * b) Abar, or without the first term
    float* r_abar;                                // (B,T,M)
    float *rows, *partial;                        // (4,B,H,N) and (parts-1,B,T,M), for the kernels alone
};

}  // namespace vlattn
