"""Choices that properties combine: sizes, features, dtypes, masks, layouts, heads that share keys, rows, threads."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers.ops import tile_edges
from tests.helpers.ops.masks import MASKS
from tests.helpers.ops.properties import SMALL, calls
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.cases._dice import lay_out

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WITHOUT_MASKS = {
    "paged_attention_statistics": "requests have lengths and a window",
    "congruence_loss": "it masks tokens, not pairs",
    "stacked_cross_attention": "it has lengths",
    "maxsim": "it masks tokens, not pairs",
    "recurrent_step": "a recurrence is causal",
    "relevancy_residual": "it adds token by token",
    ("score_attention", "sdpa"): "it has masks of keys alone: tests/ops/test_sdpa.py",
}


class Choice(NamedTuple):
    pair: tuple[int, int]  # of queries and keys
    features: tuple[int, int]  # of queries and of values
    dtype: torch.dtype
    mask: str
    layout: str
    heads: int  # of keys, which two of queries may share
    rows: int  # that are carried
    threads: int

    def __str__(self) -> str:
        return " ".join(map(str, self)).replace("torch.", "")


def choices(pairs: tile_edges.Pairs, features: tile_edges.Pairs, *dtypes: torch.dtype) -> list[Choice]:
    """As many as pairs or masks; all else takes turns."""
    layouts = "contiguous", "rows padded", "heads last", "offset by one", "features first"
    turns = features, dtypes, ("", *MASKS), layouts, (2, 1), (1, 3, 2, 70), (1, 2, 3, 7)
    rows = zip(*map(itertools.cycle, (pairs, *turns)), strict=True)
    count = max(len(pairs), len(MASKS) + 1)
    return [Choice(*each) for _, each in zip(range(count), rows, strict=False)]


CHOICES = {
    "streaming": choices([(5, 7), (1, 18), (17, 16)], [(8, 6), (3, 9)], torch.float64, F32, BF16),
    "cpu": choices(tile_edges.CPU, [(17, 9), (4, 4), (64, 65), (1, 257), (16, 33)], F32, BF16, F16),
    "triton": choices(
        tile_edges.TRITON + tile_edges.TRITON_16_BIT, [(17, 9), (64, 81), (5, 1), (128, 129), (130, 193)], BF16, F32
    ),
}
CHOICES["cpu"] += choices(
    [(n, n) for n in tile_edges.CPU_COPIED] + list(tile_edges.CPU_SEVERAL), [(17, 9), (32, 17)], F16, BF16, F32
)


def chosen(operator: str, backend: str, choice: Choice) -> list[Example]:
    """The operator's calls of these sizes, under the mask if it has any."""
    (n, m), (d, dv) = choice.pair, choice.features
    if operator in ("congruence_loss", "stacked_cross_attention"):  # whose formulas have many maps
        n, m = min(n, 65), min(m, 130)
    sizes = SMALL._replace(queries=n, keys=m, regions=m, words=max(4, n), head_dim=d, value_dim=dv, rows=choice.rows, heads=2)
    found = calls(operator, backend, sizes, choice.dtype)
    if choice.mask and operator not in WITHOUT_MASKS:
        found = [call for call in found if "other heads" not in call.title]
        shapes = [(call.tensors["query"].shape, call.tensors["key"].shape[2]) for call in found]
        masks = [MASKS[choice.mask](B=b, H=1 if operator == "indexer_divergence" else h, N=n, M=m) for (b, h, n, _), m in shapes]
        found = [replace(call, options={**call.options, **mask}) for call, mask in zip(found, masks, strict=True)]
    return found


def laid_out(call: Example, choice: Choice) -> tuple[Example, dict[str, Tensor]]:
    made = call.in_dtype(choice.dtype)
    tensors = {name: lay_out(x, choice.layout if x.dim() > 1 else "contiguous") for name, x in made.items()}
    return replace(call, options=call.placed_options(tensors)), tensors
