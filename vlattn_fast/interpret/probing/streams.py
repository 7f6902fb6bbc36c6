"""One forward pass of a model: statistics of its attention, layer by layer, and the states after each layer.

Memory holds only `attention_statistics`; queries and keys of a layer are freed before the next one runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.session import dispatched
from vlattn_fast.attach.token_kinds import IMAGE as FROM_IMAGE
from vlattn_fast.attach.token_kinds import TEXT as FROM_TEXT
from vlattn_fast.attach.token_kinds import AttentionCall, TokenKinds, kind_of
from vlattn_fast.interpret.adapters import derived_grids
from vlattn_fast.interpret.probing.layout import TEXT, Layout, Layouts
from vlattn_fast.interpret.probing.visibility import sees_both
from vlattn_fast.ops.attention_statistics import attention_statistics

_REMEDY = "Use scaled_dot_product_attention or transformers' attention interface, and name the inputs by modality="
_KEYS = 16  # groups of one key each in one call: so many columns of a map are in memory at a time
Sets = tuple[list[int], list[int]]  # two sets of positions in a sample's sequence


@dataclass
class ForwardPass:
    """What a pass over B samples gave, in L layers with H heads."""

    layout: Layout
    mass: Tensor | None  # (L, B, H, 3), attention of the explained position to text, image, special tokens; None for two streams
    crossing: Tensor | None  # (L, B, H), the largest attention to all text of an image token that sees both; NaN without one
    maxima: list[list[Tensor]]  # of each sample and two sets of tokens (L, H, 2), the largest attention in both directions
    states: list[Tensor]  # of each layer (B, N, C); for two streams those of the text


class OneStream:
    """Runs a model, and computes statistics of the attention of its one stream; `special` and `modality` as in `probe`."""

    def __init__(self, model: nn.Module, layouts: Layouts, modality: Mapping[str, str], special: bool) -> None:
        self.model, self.layouts, self.modality, self.special = model, layouts, modality, special

    def run(self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True) -> ForwardPass:
        """Runs one pass. ValueError for attention with another score than the dot product, or over two streams.

        Args:
            sets: a callable(layout) -> for each sample, the pairs of sets of tokens whose attention to one another is asked for.
            statistics: False = only states.
        """
        kinds = 0
        for name, value in inputs.items():
            kinds |= kind_of(name, self.modality) if isinstance(value, Tensor) else 0
        # Queries that look at the image are learned: their image tokens come from no input.
        tower = self.layouts.tower
        learned = tower is not None and tower.kind.image_ids and tower.grid in (None, derived_grids.derived)
        layout: Layout | None = None
        numbers, others = list[int](), list[int]()
        mass, crossing, maxima = list[Tensor](), list[Tensor](), list[list[Tensor]]()

        def on_call(number: int, call: AttentionCall) -> None:
            nonlocal layout
            in_stream = call.kinds == kinds or (learned and call.kinds == FROM_TEXT)
            if call.kinds != call.key_kinds or not in_stream:
                others.append(number)  # of a tower before the one stream, or cross-attention
                return
            numbers.append(number)
            with torch._C.DisableTorchFunction():
                shape = call.query.shape[0], call.query.shape[2]
                layout = self.layouts.of(inputs, shape) if layout is None else layout
                if tuple(layout.parts.shape) != shape or call.key.shape[2] != shape[1]:
                    raise ValueError(
                        f"inputs must give the whole sequence in one forward pass; got {shape[1]} queries and "
                        f"{call.key.shape[2]} keys in a layer of {tuple(layout.parts.shape)} tokens"
                    )
                masks, device = checked(call), call.query.device
                if not statistics:
                    return
                groups = layout.groups(self.special).to(device)
                by_kind = {"key_groups": groups, "num_groups": 3, "statistics": ("mass",), **masks}
                masses = attention_statistics(call.query, call.key, **by_kind).mass  # (B, H, N, 3)
                explained = torch.arange(shape[0], device=device), slice(None), layout.position.to(device)
                mass.append(masses[explained].double().cpu())
                on_text = masses[..., TEXT].double().where(sees_both(masks, layout, groups), -torch.inf).amax(-1)
                crossing.append(on_text.where(on_text.isfinite(), torch.nan).cpu())
                if sets is not None:
                    maxima.append(both_ways(call, sets(layout)))

        states = self.forward(inputs, on_call)
        if layout is None:
            kind = "words" if kinds == FROM_TEXT else "words and image tokens in one stream"
            got = f"none in {type(self.model).__name__}, but {len(others)} other calls"
            raise ValueError(f"model must attend over {kind}; got {got}. {_REMEDY}")
        whole = states_after(self.model, numbers, states, layout.parts.shape[1])
        samples = range(len(layout.parts)) if maxima else ()
        by_sample = [list(torch.stack([layer[number] for layer in maxima]).unbind(2)) for number in samples]
        masses, crossings = (torch.stack(values) if values else torch.zeros(0) for values in (mass, crossing))
        return ForwardPass(layout, masses, crossings, by_sample, whole)

    def forward(self, inputs: Mapping[str, Any], on_call: Callable[[int, AttentionCall], None]) -> dict[int, Tensor]:
        """Runs one pass, which hands each call to `on_call`; returns the first tensor after each call's layer."""
        states: dict[int, Tensor] = {}

        def leaves(number: int, result: Any) -> None:
            state = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(state, Tensor) and state.ndim == 3:
                states[number] = state.detach()

        arguments = self.layouts.adapter.called(inputs)
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            arguments.setdefault("use_cache", False)
        kinds = TokenKinds(self.model, self.modality, sees=on_call, leaves=leaves)
        with dispatched(self.model), kinds.observer(keeps_order=True):
            self.model(**arguments)
        return states


