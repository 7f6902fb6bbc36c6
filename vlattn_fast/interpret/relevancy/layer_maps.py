"""The explained token's row of each layer's map, or of each head's, from the one backward pass of `explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice, check_integer, check_items
from vlattn_fast.interpret.relevancy.cached_calls import CachedCalls
from vlattn_fast.interpret.relevancy.method import BackwardPass, Link, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace
from vlattn_fast.interpret.relevancy.traced_call import TracedCall


@dataclass(frozen=True)
class Selection:
    """The arguments `per`, `layers` and `heads` of `explain_layers`, checked."""

    per: str  # "layer" or "head"
    layers: tuple[int, ...] | None  # None = all
    heads: tuple[int, ...] | None

    @classmethod
    def check(cls, per: Any, layers: Any, heads: Any) -> Selection:
        check_choice("per", per, ("layer", "head"))
        for name, numbers in (("layers", layers), ("heads", heads)):
            if numbers is None:
                continue
            check_items(name, numbers, "numbers (-1 = the last)")
            for number in numbers:
                check_integer(name, number)
            if len(set(numbers)) < len(numbers) or not numbers:
                raise ValueError(f"{name} must be numbers that differ, at least one; got {list(numbers)}")
        return cls(per, None if layers is None else tuple(layers), None if heads is None else tuple(heads))

    def chosen(self, name: str, available: Sequence[int], tower: str) -> list[int]:
        """The numbers of the layers or heads (`name`) of a tower that has those that are `available`, in their order."""
        asked, count = getattr(self, name), available[-1] + 1
        if asked is None:
            return list(available)
        legend = f"from {-count} to {count - 1}" if len(available) == count else f"among {list(available)}, which mix tokens,"
        for number in asked:
            if not -count <= number < count or number % count not in available:
                raise ValueError(f"{name} must be {legend} in tower '{tower}'; got {number}")
        numbers = [number % count for number in asked]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} must be numbers that differ in tower '{tower}'; got {list(asked)}")
        return numbers


class LayerMaps(CachedCalls):
    """The explained token's row of each layer's map: relu(A * dA) if the method takes gradients, else A. For a pooling head the
    row is first multiplied by the head's own map.

    If towers attend to one another, an explained tower has the rows of its self-attention, and a tower that it attends to those
    of the cross-attention, by the numbers of the layers of the tower that attends.
    """

    def __init__(self, method: Method, selection: Selection) -> None:
        if not method.by_layer:
            raise ValueError(f"method must be 'gradient' or 'attention', which have a map of each layer; got {method.name!r}")
        if method.start_layer or method.through_connector:
            raise ValueError(
                f"method must have neither start_layer nor through_connector; got {method.label!r}. Choose layers with layers="
            )
        super().__init__()
        self.whole, self.selection = method, selection
        self.name, self.needs_score = method.name, method.needs_score
        self.freeze, self.of = method.freeze, method.of
        self.sinks = method.sinks

    @property
    def options(self) -> dict[str, Any]:
        return self.whole.options

    @property
    def asked(self) -> str:
        return "explain_layers"

    # --- the backward pass ---

    def ran(self, explained: Sequence[TowerTrace], attended: Sequence[TowerTrace], calls: Sequence[Link]) -> None:
        for tower in (*explained, *attended) if attended else ():
            queries = [tower] if tower in explained else explained
            tower.links = [call for call in calls if call.source is tower and call.tower in queries]

    def counts(self, tower: TowerTrace) -> tuple[list[int], list[int]]:
        """The numbers of the layers and of the heads of a tower that are asked for."""
        blocks, by_head = self._blocks(tower), self.selection.per == "head" or self.selection.heads is not None
        if not blocks:  # of a tower whose tokens do not attend to one another
            return [], []
        layers = self.selection.chosen("layers", sorted(blocks), tower.name)
        several = next((blocks[layer] for layer in layers if len(blocks[layer]) > 1), None)
        if several is not None and by_head:
            paths = " and ".join(f"'{call.path}'" for call in several)
            raise ValueError(
                "per must be 'layer', without heads=, unless layers= leaves out the layers that mix tokens several times; got "
                f"{paths} in layer {several[0].layer} of '{tower.name}'"
            )
        counts = {max(call.query.shape[1], call.value.shape[1]) for layer in layers for call in blocks[layer]}
        if len(counts) > 1 and by_head:
            raise ValueError(
                "per must be 'layer', without heads=, unless layers= chooses layers with the same number of heads; got "
                f"{sorted(counts)} in '{tower.name}'"
            )
        return layers, self.selection.chosen("heads", range(max(counts)), tower.name)

    def _blocks(self, tower: TowerTrace) -> dict[int, list[TracedCall]]:
        """The calls of each layer, by its number."""
        blocks: dict[int, list[TracedCall]] = {}
        for call in [link.attention for link in tower.links] or tower.cached:
            blocks.setdefault(call.layer, []).append(call)
        return blocks

    def n_vectors_of(self, tower: TowerTrace) -> int:
        layers, heads = self.counts(tower)
        return len(layers) * (len(heads) if self.selection.per == "head" else 1)

    def carry(self, backward: BackwardPass) -> list[Tensor]:
        numbers = [self.counts(tower) for tower in backward.towers]
        tower_layers = [self._blocks(tower) for tower in backward.towers]
        pairs = zip(tower_layers, numbers, strict=True)
        by_tower = self.rows_of_towers(backward, [[blocks[layer] for layer in layers] for blocks, (layers, _) in pairs])
        return [self._joined(rows, heads) for rows, (_, heads) in zip(by_tower, numbers, strict=True)]

    def between(self, backward: BackwardPass) -> list[Tensor]:
        towers = [*backward.towers, *backward.attended]
        calls = [call for tower in towers for call in tower.links]
        grads = dict(zip(calls, self.gradients(backward, [call.attention for call in calls]), strict=True))
        starts = dict(zip(backward.towers, backward.starts, strict=True))

        def layer_rows(tower: TowerTrace, layer: int, like: Tensor) -> Tensor:
            """The rows (B, H, M) of a layer that gives `tower` relevancy."""
            links = [link for link in tower.links if link.attention.layer == layer]
            if all(link.tower is tower for link in links):
                return self._of_block(tower, [(link.attention, grads[link]) for link in links], starts[tower])
            rows = [self.rows_of_call(link.attention, starts[link.tower], grads[link]).to(like) for link in links]
            return rows[0] if len(rows) == 1 else torch.stack([row.mean(1, keepdim=True) for row in rows]).sum(0)

        joined = []
        for tower in towers:
            layers, heads = self.counts(tower)
            like = starts.get(tower, backward.starts[0])
            rows = [layer_rows(tower, layer, like) for layer in layers]
            joined.append(self._joined(rows, heads) if rows else like.new_zeros(len(like), 0, tower.size))
        return joined

    def _joined(self, rows: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
        """The rows (B, H, M) of layers as (B, K, M), of the heads that are asked for or of their mean."""
        chosen = [row[:, heads[: row.shape[1]]] for row in rows]
        return torch.cat(chosen, 1) if self.selection.per == "head" else torch.stack([row.mean(1) for row in chosen], 1)
