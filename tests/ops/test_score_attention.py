"""score_attention on every backend against its formula: scores, heads, values.

Dropout, autograd, masks: test_score_attention_autograd.py. tests/kernels/ and
tests/cuda/ have the tile edges of their kernels.
"""

import math
from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops import score_cases
from tests.helpers.ops.backends import F64, INTERPRET, assert_refused, each, finest, on
from tests.helpers.ops.score_cases import DOT_PRODUCTS, DV, PUBLIC, SCORES, B, D, H, M, N, call, check, tensors
from vlattn_fast import scores as S


@each(
    "score",
    streaming=SCORES,
    sdpa=DOT_PRODUCTS,
    cpu=score_cases.of_kernels("cpu", SCORES),
    triton=score_cases.of_kernels("triton", PUBLIC),
    cuda=score_cases.of_kernels("cuda", SCORES),
)
def test_every_score(backend: str, score: str) -> None:
    check(backend, *tensors(backend, score))


def samples(backend: str) -> dict[str, int]:
    """One where the interpreter takes long and a test is not about samples."""
    return {"b": 1} if backend == "triton" else {}


@each(
    "score",
    streaming=("general-tanh-per_head", "additive-per_head", "hadamard-None-per_head"),
    sdpa=("hadamard-None-per_head",),
    cpu=("general-tanh-per_head", "additive-per_head"),
    triton=("general-tanh-per_head", "additive-per_head"),
    cuda=("additive-per_head", "hadamard-tanh-per_head"),
)
def test_keys_with_more_heads_than_values(backend: str, score: str) -> None:
    """A weight for each query head makes a key for each; the values stay shared."""
    for kv in (1, 2):
        check(backend, *tensors(backend, score, h=4, kv=kv, **samples(backend)), enable_gqa=True)


@on("reference", "streaming", "sdpa", "cpu", "triton", "cuda")
def test_grouped_heads_map_one_to_one(backend: str) -> None:
    """Seen by writing the key head's number into its values."""
    dtype = finest(backend)
    value = torch.arange(3.0, dtype=dtype)[None, :, None, None].expand(1, 3, M, 1)
    query, key = torch.randn(1, 6, N, D, dtype=dtype), torch.randn(1, 3, M, D, dtype=dtype)
    score = S.Additive(torch.ones(D, dtype=dtype)) if backend == "cuda" else "dot"
    out = va.score_attention(query, key, value, score=score, enable_gqa=True, backend=backend)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0, 0, 1, 1, 2, 2], dtype=dtype))


@each(
    "score",
    streaming=("dot", "cosine", "general-key-bias", "general-tanh-key", "additive", "hadamard-relu-key"),
    sdpa=("dot", "hadamard-relu-key"),
    cpu=("dot", "general-tanh-key", "additive"),
    triton=("dot", "general-tanh-key", "additive"),
    cuda=("additive", "hadamard-tanh-key"),
)
def test_large_and_constant_values(backend: str, score: str) -> None:
    """Logits of +-1e3 and more (one key takes all), and constants (all keys share)."""
    for dtype in dict.fromkeys((finest(backend), torch.float32)):
        for factor in (20.0, 0.0):
            inputs, make = tensors(backend, score, dtype, **samples(backend))
            for name in ("query", "key"):
                inputs[name] = inputs[name] * factor if factor else torch.full_like(inputs[name], 30.0)
            options = {"return_lse": backend != "sdpa"}
            found = assert_all_close_to(
                call(va.score_attention, make, backend=backend, **options),
                call(va.reference.score_attention, make, **options),
                inputs,
                [torch.randn(len(inputs["query"]), H, N, DV), None][: 1 + options["return_lse"]],
                scales={"out0": 1e3} | {f"grad {name}": 1e5 for name in inputs},  # a logit of 1e3 is known to an ulp of 1e3
            )
            assert all(torch.isfinite(x).all() for x in found.values())


