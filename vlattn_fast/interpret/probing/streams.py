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

from vlattn_fast.attach.events import AttentionEvent
from vlattn_fast.attach.session import dispatched
from vlattn_fast.attach.token_kinds import IMAGE as FROM_IMAGE
from vlattn_fast.attach.token_kinds import TEXT as FROM_TEXT
from vlattn_fast.attach.token_kinds import TokenKinds, kind_of
from vlattn_fast.interpret.adapters import derived_grids
from vlattn_fast.interpret.probing.layout import TEXT, Layout, Layouts
from vlattn_fast.interpret.probing.visibility import sees_both
from vlattn_fast.ops.attention_statistics import attention_statistics

_REMEDY = "Use scaled_dot_product_attention or transformers' attention interface, and name the inputs by modality="
_WORDS, _ACROSS = (FROM_TEXT, FROM_TEXT), ((FROM_TEXT, FROM_IMAGE), (FROM_IMAGE, FROM_TEXT))
_KINDS = (*_ACROSS, (FROM_IMAGE, FROM_IMAGE), _WORDS)  # of the calls of two streams: those of queries and of keys
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
    joint: list[Tensor]  # the same with words and image; for two streams after each layer in which both attend to one another
    outputs: (
        Tensor | None
    )  # (L, B, H, Dv), the weighted mean over tokens of each head's output; None = not asked for, or not seen


Weights = Callable[[Layout], Tensor]  # double (B, N), by which states and outputs of a sequence are averaged


class OneStream:
    """Runs a model, and computes statistics of the attention of its one stream; `special` and `modality` as in `probe`."""

    def __init__(self, model: nn.Module, layouts: Layouts, modality: Mapping[str, str], special: bool) -> None:
        self.model, self.layouts, self.modality, self.special = model, layouts, modality, special

    def run(
        self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True, weights: Weights | None = None
    ) -> ForwardPass:
        """Runs one pass. ValueError for attention with another score than the dot product, or over two streams.

        Args:
            sets: a callable(layout) -> for each sample, the pairs of sets of tokens whose attention to one another is asked for.
            statistics: False = only states.
            weights: those of the tokens in the means of the heads' outputs. None = no output is gathered.
        """
        stream = self._kinds(inputs)
        layout: Layout | None = None
        numbers, others = list[int](), list[int]()
        mass, crossing, maxima = list[Tensor](), list[Tensor](), list[list[Tensor]]()

        def on_call(number: int, call: AttentionEvent) -> None:
            nonlocal layout
            if call.kinds != call.key_kinds or call.kinds not in stream:
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
                masks = checked(call)
                if statistics:
                    for kept, one in zip((mass, crossing), self._of_kinds(call, masks, layout), strict=True):
                        kept.append(one)
                    if sets is not None:
                        maxima.append(both_ways(call, sets(layout)))

        means: dict[int, Tensor] = {}

        def on_output(number: int, output: Tensor) -> None:
            if weights is not None and layout is not None and number in numbers[-1:]:
                with torch._C.DisableTorchFunction():
                    means[number] = mean_output(output, weights(layout))

        states = self.forward(inputs, on_call, on_output)
        if layout is None:
            kind = "words" if stream == {FROM_TEXT} else "words and image tokens in one stream"
            got = f"none in {type(self.model).__name__}, but {len(others)} other calls"
            raise ValueError(f"model must attend over {kind}; got {got}. {_REMEDY}")
        whole = states_after(self.model, numbers, states, layout.parts.shape[1])
        samples = range(len(layout.parts)) if maxima else ()
        by_sample = [list(torch.stack([layer[number] for layer in maxima]).unbind(2)) for number in samples]
        masses, crossings = (torch.stack(values) if values else torch.zeros(0) for values in (mass, crossing))
        return ForwardPass(layout, masses, crossings, by_sample, whole, whole, stacked(means, numbers))

    def _kinds(self, inputs: Mapping[str, Any]) -> set[int]:
        """The kinds of inputs that a call of the stream may have its tokens from."""
        kinds = 0
        for name, value in inputs.items():
            kinds |= kind_of(name, self.modality) if isinstance(value, Tensor) else 0
        # Queries that look at the image are learned: their image tokens come from no input.
        tower = self.layouts.tower
        learned = tower is not None and tower.kind.image_ids and tower.grid in (None, derived_grids.derived)
        return {kinds, FROM_TEXT} if learned else {kinds}

    def _of_kinds(self, call: AttentionEvent, masks: Mapping[str, Any], layout: Layout) -> tuple[Tensor, Tensor]:
        """`mass` (B, H, 3) and `crossing` (B, H) of a layer."""
        device = call.query.device
        groups = layout.groups(self.special).to(device)
        by_kind = {"key_groups": groups, "num_groups": 3, "statistics": ("mass",), **masks}
        masses = attention_statistics(call.query, call.key, **by_kind).mass  # (B, H, N, 3)
        explained = torch.arange(len(groups), device=device), slice(None), layout.position.to(device)
        on_text = masses[..., TEXT].double().where(sees_both(masks, layout, groups), -torch.inf).amax(-1)
        return masses[explained].double().cpu(), on_text.where(on_text.isfinite(), torch.nan).cpu()

    def forward(
        self, inputs: Mapping[str, Any], on_call: Callable[[int, AttentionEvent], None], on_output: Callable[[int, Tensor], None]
    ) -> dict[int, Tensor]:
        """Runs one pass, which hands each call to `on_call`, and the output of its heads to `on_output`; returns the state after
        each call's layer: of several, the first one of the kind of the call's queries."""
        states: dict[int, Tensor] = {}
        queries: dict[int, int] = {}  # the kinds of each call's queries

        def sees(number: int, call: AttentionEvent) -> None:
            queries[number] = call.kinds
            on_call(number, call)

        def leaves(number: int, result: Any) -> None:
            several = isinstance(result, (tuple, list))
            every = [x for x in (result if several else (result,)) if isinstance(x, Tensor) and x.ndim == 3]
            alike = [x for x in every if kinds.kinds_of(x) == queries[number]]
            if every:
                states[number] = (alike or every)[0].detach()

        arguments = self.layouts.adapter.called(inputs)
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            arguments.setdefault("use_cache", False)
        kinds = TokenKinds(self.model, self.modality, sees=sees, leaves=leaves, outputs=on_output)
        with dispatched(self.model), kinds.observer(keeps_order=True):
            self.model(**arguments)
        return states


