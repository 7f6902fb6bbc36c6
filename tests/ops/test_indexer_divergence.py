"""indexer_divergence: the formula by hand and as attention_divergence, every backend against it, and what it refuses."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops.backends import F64, assert_refused, each, finest, on

FAST = ("streaming", "cpu", "triton")
TILE_ELEMENTS = 500  # streaming crosses several tiles


def tensors(heads: int = 4, shared: int = 1, index_heads: int = 3, n: int = 7, m: int = 9) -> dict[str, Tensor]:
    shapes = {"query": (heads, n, 6), "key": (heads // shared, m, 6), "index_query": (index_heads, n, 5)}
    shapes |= {"index_key": (m, 5), "index_weights": (index_heads, n)}
    return {name: torch.randn(2, *shape, dtype=F64) for name, shape in shapes.items()}


def mask() -> Tensor:
    """One row sees no key."""
    seen = torch.rand(2, 1, 7, 9) < 0.7
    seen[..., 0], seen[0, :, 2] = True, False
    return seen


def chosen() -> Tensor:
    """(2, 7, 4): a key twice, some that are none, and a row of none."""
    indices = torch.randint(0, 9, (2, 7, 4))
    indices[:, 1] = torch.tensor([3, 3, 8, 0])
    indices[:, 2] = torch.tensor([-1, 9, 5, -7])
    indices[1, 4] = -1
    return indices


@on("reference", *FAST)
def test_by_hand(backend: str) -> None:
    """The mean of (3/4, 1/4) and (1/2, 1/2), of an indexer whose scores are 2 relu(log 2) - relu(-1) and 2 relu(-1) - relu(1)."""
    dtype = finest(backend)
    query = torch.tensor([math.log(3.0), 0.0], dtype=dtype).view(1, 2, 1, 1)
    key = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 1, 2, 1)
    index_query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype).view(1, 2, 1, 2)
    index_key = torch.tensor([[math.log(2.0), -1.0], [-1.0, 1.0]], dtype=dtype).view(1, 2, 2)
    weights = torch.tensor([2.0, -1.0], dtype=dtype).view(1, 2, 1)
    told, total = (5 / 8, 3 / 8), 4 + math.exp(-1)
    index = 4 / total, math.exp(-1) / total
    expected = sum(p * math.log(p / q) for p, q in zip(told, index, strict=True))
    call = partial(va.indexer_divergence, query, key, index_query, index_key, weights, enable_gqa=True, backend=backend)
    got = call()
    assert got.shape == (1, 1) and abs(float(got) - expected) < 45 * torch.finfo(dtype).eps


@on("reference", *FAST)
def test_an_indexer_of_one_head_without_a_negative_product_is_an_attention(backend: str) -> None:
    x = as_dtype(tensors(index_heads=1), finest(backend))
    x |= {name: x[name].abs() for name in ("index_query", "index_key", "index_weights")}
    other_query = x["index_query"] * x["index_weights"][..., None]
    options: dict[str, Any] = {"is_causal": True, "attn_mask": mask()}
    other = {"other_query": other_query, "other_key": x["index_key"][:, None], "other_scale": 1.0}
    want = va.attention_divergence(x["query"], x["key"], **other, head_mean=True, **options, backend=backend)[:, 0]
    got = va.indexer_divergence(**x, **options, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=450 * torch.finfo(got.dtype).eps)


@on("reference", *FAST)
def test_one_chosen_key_has_no_divergence(backend: str) -> None:
    x = as_dtype(tensors(), finest(backend))
    assert not va.indexer_divergence(**x, topk_indices=torch.tensor([1, -1]).expand(2, 7, 2), backend=backend).any()


@on("reference", *FAST)
def test_chosen_keys_are_those_of_a_mask(backend: str) -> None:
    x, indices = as_dtype(tensors(), finest(backend)), chosen()
    kept = torch.zeros(2, 1, 7, 9, dtype=torch.bool)
    for b in range(2):
        for i in range(7):
            for j in indices[b, i].tolist():
                if 0 <= j < 9:
                    kept[b, 0, i, j] = True
    for options in ({}, {"is_causal": True}):
        got = va.indexer_divergence(**x, topk_indices=indices, **options, backend=backend)
        want = va.indexer_divergence(**x, attn_mask=kept, **options, backend=backend)
        torch.testing.assert_close(got, want, rtol=0, atol=45 * torch.finfo(got.dtype).eps)
        assert float(got[1, 4]) == 0.0 and got.any()
        assert torch.equal(got, va.indexer_divergence(**x, topk_indices=indices.int(), **options, backend=backend))


OPTIONS: dict[str, dict[str, Any]] = {  # each mask by itself and with chosen keys: properties/test_masks.py
    "scale": {"scale": -0.7},
    "chosen keys": {"topk_indices": chosen()},
    "no keys chosen": {"topk_indices": chosen()[..., :0]},
}


@each("name", **dict.fromkeys(FAST, OPTIONS))
def test_options(backend: str, name: str) -> None:
    x = as_dtype(tensors(), finest(backend))
    ours = partial(va.indexer_divergence, **OPTIONS[name], backend=backend)
    got = assert_all_close_to(ours, partial(va.reference.indexer_divergence, **OPTIONS[name]), x, [torch.randn(2, 7)])
    assert got["out0"].any() == (name != "no keys chosen")


GIVEN: dict[str, dict[str, Any]] = {
    "all keys": {},
    "masks": {"is_causal": True, "key_mask": torch.rand(2, 9) < 0.7, "attn_mask": torch.rand(1, 1, 7, 9) < 0.8},
    "numbers": {"attn_mask": torch.randn(1, 1, 7, 9).index_fill(2, torch.tensor([0]), torch.finfo(torch.float32).min)},
    "chosen keys": {"topk_indices": chosen(), "enable_gqa": True},
}


@pytest.mark.parametrize("detached", [True, False])
@each("name", streaming=GIVEN, cpu=[name for name in GIVEN if name != "numbers"], triton=[*GIVEN][:2], reference=GIVEN)
def test_a_given_lse_is_the_sum_of_a_softmax(backend: str, name: str, detached: bool) -> None:
    """Through it go the gradients that the softmax would have; without it, those of the indexer are the same."""
    options = GIVEN[name]
    x = as_dtype(tensors(shared=1 + ("enable_gqa" in options)), finest(backend))

    def run(call: Any, gives: bool, **x: Tensor) -> Tensor:
        if detached:
            x |= {side: x[side].detach() for side in ("query", "key")}
        lse = {"teacher_lse": lse_of(x["query"], x["key"], **options)} if gives else {}
        result: Tensor = call(**x, **lse, **options)
        return result

    ours = partial(run, partial(va.indexer_divergence, backend=backend), True)
    got = assert_all_close_to(ours, partial(run, va.reference.indexer_divergence, False), x, [torch.randn(2, 7)])
    assert got["grad index_key"].any() and bool(got["grad key"].any()) != detached


@on(*FAST)
def test_a_detached_lse_is_a_constant(backend: str) -> None:
    """Query and key have the gradients of scores less a constant, which no softmax's are."""
    x = as_dtype(tensors(), finest(backend))
    lse = {"teacher_lse": lse_of(x["query"], x["key"])}
    ours, formula = (partial(call, **lse) for call in (va.indexer_divergence, va.reference.indexer_divergence))
    assert_all_close_to(partial(ours, backend=backend), formula, x, [torch.randn(2, 7)])


