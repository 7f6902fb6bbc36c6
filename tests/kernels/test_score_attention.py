"""The Triton kernels of score_attention in the interpreter against the formula: outputs, log-sum-exp, every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import as_dtype, assert_all_close_to, outputs_and_grads

import vlattn_fast as va
from tests.ops.score_cases import LAYOUTS, MASKS, SCORES, B, H, attention_inputs, call, lay_out, padding
from vlattn_fast import scores as S

KINDS = {  # one score for each core score of the kernels
    "dot": lambda p: "dot",
    "cosine": lambda p: S.Cosine(eps=5.0),  # a clamp that acts on some pairs: otherwise the kernel would see plain products
    "relu": lambda p: S.General(p["weight"], activation="relu"),
    "leaky": lambda p: S.General(p["weight"], activation="leaky_relu"),
    "tanh": lambda p: S.General(p["weight"], activation="tanh"),
    "sigmoid": lambda p: S.General(p["weight"], activation="sigmoid"),
    "additive": lambda p: S.Additive(p["vector"]),
    "hadamard_tanh": lambda p: S.Hadamard(p["vector"], activation="tanh"),
    "hadamard_sigmoid": lambda p: S.Hadamard(p["vector"], activation="sigmoid"),
}
PUBLIC = (  # what stands between a public score and its kernel: features, weights per head, biases, offsets
    "scaled_dot",
    "cosine-eps=5",
    "general-key-bias",
    "general-leaky=-0.5",
    "general-tanh-per_head",
    "additive-per_head",
    "concat-unequal",
    "hadamard-None-per_head",
    "hadamard-relu-key",
    "hadamard-tanh-query",
    "hadamard-offset=tensor",
)


def check(inputs: dict[str, torch.Tensor], make: Any, **options: Any) -> None:
    b, h, n = inputs["query"].shape[:3]
    sent = [torch.randn(b, h, n, inputs["value"].shape[3]), torch.randn(b, h, n)]
    assert_all_close_to(
        call(va.score_attention, make, return_lse=True, backend="triton", **options),
        call(va.reference.score_attention, make, return_lse=True, **options),
        inputs,
        sent,
        scales={f"grad {name}": 1.0 for name in inputs},  # a row with one key has gradients of zero
    )


def tensors(n: int, m: int, d: int = 6, dv: int = 5, *, b: int = 1, h: int = 2, kv: int = 2) -> dict[str, torch.Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv), "weight": (d, d), "vector": (h, d)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("score", PUBLIC)
def test_public_scores(score: str) -> None:
    inputs, make = attention_inputs(SCORES[score])
    check(as_dtype(inputs, torch.float32), make)


@pytest.mark.parametrize(
    "kind, mask", [*((kind, mask) for kind in ("dot", "additive") for mask in MASKS), *((kind, "all") for kind in KINDS)]
)
def test_masks(kind: str, mask: str) -> None:
    inputs, _ = attention_inputs(SCORES["dot"])
    d = inputs["query"].shape[3]
    inputs |= {"weight": torch.randn(d, d), "vector": torch.randn(H, d)}
    check(as_dtype(inputs, torch.float32), KINDS[kind], **MASKS[mask]())


@pytest.mark.parametrize("n, m", [(1, 1), (15, 17), (65, 63), (33, 100)])
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kind", ("tanh", "additive"))
def test_sizes_either_side_of_a_tile(kind: str, causal: bool, n: int, m: int) -> None:
    check(tensors(n, m, d=3, h=1, kv=1), KINDS[kind], is_causal=causal)


@pytest.mark.parametrize("n, m, dtype, causal", [(257, 257, torch.float32, True), (577, 577, torch.bfloat16, False)])
def test_sizes_of_real_sequences(n: int, m: int, dtype: torch.dtype, causal: bool) -> None:
    check(as_dtype(tensors(n, m, 16, 16, h=1, kv=1), dtype), KINDS["dot"], is_causal=causal)


@pytest.mark.parametrize("d, dv", [(1, 1), (17, 3), (64, 40), (80, 136)])
def test_feature_sizes(d: int, dv: int) -> None:
    for kind in ("sigmoid", "cosine", "additive") if d < 64 else ("sigmoid", "cosine"):
        check(tensors(20, 37, d, dv, b=3, h=1, kv=1), KINDS[kind])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    check(as_dtype(tensors(20, 40, d=16, dv=16), dtype), KINDS[kind], is_causal=kind in ("dot", "additive"))


@pytest.mark.parametrize("scale", (0.0, -1.3))
@pytest.mark.parametrize("kind", ("dot", "tanh", "additive"))
def test_scale_of_either_sign(kind: str, scale: float) -> None:
    for causal in (False, True):
        check(tensors(9, 40, h=1, kv=1), KINDS[kind], scale=scale, is_causal=causal)


@pytest.mark.parametrize("kind", ("dot", "cosine", "tanh", "additive", "hadamard_sigmoid"))
def test_garbage_in_padding_stays_there(kind: str) -> None:
    mask = padding(40)
    inputs = tensors(9, 40, b=B)
    bad = {name: x.clone() for name, x in inputs.items()}
    for name in ("key", "value"):
        bad[name][~mask[:, None].expand(B, 2, 40)] = math.nan
    ours = call(va.score_attention, KINDS[kind], key_mask=mask, return_lse=True, backend="triton")
    clean, dirty = outputs_and_grads(ours, inputs), outputs_and_grads(ours, bad)
    for name, x in clean.items():
        assert torch.equal(x, dirty[name]), name
    assert not clean["out0"][1].any() and torch.isneginf(clean["out1"][1]).all() and not clean["grad query"][1].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("offset", (8.0, 13.0, 21.0, 1000.0))
def test_additive_scores_of_any_range(offset: float, dtype: torch.dtype) -> None:
    """Exponentials are met as a product, as a clamped product where two share a reciprocal, and not at all beyond e^44."""
    for signs in ((1, -1), (1, 1), (-1, -1)):  # what cancels, and what saturates
        inputs = tensors(40, 40, h=1, kv=1)
        inputs["query"][..., :20, :] += signs[0] * offset  # some tiles of either kind
        inputs["key"][..., :35, ::2] += signs[1] * offset
        inputs["key"][..., 1::2] += offset
        check(as_dtype(inputs, dtype), KINDS["additive"])


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum
@pytest.mark.parametrize("masked", (False, True))
def test_nan_and_infinity_are_not_hidden(masked: bool) -> None:
    inputs, mask = tensors(5, 6), torch.randn(5, 6) if masked else None
    inputs["query"][0, 0, 1, 2] = math.nan
    inputs["query"][0, 1, 2] = math.inf
    for kind in ("additive", "hadamard_tanh", "tanh"):
        if kind != "additive":
            inputs["query"][0, 1, 2] = 1.0  # a sum of products of infinities
        ours, formula = (
            function(inputs["query"], inputs["key"], inputs["value"], score=KINDS[kind](inputs), attn_mask=mask, **more)
            for function, more in ((va.score_attention, {"backend": "triton"}), (va.reference.score_attention, {}))
        )
        torch.testing.assert_close(ours, formula, equal_nan=True)
        assert torch.isnan(ours[0, 0, 1]).all() and not torch.isnan(ours[0, 1]).any()


def test_norms_of_zero_have_no_slope() -> None:
    inputs = tensors(5, 6)
    inputs["query"][0, 0, 1] = inputs["key"][0, 1, 2] = 0.0
    for eps in (1e-8, 1.0):
        check(inputs, lambda p, eps=eps: S.Cosine(eps=eps))


@pytest.mark.parametrize("kind", ("tanh", "additive"))
def test_either_gradient_alone(kind: str) -> None:
    for sent in ([None, torch.randn(1, 2, 20)], [torch.randn(1, 2, 20, 5), None]):
        assert_all_close_to(
            call(va.score_attention, KINDS[kind], return_lse=True, backend="triton"),
            call(va.reference.score_attention, KINDS[kind], return_lse=True),
            tensors(20, 40),
            sent,
        )


@pytest.mark.parametrize("kv", (1, 2, 4))
def test_grouped_heads(kv: int) -> None:
    for kind, causal in (("dot", False), ("tanh", True), ("additive", False)):
        check(tensors(9, 40, h=4, kv=kv), KINDS[kind], enable_gqa=True, is_causal=causal)


@pytest.mark.parametrize("score", ("general-tanh-per_head", "additive-per_head"))
def test_keys_with_more_heads_than_values(score: str) -> None:
    """A weight per query head makes a key for each; the values stay shared."""
    for kv in (1, 2):
        inputs, make = attention_inputs(SCORES[score], kv_heads=kv)
        check(as_dtype(inputs, torch.float32), make, enable_gqa=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    inputs = tensors(9, 11, b=B)
    inputs |= {name: lay_out(inputs[name], layout) for name in ("query", "key", "value")}
    mask = lay_out(torch.randn(B, 2, 9, 11), layout)
    check(inputs, KINDS["tanh"], attn_mask=mask)
    ours, formula = (
        call(f, KINDS["additive"], **more)
        for f, more in ((va.score_attention, {"backend": "triton"}), (va.reference.score_attention, {}))
    )
    assert_all_close_to(ours, formula, inputs)  # summed: gradients of stride 0


@pytest.mark.parametrize("empty", ("b", "h", "n", "m", "d", "dv"))
def test_empty_sizes(empty: str) -> None:
    inputs = tensors(**{"n": 3, "m": 4, "h": 2, "kv": 2, empty: 0} | ({"kv": 0} if empty == "h" else {}))
    if empty == "h":
        inputs["vector"] = torch.randn(6)
    for kind in ("tanh", "additive"):
        check(inputs, KINDS[kind])


@pytest.mark.parametrize("kind", ("dot", "cosine", "additive"))
def test_dropout_drops_what_streaming_drops(kind: str) -> None:
    """One counter hash: the same seed drops the same pairs in either backend, in forward and backward."""
    inputs = tensors(40, 70, b=B)

    def run(backend: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return outputs_and_grads(call(va.score_attention, KINDS[kind], dropout_p=0.3, return_lse=True, backend=backend), inputs)

    ours, theirs = run("triton"), run("streaming")
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=2e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ("tanh", "additive"))
def test_runs_are_bit_equal_and_write_no_input(kind: str) -> None:
    inputs = tensors(40, 70)
    before = {name: x.clone() for name, x in inputs.items()}
    first, second = (outputs_and_grads(call(va.score_attention, KINDS[kind], backend="triton"), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


@pytest.mark.parametrize(
    "score, dtype, words",
    [
        ("dot", torch.float64, "float16, bfloat16 and float32"),
        (S.Additive(torch.randn(300)), torch.float32, "at most 256 features"),
        (S.Additive(torch.randn(8), method="series", tolerance=0.1), torch.float32, "sine series"),
    ],
)
def test_what_it_cannot_run_is_refused(score: Any, dtype: torch.dtype, words: str) -> None:
    size = 8 if isinstance(score, str) else score.vector.shape[0]
    q, k = torch.randn(1, 1, 3, size, dtype=dtype), torch.randn(1, 1, 4, size, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        va.score_attention(q, k, k, score=score, return_lse=True, backend="triton")


def test_a_series_is_refused_by_name() -> None:
    """Nothing else runs in its place."""
    series = S.Additive(torch.randn(6), method="series", tolerance=1e-3)
    q, k, v = (torch.randn(1, 2, n, 6) for n in (9, 20, 20))
    with pytest.raises(ValueError, match="sine series"):
        va.score_attention(q, k, v, score=series, backend="triton")
