"""Does the push of a part foretell how the attention of a head changes if the part is removed?

A push is a derivative (`va.score_parts`): how much a part raises a group's share of a head's attention. What it foretells of a
removal is the push of the part in the keys and in the queries, summed. Truly removed (`va.intervene`), a head or an MLP outputs
0, and the embedding is taken from the stream after the first layer: norms, later heads and later MLPs change, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast import Mlp, Residual, ScaleHeads, attention_statistics, intervene, score_parts
from vlattn_fast.interpret.result.numbers.rank_correlation import rank_correlation
from vlattn_lab.experiments.flow.samples import Asked
from vlattn_lab.experiments.planted_circuits.models import HEADS, Circuit, Samples

KINDS = ("embedding", "head", "mlp")  # of parts


@dataclass
class Layer:
    """A layer of self-attention.

    projections: the modules of queries and of keys, or one of queries, keys and values. groups: bool (B, N) by name; each token
    is in one of them. read: the group, of one token each, whose attention is measured. first: the module that takes the
    embedding; None = the stream is normalised after each sum, so that nothing can be taken from it.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    number: int
    heads: int
    projections: Sequence[nn.Module]
    groups: Mapping[str, Tensor]
    read: str
    first: nn.Module | None
    tower: str | None = None
    masks: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def masses(self) -> Tensor:
        """(H, G): the attention of each head to each group, the mean over the samples."""
        outputs = dict[nn.Module, Tensor]()
        with ExitStack() as stack:
            for module in self.projections:
                stack.enter_context(
                    module.register_forward_hook(lambda module, _, output: outputs.__setitem__(module, output.clone()))
                )
            self.model(**self.inputs)
        projected = torch.cat([outputs[module] for module in self.projections], -1)
        width = projected.shape[-1] // (3 if len(self.projections) == 1 else 2)
        query, key = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected.split(width, -1)[:2])
        numbers = torch.stack([*self.groups.values()]).long().argmax(0)
        options = {"statistics": ("mass",), "key_groups": numbers, "num_groups": len(self.groups), **self.masks}
        mass = attention_statistics(query.contiguous(), key.contiguous(), **options).mass  # (B, H, N, G)
        return mass.transpose(1, 2)[self.groups[self.read]].double().mean(0)

    @torch.no_grad()
    def embedding(self) -> Tensor:
        assert self.first is not None
        kept = list[Tensor]()
        with self.first.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone())):
            self.model(**self.inputs)
        return kept[0]

    def removed(self, part: str) -> Any:
        """The edit that removes a part, such as "head 0.3", "cross-head 2.1" or "mlp 0"; None = there is none."""
        if part == "embedding":
            return None if self.first is None else Residual(0, add=-self.embedding(), tower=self.tower)
        kind, _, place = part.partition(" ")
        if kind == "mlp":
            return Mlp(int(place), set=0, tower=self.tower)
        layer, head = map(int, place.split("."))
        return ScaleHeads({layer: head}, 0.0, tower=("text", "vision") if kind == "cross-head" else self.tower)

    def correlations(self) -> dict[str, float | None]:
        """The rank correlation of what the push foretells with the attention that is lost without the part, over all parts of a
        kind, heads and groups; None for a kind that is not removed."""
        options: dict[str, Any] = {"groups": self.groups, "queries": self.groups[self.read], "tower": self.tower}
        table = score_parts(self.model, self.inputs, self.number, parts="heads", **options)
        foretold = torch.stack([(table.push[name] + table.query_push[name]).mean(0) for name in self.groups], 1)  # (H, G, P)
        plain, pairs = self.masses(), dict[str, list[Tensor]]()
        for number, name in enumerate(table.names[:-1]):  # all but "rest"
            if (edit := self.removed(name)) is not None:
                with intervene(self.model, self.inputs, edit):
                    lost = plain - self.masses()
                kind = next(kind for kind in KINDS if kind in name)
                pairs.setdefault(kind, []).append(torch.stack([foretold[..., number], lost]).flatten(1))
        found = {kind: rank_correlation(*torch.cat(numbers, 1)) for kind, numbers in pairs.items()}
        return {kind: None if (value := found.get(kind)) is None else round(value, 4) for kind in KINDS}


def of_planted(circuit: Circuit, samples: Samples) -> Layer:
    """The last layer, at the token that gives the answer."""
    model: Any = circuit.model
    read = samples.groups, samples.read
    if circuit.is_causal:
        first, last = model.transformer.h
        return Layer(model, samples.inputs, 1, HEADS, [last.attn.c_attn], *read, first, masks={"is_causal": True})
    attention = model.visual_bert.encoder.layer[1].attention.self
    return Layer(model, samples.inputs, 1, HEADS, [attention.query, attention.key], *read, None)


def of_scenes(model: Any, asked: Asked) -> Layer:
    """The last layer of the text tower, at the token that gives the answer."""
    before, attention = model.text.encoder.layers, model.layers[-1].self_attention
    masks = {"key_mask": asked.inputs["attention_mask"].bool(), "is_causal": attention.is_causal}
    projections = [attention.query, attention.key]
    number = len(before) + len(model.layers) - 1
    return Layer(
        model, asked.inputs, number, attention.num_heads, projections, asked.text, "last", before[0], tower="text", masks=masks
    )