class TwoStreams(OneStream):
    """Runs a model with a stream of words and one of image tokens, such as LXMERT. Image tokens count after the words.

    A phrase and a region have maxima in the layers in which words and image attend to one another; two regions have maxima
    in the layers of the image's own stream. No softmax here covers both text and image.
    """

    def run(self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True) -> ForwardPass:
        """See `OneStream.run`."""
        layout: Layout | None = None
        numbers: list[int] = []
        asked: list[list[Sets]] = []
        # by the kinds of a call, for each sample and number of a pair of sets: the maxima of each layer
        maxima: dict[tuple[int, int], dict[tuple[int, int], list[Tensor]]]
        maxima = {(FROM_TEXT, FROM_IMAGE): {}, (FROM_IMAGE, FROM_TEXT): {}, (FROM_IMAGE, FROM_IMAGE): {}}
        if not isinstance(ids := inputs.get("input_ids"), Tensor):
            adapter = self.layouts.adapter
            raise ValueError(f"inputs must contain {adapter.names[1]!r}, the texts; got {sorted(adapter.called(inputs))}")
        words = int(ids.shape[1])

        def on_call(number: int, call: AttentionCall) -> None:
            nonlocal layout
            kinds = call.kinds, call.key_kinds
            if kinds == (FROM_TEXT, FROM_TEXT):
                numbers.append(number)
            if kinds not in maxima:
                return  # of neither stream
            with torch._C.DisableTorchFunction():
                checked(call)
                if layout is None:
                    image = call.query if call.kinds == FROM_IMAGE else call.key
                    layout = self.layouts.two_streams(inputs, (image.shape[0], image.shape[2]))
                    asked.extend(sets(layout) if sets is not None else [])
                if not statistics or not asked:
                    return
                from_words = kinds != (FROM_IMAGE, FROM_IMAGE)
                indices = [[i for i, (one, _) in enumerate(pairs) if (one[0] < words) == from_words] for pairs in asked]
                chosen = []
                for pairs, some in zip(asked, indices, strict=True):
                    ones = ([i if from_words else i - words for i in pairs[index][0]] for index in some)
                    twos = ([i - words for i in pairs[index][1]] for index in some)
                    first, second = (twos, ones) if kinds == (FROM_IMAGE, FROM_TEXT) else (ones, twos)
                    chosen.append(list(zip(first, second, strict=True)))
                most = one_way(call, chosen) if from_words else both_ways(call, chosen)
                for sample, some in enumerate(indices):
                    for column, index in enumerate(some):
                        maxima[kinds].setdefault((sample, index), []).append(most[sample][:, column])

        states = self.forward(inputs, on_call)
        if layout is None or not numbers:
            name = type(self.model).__name__
            raise ValueError(f"model must attend over words and image tokens; got no such call in {name}. {_REMEDY}")

        def layers(place: tuple[int, int]) -> Tensor:
            """(L, H, 2); L = 0 without such a layer."""
            there, back, both = (by_place.get(place, []) for by_place in maxima.values())
            if len(there) == len(back):
                both = [torch.stack(ways, -1) for ways in zip(there, back, strict=True)] or both
            return torch.stack(both) if both else torch.zeros(0, 0, 2, dtype=torch.float64)

        by_sample = [[layers((sample, place)) for place in range(len(pairs))] for sample, pairs in enumerate(asked)]
        return ForwardPass(layout, None, None, by_sample, states_after(self.model, numbers, states, words))


