"""One forward pass of a model: what its attention says, layer by layer, and the states behind each layer.

Only statistics of the attention stay (`attention_statistics`); queries and keys of a layer are gone before the next one runs.
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
from vlattn_fast.interpret.probing.sight import sees_both
from vlattn_fast.ops.attention_statistics import attention_statistics

_REMEDY = "Use scaled_dot_product_attention or transformers' attention interface, and name the inputs by modality="
_KEYS = 16  # groups of one key each in one call: so much of a map is there at a time
Sets = tuple[list[int], list[int]]  # two sets of positions in a sample's sequence


@dataclass
class Seen:
    """A pass over B samples, as L layers with H heads showed it."""

    layout: Layout
    mass: Tensor | None  # (L, B, H, 3), attention of the read row on text, image and special tokens; None of two streams
    crossing: Tensor | None  # (L, B, H), the largest attention on all text of an image token that sees both; NaN without one
    maxima: list[list[Tensor]]  # of each sample and two sets of tokens (L, H, 2), the largest attention in both directions
    states: list[Tensor]  # of each layer (B, N, C); of two streams those of the text


class Watched:
    """Runs a model, and keeps statistics of the attention of its one stream; `special` and `modality` as in `probe`."""

    def __init__(self, model: nn.Module, layouts: Layouts, modality: Mapping[str, str], special: bool) -> None:
        self.model, self.layouts, self.modality, self.special = model, layouts, modality, special

    def run(self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True) -> Seen:
        """One pass. ValueError for attention of another score than the dot product, or of two streams.

        Args:
            sets: a callable(layout) -> of each sample the sets of tokens whose attention to one another is asked for.
            statistics: False = states alone.
        """
        kinds = 0
        for name, value in inputs.items():
            kinds |= kind_of(name, self.modality) if isinstance(value, Tensor) else 0
        # Queries that look at the image are learnt: image tokens of these come from no input.
        tower = self.layouts.tower
        learnt = tower is not None and tower.kind.image_ids and tower.grid in (None, derived_grids.derived)
        layout: Layout | None = None
        numbers, beside = list[int](), list[int]()
        mass, crossing, maxima = list[Tensor](), list[Tensor](), list[list[Tensor]]()

        def sees(number: int, call: AttentionCall) -> None:
            nonlocal layout
            in_stream = call.kinds == kinds or (learnt and call.kinds == FROM_TEXT)
            if call.kinds != call.key_kinds or not in_stream:
                beside.append(number)  # of a tower in front of the one stream, or cross-attention
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
                read = torch.arange(shape[0], device=device), slice(None), layout.row.to(device)
                mass.append(masses[read].double().cpu())
                on_text = masses[..., TEXT].double().where(sees_both(masks, layout, groups), -torch.inf).amax(-1)
                crossing.append(on_text.where(on_text.isfinite(), torch.nan).cpu())
                if sets is not None:
                    maxima.append(both_ways(call, sets(layout)))

        states = self.forward(inputs, sees)
        if layout is None:
            kind = "words" if kinds == FROM_TEXT else "words and image tokens in one stream"
            saw = f"no attention over {kind} in {type(self.model).__name__}, but {len(beside)} other calls"
            raise ValueError(f"probe saw {saw}. {_REMEDY}")
        whole = behind(self.model, numbers, states, layout.parts.shape[1])
        samples = range(len(layout.parts)) if maxima else ()
        by_sample = [list(torch.stack([layer[number] for layer in maxima]).unbind(2)) for number in samples]
        masses, crossings = (torch.stack(values) if values else torch.zeros(0) for values in (mass, crossing))
        return Seen(layout, masses, crossings, by_sample, whole)

    def forward(self, inputs: Mapping[str, Any], sees: Callable[[int, AttentionCall], None]) -> dict[int, Tensor]:
        """One pass, which hands each call to `sees`; returns the first tensor behind each call's layer."""
        states: dict[int, Tensor] = {}

        def leaves(number: int, result: Any) -> None:
            state = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(state, Tensor) and state.ndim == 3:
                states[number] = state.detach()

        arguments = self.layouts.adapter.called(inputs)
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            arguments.setdefault("use_cache", False)
        kinds = TokenKinds(self.model, self.modality, sees=sees, leaves=leaves)
        with dispatched(self.model), kinds.observer(keeps_order=True):
            self.model(**arguments)
        return states


