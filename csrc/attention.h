// What the kernels of attention share: how they see tensors and masks.
#pragma once

#include "device.h"

namespace vlattn {

// A tensor (B,H,rows,columns), strides in elements, columns contiguous; data is null where the tensor is absent.
struct Rows {
    void* data;
    int64_t batch, head, row;

    template <class T>
    __device__ T* at(int64_t b, int64_t h) const {
        return static_cast<T*>(data) + b * batch + h * head;
    }
};

// attn_mask, bool or float32, expanded to (B,H,N,M), strides in elements (0 where it was broadcast); key_mask (B,M), contiguous.
struct Masks {
    enum Kind : int32_t { NONE, BOOL, ADDED };
    Kind kind;
    bool causal;
    const void* pairs;
    int64_t batch, head, row, column;
    const uint8_t* keys;
    int64_t num_keys;

    // A base-2 logit, and -inf where key j is hidden from query i. Of an added mask -inf alone hides: what is finite stays so.
    __device__ __forceinline__ float apply(float log2_logit, int64_t b, int64_t h, int64_t i, int64_t j) const {
        const float hidden = -INFINITY;
        if (causal && j > i) return hidden;
        if (keys && !keys[b * num_keys + j]) return hidden;
        if (kind == NONE) return log2_logit;
        const int64_t at = b * batch + h * head + i * row + j * column;
        if (kind == BOOL) return static_cast<const uint8_t*>(pairs)[at] ? log2_logit : hidden;
        const float added = static_cast<const float*>(pairs)[at];
        if (added == hidden) return hidden;
        log2_logit += fmaxf(added, -2.3e38f) * LOG2_E;
        return log2_logit < -3.4028234e38f ? -3.4028234e38f : log2_logit;
    }
};

}  // namespace vlattn
