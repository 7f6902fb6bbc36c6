"""paged_attention_statistics: the formula against attention_statistics of each request, every backend against the formula."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, as_dtype, assert_all_close_to, bytes_of
from tests.helpers.ops.backends import DEVICE, F64, finest, on
from vlattn_fast.backends.reference.paged_attention_statistics import STATISTICS
from vlattn_fast.backends.streaming import _tiles

FAST = ("streaming", "cpu", "triton")
LENGTHS, COUNTS = (37, 70, 9, 0, 64), (37, 1, 0, 0, 5)  # keys and queries of each request
TILE_ELEMENTS = 200  # streaming crosses several tiles of queries and of heads


def requests(
    lengths: tuple[int, ...] = LENGTHS, counts: tuple[int, ...] = COUNTS, block_size: int = 16, more: int = 1
) -> dict[str, Tensor]:
    """Requests whose blocks lie in any order, with `more` columns behind the last block, which name no block."""
    columns = [-(-length // block_size) for length in lengths]
    table, free = torch.full((len(lengths), max(columns) + more), -7), torch.randperm(sum(columns) + 1)[:-1].split(columns)
    for row, numbers in zip(table, free, strict=True):
        row[: len(numbers)] = numbers
    return {"block_table": table, "lengths": torch.tensor(lengths), "query_starts": torch.tensor([0, *counts]).cumsum(0)}


def tensors(
    of: dict[str, Tensor], heads: int = 4, key_heads: int = 2, block_size: int = 16, size: int = 8, more: int = 2
) -> dict[str, Tensor]:
    """In float64; `more` tokens belong to no request, and a block of the cache to none, either."""
    blocks, tokens = int(of["block_table"].max()) + 2, int(of["query_starts"][-1]) + more
    query, cache = torch.randn(tokens, heads, size, dtype=F64), torch.randn(blocks, key_heads, block_size, size, dtype=F64)
    return {"query": query, "key_cache": cache}


def groups(of: dict[str, Tensor], width: int = 50, count: int = 3) -> dict[str, Any]:
    return {"key_groups": torch.randint(-1, count, (len(of["lengths"]), width)), "num_groups": count}


def check(backend: str, inputs: dict[str, Tensor], of: dict[str, Any]) -> dict[str, Tensor]:
    """All statistics against the formula's; the diagonal's logit is computed apart, with its own rounding. No input is written
    to."""
    options = {**of, "statistics": STATISTICS[:-1]}
    given = {name: x for name, x in (inputs | options).items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in given.items()}

    def ours(**x: Tensor) -> list[Tensor]:
        return [*va.paged_attention_statistics(**x, **options, backend=backend)[:-1]]

    def theirs(**x: Tensor) -> list[Tensor]:
        return [*va.reference.paged_attention_statistics(**x, **options)[:-1]]

    got = assert_all_close_to(ours, theirs, inputs, grads=False)
    call = partial(va.paged_attention_statistics, **inputs, **options | {"statistics": ["diagonal"]})
    largest = max(1.0, float(inputs["query"].abs().max()))
    rtol = (0.02 if inputs["query"].dtype.itemsize == 2 else 1e-5) * largest
    torch.testing.assert_close(call(backend=backend).diagonal, call(backend="reference").diagonal, rtol=rtol, atol=1e-6)
    assert all(torch.equal(given[name], x) for name, x in before.items())
    return got


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 0.7, "scale": 0.4}])
def test_each_request_is_a_call_of_attention_statistics(options: dict[str, Any]) -> None:
    """Keys gathered by hand, one by one."""
    of = requests(block_size=5)
    inputs, of_keys = tensors(of, block_size=5), groups(of)
    found = va.reference.paged_attention_statistics(**inputs, **of, **of_keys, **options, statistics=STATISTICS)
    rest = {name: x for name, x in options.items() if name != "window"}
    window, seen = options.get("window", 1000), torch.zeros(len(inputs["query"]), dtype=torch.bool)
    for r, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        where = [(int(of["block_table"][r, j // 5]), j % 5) for j in range(length)]
        key = torch.stack([inputs["key_cache"][block, :, place] for block, place in where], 1) if where else torch.zeros(2, 0, 8)
        rows = slice(int(of["query_starts"][r]), int(of["query_starts"][r + 1]))
        seen[rows] = True
        position, j = torch.arange(length)[:, None], torch.arange(length)
        group = torch.cat([of_keys["key_groups"][r], torch.full((1000,), -1)])[:length]
        want = va.reference.attention_statistics(
            F.pad(inputs["query"][rows].transpose(0, 1)[None], (0, 0, length - count, 0)),  # at their positions
            key.to(F64)[None],
            row_weight=(torch.arange(length) >= length - count).to(F64),
            key_groups=group,
            num_groups=3,
            attn_mask=(j <= position) & (j > position - window),
            enable_gqa=True,
            statistics=STATISTICS,
            **rest,
        )
        for name in STATISTICS:
            wanted = getattr(want, name)[0]
            if name == "received":
                assert not found.received[r, :, length:].any()
                torch.testing.assert_close(found.received[r, :, :length], wanted)
            else:
                torch.testing.assert_close(getattr(found, name)[rows], wanted.transpose(0, 1)[length - count :])
    assert not torch.cat([x[~seen].flatten() for x in (found.mass, found.entropy, found.maximum)]).any()
    assert (found.lse[~seen] == -torch.inf).all() and (found.max_logit[~seen] == -torch.inf).all()


@on("reference", *FAST)
def test_by_hand(backend: str) -> None:
    """Two new tokens of a request of three keys in blocks of two: the first sees two keys, 3 : 1, the second all, 3 : 1 : 4."""
    cache = torch.tensor([[9.0, 9.0], [math.log(4.0), 9.0], [math.log(3.0), 0.0]])[:, None, :, None]
    arguments = {"block_table": torch.tensor([[2, 1]]), "lengths": torch.tensor([3]), "query_starts": torch.tensor([0, 2])}
    found = va.paged_attention_statistics(
        torch.ones(2, 1, 1),
        cache,
        **arguments,
        key_groups=torch.tensor([[0, 1, 1]]),
        num_groups=2,
        statistics=STATISTICS,
        backend=backend,
    )
    torch.testing.assert_close(found.mass[:, 0], torch.tensor([[3 / 4, 1 / 4], [3 / 8, 5 / 8]]))
    entropies = [-sum(p * math.log(p) for p in row) for row in ((3 / 4, 1 / 4), (3 / 8, 1 / 8, 4 / 8))]
    torch.testing.assert_close(found.entropy[:, 0], torch.tensor(entropies))
    torch.testing.assert_close(found.maximum[:, 0], torch.tensor([3 / 4, 1 / 2]))
    torch.testing.assert_close(found.received[0, 0], torch.tensor([9 / 8, 3 / 8, 1 / 2, 0.0]))
    torch.testing.assert_close(found.max_logit[:, 0], torch.tensor([math.log(3.0), math.log(4.0)]))
    torch.testing.assert_close(found.lse[:, 0], torch.tensor([math.log(4.0), math.log(8.0)]))
    torch.testing.assert_close(found.diagonal[:, 0], torch.tensor([1 / 4, 1 / 2]))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "window of one key": {"window": 1},
    "softcap": {"softcap": 0.7, "window": 40},
    "negative scale": {"scale": -0.6},
    "scale 0": {"scale": 0.0},
}


@on(*FAST)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, backend: str) -> None:
    of = requests()
    check(backend, as_dtype(tensors(of), finest(backend)), {**of, **groups(of), **OPTIONS[name]})


# lengths and counts of requests; heads, heads of keys, block size, features; groups; options
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int, int], int, dict[str, Any]]] = {
    "one of each": ((65, 130, 5), (65, 1, 3), (1, 1, 1, 1), 1, {}),
    "blocks of 3": ((65, 130, 5), (65, 1, 3), (3, 3, 3, 5), 5, {}),
    "blocks of 7": ((65, 130, 5), (65, 1, 3), (6, 2, 7, 33), 9, {}),
    "blocks of 32": ((65, 130, 5), (65, 1, 3), (8, 1, 32, 64), 2, {}),
    "blocks of 128, many groups": ((65, 130, 5), (65, 1, 3), (5, 1, 128, 128), 70, {}),
    "256 features": ((65, 130, 5), (65, 1, 3), (4, 4, 10, 256), 4, {}),
    "many keys": ((1500, 1), (2, 1), (4, 2, 16, 8), 3, {}),
    "prompts": ((130, 129), (130, 129), (4, 2, 16, 8), 3, {}),
    # of some tokens that are computed together the first see keys of one tile more than the last
    "a window that begins within a tile": ((90, 70), (70, 3), (4, 2, 16, 8), 3, {"window": 20}),
    "a window longer than a tile": ((90, 70), (70, 3), (4, 2, 16, 8), 3, {"window": 45}),
}


@on(*FAST)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(backend: str, name: str) -> None:
    lengths, counts, (heads, key_heads, block_size, size), number, options = SIZES[name]
    of = requests(lengths, counts, block_size)
    inputs = as_dtype(tensors(of, heads, key_heads, block_size, size), finest(backend))
    check(backend, inputs, {**of, **groups(of, max(lengths) + 1, number), **options})


@on(*FAST)
def test_blocks_that_the_cache_does_not_have(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No query sees their keys where nobody reads the table first, as on a GPU. NaN lies in front of the cache and behind it."""
    monkeypatch.setattr("vlattn_fast.ops.paged_attention_statistics._check_values", lambda _: None)
    of = requests()
    inputs = as_dtype(tensors(of), finest(backend))
    blocks, beyond = len(inputs["key_cache"]), torch.full_like(inputs["key_cache"][:2], torch.nan)
    inputs["key_cache"] = torch.cat([beyond, inputs["key_cache"], beyond])[2:-2]
    of["block_table"][[0, 1, 1, 4, 4], [1, 2, 0, 3, 0]] = torch.tensor([blocks, blocks + 1, -1, blocks, -2])
    check(backend, inputs, {**of, **groups(of, 70)})


