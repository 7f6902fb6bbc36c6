"""The fields of an `Explanation`, checked, and the properties that figures and tables use."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_tensor, describe
from vlattn_fast.interpret.result.numbers.sink_tokens import Sink, as_sinks

_BY_SAMPLE = ("text", "regions", "boxes", "scores", "gap", "target", "answer", "text_positions", "sinks")
_OF_TEXT = ("words", "token_ids")
_INTEGERS = ("image_samples", "token_ids", "target", "answer", "text_positions", "photos")


@dataclass(frozen=True, eq=False)
class Explained:
    """The fields, as `Explanation` describes them. A TypeError or ValueError names a field that does not fit the others."""

    relevancy: dict[str, Tensor]
    image: Tensor | tuple[Tensor, ...] | None = None
    image_samples: list[int] | None = None
    text: Tensor | None = None
    token_ids: list[list[int]] | None = None
    words: list[list[str]] | None = None
    regions: Tensor | None = None
    boxes: Tensor | None = None
    scores: Tensor | None = None
    target: list[int] | None = None
    method: str = "gradient"
    start_layer: int = 0
    position: dict[str, Tensor] | None = None
    answer: list[list[int]] | None = None
    tower_images: dict[str, Tensor | tuple[Tensor, ...]] | None = None
    text_positions: list[list[int]] | None = None
    contribution: dict[str, Tensor] | None = None
    photos: list[int] | None = None
    crops: list[Any] | None = None
    token_names: list[str] | None = None
    sinks: list[list[Sink]] | None = None
    no_map: str | None = None
    of: str | None = None
    gap: Tensor | None = None
    seconds: list[float] | None = None

    def __post_init__(self) -> None:
        self._check_rows()
        for name in _INTEGERS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _integers(name, value))
        if self.sinks is not None:
            object.__setattr__(self, "sinks", as_sinks(self.sinks))
        self._check_samples()
        towers = {f"tower_images[{name!r}]": maps for name, maps in (self.tower_images or {}).items()}
        self._check_images(towers if self.image is None else {"image": self.image, **towers})
        count = next(iter(self.relevancy.values())).shape[-1]
        if self.token_names is not None and len(self.token_names) != count:
            raise ValueError(f"token_names must name the {count} tokens of the first tower; got {len(self.token_names)}")
        if self.image_samples is None and (self.image is not None or self.tower_images):
            object.__setattr__(self, "image_samples", list(range(len(self))))

    def _check_rows(self) -> None:
        relevancy = self.relevancy
        if not isinstance(relevancy, dict) or not relevancy:
            raise TypeError(f"relevancy must be a dict of towers and their tensors (B, N); got {describe(relevancy)}")
        for name, values in relevancy.items():
            field = f"relevancy[{name!r}]"
            check_tensor(field, values)
            if values.ndim not in (2, 3) or not values.is_floating_point():
                raise ValueError(f"{field} must be floating point of shape (B, N) or (B, T, N); got {describe(values)}")
            if len(values) != len(self):
                raise ValueError(f"{field} must have {len(self)} samples, as the first tower has; got {len(values)}")
        for name, values in (self.contribution or {}).items():
            if name not in relevancy or values.shape != relevancy[name].shape:
                raise ValueError(f"contribution[{name!r}] must have the shape of relevancy[{name!r}]; got {describe(values)}")

    def _check_samples(self) -> None:
        """Fields with an entry for each sample, and those that count the tokens of `text`."""
        samples = len(self)
        for name in (*_BY_SAMPLE, *([] if self.text is None else _OF_TEXT)):
            value = getattr(self, name)
            if value is not None and len(value) != samples:
                raise ValueError(f"{name} must have {samples} samples, as relevancy has; got {len(value)}")
        for name in () if self.text is None else _OF_TEXT:
            longest = max(map(len, getattr(self, name) or []), default=0)
            if self.text is not None and longest > self.text.shape[-1]:
                raise ValueError(f"{name} must be at most {self.text.shape[-1]} per sample, as text has; got {longest}")

    def _check_images(self, fields: Mapping[str, Any]) -> None:
        """Checks the maps in these fields, the samples they belong to, and what they are drawn on."""
        samples = len(self)
        owners = range(samples) if self.image_samples is None else self.image_samples
        for name, maps in fields.items():
            if not isinstance(maps, (Tensor, tuple)) or not all(isinstance(x, Tensor) and x.ndim in (2, 3) for x in maps):
                raise TypeError(f"{name} must be a tensor (B, h, w) or a tuple of maps (h, w); got {describe(maps)}")
            for part in maps:
                if 0 in part.shape[-2:]:
                    raise ValueError(f"{name} must have maps with at least one patch; got one of {tuple(part.shape)}")
            if len(owners) != len(maps):
                raise ValueError(f"image_samples must name the sample of each of the {len(maps)} maps of {name}; got {owners}")
            if not all(0 <= owner < samples for owner in owners):
                raise ValueError(f"image_samples must be from 0 to {samples - 1}; got {self.image_samples}")
        drawn = len(owners) if fields else samples
        for name in ("photos", "crops", "seconds"):
            value = getattr(self, name)
            if value is not None and len(value) != drawn:
                raise ValueError(f"{name} must have an entry for each of {drawn} maps; got {len(value)}")
        if self.photos is not None and set(self.photos) != set(range(len(set(self.photos)))):
            raise ValueError(f"photos must be numbered from 0 without a gap; got {self.photos}")
        for crop in self.crops or []:
            if crop is not None and not (len(crop) == 4 and crop[0] < crop[2] and crop[1] < crop[3]):
                raise ValueError(f"crops must be x1, y1, x2, y2 with x1 < x2 and y1 < y2, or None; got {crop}")

    @property
    def per_token(self) -> bool:
        """Whether each token of an answer is explained by itself."""
        return self.answer is not None and next(iter(self.relevancy.values())).ndim == 3

    @property
    def is_spatial(self) -> bool:
        """Whether some entries have a place in an image."""
        return self.image is not None or bool(self.tower_images) or (self.regions is not None and self.boxes is not None)

    def without_self(self, tower: str, number: int | None = None) -> Tensor:
        """Returns a tower's `relevancy` without `self_relevancy`, as figures and tables show it: of all samples, or of one."""
        values, contribution, position = (
            self.relevancy[tower],
            (self.contribution or {}).get(tower),
            (self.position or {}).get(tower),
        )
        if number is None:
            return subtract_self(values, contribution, position)
        return subtract_self(values[number], *(part if part is None else part[number] for part in (contribution, position)))

    @property
    def self_relevancy(self) -> dict[str, Tensor]:
        """tower -> what the explained positions give themselves, in the shape of `relevancy`: for a single position its whole
        entry, for several what the residual connections keep of their weights. Towers without such a part are missing."""
        return {name: difference(self.relevancy[name], self.without_self(name)) for name in self.explained_towers}

    @property
    def explained_towers(self) -> list[str]:
        """The towers of `self_relevancy`."""
        return [name for name in self.relevancy if name in (self.position or {}) or name in (self.contribution or {})]

    @property
    def tokens(self) -> list[list[str]] | None:
        """The tokens of the entries of `text` as strings: their names after `with_tokens`, else their ids."""
        if self.words is not None or self.token_ids is None:
            return self.words
        return [[str(index) for index in row] for row in self.token_ids]

    @property
    def answer_tokens(self) -> list[list[str]] | None:
        """The answer's part of `tokens`; None without an answer."""
        if self.answer is None:
            return None
        if self.tokens is None:
            return [[str(index) for index in row] for row in self.answer]
        return [row[len(row) - len(answer) :] for row, answer in zip(self.tokens, self.answer, strict=True)]

    def __len__(self) -> int:
        """Returns the number of samples."""
        return next(iter(self.relevancy.values())).shape[0]

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.relevancy.items()}
        return f"Explanation(method={self.method!r}, relevancy={shapes}, target={self.target})"


def subtract_self(values: Tensor, contribution: Tensor | None, position: Tensor | None) -> Tensor:
    """Relevancy (..., N) without what the explained positions give themselves: `contribution` if it is known, else with 0 at
    `position`: (B,), (B, T) for relevancy (B, T, N), or (B, T) for relevancy (B, N) of several positions together."""
    if contribution is not None or position is None:
        return values if contribution is None else contribution
    index = position.to(values.device)
    index = index if index.ndim == values.ndim else index[..., None].expand(*values.shape[:-1], 1)
    return values.scatter(-1, index, 0.0)


def difference(values: Tensor, rest: Tensor) -> Tensor:
    """values - rest, with 0 where both are equal, also if both are infinite."""
    return torch.where(values == rest, 0.0, values - rest)


def _integers(name: str, value: Any) -> Any:
    """`value` as lists of ints for JSON, also from tensors and arrays. TypeError if it holds anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_integers(name, part) for part in value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold only integers; got {describe(value)}") from None