@each(
    "score",
    streaming=("scaled_dot", "cosine", "general-tanh-key", "additive", "hadamard-tanh-key", "hadamard-none-offset=tensor"),
    sdpa=("scaled_dot", "hadamard-none-offset=tensor"),
    cpu=("scaled_dot", "general-tanh-key", "additive"),
    triton=("scaled_dot", "general-tanh-key", "additive"),
    cuda=("additive", "hadamard-tanh-key"),
)
def test_scale(backend: str, score: str) -> None:
    """A scale of either sign: torch's fused CPU kernel multiplies its causal -inf by the scale, which gives +inf or NaN."""
    cases = ((0.0, False), (0.0, True), (-1.3, False), (-1.3, True), (2, False))
    for scale, is_causal in cases[:: 3 if backend == "triton" else 1]:
        inputs, make = tensors(backend, score, **samples(backend))
        if backend == "sdpa" and scale <= 0.0 and (is_causal or not INTERPRET):
            run = call(va.score_attention, make, backend=backend, scale=scale, is_causal=is_causal)
            assert_refused(backend, "scale of at most 0", partial(run, **inputs))
            continue
        found = check(backend, inputs, make, cancels=True, what=f"{scale} {is_causal}", scale=scale, is_causal=is_causal)
        if scale == 0.0 and not is_causal:
            torch.testing.assert_close(found["out0"], inputs["value"].mean(2, keepdim=True).expand(-1, H, N, DV))
            if backend != "sdpa":
                torch.testing.assert_close(found["out1"], torch.full_like(found["out1"], math.log(M)))


@pytest.mark.parametrize("scale", [0.0, -1.3])
def test_scale_and_causality_from_sixteen_keys_on(scale: float) -> None:
    """Streaming takes torch's fused kernel of float64 from 16 keys on."""
    query, key, value = torch.randn(3, 1, 2, 20, D, dtype=F64)
    out, wanted = (
        va.score_attention(query, key, value, is_causal=True, scale=scale, backend=backend)
        for backend in ("streaming", "reference")
    )
    torch.testing.assert_close(out, wanted)


def test_default_scale_belongs_to_scaled_dot_alone() -> None:
    query, key = torch.randn(B, H, N, D, dtype=F64), torch.randn(B, H, M, D, dtype=F64)
    for score, scale in (("dot", 1.0), ("scaled_dot", D**-0.5), (S.General(torch.eye(D, dtype=F64)), 1.0)):
        _, lse = va.score_attention(query, key, key, score=score, return_lse=True)
        torch.testing.assert_close(lse, torch.logsumexp(scale * query @ key.mT, -1))


@on("streaming", "cpu", "triton")
def test_cosine_of_a_zero_vector_has_no_slope(backend: str) -> None:
    inputs, _ = tensors(backend, "cosine")
    inputs["query"][0, 0, 1] = inputs["key"][0, 1, 2] = 0.0
    for eps in (1e-8, 1.0):
        check(backend, inputs, lambda p, eps=eps: S.Cosine(eps=eps))


@on("reference", "streaming", "cpu", "triton")
def test_the_cosine_of_an_infinite_vector_is_nan(backend: str) -> None:
    """Inf / Inf, also where the clamp may act."""
    query, key = torch.randn(1, 1, 4, D), torch.randn(1, 1, M, D)
    bad_query, bad_key = query.clone(), key.clone()
    bad_query[0, 0, 1, 2], bad_key[0, 0, 1, 2] = math.inf, -math.inf
    for eps in (1e-8, 1.0, 0.0):
        run = partial(va.score_attention, score=S.Cosine(eps), return_lse=True, backend=backend)
        for x in run(bad_query, key, key):
            lost = x.isnan().reshape(1, 4, -1).all(-1)
            assert lost[0].tolist() == [False, True, False, False], eps
        for x in run(query, bad_key, key):
            assert x.isnan().all(), eps