@on(*FAST)
def test_integers_of_32_bits(backend: str) -> None:
    of = requests()
    inputs = as_dtype(tensors(of), finest(backend))
    narrow = {name: x.to(torch.int32) for name, x in of.items()}
    of_keys = groups(of)
    small = {"key_groups": of_keys["key_groups"].to(torch.int32), "num_groups": 3}
    call = partial(va.paged_attention_statistics, **inputs, statistics=STATISTICS, backend=backend)
    for got, want in zip(call(**narrow, **small), call(**of, **of_keys), strict=True):
        assert torch.equal(got, want)


@on(*FAST)
@pytest.mark.parametrize("axis", range(4))
def test_offsets_of_64_bits(axis: int, backend: str) -> None:
    """Blocks, heads, tokens or features lie 2^30 numbers and more apart, and the rows of all else in columns. Untouched memory
    costs nothing."""
    of, apart = requests((7, 5), (2, 1), block_size=3, more=0), 2**30 + 8
    inputs = as_dtype(tensors(of, block_size=3, size=3), torch.bfloat16)
    cache = inputs["key_cache"][:, :, :, :3]
    wide = torch.empty(apart * cache.shape[axis], dtype=torch.bfloat16)
    strides = [
        apart if n == axis else math.prod(size for m, size in enumerate(cache.shape) if m > n and m != axis) for n in range(4)
    ]
    spread = wide.as_strided(cache.shape, strides).copy_(cache)
    of |= groups(of)
    call = partial(va.paged_attention_statistics, statistics=STATISTICS, backend=backend)
    in_columns = {name: x.mT.contiguous().mT for name, x in (of | inputs).items() if isinstance(x, Tensor) and x.ndim > 1}
    for got, want in zip(call(**of | in_columns | {"key_cache": spread}), call(**inputs, **of), strict=True):
        assert torch.equal(got, want)