def checked(call: AttentionCall) -> Mapping[str, Any]:
    """The masks of a call. ValueError for attention without statistics."""
    if call.masks is None or call.score != "dot":
        what = "attention that is written out by hand" if call.masks is None else f"the score {call.score!r}"
        raise ValueError(f"model must attend by a dot product, by calls of torch or transformers; got {what}")
    return call.masks


def states_after(model: nn.Module, numbers: Sequence[int], states: Mapping[int, Tensor], size: int) -> list[Tensor]:
    """The states (B, size, C) after the layers of some calls."""
    whole = [states[number] for number in numbers if number in states and states[number].shape[1] == size]
    if len(whole) != len(numbers):
        got = f"{len(whole)} such states after {len(numbers)} layers of {type(model).__name__}"
        raise ValueError(f"model must have its layers in a list, and return (B, {size}, C) from each; got {got}")
    return whole


def both_ways(call: AttentionCall, sets: Sequence[Sequence[Sets]]) -> list[Tensor]:
    """(H, sets, 2) for each sample: both directions."""
    there, back = one_way(call, sets), one_way(call, [[(two, one) for one, two in pairs] for pairs in sets])
    return [torch.stack(both, -1) for both in zip(there, back, strict=True)]


def one_way(call: AttentionCall, sets: Sequence[Sequence[Sets]]) -> list[Tensor]:
    """(H, sets) for each sample: the largest attention of the first set to the second.

    A group of one key has its attention weight as mass: this gives single weights without a map.
    """
    fixed = {"statistics": ("mass",), **checked(call)}
    batch, heads = call.query.shape[:2]
    keys = [sorted({token for _, part in pairs for token in part}) for pairs in sets]
    largest = [torch.zeros(heads, len(pairs), dtype=torch.float64) for pairs in sets]
    for start in range(0, max(map(len, keys), default=0), _KEYS):
        chosen = [tokens[start : start + _KEYS] for tokens in keys]
        groups = torch.full((batch, call.key.shape[2]), -1)
        for number, tokens in enumerate(chosen):
            groups[number, tokens] = torch.arange(len(tokens))
        by_group = {"key_groups": groups.to(call.query.device), "num_groups": max(map(len, chosen)), **fixed}
        mass = attention_statistics(call.query, call.key, **by_group).mass
        for number, pairs in enumerate(sets):
            for index, (one, two) in enumerate(pairs):
                if columns := [i for i, token in enumerate(chosen[number]) if token in two]:
                    most = mass[number][:, one][..., columns].double().cpu().amax((1, 2))
                    largest[number][:, index] = torch.maximum(largest[number][:, index], most)
    return largest
