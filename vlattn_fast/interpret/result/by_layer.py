"""The result of `explain_layers`: a relevancy vector per layer or per head, and small multiples of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.multiples import Multiples
from vlattn_fast.interpret.result.figures.page import Page
from vlattn_fast.interpret.result.figures.scale import RELEVANCY
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.samples import chosen_rows, some_samples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_STACKED = ("image", "text", "regions")  # besides `relevancy`


@dataclass(frozen=True, eq=False, repr=False)
class LayerExplanation(Explanation):
    """The result of `explain_layers`: a relevancy vector for each layer's own map, or for each head's.

    `at(layer)` or `at(layer, head)` gives one of them as an `Explanation`; `plot` and `to_html` show all as small multiples.

    The tensors are those of an `Explanation` with the layers as first dimension: for each tower, `relevancy` has (L, B, N), or
    (L, H, B, N) with per="head"; `image` has (L, B, h, w) or (L, H, B, h, w), or is a tuple of (L, h, w) or (L, H, h, w) if the
    grids differ; `text` and `regions` likewise. Scores and metadata are as in an `Explanation`. The vector of a layer is the mean
    over all of its heads.

    Args:
        per: "layer" or "head".
        layers: tower -> the numbers of its layers, from 0.
        heads: tower -> the numbers of its heads; with per="layer" the maps are means over them.
        owners: the tower that `image`, `text` and `regions` belong to.
    """

    per: str = "layer"
    layers: dict[str, list[int]] = field(default_factory=dict)
    heads: dict[str, list[int]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_rows(
        cls,
        per: str,
        counts: Mapping[str, tuple[list[int], list[int]]],
        owners: dict[str, str],
        relevancy: Mapping[str, Tensor],
        fields: Mapping[str, Any],
    ) -> LayerExplanation:
        """Builds it from `relevancy` (B, K, N) and fields with the same K: K = L, or L * H."""

        def stacked(values: Any, tower: str, at: int) -> Any:
            if isinstance(values, tuple):
                return tuple(stacked(part, tower, 0) for part in values)
            layers, heads = (len(numbers) for numbers in counts[tower])
            sizes = (layers, heads) if per == "head" else (layers,)
            split = values.unflatten(at, sizes)
            return split.movedim(tuple(range(at, at + len(sizes))), tuple(range(len(sizes))))

        stacked_fields = {name: stacked(fields[name], owners[name], 1) for name in _STACKED if fields.get(name) is not None}
        return cls(
            relevancy={name: stacked(rows, name, 1) for name, rows in relevancy.items()},
            per=per,
            layers={name: layers for name, (layers, _) in counts.items()},
            heads={name: heads for name, (_, heads) in counts.items()},
            owners={name: owners[name] for name in stacked_fields},
            **{**fields, **stacked_fields},
        )

    def __post_init__(self) -> None:
        """Checks the maps of one layer as an `Explanation` does, the image numbers included."""
        owner = self.owners.get("image", "")  # not every tower has every layer
        layers, heads = (getattr(self, name).get(owner) or self._numbers(name) for name in ("layers", "heads"))
        first = self.at(layers[0], None if self.per == "layer" else heads[0])
        for name in ("image_samples", "sinks"):
            object.__setattr__(self, name, getattr(first, name))

    @property
    def per_token(self) -> bool:
        return False

    def __len__(self) -> int:
        return next(iter(self.relevancy.values())).shape[-2]

    def __getitem__(self, index: int | slice) -> Self:
        """Returns one sample of the batch with all of its maps, by its number; several by a slice."""
        return some_samples(self, chosen_rows(index, len(self)), 1 if self.per == "layer" else 2, self._further())

    def _numbers(self, name: str) -> list[int]:
        """The numbers of the layers, or of the heads, over all towers."""
        return sorted({number for numbers in getattr(self, name).values() for number in numbers})

    def at(self, layer: int, head: int | None = None) -> Explanation:
        """Returns the explanation of one layer, or of one head in it.

        Args:
            layer: a number of `layers`.
            head: with per="head", a number of `heads`; None = the mean over these heads.

        Towers without this layer or head are left out.
        """
        if head is not None and self.per == "layer":
            raise ValueError(
                f"head must be None for an explanation with per='layer'; got {head}. Use explain_layers(..., per='head')"
            )
        towers = [name for name in self.relevancy if layer in self.layers[name] and (head is None or head in self.heads[name])]
        if not towers:
            check_integer("layer", layer)
            asked = f"layer {layer}" if head is None else f"layer {layer} with head {head}"
            raise ValueError(f"layer and head must be among {self.layers} and {self.heads}; got {asked}")

        def cut(values: Any, tower: str) -> Any:
            if values is None or tower not in towers:
                return None
            if isinstance(values, tuple):
                return tuple(cut(part, tower) for part in values)
            one = values[self.layers[tower].index(layer)]
            if self.per == "layer":
                return one
            return one.mean(0) if head is None else one[self.heads[tower].index(head)]

        fields = {name: getattr(self, name) for name in Explained.__dataclass_fields__ if name != "relevancy"}
        for name in _STACKED:
            fields[name] = cut(fields[name], self.owners.get(name, ""))
        if fields["image"] is None:
            fields |= dict.fromkeys(
                ("image_samples", "crops", "seconds", *(() if fields["regions"] is not None else ("photos",)))
            )
        if fields["text"] is None:
            fields |= dict.fromkeys(("token_ids", "words", "text_positions"))
        if fields["regions"] is None:
            fields["boxes"] = None
        if fields["position"] is not None:
            fields["position"] = {name: value for name, value in fields["position"].items() if name in towers}
        return Explanation(relevancy={name: cut(self.relevancy[name], name) for name in towers}, **fields)

    def items(self) -> Iterator[tuple[tuple[int, int | None], Explanation]]:
        """Yields ((layer, head), explanation) for each map; head is None with per="layer"."""
        for layer in self._numbers("layers"):
            for head in [None] if self.per == "layer" else self._numbers("heads"):
                if head is None or any(layer in self.layers[name] and head in self.heads[name] for name in self.layers):
                    yield (layer, head), self.at(layer, head)

    # --- figures and tables ---

    def plot(
        self,
        image: Any = None,
        *,
        samples: Sequence[int] | None = None,
        labels: Sequence[Any] | None = None,
        crop: Any = None,
        processor: Any = None,
        cmap: str = RELEVANCY,
        alpha: float = 0.85,
        scale: str = "max",
        common: bool = False,
    ) -> Figure:
        """Draws small multiples: a map per layer, or with per="head" a line of heads per layer; the words as a table with a line
        per map. The arguments are those of `Explanation.plot`. Each map has its own scale; with `common` all share one."""
        with extra("viz"):
            return Multiples([*self.items()], image, labels, crop, processor, cmap, samples, alpha, scale, common).figure()

    def to_html(
        self,
        image: Any = None,
        *,
        labels: Sequence[Any] | None = None,
        crop: Any = None,
        processor: Any = None,
        title: str = "Relevancy by layer",
        cmap: str = RELEVANCY,
        scale: str = "max",
        others: Sequence[Explanation] = (),
    ) -> Page:
        """Returns one self-contained page of small multiples. Arguments as for `Explanation.to_html`; `others` must be empty."""
        if len(others):
            raise ValueError(f"others must be empty for a LayerExplanation; got {len(others)} explanations")
        with extra("viz"):
            return Multiples([*self.items()], image, labels, crop, processor, cmap, scale=scale).page(title)

    def to_pandas(self) -> pd.DataFrame:
        """Returns the data frame of `Explanation.to_pandas` for all maps, with the columns layer and head first."""
        with extra("tables"):
            import pandas

            frames = []
            for (layer, head), one in self.items():
                frame = one.to_pandas()
                frame.insert(0, "layer", layer)
                if head is not None:
                    frame.insert(1, "head", head)
                frames.append(frame)
            return pandas.concat(frames, ignore_index=True)

    def overlay(self, *args: Any, **options: Any) -> NoReturn:
        """Raises a ValueError: choose a map with `at` first."""
        self._one_at_a_time("overlay")

    def top(self, *args: Any, **options: Any) -> NoReturn:
        """Raises a ValueError: choose a map with `at` first."""
        self._one_at_a_time("top")

    def compare(self, *args: Any, **options: Any) -> NoReturn:
        """Raises a ValueError: choose a map with `at` first."""
        self._one_at_a_time("compare")

    def _one_at_a_time(self, name: str) -> NoReturn:
        raise ValueError(
            f"{name} needs one map; got a LayerExplanation. Choose a map with at(layer, head), e.g. explanation.at(0).{name}(...)"
        )

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.relevancy.items()}
        return f"LayerExplanation(method={self.method!r}, per={self.per!r}, relevancy={shapes}, target={self.target})"
