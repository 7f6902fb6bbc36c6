"""Calls of paged_attention_statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.backends.reference.paged_attention_statistics import STATISTICS
from vlattn_fast.checking.cases._dice import DIMS, Dice
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.paged_attention_statistics import paged_attention_statistics

COMPARED = STATISTICS[:-1]  # the diagonal's logit is computed apart, with its own rounding
BLOCK_SIZE = 3


def _arranged(requests: int, block_size: int) -> Callable[[Tensors], dict[str, Any]]:
    """As many tokens and blocks for each request, which has one key less than the one before it."""

    def arrange(t: Tensors) -> dict[str, Any]:
        like, tokens, blocks = t["query"], t["query"].size(0), t["key_cache"].size(0)
        columns = blocks // max(1, requests)
        r = torch.arange(requests + 1, device=like.device)
        table = torch.arange(requests * columns, device=like.device).flip(0).view(requests, columns)
        lengths = (columns * block_size - r[:requests]).clamp(min=0)
        groups = (torch.arange(columns * block_size, device=like.device) % 2).expand(requests, -1)
        starts = r * (tokens // max(1, requests))
        key_arguments = {"block_table": table, "lengths": lengths, "query_starts": starts, "key_groups": groups, "num_groups": 2}
        return {**t, **key_arguments, "statistics": COMPARED}

    return arrange


def _required(sizes: Sizes, block_size: int = BLOCK_SIZE) -> Tensors:
    columns = -(-sizes.keys // block_size)
    return {
        "query": torch.randn(sizes.batch * sizes.queries, sizes.heads, sizes.head_dim),
        "key_cache": torch.randn(sizes.batch * columns, sizes.heads, block_size, sizes.head_dim),
    }


def _example(sizes: Sizes, name: str, floats: dict[str, Any], options: dict[str, Any]) -> Example:
    arrange = _arranged(sizes.batch, BLOCK_SIZE)
    return Example(paged_attention_statistics, name, _required(sizes), options, arrange, floats, differentiable=False)


def examples(sizes: Sizes) -> Iterator[Example]:
    yield _example(sizes, "", {"scale": FLOATS}, {})
    yield _example(sizes, "softcap and window", {"scale": FLOATS, "softcap": FLOATS}, {"softcap": 1.5, "window": 3})


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    """A prompt, the newest token of a long answer, the end of a prompt whose beginning is cached, a request that waits; and then
    a few tokens of each request, whose keys Triton splits into parts."""
    lengths, counts = (sizes.queries, sizes.keys, sizes.keys - 1, 0), (sizes.queries, 1, sizes.queries // 2, 0)
    tensors, options = _verified(generator, sizes, lengths, counts)
    yield Example(paged_attention_statistics, "requests", tensors, options, differentiable=False)
    options = {**options, "softcap": 1.5, "window": max(1, sizes.queries // 2)}
    yield Example(paged_attention_statistics, "softcap and window", tensors, options, differentiable=False)
    tensors, options = _verified(generator, sizes, (4 * sizes.keys, sizes.keys, 3, 0), (1, 3, 2, 0))
    yield Example(paged_attention_statistics, "new tokens", tensors, options, differentiable=False)


def _verified(
    generator: torch.Generator, sizes: Sizes, lengths: tuple[int, ...], counts: tuple[int, ...]
) -> tuple[Tensors, dict[str, Any]]:
    randn, requests = normal(generator), _requests(generator, lengths, counts, 16)
    key_cache = randn(int(requests["block_table"].max()) + 2, sizes.heads, 16, sizes.head_dim)
    tensors = {"query": randn(sum(counts) + 1, 2 * sizes.heads, sizes.head_dim), "key_cache": key_cache}
    groups = {"key_groups": torch.randint(-1, 3, (len(lengths), sizes.keys), generator=generator), "num_groups": 3}
    return tensors, {**requests, **groups, "statistics": COMPARED}


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    heads, group = dice.pick("Hkv", (1, 2, 3)), dice.pick("H / Hkv", (1, 1, 2, 4))
    block_size = dice.pick("block size", (1, 3, 4, 16, 17))
    size, most = dice.pick("D", DIMS), max(1, dice.pairs // (8 * heads * group))
    some = [tuple(dice.choice.choice((0, 1, 5, 16, 31, 64, 129)) for _ in range(n)) for n in (0, 1, 2, 4)]
    lengths = dice.pick("lengths", some)
    counts = tuple(min(dice.choice.choice((0, 1, 1, 2, 7, length)), length, max(1, most // max(1, length))) for length in lengths)
    dice.drawn["queries"] = counts
    requests = _requests(dice.generator, lengths, counts, block_size)
    blocks = int(requests["block_table"].max()) + 2 if requests["block_table"].numel() else 1
    if dice.pick("integers", (32, 64)) == 32:
        requests = {name: x.to(torch.int32) for name, x in requests.items()}
    cache = dice.randn(blocks, heads, block_size, size)
    unused = torch.ones(blocks, block_size, dtype=torch.bool)
    for row, length in zip(requests["block_table"], lengths, strict=True):
        for j in range(length):
            unused[row[j // block_size], j % block_size] = False
    cache = torch.where(unused[:, None, :, None], dice.gap, cache)  # what no request has
    tokens = sum(counts) + dice.pick("more", (0, 0, 2))
    tensors = {"query": dice.laid_out("query", dice.randn(tokens, heads * group, size), dtype)}
    tensors["key_cache"] = dice.laid_out("key_cache", cache, dtype, repeated=False)
    options: dict[str, Any] = {**requests, "statistics": COMPARED, "num_groups": dice.pick("G", (0, 1, 2, 3, 7))}
    if options["num_groups"] > 0:
        shape = len(lengths), dice.choice.choice((0, 5, max(lengths, default=0), 200))
        options["key_groups"] = torch.randint(-1, options["num_groups"], shape, generator=dice.generator)
    options["scale"] = dice.pick("scale", (None, None, 0.125, 1.0, 0.0, -0.5))
    options |= {"softcap": dice.pick("softcap", (None, None, 0.5, 5.0)), "window": dice.pick("window", (None, None, 1, 5, 64))}
    return Example(paged_attention_statistics, "", tensors, options, differentiable=False)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(paged_attention_statistics, "", _required(sizes, 16), {}, _arranged(sizes.batch, 16), differentiable=False)


def fit(sizes: Sizes) -> Sizes:
    """The formula's map has the keys of all requests."""
    return sizes._replace(queries=min(sizes.queries, 256), keys=min(sizes.keys, 4096))


def _requests(
    generator: torch.Generator, lengths: tuple[int, ...], counts: tuple[int, ...], block_size: int
) -> dict[str, Tensor]:
    """Requests of so many keys and queries, whose blocks are in any order; a block number of -1 comes after the last."""
    columns = [-(-length // block_size) for length in lengths]
    table = torch.full((len(lengths), max(columns, default=0) + 1), -1)
    order = torch.randperm(sum(columns), generator=generator)
    first = 0
    for row, count in zip(table, columns, strict=True):
        row[:count] = order[first : first + count]
        first += count
    starts = torch.tensor([0, *counts]).cumsum(0)
    return {"block_table": table, "lengths": torch.tensor(lengths, dtype=torch.int64), "query_starts": starts}