def test_second_derivatives_with_a_given_lse() -> None:
    x = tensors(n=3, m=4)

    def run(*given: Tensor) -> Tensor:
        result: Tensor = va.indexer_divergence(*given, teacher_lse=lse_of(*given[:2], is_causal=True), is_causal=True)
        return result

    assert torch.autograd.gradgradcheck(run, [y.requires_grad_() for y in x.values()], fast_mode=True)


def lse_of(query: Tensor, key: Tensor, topk_indices: Tensor | None = None, **options: Any) -> Tensor:
    """Of each head's rows, in the dtype of sums; -inf without a key."""
    query, key = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (query, key))
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[-1] ** -0.5
    hidden = torch.zeros(len(query), 1, *logits.shape[2:], dtype=torch.bool)
    if options.get("is_causal"):
        hidden = hidden | torch.ones_like(hidden).triu(1)
    if "key_mask" in options:
        hidden = hidden | ~options["key_mask"][:, None, None]
    if topk_indices is not None:
        hidden = hidden | ~(topk_indices[..., None] == torch.arange(logits.shape[-1])).any(2)[:, None]
    mask = options.get("attn_mask", torch.zeros(()))
    if mask.dtype == torch.bool:
        hidden, mask = hidden | ~mask, torch.zeros(())
    return (logits + mask).masked_fill(hidden, -torch.inf).logsumexp(-1)


