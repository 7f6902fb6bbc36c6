"""The gated delta rule (Yang, Kautz, Hatamizadeh, ICLR 2025, arXiv 2412.06464), and Kimi's, which forgets by features.

Models: Qwen3-Next, Qwen3.5, OLMo Hybrid, and Kimi Linear (arXiv 2510.26692) with those that follow it.
"""

from __future__ import annotations

from torch import Tensor

from vlattn_fast.attach.recurrences.reading import GOES_ON, PACKED, FunctionCall, Reading, Recurrence, at_least_float32

_EPSILON = 1e-6  # of the norms of queries and keys


def read(call: FunctionCall) -> Reading:
    """Query, key and value are (B, N, H, D), beta (B, N, H), and g (B, N, H) or (B, N, H, Dk) is the logarithm of the decay."""
    query, key, log_decay, beta = (at_least_float32(call[name]).transpose(1, 2) for name in ("query", "key", "g", "beta"))
    value: Tensor = call["value"].transpose(1, 2)
    if call["use_qk_l2norm_in_kernel"]:
        query, key = (x * (x.square().sum(-1, keepdim=True) + _EPSILON).rsqrt() for x in (query, key))
    return Reading(
        Recurrence(query * query.shape[-1] ** -0.5, key, value, log_decay, beta),
        run=lambda value: call.run(value=value.transpose(1, 2)),
        output_of=lambda result: result[0].transpose(1, 2),
        with_output=lambda result, output: (output.transpose(1, 2), *result[1:]),
        channels=slice(-value.shape[1] * value.shape[3], None),  # after those of queries and keys
        unsupported=GOES_ON if call["initial_state"] is not None else PACKED if call["cu_seqlens"] is not None else "",
    )


# The names in the files of the models; those without "torch" are attributes of modules in older releases.
FUNCTIONS = dict.fromkeys(
    (
        *("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
        *("chunk_gated_delta_rule", "recurrent_gated_delta_rule"),
        *("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    ),
    read,
)
