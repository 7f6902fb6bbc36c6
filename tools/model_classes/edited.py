"""One model of one class: `va.intervene` with edits of edges and of states, beside eager attention with edited maps and hooks, in
float64.

The edits are of the last tower that attends to itself: heads 0 and 1 of all layers lose edges, all heads of the first layer are
steered, and some states after it, and outputs of its MLP, are scaled. The eager model's maps of that size are multiplied by
weights, 0 where edges are cut, and divided by the sums of their rows; its states are scaled by hooks. Nothing of the package
changes them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tools.model_classes.compare import BOUND, Row, described, next_logits
from tools.tiny_models.stored import SOFTMAX
from vlattn_fast import Knockout, Mlp, Residual, Steer, intervene
from vlattn_fast.interpret.intervening.state_places import StatePlace, find_states
from vlattn_fast.interpret.intervening.traced_model import ModelCall, trace_model

WEIGHT = 3.0
FACTORS = {"residual": 0.5, "mlp": -1.5}
WITHOUT = "without "  # in a reason: the kinds of states that the class has no place for


class EditedMaps(TorchFunctionMode):
    """Multiplies the maps (B, H, N, M) or (B * H, N, M), one after the other, by `weights` (H, N, M), and divides rows by their
    sums."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.count = weights, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.logsumexp and (weight := self._weight(args[0])) is not None:  # of the scores, for a sink's share
            return result + (args[0].reshape(-1, *weight.shape[-3:]).softmax(-1) * weight).sum(-1).log().view(result.shape)
        if func not in SOFTMAX or (weight := self._weight(args[0] if args else kwargs["input"])) is None:
            return result
        self.count += 1
        weighed = result.reshape(-1, *weight.shape[-3:]) * weight
        total = weighed.sum(-1, keepdim=True)
        return (weighed / total.masked_fill(total == 0, 1.0)).view(result.shape)

    def _weight(self, scores: Tensor) -> Tensor | None:
        """(H, N, M), or (B, H, N, M), of the map that is made next of these scores; None where they make none."""
        weight = self.weights[self.count % len(self.weights)]
        heads, size, _ = weight.shape
        sinks = scores.shape[-1] - size  # whose column stays
        by_head = scores.ndim == 4 and scores.shape[1] == heads or scores.ndim == 3 and len(scores) % heads == 0
        if not by_head or scores.shape[-2] != size or sinks not in (0, 1):
            return None
        weight = nn.functional.pad(weight, (0, sinks), value=1.0)
        blind = (scores.reshape(-1, *weight.shape)[..., :size] < -1e30).all(-1, keepdim=True)
        return weight.where((weight == 0) | ~blind, 1.0)  # a finite mask over a whole row swallows what is added to it


def spans(size: int) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    """The queries and the keys between which edges are cut, and the keys that are steered."""
    middle = max(2, size // 2)
    return [(0, 1), (min(middle, size - 1), size)], (1, middle), (0, 2)


def weights_of(calls: list[ModelCall], edited: list[ModelCall], size: int) -> list[Tensor]:
    """Those of each call; ones but for the `edited` ones."""
    (queries, keys, steered), first = spans(size), edited[0].layer
    weights = []
    for call in calls:
        weight = torch.ones(call.heads, size, size)
        weights.append(weight)
        if call not in edited:
            continue
        for start, stop in queries:
            weight[:2, start:stop, slice(*keys)] = 0.0
        weight[:, :, slice(*steered)] *= WEIGHT if call.layer == first else 1.0
    return weights


@contextlib.contextmanager
def scaled_states(model: nn.Module, places: dict[str, StatePlace], size: int) -> Iterator[None]:
    """A context in which hooks scale the states of the keys that are cut, at one place of each kind."""
    handles = []
    start, stop = spans(size)[1]
    for kind, place in places.items():
        runs = itertools.count()

        def scale(_: Any, args: Any, output: Any, kind: str = kind, place: Any = place, runs: Any = runs) -> Any:
            if next(runs) != place.run[0]:
                return output
            state = output if place.element is None else output[place.element]
            rows = state.contiguous().clone()
            if place.tokens_first:
                rows.view(size, -1, place.channels)[start:stop] *= FACTORS[kind]
            else:
                rows.view(-1, size, place.channels)[:, start:stop] *= FACTORS[kind]
            return rows if place.element is None else type(output)((*output[: place.element], rows, *output[place.element + 1 :]))

        handles.append(model.get_submodule(place.path).register_forward_hook(scale))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compared(mapping: str, model: nn.Module, eager: nn.Module, inputs: dict[str, Any]) -> Row:
    """The row of a model; `eager` is the same model with eager attention."""
    try:
        traced = trace_model(model, inputs)
        itself = [call for call in traced.calls if not call.crosses and call.tower.shape[1] > 2]
        if not itself:
            return Row("cannot be compared", "no tower of three tokens attends to itself")
        tower = itself[-1].tower
        calls, size = [call for call in itself if call.tower is tower], tower.shape[1]
        sizes = calls[0].heads, size, calls[0].keys
        queries, keys, steered = spans(size)
        heads, pair = range(min(2, calls[0].heads)), (tower.name, tower.name)
        edits: list[Any] = [
            Knockout(queries=queries, keys=keys, layers={call.layer for call in calls}, heads=heads, tower=pair),
            Steer(keys=steered, layers=calls[0].layer, weight=WEIGHT, tower=pair),
        ]
        found = {kind: towers.get(tower, {}).get(calls[0].layer, "") for kind, towers in find_states(traced).items()}
        places = {kind: place for kind, place in found.items() if isinstance(place, StatePlace) and not calls[0].problem}
        states: dict[str, Any] = {"positions": keys, "layers": calls[0].layer, "tower": tower.name}
        edits += [{"residual": Residual, "mlp": Mlp}[kind](**states, scale=FACTORS[kind]) for kind in places]
        with torch.no_grad(), intervene(model, inputs, edits):
            got = next_logits(model(**inputs), inputs)
    except Exception as error:
        return Row("refused", described(error))
    try:
        with torch.no_grad():
            base = next_logits(eager(**inputs), inputs)
            alike = [call for call in traced.calls if (call.heads, call.tower.shape[1], call.keys) == sizes]
            with EditedMaps(weights_of(alike, calls, size)) as edited, scaled_states(eager, places, size):
                expected = next_logits(eager(**inputs), inputs)
    except Exception as error:
        return Row("cannot be compared", described(error))
    if edited.count != len(alike):
        return Row("cannot be compared", f"the eager model makes {edited.count} maps for {len(alike)} calls of attention")
    change = float((expected - base).abs().max())
    if change <= 1e-9:
        return Row("cannot be compared", "the edits change no logit")
    share = float((got - expected).abs().max()) / change
    if share > BOUND:
        return Row("wrong", f"logits differ by {share:.1e}")
    without = [kind for kind in FACTORS if kind not in places]
    return Row("equal", f"{share:.0e}" + (f", {WITHOUT}{' and '.join(without)}" if without else ""))