def in_blocks(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    *,
    topk_indices: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The last block of four keys has one."""
    seen = torch.ones(len(query), 1, query.shape[2], 9, dtype=torch.bool) if attn_mask is None else attn_mask
    seen = seen & torch.ones(query.shape[2], 9, dtype=torch.bool).tril() if is_causal else seen
    blocks = torch.arange(9) // 4 == torch.arange(3)[:, None]  # (3, 9)
    if topk_indices is not None:
        kept = (topk_indices[..., None] == torch.arange(3)).any(2)[:, None]
        seen = seen & (kept.double() @ blocks.double() > 0)

    def softmax(logits: Tensor, seen: Tensor) -> Tensor:
        e = logits.exp() * seen
        return e / e.sum(-1, keepdim=True).clamp(min=1e-300)

    p = softmax(query @ key.mT * query.shape[-1] ** -0.5, seen).mean(1) @ blocks.to(query.dtype).mT
    visible = (seen[:, 0].double() @ blocks.double().mT) > 0
    q = softmax((index_weights[..., None] * (index_query @ index_key[:, None].mT).relu()).sum(1), visible)
    p, q = (torch.where(visible, each, 1.0) for each in (p, q))
    return torch.where(visible, p * (p / q).log(), 0.0).sum(-1)


BLOCKS: dict[str, dict[str, Any]] = {
    "all": {},
    "masked": {"is_causal": True, "attn_mask": mask()},
    "chosen": {"topk_indices": torch.tensor([[2, 0, -1, 0], [1, 1, 3, 9]])[:, None].repeat(1, 7, 1), "is_causal": True},
}


@each("name", reference=BLOCKS, streaming=BLOCKS)
def test_blocks_of_keys(backend: str, name: str) -> None:
    x, options = tensors() | {"index_key": torch.randn(2, 3, 5, dtype=F64)}, BLOCKS[name]
    ours = partial(va.indexer_divergence, key_block=4, **options, backend=backend)
    sent = [torch.randn(2, 7)]
    got, want = (outputs_and_grads(call, x, sent) for call in (ours, partial(in_blocks, **options)))
    for each_name, y in want.items():
        torch.testing.assert_close(got[each_name], y, rtol=1e-10, atol=1e-12)
    if backend == "streaming":
        leaves = [y.detach().requires_grad_() for y in x.values()]
        assert torch.autograd.gradgradcheck(lambda *given: ours(**dict(zip(x, given, strict=True))), leaves, fast_mode=True)


def test_a_padded_block_may_hold_nan() -> None:
    x = tensors() | {"index_key": torch.randn(2, 3, 5, dtype=F64)}
    key_mask = torch.arange(9).expand(2, -1) < 5
    want = va.indexer_divergence(**x, key_block=4, key_mask=key_mask)
    x["index_key"][:, 2:], x["key"][:, :, 5:] = torch.nan, torch.nan
    for backend in ("reference", "streaming"):
        got = va.indexer_divergence(**x, key_block=4, key_mask=key_mask, backend=backend)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend, words", [("cpu", "a key_block of 1"), ("triton", "a key_block of 1")])
def test_blocks_are_refused_by_kernels(backend: str, words: str) -> None:
    x = as_dtype(tensors() | {"index_key": torch.randn(2, 3, 5)}, torch.float32)
    assert_refused(backend, words, lambda: va.indexer_divergence(**x, key_block=4, backend=backend))


@on(*FAST)
def test_weights_below_the_least_float(backend: str) -> None:
    x = {name: 60 * value.float() for name, value in tensors().items()}
    for value in outputs_and_grads(partial(va.indexer_divergence, backend=backend), x).values():
        assert value.isfinite().all()


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@on(*FAST)
def test_small_divergences_keep_their_digits(backend: str, size: float) -> None:
    """An indexer that has learned its attention but for a little."""
    query, key = torch.rand(1, 1, 32, 64), torch.rand(1, 1, 512, 64)
    index_query = query + size * torch.randn_like(query)
    given = query, key, index_query, key[:, 0], torch.full((1, 1, 32), 0.125)
    exact = va.indexer_divergence(*(x.double() for x in given))
    got = va.indexer_divergence(*given, backend=backend)
    assert float(((got - exact) / exact).abs().max()) < 1e-6 / size
    assert float(exact.max()) < 3 * size**2


def test_a_detached_attention_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlattn_fast.backends.streaming import attention_divergence

    vjp, leaves = attention_divergence.vjp, set[str]()
    monkeypatch.setattr(attention_divergence, "vjp", lambda f, x: leaves.update(x) or vjp(f, x))
    x = {name: value.requires_grad_(name.startswith("index")) for name, value in tensors().items()}
    va.indexer_divergence(**x).sum().backward()
    assert leaves == {"index_query", "index_key", "index_weights"}
    va.indexer_divergence(**x | {"query": x["query"].clone().requires_grad_()}).sum().backward()
    assert leaves == set(x)


def test_training_finds_the_keys_of_the_attention() -> None:
    """An indexer trained on the divergence chooses keys that hold more of the attention than before."""
    query, key = torch.randn(1, 4, 24, 8) * 2, torch.randn(1, 4, 24, 8)
    index_query, index_key = (torch.randn(1, *shape).requires_grad_() for shape in ((2, 24, 8), (24, 8)))
    weights = torch.rand(1, 2, 24).requires_grad_()
    attention = (query @ key.mT * 8**-0.5).softmax(-1).mean(1)
    optimizer = torch.optim.Adam([index_query, index_key, weights], lr=0.05)

    def mass() -> float:
        scores = (weights[..., None] * (index_query @ index_key[:, None].mT).relu()).sum(1)
        return float(attention.gather(2, scores.topk(4, -1).indices).sum(-1).mean())

    before = mass()
    for _ in range(40):
        optimizer.zero_grad()
        va.indexer_divergence(query, key, index_query, index_key, weights).mean().backward()
        optimizer.step()
    assert mass() > before + 0.2


X = {name: value.float() for name, value in tensors().items()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": X["query"][:, :0], "key": X["key"][:, :0]}, ValueError, "query must have at least one head to reduce"),
        ({"index_key": X["index_key"][:, :5]}, ValueError, r"index_key must have shape .* = \(2, 9, 5\)"),
        ({"key_block": 4}, ValueError, r"index_key must have shape \(B, ceil\(M / key_block\), Di\) = \(2, 3, 5\)"),
        ({"key_block": 0}, ValueError, "key_block must be"),
        ({"key_block": 4, "document_ids": (torch.zeros(7).long(), torch.zeros(9).long())}, ValueError, "key_block must be 1"),
        ({"teacher_lse": torch.zeros(2, 4, 9)}, ValueError, "teacher_lse must be float32 or float64 of shape"),
        ({"index_weights": X["index_weights"].double()}, TypeError, "index_weights must have"),
        ({"attn_mask": torch.ones(2, 4, 7, 9, dtype=torch.bool)}, ValueError, "attn_mask must broadcast"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        va.indexer_divergence(**(X | change))
