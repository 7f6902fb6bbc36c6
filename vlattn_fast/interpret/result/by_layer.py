"""The result of `explain_layers`: the row of each layer's own map, or of each head's, and small multiples of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.samples import chosen_rows, some_samples
from vlattn_fast.interpret.result.pictures.multiples import Multiples
from vlattn_fast.interpret.result.pictures.page import Page

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_STACKED = ("image", "text", "regions")  # beside `relevancy`


@dataclass(frozen=True, eq=False, repr=False)
class LayerExplanation(Explanation):
    """Rows of each layer's own map. `at(layer)` or `at(layer, head)` is one of them as an `Explanation`.

    Tensors are those of an `Explanation`, with layers in front: `relevancy` has (L, B, N) a tower, with per="head" (L, H, B, N),
    `image` (L, B, h, w) or (L, H, B, h, w), or a tuple of (L, h, w) or (L, H, h, w) where grids differ; `text` and `regions`
    likewise. Scores and facts are as in an `Explanation`. The mean over all heads of a layer is the layer's row.

    Args:
        per: "layer" or "head".
        layers: tower -> the numbers of its layers, 0 the first.
        heads: tower -> the numbers of its heads: rows of per="layer" are means over them.
        owners: the tower that `image`, `text` and `regions` are of.
    """

    per: str = "layer"
    layers: dict[str, list[int]] = field(default_factory=dict)
    heads: dict[str, list[int]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls,
        per: str,
        counts: Mapping[str, tuple[list[int], list[int]]],
        owners: dict[str, str],
        relevancy: Mapping[str, Tensor],
        fields: Mapping[str, Any],
    ) -> LayerExplanation:
        """From `relevancy` (B, K, N) and fields that have K rows, too: K = L, or L * H."""

        def stacked(values: Any, tower: str, at: int) -> Any:
            if isinstance(values, tuple):
                return tuple(stacked(part, tower, 0) for part in values)
            layers, heads = (len(numbers) for numbers in counts[tower])
            sizes = (layers, heads) if per == "head" else (layers,)
            split = values.unflatten(at, sizes)
            return split.movedim(tuple(range(at, at + len(sizes))), tuple(range(len(sizes))))

        made = {name: stacked(fields[name], owners[name], 1) for name in _STACKED if fields.get(name) is not None}
        return cls(
            relevancy={name: stacked(rows, name, 1) for name, rows in relevancy.items()},
            per=per,
            layers={name: layers for name, (layers, _) in counts.items()},
            heads={name: heads for name, (_, heads) in counts.items()},
            owners={name: owners[name] for name in made},
            **{**fields, **made},
        )

    def __post_init__(self) -> None:
        """The maps of one layer are checked as an `Explanation` is; the numbers of images, too."""
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
        """One row of the batch, by its number, with all of its maps; several by a slice."""
        return some_samples(self, chosen_rows(index, len(self)), 1 if self.per == "layer" else 2, self._further())

    def _numbers(self, name: str) -> list[int]:
        """The numbers of the layers, or of the heads, that some tower has."""
        return sorted({number for numbers in getattr(self, name).values() for number in numbers})

    def at(self, layer: int, head: int | None = None) -> Explanation:
        """The explanation by the map of one layer, or of one head in it: towers without this layer or head are left out.

        Args:
            layer: its number, as `layers` has it.
            head: its number, as `heads` has it, with per="head"; None = the mean over all that there are.
        """
        if head is not None and self.per == "layer":
            raise ValueError(f"head must be None for the maps of layers; got {head}. Explain with per='head'")
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

        facts = {name: getattr(self, name) for name in Explained.__dataclass_fields__ if name != "relevancy"}
        for name in _STACKED:
            facts[name] = cut(facts[name], self.owners.get(name, ""))
        if facts["image"] is None:
            facts |= dict.fromkeys(
                ("image_samples", "crops") if facts["regions"] is not None else ("image_samples", "crops", "photos")
            )
        if facts["text"] is None:
            facts |= dict.fromkeys(("token_ids", "words", "text_positions"))
        if facts["regions"] is None:
            facts["boxes"] = None
        if facts["position"] is not None:
            facts["position"] = {name: value for name, value in facts["position"].items() if name in towers}
        return Explanation(relevancy={name: cut(self.relevancy[name], name) for name in towers}, **facts)

    def items(self) -> Iterator[tuple[tuple[int, int | None], Explanation]]:
        """The layer and the head (None with per="layer") of each map, and its explanation."""
        for layer in self._numbers("layers"):
            for head in [None] if self.per == "layer" else self._numbers("heads"):
                if head is None or any(layer in self.layers[name] and head in self.heads[name] for name in self.layers):
                    yield (layer, head), self.at(layer, head)

    # --- pictures and tables ---

    def plot(
        self,
        image: Any = None,
        *,
        rows: Sequence[int] | None = None,
        labels: Sequence[Any] | None = None,
        crop: Any = None,
        processor: Any = None,
        cmap: str = "inferno",
        alpha: float = 0.85,
        scale: str = "max",
        common: bool = False,
    ) -> Figure:
        """Small multiples: a map for each layer, or with per="head" a line of heads for each; the words as a table, a line for
        each map. The arguments are those of `Explanation.plot`; every map has its own scale, or with `common` all have one."""
        with extra("viz"):
            return Multiples([*self.items()], image, labels, crop, processor, cmap, rows, alpha, scale, common).figure()

    def to_html(
        self,
        image: Any = None,
        *,
        labels: Sequence[Any] | None = None,
        crop: Any = None,
        processor: Any = None,
        title: str = "Relevancy by layer",
        cmap: str = "inferno",
        scale: str = "max",
        others: Sequence[Explanation] = (),
    ) -> Page:
        """One self-contained page of small multiples, with the arguments of `Explanation.to_html`; `others` must be empty."""
        if len(others):
            raise ValueError(f"others must be empty for maps of layers; got {len(others)} explanations")
        with extra("viz"):
            return Multiples([*self.items()], image, labels, crop, processor, cmap, scale=scale).page(title)

    def to_pandas(self) -> pd.DataFrame:
        """Every entry as a line, as `Explanation.to_pandas` has it, with its layer and head in front."""
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
        """See `at`."""
        self._one_at_a_time("overlay")

    def top(self, *args: Any, **options: Any) -> NoReturn:
        """See `at`."""
        self._one_at_a_time("top")

    def compare(self, *args: Any, **options: Any) -> NoReturn:
        """See `at`."""
        self._one_at_a_time("compare")

    def _one_at_a_time(self, name: str) -> NoReturn:
        raise ValueError(f"{name} takes one map: choose it by at(layer, head), as in explanation.at(0).{name}(...)")

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.relevancy.items()}
        return f"LayerExplanation(method={self.method!r}, per={self.per!r}, relevancy={shapes}, target={self.target})"
