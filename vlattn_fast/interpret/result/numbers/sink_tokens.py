"""Tokens that receive attention without content, as an explanation names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NAMED = 5  # tokens of a line


@dataclass(frozen=True)
class Sink:
    """A token of one sample that some layers attend to without content.

    Args:
        tower: the key in `Explanation.relevancy`.
        index: its position in the tower.
        reader: the tower whose tokens attend to it; in self-attention the same.
        layers: the numbers of the reader's layers in which it is a sink; a pooling head counts as one more layer.
        shares: layer -> its share of the layer's attention, the mean over heads and queries; all layers of the reader.
        norms: layer -> the norm of its values over the median of the tokens.
        place: (image, y, x) of a patch: which of the sample's maps, and where on its grid; else None.
        word: its name, if it has an id; else None.
        removed: its share is left out of the maps.
    """

    tower: str
    index: int
    reader: str
    layers: tuple[int, ...]
    shares: dict[int, float]
    norms: dict[int, float]
    place: tuple[int, int, int] | None = None
    word: str | None = None
    removed: bool = False

    @property
    def name(self) -> str:
        """Its tower and position, and its word or patch."""
        where = self.word if self.place is None else f"patch y {self.place[1]}, x {self.place[2]}"
        return f"{self.tower} {self.index}" + ("" if where is None else f" ({where})")


class Sinks(list[list[Sink]]):
    """The tokens of each sample that receive attention without content; printed, one line that names them."""

    def __repr__(self) -> str:
        return sinks_line(self)


def as_sinks(samples: Any) -> Sinks:
    """Sinks by sample, also from JSON. TypeError for anything else."""
    try:
        return Sinks([one if isinstance(one, Sink) else _of_json(**one) for one in sample] for sample in samples)
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"sinks must be a list of Sinks for each sample; got {samples!r}") from error


def _of_json(layers: Any, shares: Any, norms: Any, place: Any, **others: Any) -> Sink:
    """JSON has lists for tuples, and strings for the numbers of layers."""
    layer_shares, layer_norms = ({int(layer): value for layer, value in each.items()} for each in (shares, norms))
    return Sink(
        layers=tuple(layers), shares=layer_shares, norms=layer_norms, place=None if place is None else tuple(place), **others
    )


def sinks_line(samples: Sequence[Sequence[Sink]] | None) -> str:
    """One line that names the sinks of all samples, those of the most attention first; "" if `samples` is None."""
    if samples is None:
        return ""
    by_name: dict[tuple[int, str], float] = {}
    for number, sample in enumerate(samples):
        for sink in sample:
            key = number, sink.name
            by_name[key] = max(by_name.get(key, 0.0), *(sink.shares[layer] for layer in sink.layers))
    if not by_name:
        return "No token receives attention without content."
    ordered = sorted(by_name.items(), key=lambda item: -item[1])
    sample_name = (lambda number: f"sample {number}: ") if len(samples) > 1 else lambda number: ""
    named = [f"{sample_name(number)}{name}, up to {share:.0%} of a layer" for (number, name), share in ordered[:_NAMED]]
    more = f"; and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    removed = any(sink.removed for sample in samples for sink in sample)
    return f"Attention without content{', left out of the maps' if removed else ''}: {'; '.join(named)}{more}."
