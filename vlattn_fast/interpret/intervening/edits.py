"""Edits of attention, checked as far as possible without a model."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlattn_fast._ground.checks import check_number, describe
from vlattn_fast.interpret.intervening.head_record import HeadRecord
from vlattn_fast.interpret.intervening.token_sets import TokenGroup, check_group

Numbers = int | Iterable[int] | None  # of layers or heads, from 0, or negative from the end; None = all


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeEdit(abc.ABC):
    """The base of `Knockout` and `Steer`: adds a number to the logits of some queries with some keys. Information flows from the
    keys to the queries: an edge is written key -> query."""

    queries: TokenGroup | None = None
    keys: TokenGroup | None = None
    layers: Numbers = None
    heads: Numbers = None
    tower: str | tuple[str, str] | None = None

    def __post_init__(self) -> None:
        check_group("queries", self.queries)
        check_group("keys", self.keys)
        object.__setattr__(self, "layers", check_numbers("layers", self.layers))
        object.__setattr__(self, "heads", check_numbers("heads", self.heads))
        check_tower(self.tower)
        if self.queries is None and self.keys is None and self.heads is None:
            what = type(self).__name__
            raise ValueError(f"queries, keys or heads must be given, since {what} without them edits all attention; got none")

    @property
    @abc.abstractmethod
    def bias(self) -> float:
        """The number that is added."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Knockout(EdgeEdit):
    """An edit that cuts edges of attention: these queries do not see these keys.

    It acts as a mask: the other keys share the attention, and a query without keys gives zeros. Information flows from keys to
    queries, so the edge that is cut is keys -> queries. This is attention knockout (Geva et al., EMNLP 2023; for vision-language
    models Basu et al., 2024, and "Cross-modal Information Flow in MLLMs", CVPR 2025).

    Examples:
        >>> import vlattn_fast as va
        >>> va.Knockout(queries="last", keys="image", layers=range(10, 16)).bias
        -inf

    Args:
        queries: tokens: a name, a span (start, stop) or several, or bool (B, N). None = all. Names are "image" ("image:0" for one
            of several), "text" (all words, including the answer's), "question" (words without the answer's), "answer" (the
            answer's tokens, and those that `generate` adds), "last" (the last real token, a word or not, and in `generate` the
            newest token; for inputs with an answer the tokens that predict it) and "special" (real tokens that are neither words
            nor patches nor an answer, such as [CLS] and registers). Names may overlap; "question - last" is one without another,
            among the tokens of the inputs. ("image", (x1, y1, x2, y2)), relative to the image, selects the patches with centres
            in the box.
        keys: tokens, likewise. None = all.
        layers: numbers from 0, or negative from the end, -1 the last; None = all.
        heads: likewise. Queries, keys or heads must be given.
        tower: the name of the tower with these queries, if several towers have such tokens; (queries', keys') if a tower also
            attends to another. None = the only one that has them.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    @property
    def bias(self) -> float:
        return -math.inf


@dataclass(frozen=True, eq=False, kw_only=True)
class Steer(EdgeEdit):
    """An edit that multiplies the attention of these queries to these keys by `weight` before its normalisation.

    log(weight) is added to the logits. PASTA (Zhang et al., ICLR 2024) does the same with weights below 1 for all other keys.

    Args:
        queries, keys, layers, heads, tower: as in `Knockout`.
        weight: above 0; 1 changes nothing.

    Raises:
        TypeError, ValueError: an argument is invalid; for a weight of 0 use `Knockout`.
    """

    weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight", self.weight)
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0 (va.Knockout cuts edges); got {self.weight!r}")

    @property
    def bias(self) -> float:
        return math.log(self.weight)


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """The base of `ScaleHeads` and `Patch`: another output for some heads."""


@dataclass(frozen=True, eq=False)
class ScaleHeads(HeadEdit):
    """An edit that scales the outputs of heads, before the output projection: mean + factor * (output - mean).

    Args:
        heads: {layer: heads}, numbers from 0, or negative from the end; heads None = all of the layer.
        factor: any finite number; 0 removes the heads, or replaces their outputs with the mean.
        mean: a `HeadRecord` with the means; with factor 0 this is mean ablation. None = zero.
        tower: as in `Knockout`.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    heads: Mapping[int, Numbers]
    factor: float
    mean: HeadRecord | None = None
    tower: str | tuple[str, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", check_heads(self.heads))
        check_number("factor", self.factor)
        if self.mean is not None and not isinstance(self.mean, HeadRecord):
            raise TypeError(f"mean must be a result of va.record_heads, or None; got {describe(self.mean)}")
        check_tower(self.tower)


@dataclass(frozen=True, eq=False)
class Patch(HeadEdit):
    """An edit that replaces the outputs of heads with those of another run (activation patching).

    References: Vig et al., NeurIPS 2020; Wang et al., ICLR 2023.

    Args:
        other_run: the result of `va.record_heads(model, inputs)` for another run of a model of this class, with the same number
            of tokens and of samples (or one).
        heads: {layer: heads}, numbers from 0, or negative from the end; heads None = all of the layer.
        queries: the tokens whose outputs are replaced, as in `Knockout`. None = all. Tokens that `generate` adds keep their own.
        tower: as in `Knockout`.

    Raises:
        TypeError, ValueError: an argument is invalid; `other_run` has only means.
    """

    other_run: HeadRecord
    heads: Mapping[int, Numbers]
    queries: TokenGroup | None = None
    tower: str | tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.other_run, HeadRecord):
            raise TypeError(f"other_run must be a result of va.record_heads; got {describe(self.other_run)}")
        if self.other_run.outputs is None:
            raise ValueError(
                "other_run must be of one run, va.record_heads(model, inputs); got that of a data set, which has only means"
            )
        object.__setattr__(self, "heads", check_heads(self.heads))
        check_group("queries", self.queries)
        check_tower(self.tower)


Edit = EdgeEdit | HeadEdit


def check_numbers(name: str, numbers: Any) -> tuple[int, ...] | None:
    """Sorted numbers without repeats; negative ones count from the end, which is not known here. None = all."""
    if numbers is None:
        return None
    listed = [numbers] if type(numbers) is int else numbers
    if isinstance(listed, (str, Tensor)) or not isinstance(listed, Iterable):
        raise TypeError(f"{name} must be a number, numbers, or None; got {describe(numbers)}")
    listed = tuple(dict.fromkeys(listed))
    if not listed or not all(type(number) is int for number in listed):
        raise ValueError(f"{name} must be ints, at least one, -1 for the last; got {numbers!r:.80}")
    return tuple(sorted(listed))


def check_heads(heads: Any) -> dict[int, tuple[int, ...] | None]:
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads must be a dict {{layer: heads}}; got {describe(heads)}")
    if not heads:
        raise ValueError("heads must name a layer; got an empty dict")
    check_numbers("heads", list(heads))
    return {layer: check_numbers("heads", layer_heads) for layer, layer_heads in heads.items()}


def check_tower(tower: Any) -> None:
    pair = isinstance(tower, tuple) and len(tower) == 2 and all(isinstance(name, str) for name in tower)
    if not (tower is None or isinstance(tower, str) or pair):
        raise TypeError(f"tower must be a name, a pair of names, or None; got {describe(tower)}")
