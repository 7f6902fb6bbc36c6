"""One forward pass of a model with a stream of words and another of image tokens, such as LXMERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast.attach.attention_calls import IMAGE, TEXT, AttentionCall
from vlattn_fast.interpret.probing.layout import Layout
from vlattn_fast.interpret.probing.watched import Seen, Sets, Watched, behind, both_ways, checked, one_way


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
        # by the kinds of a call, for each sample and number of a pair of sets: the maxima of each layer
        maxima: dict[tuple[int, int], dict[tuple[int, int], list[Tensor]]]
        maxima = {(TEXT, IMAGE): {}, (IMAGE, TEXT): {}, (IMAGE, IMAGE): {}}
        words = int(inputs["input_ids"].shape[1])

        def sees(number: int, call: AttentionCall) -> None:
            nonlocal layout
            kinds = call.kinds, call.key_kinds
            if kinds == (TEXT, TEXT):
                numbers.append(number)
            if kinds not in maxima:
                return  # of neither stream
            with torch._C.DisableTorchFunction():
                checked(call)
                if layout is None:
                    image = call.query if call.kinds == IMAGE else call.key
                    layout = self.layouts.of_two(inputs, (image.shape[0], image.shape[2]))
                    asked.extend(sets(layout) if sets is not None else [])
                if not statistics or not asked:
                    return
                of_words = kinds != (IMAGE, IMAGE)
                places = [[i for i, (one, _) in enumerate(pairs) if (one[0] < words) == of_words] for pairs in asked]
                chosen = []
                for pairs, some in zip(asked, places, strict=True):
                    ones = ([i if of_words else i - words for i in pairs[place][0]] for place in some)
                    twos = ([i - words for i in pairs[place][1]] for place in some)
                    chosen.append(list(zip(twos, ones, strict=True) if kinds == (IMAGE, TEXT) else zip(ones, twos, strict=True)))
                most = one_way(call, chosen) if of_words else both_ways(call, chosen)
                for sample, some in enumerate(places):
                    for index, place in enumerate(some):
                        maxima[kinds].setdefault((sample, place), []).append(most[sample][:, index])

        states = self.forward(inputs, sees)
        if layout is None or not numbers:
            raise ValueError(f"model must attend to words and to image tokens; got neither in {type(self.model).__name__}")

        def layers(place: tuple[int, int]) -> Tensor:
            """(L, H, 2); L = 0 without such a layer."""
            there, back, both = (by_place.get(place, []) for by_place in maxima.values())
            if len(there) == len(back):
                both = [torch.stack(ways, -1) for ways in zip(there, back, strict=True)] or both
            return torch.stack(both) if both else torch.zeros(0, 0, 2, dtype=torch.float64)

        of_samples = [[layers((sample, place)) for place in range(len(pairs))] for sample, pairs in enumerate(asked)]
        return Seen(layout, None, None, of_samples, behind(self.model, numbers, states, words))