class TwoStreams(OneStream):
    """Runs a model with a stream of words and one of image tokens, such as LXMERT. Image tokens count after the words.

    A phrase and a region have maxima in the layers in which words and image attend to one another; two regions, and two words,
    have maxima in the layers of their own stream. No softmax here covers both text and image.
    """

    def run(
        self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True, weights: Weights | None = None
    ) -> ForwardPass:
        """See `OneStream.run`. Outputs are those of the heads in which words attend to words."""
        if not isinstance(ids := inputs.get("input_ids"), Tensor):
            adapter = self.layouts.adapter
            raise ValueError(f"inputs must contain {adapter.names[1]!r}, the texts; got {sorted(adapter.called(inputs))}")
        layout: Layout | None = None
        words = int(ids.shape[1])
        calls: dict[tuple[int, int], list[int]] = {kinds: [] for kinds in (_WORDS, *_ACROSS)}
        maxima = _Maxima(sets, words) if statistics and sets is not None else None

        def on_call(number: int, call: AttentionEvent) -> None:
            nonlocal layout
            kinds = call.kinds, call.key_kinds
            if kinds in calls:
                calls[kinds].append(number)
            if kinds not in _KINDS:
                return  # of neither stream
            with torch._C.DisableTorchFunction():
                if kinds != _WORDS:
                    checked(call)
                    image = call.query if call.kinds == FROM_IMAGE else call.key
                    shape = image.shape[0], image.shape[2]
                    layout = self.layouts.two_streams(inputs, shape) if layout is None else layout
                if maxima is not None:
                    maxima.add(call, layout)

        numbers, means = calls[_WORDS], dict[int, Tensor]()

        def on_output(number: int, output: Tensor) -> None:
            if weights is not None and number in numbers[-1:]:
                with torch._C.DisableTorchFunction():
                    means[number] = mean_output(output, weights(self.layouts.text(inputs)))

        states = self.forward(inputs, on_call, on_output)
        if layout is None or not numbers:
            name = type(self.model).__name__
            raise ValueError(f"model must attend over words and image tokens; got no such call in {name}. {_REMEDY}")
        whole = states_after(self.model, numbers, states, words)
        of_words, of_image = ([states.get(number) for number in calls[kinds]] for kinds in _ACROSS)
        joint = joined(of_words, of_image, (words, layout.parts.shape[1] - words))
        by_sample = [] if maxima is None else maxima.by_sample()
        return ForwardPass(layout, None, None, by_sample, whole, joint, stacked(means, numbers))


