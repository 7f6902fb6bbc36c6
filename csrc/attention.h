// What the kernels of attention share: how they see tensors and masks.
#pragma once

#include "device.h"

namespace vlattn {

constexpr float LARGEST_LOGIT = 3.4028234e38f;

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
        // finite in base e, not always in base 2: such a value is held at the largest number
        log2_logit += added * LOG2_E;
        if (log2_logit < -LARGEST_LOGIT) return -LARGEST_LOGIT;
        return added > 2.35e38f && added < INFINITY ? LARGEST_LOGIT : log2_logit;
    }
};

// The natural log-sum-exp from a row's largest base-2 logit and the sum of the powers less it; -inf for a fully masked row.
__device__ __forceinline__ float natural_lse(float top, float total) {
    if (total == 0.0f) return -INFINITY;
    return fabsf(top) >= LARGEST_LOGIT ? top : (top + log2f(total)) * LN_2;
}

// Whether a natural log-sum-exp is so far from 0 that its rounding shows in exp(logit - lse), as in rows that a float mask of -1e5
// or of the lowest number covers: probabilities come from the largest logit and the sum there. The limit is lower for our own lse
// than for one that a caller gives, which may count keys that are not here.
constexpr float OWN_LSE = 4096.0f, GIVEN_LSE = 16384.0f;
__device__ __forceinline__ bool is_coarse(float lse, float limit) { return fabsf(lse) >= limit && fabsf(lse) < INFINITY; }

}  // namespace vlattn
