// What the attention kernels share: the layout of tensors and masks.
#pragma once

#include "device.h"

namespace vlattn {

constexpr float LARGEST_LOGIT = 3.4028234e38f;

// A tensor (B,H,rows,columns), strides in elements, columns contiguous; data is null where the tensor is absent.
struct StridedTensor {
    void* data;
    int64_t stride_b, stride_h, stride_n;
    FIELDS(data, stride_b, stride_h, stride_n)

    template <class T> __device__ T* at(int64_t b, int64_t h) const {
        return static_cast<T*>(data) + b * stride_b + h * stride_h;
    }
};

// attn_mask, bool or float32, expanded to (B,H,N,M), strides in elements (0 where it was broadcast); key_mask (B,M), contiguous.
struct Masks {
    enum Kind : int32_t { NONE, BOOL, ADDED };
    Kind kind;
    bool causal;
    const void* pairs;
    int64_t stride_b, stride_h, stride_n, stride_m;
    const uint8_t* keys;
    int64_t num_keys;
    FIELDS(kind, causal, pairs, stride_b, stride_h, stride_n, stride_m, keys, num_keys)

    // Of a sample, which of its keys are real; null: all.
    __device__ __forceinline__ const uint8_t* real(int64_t b) const { return keys ? keys + b * num_keys : nullptr; }

    // The base-2 logit with the masks applied: -inf where query i does not see key j.
    __device__ __forceinline__ float apply(float log2_logit, int64_t b, int64_t h, int64_t i, int64_t j) const {
        if (causal && j > i) return -INFINITY;
        if (keys && !real(b)[j]) return -INFINITY;
        return kind == NONE ? log2_logit : with_pair(log2_logit, b * stride_b + h * stride_h + i * stride_n + j * stride_m);
    }

    // With attn_mask's element `at` applied. Only -inf in a float mask masks a pair; a finite value is data, however large, and NaN
    // stays NaN.
    __device__ __forceinline__ float with_pair(float log2_logit, int64_t at) const {
        const float masked = -INFINITY;
        if (kind == BOOL) return static_cast<const uint8_t*>(pairs)[at] ? log2_logit : masked;
        const float added = static_cast<const float*>(pairs)[at];
        if (added == masked) return masked;
        // a value may be finite in base e and not in base 2: it is clamped to the largest number
        log2_logit += added * LOG2_E;
        if (log2_logit < -LARGEST_LOGIT) return -LARGEST_LOGIT;
        return added > 2.35e38f && added < INFINITY && log2_logit == log2_logit ? LARGEST_LOGIT : log2_logit;
    }
};

// The natural log-sum-exp from a row's largest base-2 logit and the sum of the powers less it; -inf for a fully masked row. A NaN
// among the logits is in the sum alone: fmaxf drops it.
__device__ __forceinline__ float natural_lse(float top, float total) {
    if (total == 0.0f) return -INFINITY;
    return fabsf(top) >= LARGEST_LOGIT && total == total ? top : (top + log2f(total)) * LN_2;
}

// Whether rounding a natural log-sum-exp shows in exp(logit - lse), because it is so far from 0. Float masks of -1e5 or of the
// lowest number make such rows. Their probabilities come from the largest logit and the sum. The limit is lower for our own lse
// than for the caller's, which may count keys that are not here.
constexpr float OWN_LSE = 4096.0f, CALLER_LSE = 16384.0f;
__device__ __forceinline__ bool is_coarse(float lse, float limit) { return fabsf(lse) >= limit && fabsf(lse) < INFINITY; }

}  // namespace vlattn
