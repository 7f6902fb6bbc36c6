"""Edits of attention and of states, checked as far as possible without a model."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vlattn_fast._ground.checks import check_number, describe
from vlattn_fast.interpret.intervening.records import HeadRecord, StateRecord
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
            in the box. "sound" is all tokens of a sound, and `va.Seconds(begin, end)` a stretch of it.
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
                "other_run must be of one run, va.record_heads(model, inputs); got that of several, which has only means"
            )
        object.__setattr__(self, "heads", check_heads(self.heads))
        check_group("queries", self.queries)
        check_tower(self.tower)


@dataclass(frozen=True, eq=False)
class StateEdit:
    """The base of `Residual` and `Mlp`: another state (B, N, C) at some positions. Exactly one of `set`, `add` and `scale`."""

    of: ClassVar[str]  # the kind of state

    layers: Numbers
    positions: TokenGroup | None = None
    set: float | Tensor | StateRecord | None = field(default=None, kw_only=True)
    add: Tensor | None = field(default=None, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)
    tower: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_numbers("layers", self.layers))
        check_group("positions", self.positions)
        check_tower_name(self.tower)
        names = [name for name in ("set", "add", "scale") if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(f"{type(self).__name__} needs one of set, add and scale; got {', '.join(names) or 'none'}")
        name, value = self.value
        if isinstance(value, Tensor) and name != "scale":
            if not value.is_floating_point() or value.ndim not in (1, 3):
                raise ValueError(f"{name} must be a floating-point tensor (C) or (B, N, C); got {describe(value)}")
        elif isinstance(value, StateRecord) and name == "set":
            if value.of != self.of:
                raise ValueError(f"set must be recorded with of={self.of!r}; got a record of {value.of!r}")
        elif name == "add":
            raise TypeError(f"add must be a tensor (C) or (B, N, C); got {describe(value)}")
        else:
            check_number(name, value)

    @property
    def value(self) -> tuple[str, Any]:
        """The name of the argument that is given, and its value."""
        return next((name, value) for name in ("set", "add", "scale") if (value := getattr(self, name)) is not None)


@dataclass(frozen=True, eq=False)
class Residual(StateEdit):
    """An edit of the residual stream after layers: the states that a layer hands to the next one.

    With `set` it is zero or mean ablation, or activation patching (Meng et al., NeurIPS 2022, restore states of a clean run);
    with `add` it adds a steering vector (Turner et al., 2023).

    Examples:
        >>> import torch, vlattn_fast as va
        >>> va.Residual(4, "last", add=torch.randn(32)).value[0]
        'add'

    Args:
        layers: numbers from 0, or negative from the end, -1 the last; None = all.
        positions: tokens, as `queries` of `Knockout`. None = all, those that `generate` adds among them.
        set: replaces the states: a number; a tensor (C) or (B, N, C), B or one sample; or a result of `record_states`, whose
            states have the same positions. That of a data set gives its means.
        add: a tensor (C) or (B, N, C) that is added to them.
        scale: a factor.
        tower: the name of the tower; None = that of the record, or the only one.

    Tokens that `generate` adds keep their states if values are (B, N, C), or of a run. Several edits of a layer act one after the
    other.

    Raises:
        TypeError, ValueError: an argument is invalid; not exactly one of set, add and scale.
    """

    of = "residual"


@dataclass(frozen=True, eq=False)
class Mlp(StateEdit):
    """An edit of what the MLPs of layers add to the residual stream, after a norm or factor of this output.

    A mixture of experts is one MLP. A layer with several MLPs side by side raises an error.

    Args:
        layers, positions, set, add, scale, tower: as in `Residual`; a record is one of `record_states(..., of="mlp")`.

    Raises:
        TypeError, ValueError: an argument is invalid; not exactly one of set, add and scale.
    """

    of = "mlp"


Edit = EdgeEdit | HeadEdit | StateEdit
EDITS = "va.Knockout, va.Steer, va.ScaleHeads, va.Patch, va.Residual or va.Mlp"


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


def check_tower_name(tower: Any) -> None:
    if not (tower is None or isinstance(tower, str)):
        raise TypeError(f"tower must be a name, or None; got {describe(tower)}")