class _Maxima:
    """The maxima that a pass over two streams is asked for: those of a pair of sets are in layers from one to the other."""

    def __init__(self, sets: Callable[[Layout], list[list[Sets]]], words: int) -> None:
        self.sets, self.words = sets, words
        self.asked: list[list[Sets]] = []
        self.waiting: list[AttentionEvent] = []
        # by the kinds of a call, for each sample and number of a pair: the maxima of each layer
        self.layers: dict[tuple[int, int], dict[tuple[int, int], list[Tensor]]] = {kinds: {} for kinds in _KINDS}

    def add(self, call: AttentionEvent, layout: Layout | None) -> None:
        """Adds those of a call. It waits for the layout, which is None until it is known how many image tokens there are."""
        self.waiting.append(call)
        if layout is not None:
            self.asked = self.asked or self.sets(layout)
            for one in self.waiting:
                self._add(one)
            self.waiting.clear()

    def _add(self, call: AttentionEvent) -> None:
        """Adds those of the pairs of which one set is among the call's queries and the other among its keys."""
        kinds = call.kinds, call.key_kinds
        ordered = _ACROSS[0] if (across := kinds in _ACROSS) else kinds  # a phrase comes first, and then its region
        first, second = (0 if kind == FROM_TEXT else self.words for kind in ordered)
        chosen = [
            {
                number: ([token - first for token in one], [token - second for token in two])
                for number, (one, two) in enumerate(pairs)
                if tuple(FROM_TEXT if part[0] < self.words else FROM_IMAGE for part in (one, two)) == ordered
            }
            for pairs in self.asked
        ]
        if kinds == _ACROSS[1]:
            chosen = [{number: (two, one) for number, (one, two) in pairs.items()} for pairs in chosen]
        most = (one_way if across else both_ways)(call, [[*pairs.values()] for pairs in chosen])
        for sample, pairs in enumerate(chosen):
            for column, number in enumerate(pairs):
                self.layers[kinds].setdefault((sample, number), []).append(most[sample][:, column])

    def by_sample(self) -> list[list[Tensor]]:
        """(L, H, 2) of each sample and pair; L = 0 without such a layer."""
        return [[self._of((sample, number)) for number in range(len(pairs))] for sample, pairs in enumerate(self.asked)]

    def _of(self, place: tuple[int, int]) -> Tensor:
        there, back, of_image, of_text = (self.layers[kinds].get(place, []) for kinds in _KINDS)
        both = of_image or of_text
        if len(there) == len(back):
            both = [torch.stack(ways, -1) for ways in zip(there, back, strict=True)] or both
        return torch.stack(both) if both else torch.zeros(0, 0, 2, dtype=torch.float64)


def checked(call: AttentionEvent) -> Mapping[str, Any]:
    """The masks of a call. ValueError for attention without statistics."""
    if call.masks is None or call.score != "dot":
        what = "attention that is written out by hand" if call.masks is None else f"the score {call.score!r}"
        raise ValueError(f"model must attend by a dot product, by calls of torch or transformers; got {what}")
    return call.masks


def mean_output(output: Tensor, weights: Tensor) -> Tensor:
    """Means (B, H, Dv) over the tokens of a call's output (B, H, N, Dv), with weights (B, N)."""
    return torch.einsum("bn,bhnd->bhd", weights[:, : output.shape[2]].to(output.device), output.double()).cpu()


def stacked(means: Mapping[int, Tensor], numbers: Sequence[int]) -> Tensor | None:
    """The means of the calls with these numbers (L, B, H, Dv); None if one is missing."""
    return torch.stack([means[number] for number in numbers]) if means and set(numbers) <= means.keys() else None


def joined(words: Sequence[Tensor | None], regions: Sequence[Tensor | None], sizes: tuple[int, int]) -> list[Tensor]:
    """The states of words and of image tokens together, of the layers that return both."""
    pairs = zip(words, regions, strict=True) if len(words) == len(regions) else ()
    both = [(one, two) for one, two in pairs if one is not None and two is not None]
    fits = [(one, two) for one, two in both if (one.shape[1], two.shape[1]) == sizes and one.shape[2] == two.shape[2]]
    return [torch.cat(pair, 1) for pair in fits]


def states_after(model: nn.Module, numbers: Sequence[int], states: Mapping[int, Tensor], size: int) -> list[Tensor]:
    """The states (B, size, C) after the layers of some calls."""
    whole = [states[number] for number in numbers if number in states and states[number].shape[1] == size]
    if len(whole) != len(numbers):
        got = f"{len(whole)} such states after {len(numbers)} layers of {type(model).__name__}"
        raise ValueError(f"model must have its layers in a list, and return (B, {size}, C) from each; got {got}")
    return whole


def both_ways(call: AttentionEvent, sets: Sequence[Sequence[Sets]]) -> list[Tensor]:
    """(H, sets, 2) for each sample: both directions."""
    there, back = one_way(call, sets), one_way(call, [[(two, one) for one, two in pairs] for pairs in sets])
    return [torch.stack(both, -1) for both in zip(there, back, strict=True)]


def one_way(call: AttentionEvent, sets: Sequence[Sequence[Sets]]) -> list[Tensor]:
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
