"""token_scores against the eager formulas of the papers' own code, and the tokens that they keep."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation
from tests.helpers.ops.backends import on

B, H, N, D = 2, 4, 40, 16
TEXT = torch.zeros(B, N, dtype=torch.bool).index_fill(1, torch.arange(30, N), True)
RULES = ("snapkv", "h2o", "tova", "fastv", "sparsevlm", "visionzip")
backends = on("auto", "reference", "streaming", "cpu", "triton")


def inputs(*, heads: int = H, queries: int = N, keys: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(B, H, queries, D, dtype=dtype), torch.randn(B, heads, keys, D, dtype=dtype)


def eager(query: Tensor, key: Tensor, causal: bool = True) -> Tensor:
    """A (B, H, N, M) in float64, as transformers' eager attention computes it; key heads repeated."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(logits.shape[-1] - logits.shape[-2] + 1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits.softmax(-1)


def snapkv_by_hand(prob: Tensor, window: int, kernel_size: int, pool: Any) -> Tensor:
    """Votes of the window for the keys in front of it, (B, H, M - W)."""
    votes = prob[:, :, -window:, :-window].sum(-2)
    return pool(votes, kernel_size, stride=1, padding=kernel_size // 2)


@backends
@pytest.mark.parametrize("window", [1, 8, 32])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv(window: int, pooling: str, backend: str) -> None:
    query, key = inputs()
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    want = snapkv_by_hand(eager(query, key), window, 5, pool)
    got = va.token_scores(query, key, "snapkv", queries=window, pooling=pooling, backend=backend)
    torch.testing.assert_close(got[..., :-window].double(), want, rtol=1e-4, atol=1e-5)
    budget = window + 4
    kept = got.topk(budget, -1).indices.sort().values
    assert torch.equal(kept[..., 4:], torch.arange(N - window, N).expand(B, H, -1))
    if pooling == "avg":
        assert torch.equal(kept[..., :4], want.topk(4, -1).indices.sort().values)
    else:  # neighbours share a maximum
        votes = want.gather(-1, kept[..., :4]).sort(descending=True).values
        torch.testing.assert_close(votes, want.topk(4, -1).values, rtol=1e-4, atol=1e-5)


def test_snapkvs_defaults_are_those_of_its_code() -> None:
    query, key = inputs()
    want = snapkv_by_hand(eager(query, key), 32, 5, F.avg_pool1d)
    torch.testing.assert_close(va.token_scores(query, key)[..., :-32].double(), want, rtol=1e-4, atol=1e-5)


@backends
def test_snapkv_takes_the_mean_of_a_group_of_heads(backend: str) -> None:
    query, key = inputs(heads=2)
    for pooling, pool in (("avg", F.avg_pool1d), ("max", F.max_pool1d)):
        want = snapkv_by_hand(eager(query, key), 8, 7, pool).unflatten(1, (2, 2)).mean(2)
        options: dict[str, Any] = {"queries": 8, "kernel_size": 7, "pooling": pooling, "enable_gqa": True}
        got = va.token_scores(query, key, "snapkv", backend=backend, **options)
        torch.testing.assert_close(got[..., :-8].double(), want, rtol=1e-4, atol=1e-5)


@backends
def test_h2o(backend: str) -> None:
    query, key = inputs()
    want = eager(query, key).sum(2)
    torch.testing.assert_close(va.token_scores(query, key, "h2o", backend=backend).double(), want, rtol=1e-4, atol=1e-5)
    kept = va.token_scores(query, key, "h2o", recent=6, backend=backend).topk(12, -1).indices.sort().values
    heavy = want[..., :-6].topk(6, -1).indices.sort().values
    assert torch.equal(kept, torch.cat([heavy, torch.arange(N - 6, N).expand(B, H, -1)], -1))


@backends
@pytest.mark.parametrize("rule", ["fastv", "tova"])
def test_the_last_query(rule: str, backend: str) -> None:
    query, key = inputs(heads=2)
    prob = eager(query, key).mean(1)
    got = va.token_scores(query, key, rule, enable_gqa=True, backend=backend)
    torch.testing.assert_close(got.double(), prob[:, -1], rtol=1e-4, atol=1e-5)
    got = va.token_scores(query, key, rule, queries="all", enable_gqa=True, backend=backend)  # the text of FastV's paper
    torch.testing.assert_close(got.double(), prob.mean(1), rtol=1e-4, atol=1e-5)


@backends
def test_sparsevlm(backend: str) -> None:
    """The authors' code has one sample, the image in front of the text, and no scale in the raters' product."""
    query, key = inputs()
    hidden = 0.2 * torch.randn(B, N, 24)
    image = torch.zeros(B, N, dtype=torch.bool).index_fill(1, torch.arange(5, 30), True)
    raters = va.text_raters(hidden, image, TEXT, backend=backend)
    got = va.token_scores(query, key, "sparsevlm", queries=raters, backend=backend)
    for sample in range(B):
        states = hidden[sample].double()
        rated = (states[5:30] @ states[30:].T).softmax(1).mean(0)
        index = torch.where(rated > rated.mean())[0] + 30
        assert torch.equal(raters[sample].nonzero()[:, 0], index)
        want = eager(query, key).mean(1)[sample, index].mean(0)
        torch.testing.assert_close(got[sample].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["h2o", "tova", "visionzip"])
def test_no_heads(rule: str) -> None:
    query, key = torch.randn(B, 0, N, D, requires_grad=True), torch.randn(B, 0, N, D)
    scores = va.token_scores(query, key, rule)
    assert scores.shape == ((B, 0, N) if rule == "h2o" else (B, N))
    assert scores.sum() == (2.0 * B if rule == "visionzip" else 0.0)  # CLS is kept
    scores.sum().backward()


@backends
def test_equal_texts_are_all_raters(backend: str) -> None:
    for length in (7, 10, 11, 49):
        text = torch.arange(3 + length)[None] >= 3
        assert torch.equal(va.text_raters(torch.ones(1, 3 + length, 4), ~text, text, backend=backend), text)


@backends
def test_visionzip(backend: str) -> None:
    query, key = inputs()
    prob = eager(query, key, causal=False)
    got = va.token_scores(query, key, "visionzip", backend=backend)
    torch.testing.assert_close(H * got[:, 1:].double(), prob[:, :, 0, 1:].sum(1), rtol=1e-4, atol=1e-5)
    dominant = prob[:, :, 0, 1:].sum(1).topk(9, 1).indices.sort().values + 1
    assert torch.equal(got.topk(10, 1).indices.sort().values, F.pad(dominant, (1, 0)))
    got = va.token_scores(query, key, "visionzip", queries="all", backend=backend)  # of a tower without CLS
    torch.testing.assert_close(got.double(), prob.mean((1, 2)), rtol=1e-4, atol=1e-5)


def calls(rule: str) -> dict[str, Any]:
    return {"queries": TEXT} if rule == "sparsevlm" else {"queries": 6} if rule == "snapkv" else {}


@backends
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_ragged_samples_are_those_without_padding(rule: str, side: str, backend: str) -> None:
    query, key = inputs()
    lengths = [25, 33]
    real = torch.stack([torch.arange(N) < length if side == "right" else torch.arange(N) >= N - length for length in lengths])
    raters = torch.rand(B, N) < 0.4
    options = calls(rule) | ({"queries": raters} if rule == "sparsevlm" else {})
    padded = [x.masked_fill(~real[:, None, :, None], torch.nan) for x in (query, key)]
    got = va.token_scores(*padded, rule, key_mask=real, backend=backend, **options)
    assert bool((got.masked_select(~real[:, None].expand_as(got) if got.dim() == 3 else ~real) == 0).all())
    for sample in range(B):
        alone = [x[sample : sample + 1, :, real[sample]] for x in (query, key)]
        if rule == "sparsevlm":
            options = {"queries": raters[sample : sample + 1, real[sample]]}
        want, row = va.token_scores(*alone, rule, backend=backend, **options)[0], got[sample][..., real[sample]]
        front = want < 2  # tokens that are kept in any case have a score by the number of rows
        assert torch.equal(row >= 2, ~front) or rule in ("h2o", "snapkv")
        if rule in ("h2o", "snapkv"):
            front[..., -6:] = rule == "h2o"
        torch.testing.assert_close(row[front], want[front], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_padding_gives_no_attention_in_a_later_part_of_a_prompt(rule: str, causal: bool) -> None:
    """The queries are those of the last tokens, padding among them, whether or not they attend to later ones."""
    query, key = inputs(queries=12)
    raters = torch.rand(B, 12) < 0.6
    for function, length in itertools.product((va.token_scores, va.reference.token_scores), (N - 5, N - 2)):
        rows, options = length - (N - 12), calls(rule) | {"is_causal": causal}
        of_all, of_real = ({"queries": x} if rule == "sparsevlm" else {} for x in (raters, raters[:, :rows]))
        real = (torch.arange(N) < length).expand(B, N)
        padded = function(query, key, rule, key_mask=real, **options | of_all)[..., :length]
        alone = function(query[:, :, :rows], key[:, :, :length], rule, **options | of_real)
        kept = alone == rows + 1  # in any case, with a score by the number of queries
        torch.testing.assert_close(padded.masked_fill(kept, 0.0), alone.masked_fill(kept, 0.0))


@backends
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow("triton")
def test_masks_and_grouped_heads_are_those_of_the_formula(rule: str, backend: str) -> None:
    query, key = inputs(heads=2)
    options: dict[str, Any] = {**calls(rule), "enable_gqa": True, "scale": 0.4, "softcap": 2.0, "sink": torch.randn(H)}
    hole = torch.rand(B, N) < 0.8
    for mask in (torch.rand(B, 1, N, N) < 0.7, torch.randn(N, N), torch.rand(N) < 0.7):
        for key_mask in (None, hole):
            got = va.token_scores(query, key, rule, attn_mask=mask, key_mask=key_mask, backend=backend, **options)
            exact = {name: x.double() if name == "sink" else x for name, x in options.items()}
            mask64 = mask.double() if mask.is_floating_point() else mask
            want = va.reference.token_scores(query.double(), key.double(), rule, attn_mask=mask64, key_mask=key_mask, **exact)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(rule: str, dtype: torch.dtype) -> None:
    query, key = inputs(dtype=dtype)
    got = va.token_scores(query, key, rule, **calls(rule))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = va.reference.token_scores(query.double(), key.double(), rule, **calls(rule))
    torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype != torch.float64 else 1e-7, atol=1e-2)


@backends
def test_a_later_part_of_a_prompt(backend: str) -> None:
    """With fewer queries than keys, the queries are the last tokens, and no query sees a key behind its own place."""
    query, key = inputs(queries=12)
    prob = eager(query, key)
    got = va.token_scores(query, key, "h2o", backend=backend)
    torch.testing.assert_close(got.double(), prob.sum(2), rtol=1e-4, atol=1e-5)
    got = va.token_scores(query, key, "snapkv", queries=8, backend=backend)
    want = snapkv_by_hand(prob, 8, 5, F.avg_pool1d)
    torch.testing.assert_close(got[..., :-8].double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        va.token_scores(query, key, "fastv", backend=backend).double(), prob[:, :, -1].mean(1), rtol=1e-4, atol=1e-5
    )


@backends
@pytest.mark.parametrize("rule", RULES)
def test_samples_that_see_nothing(rule: str, backend: str) -> None:
    query, key = inputs()
    real = torch.stack([torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)])
    got = va.token_scores(query, key, rule, key_mask=real, backend=backend, **calls(rule))
    assert bool((got[0] == 0).all()) and bool(got[1].isfinite().all()) and bool((got[1] > 0).any())
    hidden = torch.zeros(N, N, dtype=torch.bool)
    got = va.token_scores(query, key, rule, attn_mask=hidden, backend=backend, **calls(rule))
    assert bool((got[got < 2] == 0).all())


