"""Recipes against words that do not rest on the image: functions that return edits for `va.intervene`, chosen by statistics.

Each takes the model's inputs and, if it looks at an answer, the ids that the model generated without edits. `tower` is None for a
decoder that has patches and words in one sequence, and (words', patches') for one that looks at the image by cross-attention,
such as ("text", "vision"). The recipes change what a run computes, and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vlattn_fast as va

Inputs = Mapping[str, Any]
Answer = Sequence[Sequence[int]]
Tower = tuple[str, str] | None
Edits = list[va.Steer | va.Knockout | va.ScaleHeads]


def raise_image(weight: float, layers: Sequence[int], tower: Tower = None) -> Edits:
    """More of the image for the newest token: its attention to the patches times `weight` before its normalisation or, if the
    image has an attention of its own, what that adds times `weight`.

    PAI (Liu, Zheng, Chen, "Paying more attention to image", ECCV 2024) adds alpha |s| to each score s of the newest token with a
    patch, and then contrasts the prediction with one without the image. Here log(weight) is added to each, and nothing is
    contrasted.
    """
    if tower is not None:
        return [va.ScaleHeads(dict.fromkeys(layers), weight, tower=tower)]
    return [va.Steer(queries="last", keys="image", weight=weight, layers=layers)]


def even_heads(model: nn.Module, inputs: Inputs, answer: Answer, share: float) -> dict[int, list[int]]:
    """Layer -> the heads among the `share` whose attention to the image is most even, in the mean over the answers' tokens."""
    entropy = va.token_grounding(model, inputs, answer=answer, maps=False).by_head["attention_entropy"].nanmean((0, 1))  # (L, H)
    known = entropy[~entropy.isnan()]  # of the layers that attend to the image
    least = known.topk(max(1, round(share * len(known)))).values[-1]
    return {
        layer: [head for head, even in enumerate(row) if even]
        for layer, row in enumerate((entropy >= least).tolist())
        if any(row)
    }


def cut_even_heads(heads: Mapping[int, Sequence[int]], tower: Tower = None) -> Edits:
    """Takes the text from heads, those of `even_heads`: the newest token sees only the image there. Heads of a cross-attention
    see no text, and are switched off.

    After Fox (Yu et al., arXiv 2606.27596), which finds heads that ignore the image by the entropy of their attention to it, and
    cuts them from the text by saturated logits. We had its abstract and not its formulas: the mean over an answer, the share of
    heads, and a mask in place of saturated logits are ours.
    """
    if tower is not None:
        return [va.ScaleHeads(heads, 0.0, tower=tower)]
    return [va.Knockout(queries="last", keys="text", layers=layer, heads=some) for layer, some in heads.items()]


def evidence(model: nn.Module, inputs: Inputs, answer: Answer, threshold: float = 1.5) -> Tensor:
    """(B, patches) in [0, 1]: in how many layers a patch becomes salient that was not so in the layer before, as a part of the
    most. Salient patches get more than `threshold` times the mean attention in the half of the heads that look at the image
    most (ILVAD: Xie et al., arXiv 2605.20965, by a published note on it)."""
    maps = va.explain_layers(model, inputs, answer=answer, per="head", method="attention").image
    assert isinstance(maps, Tensor)
    heads = maps.flatten(3)  # (L, H, B, patches)
    looks = heads.sum(-1, keepdim=True)
    seen = torch.where(looks >= looks.median(1, keepdim=True).values, heads, 0).sum(1)
    salient = (seen > threshold * seen.mean(-1, keepdim=True)).double()
    gained = salient.diff(dim=0).clamp(min=0).sum(0)
    return gained / gained.amax(-1, keepdim=True).clamp(min=1)


def raise_evidence(found: Tensor, image: Tensor, alpha: float, tower: Tower = None) -> Edits:
    """The attention of the newest token to a patch times exp(alpha S), S of `evidence`. image: bool (B, N), the places of the
    patches in their tower. ILVAD also raises the answer's own words that attend to S, and chooses the heads; both are left
    out."""
    levels = torch.zeros(image.shape, dtype=found.dtype).masked_scatter(image, found)
    known = [float(level) for level in levels.unique() if level > 0]
    return [va.Steer(queries="last", keys=levels == s, weight=torch.tensor(alpha * s).exp().item(), tower=tower) for s in known]


def cut_sinks(model: nn.Module, inputs: Inputs, size: int, tower: Tower = None) -> Edits:
    """Cuts the token that distracts the newest one most: of the sinks of `va.find_sinks`, the one with the largest share of a
    layer's attention. A sample without a sink keeps all of its tokens; no edits if none has one. size: tokens of the tower."""
    sinks = va.find_sinks(model, inputs)
    reader, seen = tower or ("language", "language")
    mask = torch.zeros(len(sinks), size, dtype=torch.bool)
    for row, of_sample in zip(mask, sinks, strict=True):
        if own := [sink for sink in of_sample if (sink.reader, sink.tower) == (reader, seen)]:
            row[max(own, key=lambda sink: max(sink.shares.values())).index] = True
    return [va.Knockout(queries="last", keys=mask, tower=tower)] if bool(mask.any()) else []
