"""Calls of maxsim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vlattn_fast.checking.cases._dice import DIMS, LENGTHS, Dice
from vlattn_fast.checking.cases._example import Example, Sizes, Tensors, normal
from vlattn_fast.ops.maxsim import maxsim


def _required(sizes: Sizes) -> Tensors:
    shapes = {"queries": (sizes.captions, sizes.words), "documents": (sizes.images, sizes.regions)}
    return {name: torch.randn(*shape, sizes.features) for name, shape in shapes.items()}


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(maxsim, "", _required(sizes))


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    randn = normal(generator)
    shapes = {"queries": (4, sizes.words), "documents": (sizes.images, sizes.regions)}
    tensors = {name: torch.nn.functional.normalize(randn(*shape, sizes.features), dim=-1) for name, shape in shapes.items()}
    masks = {"query_mask": torch.rand(4, sizes.words, generator=generator) > 0.2}
    masks["document_mask"] = torch.rand(sizes.images, sizes.regions, generator=generator) > 0.2
    masks["document_mask"][0] = False
    yield Example(maxsim, "all tokens", tensors)
    yield Example(maxsim, "masks", tensors, masks)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    few = (0,) * dice.chance(0.1)
    counts = {"queries": dice.pick("A", (1, 2, 3, *few)), "documents": dice.pick("B", (1, 2, 5, *few))}
    lengths = {"queries": dice.pick("N", LENGTHS[:15]), "documents": dice.pick("M", LENGTHS)}
    features = dice.pick("D", DIMS)
    tensors, options = {}, dict[str, Any]()
    for name, count in counts.items():
        x = dice.randn(count, lengths[name], features)
        if masked := dice.chance(0.5):
            mask = options[f"{name.removesuffix('s').replace('querie', 'query')}_mask"] = dice.bools(count, lengths[name])
            x = torch.where(mask[..., None], x, torch.nan)
        tensors[name] = dice.laid_out(name, x, dtype, repeated=not masked)
    return Example(maxsim, "", tensors, options)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(maxsim, "", _required(sizes))


def fit(sizes: Sizes) -> Sizes:
    """As many tokens as queries and keys, in as many queries and documents as samples and heads."""
    counts = {"captions": sizes.batch, "images": sizes.heads}
    return sizes._replace(words=min(sizes.queries, 64), regions=min(sizes.keys, 1024), features=sizes.head_dim, **counts)
