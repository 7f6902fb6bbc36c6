"""One forward pass of a model with a stream of words and another of image tokens, such as LXMERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.attach.attention_calls import IMAGE, TEXT, AttentionCall
from vlattn_fast.interpret.probing.layout import Layout
from vlattn_fast.interpret.probing.watched import Seen, Sets, Watched, behind, both_ways, checked, one_way

Place = tuple[int, int]  # a sample, and the number of a pair of sets in it


class TwoStreams(Watched):
    """Image tokens are counted behind the words.

    A phrase and a region have maxima in the layers where words and image attend to one another both ways; two regions have maxima
    in the layers of the image's own stream. No softmax here covers both text and image.
    """

    def run(self, inputs: Mapping[str, Any], sets: Any = None, statistics: bool = True) -> Seen:
        """See `Watched.run`."""
        layout: Layout | None = None
        numbers: list[int] = []
        asked: list[list[Sets]] = []
        of_words: dict[tuple[int, int], list[dict[Place, Tensor]]] = {(TEXT, IMAGE): [], (IMAGE, TEXT): []}
        of_regions: list[dict[Place, Tensor]] = []
        words = int(inputs["input_ids"].shape[1])

        def sees(number: int, call: AttentionCall) -> None:
            nonlocal layout
            kinds = call.kinds, call.key_kinds
            if kinds == (TEXT, TEXT):
                numbers.append(number)
                return
            if kinds not in of_words and kinds != (IMAGE, IMAGE):
                return  # of neither stream
            with torch._C.DisableTorchFunction():
                checked(call)
                if layout is None:
                    image = call.query if call.kinds == IMAGE else call.key
                    layout = self.layouts.of_two(inputs, (image.shape[0], image.shape[2]))
                    asked.extend(sets(layout) if sets is not None else [])
                if not statistics or not asked:
                    return
                chosen, places = _chosen(asked, words, with_words=kinds != (IMAGE, IMAGE))
                if kinds == (IMAGE, IMAGE):
                    of_regions.append(_by_place(both_ways(call, chosen), places))
                else:
                    turned = [[(two, one) if kinds == (IMAGE, TEXT) else (one, two) for one, two in pairs] for pairs in chosen]
                    of_words[kinds].append(_by_place(one_way(call, turned), places))

        states = self.forward(inputs, sees)
        if layout is None or not numbers:
            raise ValueError(f"model must attend to words and to image tokens; got neither in {type(self.model).__name__}")
        there, back = of_words.values()
        crossing = []
        if len(there) == len(back):
            crossing = [{p: torch.stack([one[p], two[p]], -1) for p in one} for one, two in zip(there, back, strict=True)]
        maxima = []
        for number, pairs in enumerate(asked):
            layers = [crossing if one[0] < words else of_regions for one, _ in pairs]
            by_layer = [[layer[number, i] for layer in mine] for i, mine in enumerate(layers)]
            # (L, H, 2) each; L = 0 without such a layer
            maxima.append([torch.stack(one) if one else torch.zeros(0, 0, 2, dtype=torch.float64) for one in by_layer])
        return Seen(layout, None, None, maxima, behind(self.model, numbers, states, words))


def _chosen(asked: list[list[Sets]], words: int, with_words: bool) -> tuple[list[list[Sets]], list[list[int]]]:
    """The sets that a call has maxima of, as positions in its streams, and their numbers."""
    places = [[i for i, (one, _) in enumerate(pairs) if (one[0] < words) == with_words] for pairs in asked]
    chosen = []
    for pairs, numbers in zip(asked, places, strict=True):
        some = (pairs[i] for i in numbers)
        chosen.append([([i if with_words else i - words for i in one], [i - words for i in two]) for one, two in some])
    return chosen, places


def _by_place(maxima: list[Tensor], places: list[list[int]]) -> dict[Place, Tensor]:
    """Maxima (H, ...) by sample and set."""
    return {(number, place): maxima[number][:, i] for number, some in enumerate(places) for i, place in enumerate(some)}