@on("reference", *FAST)
@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_alone(name: str, backend: str) -> None:
    of = requests()
    inputs, of_keys = as_dtype(tensors(of), torch.float32), groups(of)
    call = partial(va.paged_attention_statistics, **inputs, **of, **of_keys, backend=backend)
    alone, all_of_them = call(statistics=[name]), call(statistics=STATISTICS)
    assert [x is not None for x in alone] == [each == name for each in STATISTICS]
    torch.testing.assert_close(getattr(alone, name), getattr(all_of_them, name))
    by_default = call()
    assert [x is not None for x in by_default] == [True] * 4 + [False] * 3


@on("reference", *FAST)
def test_without_groups(backend: str) -> None:
    of = requests()
    inputs = as_dtype(tensors(of), torch.float32)
    found = va.paged_attention_statistics(**inputs, **of, backend=backend)
    assert found.mass.shape == (*inputs["query"].shape[:2], 0)
    counted = va.paged_attention_statistics(**inputs, **of, key_groups=groups(of)["key_groups"], backend=backend)
    assert counted.mass.shape[2] == 3


@on("reference", *FAST)
def test_more_queries_than_keys(backend: str) -> None:
    """The first stand in front of all keys, and see none."""
    of = requests((3,), (5,))
    inputs = as_dtype(tensors(of, more=0), torch.float32)
    found = va.paged_attention_statistics(**inputs, **of, statistics=STATISTICS, num_groups=0, backend=backend)
    assert (found.lse[:2] == -torch.inf).all() and not found.maximum[:2].any()
    assert (found.maximum[2] == 1).all() and found.lse[2:].isfinite().all()
    torch.testing.assert_close(found.received.sum(2), torch.full((1, 4), 3.0))


