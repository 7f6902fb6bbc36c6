// congruence_loss of each sample, and its gradients. Packed by vlattn_fast/backends/cuda/congruence_loss.py.
#pragma once

#include "attention.h"

namespace vlattn {

struct Congruence {
    enum Kind : int32_t { CACR, IAIS_SINGULAR, IAIS_DISTRIBUTED };
    DType dtype;
    int64_t B, H, L, V;
    int D, regions;  // regions: of Sample::Region, those that this kind and pass keep
    Kind kind;
    bool text, image;                   // the directions
    StridedTensor query[4], key[4];              // of the blocks LL, LV, VL, VV: (B,H,L or V,D)
    const uint8_t *text_mask, *image_mask;  // (B,L), (B,V), contiguous; null: every token is real
    float scale;
    float* loss;  // (B); forward only
    // backward
    const float* grad_loss;       // (B)
    StridedTensor grad_query[4], grad_key[4];  // absent: a block without a gradient
    float* maps;                      // (B,regions,L+V,L+V), for the kernel alone
};

}  // namespace vlattn
