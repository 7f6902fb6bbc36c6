"""score_attention of few queries, as a decoder has them: one query over many keys, and heads that share keys."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.backends import LOW, each, on


def tensors(heads: int, key_heads: int, queries: int, keys: int, size: int = 16, value_size: int = 16) -> dict[str, Tensor]:
    shapes = {"query": (heads, queries, size), "key": (key_heads, keys, size), "value": (key_heads, keys, value_size)}
    return {name: torch.randn(2, *shape) for name, shape in shapes.items()}


def masks(name: str, heads: int, keys: int) -> dict[str, Any]:
    bias = torch.randn(2, 1, 1, keys)
    hidden = torch.where(torch.rand(2, heads, 1, keys) < 0.5, -torch.inf, torch.randn(2, heads, 1, keys))
    hidden[0, 0] = -torch.inf
    padding = torch.rand(2, keys) < 0.6
    choices: dict[str, dict[str, Any]] = {
        "none": {},
        "bool": {"attn_mask": torch.rand(1, keys) < 0.5},
        "float": {"attn_mask": bias, "key_mask": padding},
        "float64": {"attn_mask": bias.double() + 1e6},
        "heads": {"attn_mask": hidden},
        "queries": {"attn_mask": torch.rand(2, heads, 3, keys) < 0.5},
        "keys": {"key_mask": padding & torch.tensor([[True], [False]])},
        "causal": {"is_causal": True, "key_mask": torch.ones(2, keys, dtype=torch.bool)},
    }
    return choices[name]


def check(backend: str, inputs: dict[str, Tensor], **options: Any) -> None:
    run = partial(va.score_attention, **options, enable_gqa=True, return_lse=True)
    assert_all_close_to(partial(run, backend=backend), partial(run, backend="reference"), inputs)


MASKS = ("none", "bool", "float", "float64", "heads", "keys")


# Under "causal" one key is visible. The formula's gradient through its weight is exactly 0, and streaming's the difference of two
# products of torch, whose last digits differ from processor to processor.
@each("mask", cpu=(*MASKS, "causal"), streaming=MASKS)
def test_masks(backend: str, mask: str) -> None:
    check(backend, tensors(3, 3, 1, 37), **masks(mask, 3, 37))
    check(backend, tensors(6, 2, 1, 37), **masks(mask, 6, 37))


@pytest.mark.parametrize("mask", ("none", "queries", "heads", "keys", "causal"))
@on("cpu")
def test_masks_of_several_queries(backend: str, mask: str) -> None:
    """Heads that share keys have masks of their own, over two blocks of keys."""
    for keys in (37, 700):
        check(backend, tensors(6, 2, 3, keys), **masks(mask, 6, keys))


@pytest.mark.parametrize("size, value_size", [(1, 1), (15, 33), (40, 72), (255, 145)])
@pytest.mark.parametrize("dtype", LOW)
@on("cpu")
def test_sizes_in_each_dtype(backend: str, dtype: torch.dtype, size: int, value_size: int) -> None:
    for queries, keys in ((1, 1), (1, 5), (1, 513), (2, 70), (3, 5), (8, 70)):
        check(backend, as_dtype(tensors(4, 2, queries, keys, size, value_size), dtype))


@on("cpu")
def test_keys_that_threads_share(backend: str) -> None:
    """Two heads and 5 threads: three parts for each head. The last keys, and so the last part, are padding in one sample."""
    threads, inputs = torch.get_num_threads(), tensors(1, 1, 1, 7000, 8, 8)
    visible = torch.ones(2, 7000, dtype=torch.bool)
    visible[1, 2500:] = False
    inputs["key"][0, 0, 4800] *= 20  # the largest logit is in a later part
    try:
        torch.set_num_threads(5)
        check(backend, inputs, key_mask=visible)
        inputs["key"][1, :, 2500:] = inputs["value"][1, :, 2500:] = torch.nan
        assert va.score_attention(**inputs, key_mask=visible, backend=backend).isfinite().all()
        inputs["query"][0] = torch.nan
        assert va.score_attention(**inputs, key_mask=visible, backend=backend).isnan().all(-1).flatten().tolist() == [True, False]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("queries", (1, 3))
@pytest.mark.parametrize("options", ({}, {"score": "cosine"}, {"softcap": 2.0}, {"dropout_p": 0.3}), ids=str)
@on("streaming", "cpu", "triton")
def test_heads_that_share_keys(backend: str, options: dict[str, Any], queries: int) -> None:
    """They are taken for more queries of one head; a call with copies of the keys gives the same, and drops the same weights."""
    inputs = {name: x.requires_grad_() for name, x in tensors(6, 2, queries, 11).items()}
    cotangents = torch.randn(2, 6, queries, 16), torch.randn(2, 6, queries)

    def outputs(copies: int) -> list[Tensor]:
        key, value = (inputs[name].repeat_interleave(copies, 1) for name in ("key", "value"))
        torch.manual_seed(0)
        arguments = {"enable_gqa": copies == 1, "return_lse": True, "backend": backend, **options}
        results = va.score_attention(inputs["query"], key, value, **arguments)
        return [*results, *torch.autograd.grad(results, list(inputs.values()), cotangents)]

    for shared, copied in zip(outputs(1), outputs(3), strict=True):
        torch.testing.assert_close(shared, copied, atol=2e-5, rtol=2e-5)


@on("reference", "cpu", "streaming")
def test_no_query_at_all(backend: str) -> None:
    """In a batch without queries, heads that share keys are not taken for more queries."""
    inputs = {name: x.requires_grad_() for name, x in tensors(4, 2, 0, 7).items()}
    out, lse = va.score_attention(**inputs, enable_gqa=True, return_lse=True, backend=backend)
    assert out.shape == (2, 4, 0, 16) and lse.shape == (2, 4, 0)
    grads = torch.autograd.grad(out.sum() + lse.sum(), list(inputs.values()))
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs.values(), strict=True))