@on("reference", *FAST)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_nobody_sees_has_no_influence(dtype: torch.dtype, value: float, backend: str) -> None:
    """Keys behind a request's length, blocks of no request, keys behind a query or in front of its window."""
    of, window = requests((37, 70), (2, 1)), 20
    inputs = as_dtype(tensors(of), dtype)
    call = partial(va.paged_attention_statistics, **of, **groups(of), window=window, statistics=STATISTICS, backend=backend)
    clean, dirty, seen = call(**inputs), torch.full_like(inputs["key_cache"], value), ((16, 37), (50, 70))
    for r, (low, high) in enumerate(seen):
        for j in range(low, high):
            block = int(of["block_table"][r, j // 16])
            dirty[block, :, j % 16] = inputs["key_cache"][block, :, j % 16]
    for got, want in zip(call(inputs["query"], dirty), clean, strict=True):
        assert torch.equal(got, want)


@on("reference", *FAST)
@pytest.mark.parametrize("value, window", [(torch.nan, None), (torch.inf, None), (torch.nan, 40), (torch.inf, 40)])
def test_nan_reaches_the_queries_that_see_it(value: float, window: int | None, backend: str) -> None:
    of = requests((70, 30), (6, 30))
    inputs = as_dtype(tensors(of, more=0), torch.float32)
    inputs["query"] = inputs["query"].abs()
    inputs["key_cache"][of["block_table"][0, 66 // 16], 1, 66 % 16] = value  # heads 2 and 3 of the queries from position 66 on
    call = partial(va.paged_attention_statistics, **of, **groups(of, 70), window=window, statistics=STATISTICS)
    found, exact = call(**inputs, backend=backend), call(**as_dtype(inputs, F64), backend="reference")
    assert found.entropy.isnan().nonzero().tolist() == [[i, h] for i in (2, 3, 4, 5) for h in (2, 3)]
    for name, got, want in zip(STATISTICS, found, exact, strict=True):
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got == torch.inf, want == torch.inf), name


@on(*FAST)
def test_large_logits(backend: str) -> None:
    of = requests()
    inputs = as_dtype(tensors(of), finest(backend))
    check(backend, {**inputs, "query": 300.0 * inputs["query"]}, {**of, **groups(of)})


@on(*FAST)
@pytest.mark.slow
def test_compiles(backend: str) -> None:
    """One graph, also for other numbers of tokens, requests and blocks."""
    counter = CompileCounterWithBackend("aot_eager")
    call = partial(va.paged_attention_statistics, statistics=STATISTICS, backend=backend, window=9)
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for lengths, counts in ((LENGTHS, COUNTS), ((20, 30, 40), (3, 1, 7))):
        of = requests(lengths, counts)
        inputs = as_dtype(tensors(of), torch.float32)
        of_keys = groups(of)
        for got, want in zip(compiled(**inputs, **of, **of_keys), call(**inputs, **of, **of_keys), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="counts allocations on the CPU")
@pytest.mark.parametrize("backend", FAST[:2])
@pytest.mark.slow("streaming")
def test_no_copy_of_the_cache(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 2,000 tokens and eight answers: nothing as large as a map of a head or as the keys."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 16)
    of = requests((2000, *[900] * 8), (2000, *[1] * 8))
    inputs = as_dtype(tensors(of, size=32, more=0), torch.float32)
    with torch.inference_mode(), LargestAllocation() as largest:
        found = va.paged_attention_statistics(**inputs, **of, **groups(of), backend=backend)
    assert largest.bytes <= max(*map(bytes_of, found[:4]), (1 << 16) * 8) < bytes_of(inputs["key_cache"]) / 4


def test_autocast() -> None:
    """The query takes the cache's dtype: the cache stays as it is."""
    of = requests()
    inputs = as_dtype(tensors(of), torch.float32)
    low = inputs["key_cache"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = va.paged_attention_statistics(inputs["query"], low, **of)
    for x, want in zip(got, va.paged_attention_statistics(inputs["query"].bfloat16(), low, **of), strict=True):
        torch.testing.assert_close(x, want)


def test_gradients_are_refused() -> None:
    of = requests()
    inputs = as_dtype(tensors(of), torch.float32)
    for name in inputs:
        asks = {**inputs, name: inputs[name].requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            va.paged_attention_statistics(**asks, **of)
        with torch.no_grad():
            va.paged_attention_statistics(**asks, **of)
        inputs[name].requires_grad_(False)
    leaf = inputs["query"].requires_grad_()
    integers = *of.values(), None, 0
    how = "lse", 0, "dot", 1.0, 0.3, "streaming"
    out = torch.ops.vlattn.paged_attention_statistics(leaf, inputs["key_cache"], *integers, *how)
    with pytest.raises(RuntimeError, match="has no gradients"):
        out[-1].sum().backward()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fp8": ({"key_cache": torch.zeros(20, 2, 16, 8).to(torch.float8_e4m3fn)}, TypeError, "a quantised cache has scales"),
    "bytes": ({"key_cache": torch.zeros(20, 2, 16, 8, dtype=torch.uint8)}, TypeError, 'kv_cache_dtype="auto"'),
    "block size": ({"key_cache": torch.randn(20, 2, 0, 8)}, ValueError, "block size of at least 1"),
    "no block": ({"key_cache": torch.randn(0, 2, 16, 8)}, ValueError, "at least one block if block_table has columns"),
    "group": ({"key_groups": torch.full((5, 6), 3), "num_groups": 3}, ValueError, "below num_groups = 3; got values from 3 to 3"),
    "num_groups": ({"num_groups": 2}, ValueError, "num_groups must be 0 or None if key_groups is not given"),
    "statistics": ({"statistics": ["argmax"]}, ValueError, "statistics must be among mass, entropy"),
    "mass": ({"statistics": ["mass"]}, ValueError, "key_groups must be given if statistics names 'mass'"),
    "window": ({"window": 0}, ValueError, "window must be at least 1; got 0"),
    "descending": ({"query_starts": torch.tensor([0, 5, 3, 6, 7, 8])}, ValueError, "query_starts must ascend from 0"),
    "too many": ({"query_starts": torch.tensor([0, 5, 6, 7, 8, 99])}, ValueError, "to at most the 45 tokens of query"),
    "negative": ({"query_starts": torch.tensor([-1, 5, 6, 7, 8, 9])}, ValueError, "query_starts must ascend from 0"),
    "long": ({"lengths": torch.tensor([1, 2, 97, 0, 0])}, ValueError, "6 blocks of 16 hold; got values from 0 to 97"),
    "short": ({"lengths": torch.tensor([1, 2, -1, 0, 0])}, ValueError, "lengths must lie from 0 to 96"),
    "block": ({"lengths": torch.tensor([49, 70, 9, 0, 64])}, ValueError, "got -7 for block 3 of request 0"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_what_it_refuses(name: str, backend: str) -> None:
    wrong, error, words = WRONG[name]
    of = requests()
    with pytest.raises(error, match=words):
        va.paged_attention_statistics(**{**as_dtype(tensors(of), torch.float32), **of, **wrong}, backend=backend)