class TwoStreams(Watched):
    """Runs a model with a stream of words and another of image tokens, such as LXMERT. Image tokens are counted behind the words.

    A phrase and a region have maxima in the layers where words and image attend to one another both ways; two regions have maxima
    in the layers of the image's own stream. No softmax here covers both text and image.
    """

    def run(self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True) -> Seen:
        """See `Watched.run`."""
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

        def sees(number: int, call: AttentionCall) -> None:
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
                places = [[i for i, (one, _) in enumerate(pairs) if (one[0] < words) == from_words] for pairs in asked]
                chosen = []
                for pairs, some in zip(asked, places, strict=True):
                    ones = ([i if from_words else i - words for i in pairs[place][0]] for place in some)
                    twos = ([i - words for i in pairs[place][1]] for place in some)
                    first, second = (twos, ones) if kinds == (FROM_IMAGE, FROM_TEXT) else (ones, twos)
                    chosen.append(list(zip(first, second, strict=True)))
                most = one_way(call, chosen) if from_words else both_ways(call, chosen)
                for sample, some in enumerate(places):
                    for index, place in enumerate(some):
                        maxima[kinds].setdefault((sample, place), []).append(most[sample][:, index])

        states = self.forward(inputs, sees)
        if layout is None or not numbers:
            raise ValueError(f"probe saw no attention over words and image tokens in {type(self.model).__name__}. {_REMEDY}")

        def layers(place: tuple[int, int]) -> Tensor:
            """(L, H, 2); L = 0 without such a layer."""
            there, back, both = (by_place.get(place, []) for by_place in maxima.values())
            if len(there) == len(back):
                both = [torch.stack(ways, -1) for ways in zip(there, back, strict=True)] or both
            return torch.stack(both) if both else torch.zeros(0, 0, 2, dtype=torch.float64)

        by_sample = [[layers((sample, place)) for place in range(len(pairs))] for sample, pairs in enumerate(asked)]
        return Seen(layout, None, None, by_sample, behind(self.model, numbers, states, words))


def checked(call: AttentionCall) -> Mapping[str, Any]:
    """Its masks. ValueError for attention whose statistics cannot be had."""
    if call.masks is None or call.score != "dot":
        what = "attention that is written out by hand" if call.masks is None else f"the score {call.score!r}"
        raise ValueError(f"model must attend by a dot product, by calls of torch or transformers; got {what}")
    return call.masks


def behind(model: nn.Module, numbers: Sequence[int], states: Mapping[int, Tensor], size: int) -> list[Tensor]:
    """The states (B, size, C) behind the layers of some calls."""
    whole = [states[number] for number in numbers if number in states and states[number].shape[1] == size]
    if len(whole) != len(numbers):
        got = f"{len(whole)} such states behind {len(numbers)} layers of {type(model).__name__}"
        raise ValueError(f"model must hold its layers in a list and give (B, {size}, C) behind each; got {got}")
    return whole


def both_ways(call: AttentionCall, sets: Sequence[Sequence[Sets]]) -> list[Tensor]:
    """(H, sets, 2) for each sample: both directions."""
    there, back = one_way(call, sets), one_way(call, [[(two, one) for one, two in pairs] for pairs in sets])
    return [torch.stack(both, -1) for both in zip(there, back, strict=True)]


def one_way(call: AttentionCall, sets: Sequence[Sequence[Sets]]) -> list[Tensor]:
    """(H, sets) for each sample: the largest attention of the first set on the second.

    A group of keys that is one key has its weight as mass: so single weights are read, and no map.
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