@pytest.mark.parametrize("sizes", [(0, N, N), (B, 0, N), (B, 0, 0), (B, 3, 0), (B, 3, 3)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_empty_and_short(rule: str, sizes: tuple[int, int, int]) -> None:
    """A window that is longer than the sequence keeps all tokens."""
    batch, queries, keys = sizes
    options = {"queries": torch.ones(batch, queries, dtype=torch.bool)} if rule == "sparsevlm" else {}
    scores = va.token_scores(torch.randn(batch, H, queries, D), torch.randn(batch, 2, keys, D), rule, enable_gqa=True, **options)
    assert scores.shape == ((batch, 2, keys) if rule in ("snapkv", "h2o") else (batch, keys))
    assert bool(scores.isfinite().all())
    if rule == "snapkv" and keys <= 32:
        assert bool((scores == queries + 1).all())


def test_heads_together_and_each() -> None:
    query, key = inputs(heads=2)
    each = va.token_scores(query, key, "h2o", enable_gqa=True)
    together = va.token_scores(query, key, "h2o", per_head=False, enable_gqa=True)
    torch.testing.assert_close(together, each.mean(1))
    each = va.token_scores(query, key, "fastv", per_head=True, enable_gqa=True)
    assert each.shape == (B, 2, N)


def test_no_map_is_stored() -> None:
    """The rows of a window have a mask; all rows have none."""
    peaks = []
    for n in (4096, 8192):
        query, key = torch.randn(1, 1, n, 4), torch.randn(1, 1, n, 4)
        real = torch.arange(n)[None] < n - 5
        for rule, options in (("h2o", {}), ("snapkv", {}), ("fastv", {}), ("fastv", {"queries": "all"})):
            with LargestAllocation() as seen:
                va.token_scores(query, key, rule, **options)
                va.token_scores(query, key, rule, key_mask=real, **options)
            peaks.append(seen.peak)
            assert seen.peak < 4 << 20 < n * n
    assert all(large <= 2.2 * small for small, large in zip(peaks[:4], peaks[4:], strict=True))


def test_a_window_reads_its_queries_alone() -> None:
    query, key = inputs()
    scores = va.token_scores(query.index_fill(2, torch.arange(N - 6), torch.nan), key, "snapkv", queries=6)
    torch.testing.assert_close(scores, va.token_scores(query, key, "snapkv", queries=6))


@pytest.mark.parametrize("rule", RULES)
def test_compiles(rule: str) -> None:
    query, key = inputs()
    real = torch.arange(N) < torch.tensor([[N], [29]])

    def call(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
        return va.token_scores(query, key, rule, key_mask=real, **calls(rule))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, real), call(query, key, real))


def test_gradients() -> None:
    query, key = (x.double().requires_grad_() for x in inputs())
    for rule in RULES:
        grads, wanted = (
            torch.autograd.grad((call(query, key, rule, **calls(rule)) ** 2).sum(), (query, key))
            for call in (va.token_scores, va.reference.token_scores)
        )
        torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "snap"}, "rule must be"),
        ({"rule": "sparsevlm"}, "queries must be given for rule 'sparsevlm'"),
        ({"queries": "middle"}, "queries must be"),
        ({"queries": 0}, "queries must be .* a number of last tokens from 1 on, or bool .B, N.; got 0"),
        ({"queries": True}, "queries must be"),
        ({"queries": 2**70}, "queries must be at most"),
        ({"queries": torch.ones(B, N + 1, dtype=torch.bool)}, "queries must have shape"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"kernel_size": 0}, "kernel_size must be"),
        ({"pooling": "mean"}, "pooling must be"),
        ({"recent": -1}, "recent must be"),
        ({"key_mask": torch.ones(B, N - 1, dtype=torch.bool)}, "key_mask must have shape"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        va.token_scores(*inputs(), **options)
