"""Packed documents: the formula with a mask between documents. Documents begin at the same places for queries and for keys, so
that causal masks and distances are those of the whole row; one has keys only."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.properties import BACKENDS, SMALL, calls, check, every
from vlattn_fast._ground.tensors import joined
from vlattn_fast.checking.cases import Example
from vlattn_fast.nn.captured_layer import pair_of

WITHOUT = {
    "attention_map": "its result has all pairs",
    "paged_attention_statistics": "it has requests",
    "stacked_cross_attention": "captions and images are samples",
    "maxsim": "queries and documents are samples",
    "relevancy_residual": "it adds token by token",
    "congruence_loss": "its documents are pairs: below",
    "recurrent_step": "it has no mask: below",
    ("score_attention", "sdpa"): "torch's attention refuses a document without queries",
}


def in_documents(call: Example) -> Example:
    """A call that is given documents; its formula is given a mask in their place."""
    n, m, own = call.tensors["query"].shape[2], call.tensors["key"].shape[2], call.options.get("attn_mask")
    begins = torch.zeros(len(call.tensors["query"]), max(n, m), dtype=torch.int64)
    for row, starts in zip(begins, ((2, 3, n), (1, n - 1)), strict=True):
        row[[start for start in starts if start < len(row)]] = 1
    ids = begins.cumsum(1)[:, :n], begins.cumsum(1)[:, :m]
    mask = joined(own, (ids[0][:, :, None] == ids[1][:, None])[:, None])
    given = ids[0] if n == m else ids

    def packed(attn_mask: Tensor, **x: Any) -> Any:
        assert attn_mask is not own
        return call.call(**x, attn_mask=own, document_ids=given)

    return replace(call, call=functools.wraps(call.call)(packed), options={**call.options, "attn_mask": mask})


@every(*BACKENDS, without=WITHOUT)
@pytest.mark.slow("triton", "cuda")
@pytest.mark.usefixtures("small_tiles")
def test_as_with_a_mask_between_documents(backend: str, operator: str) -> None:
    for call in calls(operator, backend, SMALL):
        if "lse" not in call.options:  # of the row without a mask
            check(in_documents(call), backend, scale=1.0)  # one key's weight is 1: divergences and gradients cancel


def test_derivatives() -> None:
    shapes = (1, 2, 5), (1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 5, 2), (1, 2, 5, 2)  # relevancy, query, key, value, grad_output
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def step(*x: Tensor) -> Tensor:
        return va.relevancy_step(*x, row_normalize=True, document_ids=torch.tensor([0, 0, 1, 1, 1]))

    assert torch.autograd.gradcheck(step, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=True)


def pieces(x: Tensor, dim: int, ends: tuple[int, ...]) -> list[Tensor]:
    return [x.narrow(dim, start, end - start) for start, end in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("backend", ["reference", "streaming", "cpu"])
@pytest.mark.parametrize("packing", ["document_ids", "cu_seqlens", "nested"])
def test_pairs_of_text_and_image(backend: str, packing: str) -> None:
    """A pair is a sample: each by itself gives its loss and its gradients."""
    ends, inputs = ((0, 3, 7, 7, 8), (0, 4, 6, 9, 10)), [torch.randn(1, 2, n, 4, requires_grad=True) for n in (8, 8, 10, 10)]
    offsets = [torch.tensor(each) for each in ends]

    def packed(*x: Tensor) -> Tensor:
        if packing == "nested":
            x = tuple([nested(each[0], offsets[i // 2], 1) for i, each in enumerate(x)])
            return va.congruence_loss(x[:2], x[2:], backend=backend)
        ids = tuple([torch.arange(4).repeat_interleave(each.diff()) for each in offsets])
        given = ids if packing == "document_ids" else tuple(each.int() for each in offsets)
        return va.congruence_loss(x[:2], x[2:], backend=backend, **{packing: given})

    def by_pairs(*x: Tensor) -> Tensor:
        pairs = zip(*[pieces(each, 2, ends[i // 2]) for i, each in enumerate(x)], strict=True)
        return torch.stack([va.reference.congruence_loss(pair[:2], pair[2:]) for pair in pairs]).mean()

    tensors = dict(zip(("text_query", "text_key", "image_query", "image_key"), inputs, strict=True))
    assert_all_close_to(lambda **x: packed(*x.values()), lambda **x: by_pairs(*x.values()), tensors, [None])


@pytest.mark.parametrize("backend", ["reference", "streaming", "cpu"])
def test_a_recurrence_begins_anew(backend: str) -> None:
    ends, shapes = (0, 3, 7, 8), {"relevancy": (1, 2, 8)} | dict.fromkeys(("query", "key", "value", "grad_output"), (1, 2, 8, 4))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    gates = {"beta": torch.rand(1, 2, 8), "log_decay": -torch.rand(1, 2, 8, 4)}

    def by_pieces(**x: Tensor) -> Tensor:
        parts = [pieces(each, 2, ends) for each in (x | gates).values()]
        return torch.cat(
            [va.reference.recurrent_step(**dict(zip(x | gates, part, strict=True))) for part in zip(*parts, strict=True)], 2
        )

    def packed(**x: Tensor) -> Tensor:
        return va.recurrent_step(**x, **gates, cu_seqlens=torch.tensor(ends), backend=backend)

    assert_all_close_to(packed, by_pieces, tensors, [None])


@pytest.mark.parametrize("rule", ["h2o", "snapkv", "fastv"])
def test_tokens_are_scored_in_their_own_document(rule: str) -> None:
    query, key, ends = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), (0, 5, 6, 9)
    each = [
        va.token_scores(q, k, rule, enable_gqa=True) for q, k in zip(*[pieces(x, 2, ends) for x in (query, key)], strict=True)
    ]
    found = va.token_scores(query, key, rule, enable_gqa=True, cu_seqlens=torch.tensor(ends))
    torch.testing.assert_close(found, torch.cat(each, -1))


def test_nested_tensors_come_back_nested() -> None:
    offsets = torch.tensor([0, 3, 3, 8])
    query, key, value = (torch.randn(2, 8, 4, requires_grad=True) for _ in range(3))
    tensors = [nested(x, offsets, 1) for x in (query, key, value)]
    out, lse = va.score_attention(*tensors, is_causal=True, return_lse=True)
    assert out.shape == tensors[0].shape and lse.is_nested
    expected = va.score_attention(query[None], key[None], value[None], is_causal=True, return_lse=True, cu_seqlens=offsets)
    torch.testing.assert_close((out.values(), lse.values()), (expected[0][0], expected[1][0]))
    (grad,) = torch.autograd.grad(out.values().sum(), query)
    torch.testing.assert_close(grad, torch.autograd.grad(expected[0].sum(), query)[0])


def test_layers_and_losses() -> None:
    starts, x = torch.tensor([0, 2, 5]), torch.randn(1, 5, 8)
    layer = va.nn.ScoreAttention(8, 2)
    each = [layer(part, is_causal=True) for part in pieces(x, 1, (0, 2, 5))]
    torch.testing.assert_close(layer(x, is_causal=True, cu_seqlens=starts), torch.cat(each, 1))
    with pytest.raises(ValueError, match="need_weights must be False"):
        layer(x, need_weights=True, cu_seqlens=starts)
    query, key, other = (torch.randn(1, 2, 5, 8) for _ in range(3))
    losses = {"document_ids": torch.tensor([0, 0, 1, 1, 1])}, {"cu_seqlens": starts}
    one, two = (pair_of(each, key, {"attn_mask": None, "is_causal": False, "scale": None}, "dot") for each in (query, other))
    found = [va.nn.AttentionDivergence()([one], [two], **options) for options in losses]
    expected = va.attention_divergence(query, key, other, key, cu_seqlens=starts).mean()
    torch.testing.assert_close(torch.stack(found), expected.expand(2))
    found = [va.nn.CongruenceLoss()((query, key), (other, key), **options) for options in losses]
    pairs = zip(*[pieces(x, 2, (0, 2, 5)) for x in (query, key, other)], strict=True)
    expected = torch.stack([va.congruence_loss((q, k), (o, k)) for q, k, o in pairs]).mean()
    torch.testing.assert_close(torch.stack(found), expected.expand(2))


def test_in_compiled_code() -> None:
    query, ends = torch.randn(1, 2, 5, 8), torch.tensor([0, 2, 5])
    call = functools.partial(va.score_attention, cu_seqlens=ends, is_causal=True)
    torch.testing.assert_close(torch.compile(lambda x: call(2 * x, x, x))(query), call(2 * query, query, query))


IDS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_ids": IDS.flip(0)}, "document_ids must not fall"),
        ({"document_ids": IDS[:3]}, r"document_ids must be \(4\) or \(2, 4\)"),
        ({"document_ids": IDS.float()}, "document_ids must be int64 or int32"),
        ({"document_ids": 2}, "document_ids must be a tensor, or a pair"),
        ({"document_ids": IDS, "cu_seqlens": IDS}, "must be None, since both say the same"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "belong to a batch of 1"),
        ({"document_ids": IDS, "key_mask": torch.ones(2, 3, dtype=torch.bool)}, "key_mask must have 4 keys"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    x = torch.randn(2, 2, 4, 8)
    with pytest.raises((ValueError, TypeError), match=message):
        va.score_attention(x, x, x, **options)
    with pytest.raises(ValueError, match="document_ids must be a pair, of 4 queries and of 3 keys"):
        va.score_attention(x, x[:, :, :3], x[:, :, :3], document_ids=IDS)


def nested(x: Tensor, offsets: Tensor, dim: int) -> Tensor:
    made = torch.nested.nested_tensor_from_jagged(x.movedim(dim, 0), offsets)
    return made.transpose(1, dim + 1) if dim else made
