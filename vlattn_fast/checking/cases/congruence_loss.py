"""Calls of congruence_loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import torch

from vlattn_fast.backends.reference.congruence_loss import KINDS, NORMALIZATIONS
from vlattn_fast.checking.cases._dice import DIMS, LENGTHS, Dice, poison
from vlattn_fast.checking.cases._example import FLOATS, Example, Sizes, Tensors, normal
from vlattn_fast.ops.congruence_loss import congruence_loss

LONGEST = 400  # tokens of a text or an image


def _in_pairs(t: Tensors) -> dict[str, Any]:
    return {"text": (t["text_query"], t["text_key"]), "image": (t["image_query"], t["image_key"])}


def _name(kind: str, normalize: str) -> str:
    return f"{kind}, rows as they are" if normalize == "none" else kind


def _required(sizes: Sizes) -> Tensors:
    lengths = {"text_query": sizes.queries, "text_key": sizes.queries, "image_query": sizes.keys, "image_key": sizes.keys}
    return {name: torch.randn(sizes.batch, sizes.heads, length, sizes.head_dim) for name, length in lengths.items()}


def examples(sizes: Sizes) -> Iterator[Example]:
    yield Example(congruence_loss, "", _required(sizes), {}, _in_pairs, {"scale": FLOATS})
    for kind, normalize in itertools.product(KINDS, NORMALIZATIONS):
        if (name := _name(kind, normalize)) != "cacr":
            options = {"kind": kind, "normalize": normalize, "reduction": "none"}
            yield Example(congruence_loss, name, _required(sizes), options, _in_pairs, {"scale": FLOATS})


def verify(generator: torch.Generator, sizes: Sizes) -> Iterator[Example]:
    randn, b = normal(generator), sizes.batch
    lengths = {"text_query": sizes.queries, "text_key": sizes.queries, "image_query": sizes.keys, "image_key": sizes.keys}
    blocks = {name: randn(b, sizes.heads, length, sizes.head_dim) for name, length in lengths.items()}
    masks = {"text_mask": torch.rand(b, sizes.queries, generator=generator) > 0.2}
    masks["image_mask"] = torch.rand(b, sizes.keys, generator=generator) > 0.3
    for kind, normalize in itertools.product(KINDS, NORMALIZATIONS):
        options = {"kind": kind, "normalize": normalize, "reduction": "none", **masks}
        yield Example(congruence_loss, _name(kind, normalize), blocks, options, _in_pairs)


def draw(dice: Dice, dtype: torch.dtype) -> Example:
    batch, heads = dice.pick("B", (1, 2, 3)), dice.pick("H", (1, 2, 4))
    text, image = dice.pick("L", LENGTHS[:15]), dice.pick("V", LENGTHS[:17])
    dim = dice.pick("D", DIMS)
    options: dict[str, Any] = {
        "kind": dice.pick("kind", KINDS),
        "normalize": dice.pick("normalize", NORMALIZATIONS),
        "direction": dice.pick("direction", ("text", "image", "both")),
        "reduction": dice.pick("reduction", ("mean", "none")),
        "scale": dice.pick("scale", (None, 0.25)),
    }
    if dice.chance(0.6):
        options |= {"text_mask": dice.bools(batch, text), "image_mask": dice.bools(batch, image)}
    lengths = {"text": text, "image": image}
    names = [f"{side} {part}" for side in lengths for part in ("query", "key")]
    if crossed := dice.pick("cross", (False, True)):
        names += ["cross text query", "cross image key", "cross image query", "cross text key"]
    tensors = {}
    for name in names:
        side = "text" if "text" in name else "image"
        x = poison(dice.randn(batch, heads, lengths[side], dim), options.get(f"{side}_mask"))
        tensors[name] = dice.laid_out(name, x, dtype, repeated=f"{side}_mask" not in options)

    def arrange(t: Tensors) -> dict[str, Any]:
        call: dict[str, Any] = {side: (t[f"{side} query"], t[f"{side} key"]) for side in lengths}
        if crossed:
            call["cross"] = ((t["cross text query"], t["cross image key"]), (t["cross image query"], t["cross text key"]))
        return call

    return Example(congruence_loss, "", tensors, options, arrange)


def host(sizes: Sizes) -> Iterator[Example]:
    yield Example(congruence_loss, "", _required(sizes), {}, _in_pairs)


def fit(sizes: Sizes) -> Sizes:
    return sizes._replace(queries=min(sizes.queries, LONGEST), keys=min(sizes.keys, LONGEST))


def cliff(sizes: Sizes, dice: Random) -> Example:
    return replace(next(host(sizes)), options={"kind": dice.choice(KINDS), "normalize": dice.choice(NORMALIZATIONS)})
