// congruence_loss of each sample, and its gradients.
#pragma once

#include "attention.h"

namespace vlattn {

struct Congruence {
    enum Kind { CACR, IAIS_SINGULAR, IAIS_DISTRIBUTED };
    DType dtype;
    Kind kind;
    bool text, image;  // the directions
    int64_t B, H, L, V;
    int D;
    Rows query[4], key[4];              // of the blocks LL, LV, VL, VV: (B,H,L or V,D)
    const uint8_t *text_mask, *image_mask;  // (B,L), (B,V), contiguous; null: every token is real
    float scale;
    float* loss;  // (B); forward only
    // backward
    const float* grad_loss;       // (B)
    Rows grad_query[4], grad_key[4];  // absent: a block without a gradient
    float* workspace;
};

int64_t congruence_loss_workspace(const Congruence& call, bool backward);  // in floats
cudaError_t congruence_loss_forward(const Congruence& call, cudaStream_t stream);
cudaError_t congruence_loss_backward(const Congruence& call, cudaStream_t stream);

}  // namespace vlattn
