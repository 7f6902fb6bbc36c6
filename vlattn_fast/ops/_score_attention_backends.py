"""The backends of score_attention, and what they do not support."""

from __future__ import annotations

import torch

from vlattn_fast import kernels
from vlattn_fast._ground.score_kinds import kind_of
from vlattn_fast.backends.cpu import score_attention as cpu
from vlattn_fast.backends.cuda import score_attention as cuda
from vlattn_fast.backends.sdpa import score_attention as sdpa
from vlattn_fast.backends.streaming import score_attention as streaming
from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.table import table


def _sdpa_limits(call: CallShape) -> list[tuple[str, bool]]:
    sizes, flags, on_cpu = call.sizes, call.flags, call.device_type == "cpu"
    query_elements = sizes["batch"] * sizes["heads"] * sizes["queries"] * sizes["head_dim"]
    return [
        ("SDPA takes scores that are a dot product of features, whatever the data are", not flags["dot_product"]),
        ("SDPA returns no log-sum-exp", flags["return_lse"]),
        ("SDPA has no forward mode, and torch.func may ask for it", flags["transformed"]),
        ("SDPA has no attention sinks", flags["sink"]),
        ("SDPA has no softcap", flags["softcap"]),
        ("SDPA has no group_bias but as a mask of N x M", flags["group_bias"]),
        ("SDPA's dropout cannot be repeated tile by tile", flags["dropout"]),
        (
            "SDPA takes no attn_mask: it adds -inf to a masked score, which leaves NaN there, and rounds a float mask",
            flags["attn_mask"],
        ),
        (
            "SDPA takes key_mask or is_causal, not both: it adds -inf to a masked score, which leaves NaN there",
            flags["key_mask"] and flags["is_causal"],
        ),
        (
            "torch's fused CPU kernel gives zeros for a row of NaN under is_causal with fewer than 16 keys",
            on_cpu and flags["is_causal"] and sizes["keys"] < 16,
        ),
        ("SDPA gives NaN for what is empty", query_elements * sizes["keys"] * sizes["value_dim"] == 0),
        ("SDPA's scale is a constant of the graph that torch.compile makes", flags["varying_scale"]),
        ("SDPA's fused kernels take float64 on the CPU only", call.dtype == torch.float64 and not on_cpu),
        (
            "SDPA's fused kernels take a scale of at most 0 on the CPU only, and not under is_causal: they scale its -inf",
            not flags["positive_scale"] and (flags["is_causal"] or not on_cpu),
        ),
        (
            # pytorch issue 196678; torch prefers cuDNN there from 2.11 on
            "SDPA by cuDNN on sm_90 gives NaN for gradients of low scores under a mask of so many keys",
            flags["key_mask"]
            and flags["backward_in_16_bit"]
            and call.device_type == "cuda"
            and call.capability is not None
            and call.capability[0] == 9
            and sizes["keys"] % 128 == 64,
        ),
    ]


def _cpu_limits(call: CallShape) -> list[tuple[str, bool]]:
    return [("the CPU kernels do not have this kind of score", "cpu" not in kind_of(call.flags["score"]).kernels)]


def _triton_limits(call: CallShape) -> list[tuple[str, bool]]:
    return [
        ("the Triton kernels do not have this kind of score", "triton" not in kind_of(call.flags["score"]).kernels),
        ("Triton kernels take scores of at most 256 features", call.sizes["features"] > 256),
        ("a sine series chooses its number of features from the data, a Triton kernel takes at most 256", call.flags["series"]),
    ]


def _cuda_limits(call: CallShape) -> list[tuple[str, bool]]:
    most = cuda.MOST_SIZE
    return [
        ("the CUDA C++ kernel takes exact scores that sum over hidden units", "cuda" not in kind_of(call.flags["score"]).kernels),
        ("the CUDA C++ kernel has no dropout", call.flags["dropout"]),
        (f"the CUDA C++ kernel takes at most {most} hidden units", call.sizes["features"] > most),
        (f"the CUDA C++ kernel takes value sizes of at most {most}", call.sizes["value_dim"] > most),
    ]


_SHARED_SUMS = dict.fromkeys(("triton", "cuda"), ("gradient of query",))


def _in_16_bits_on_a_gpu(call: CallShape) -> bool:
    return call.device_type == "cuda" and call.dtype in (torch.float16, torch.bfloat16)


# On an H100, in bfloat16: SDPA under padding of 160 keys took 2.6 times as long as Triton, forward and backward, and Triton 1.7
# times as long as CUDA C++ for additive scores of 64 hidden units, forward
_LEADS = {
    "triton": lambda call: _in_16_bits_on_a_gpu(call) and call.flags["key_mask"] and call.flags["dot_product"],
    "cuda": lambda call: _in_16_bits_on_a_gpu(call) and call.flags["score"] == "additive",
}
BACKENDS = table(
    streaming,
    sdpa=sdpa,
    cpu=cpu,
    triton=lambda: kernels.score_attention,
    cuda=cuda,
    limits={"sdpa": _sdpa_limits, "cpu": _cpu_limits, "triton": _triton_limits, "cuda": _cuda_limits},
    shared_sums=_SHARED_SUMS,
    leads=_LEADS,
)
