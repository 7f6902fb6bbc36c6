"""Explanations side by side, under the caller's names: methods, checkpoints, inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlattn_fast._ground.checks import check_writable, describe
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.by_layer import LayerExplanation
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.multiples import Multiples
from vlattn_fast.interpret.result.figures.page import Page
from vlattn_fast.interpret.result.figures.scale import RELEVANCY, check_scale
from vlattn_fast.interpret.result.numbers import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class SideBySide:
    """The result of `compare`: `plot` draws a figure, `to_html` makes a page, `table` has numbers. A notebook shows the page."""

    explanations: dict[str, Explanation]
    image: Any = None
    labels: Any = None
    crop: Any = None
    processor: Any = None
    cmap: str = RELEVANCY
    scale: str = "max"

    @property
    def table(self) -> list[dict[str, Any]]:
        """The similarity of the first explanation and each other one: a dict per tower and sample, with the names "one" and
        "other", and the keys of `Explanation.compare`. Explanations of other tokens than the first's are left out."""
        (first, one), *others = self.explanations.items()
        lines = []
        for name, second in others:
            if table.shapes_of(one) == table.shapes_of(second) and one.token_ids == second.token_ids:
                lines += [{"one": first, "other": name, **line} for line in one.compare(second).table]
        return lines

    def plot(
        self, *, samples: Any = None, cmap: str | None = None, alpha: float = 0.85, scale: str | None = None, common: bool = False
    ) -> Figure:
        """Draws a map for each explanation, under its name and score and above its scale with the range of its values; dashes
        around the part of the photo that a model saw, if it did not see all; words as a table, a line for each explanation.

        The arguments are those of `Explanation.plot`; `cmap` and `scale` default to those of `compare`. Each map has its own
        scale; with `common` all maps of a sample share one.
        """
        with extra("viz"):
            return self._multiples(samples, cmap, alpha, scale, common).figure()

    def to_html(
        self,
        *,
        title: str = "Side by side",
        samples: Any = None,
        cmap: str | None = None,
        alpha: float = 0.85,
        scale: str | None = None,
        common: bool = False,
    ) -> Page:
        """Returns the same as one self-contained page, with `table` below. A notebook shows it in a frame."""
        with extra("viz"):
            return self._multiples(samples, cmap, alpha, scale, common).page(title, self.table)

    def save_html(self, path: str | Path, **options: Any) -> Path:
        """Writes the page of `to_html`, with the same options, to `path`."""
        check_writable("path", Path(path))
        Path(path).write_text(self.to_html(**options), encoding="utf-8")
        return Path(path)

    def _multiples(self, samples: Any, cmap: str | None, alpha: float, scale: str | None, common: bool) -> Multiples:
        cmap, scale = self.cmap if cmap is None else cmap, self.scale if scale is None else scale
        maps = [*self.explanations.items()]
        return Multiples(maps, self.image, self.labels, self.crop, self.processor, cmap, samples, alpha, scale, common)

    def _repr_html_(self) -> str | None:
        """The page for a notebook; None, i.e. plain text, if a package for pages is missing."""
        try:
            return self.to_html()._repr_html_()
        except ModuleNotFoundError:
            return None

    def __repr__(self) -> str:
        return f"SideBySide({', '.join(map(repr, self.explanations))})"


def compare(
    explanations: Mapping[str, Explanation],
    image: Any = None,
    *,
    labels: Any = None,
    crop: Any = None,
    processor: Any = None,
    cmap: str = RELEVANCY,
    scale: str = "max",
) -> SideBySide:
    """Shows explanations side by side, as a figure, a page and a table: of several methods, checkpoints or inputs.

    No model runs. The table compares the first explanation with each other one: cosine and rank correlation.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> before, after = (va.Explanation({"text": torch.tensor([[0.0, 0.3, x]])}) for x in (0.5, 0.1))
        >>> va.compare({"before": before, "after": after}).table
        [{'one': 'before', 'other': 'after', 'tower': 'text', 'sample': 0, 'cosine': 0.759257, 'rank': -1.0}]

    Args:
        explanations: a dict from the names that are shown. All have the same number of samples, and with an answer the same
            number of words.
        image: the photo under all maps, as for `Explanation.plot`; or one for each name, in a dict.
        processor, crop, labels, scale, cmap: as for `Explanation.plot`. `scale="quantile"` shows more of maps in which one patch
            is many times the others, as those of "rollout" and "weighted".

    Raises:
        TypeError: `explanations` is not a dict of explanations.
        ValueError: explanations with different numbers of samples or words; names of `image` that are not those of
            `explanations`; an unknown `scale`.
    """
    legend = "explanations must be a dict from names to explanations"
    if not isinstance(explanations, Mapping) or not explanations:
        raise TypeError(f"{legend}; got {describe(explanations)}")
    for name, one in explanations.items():
        if not isinstance(name, str) or not isinstance(one, Explanation):
            raise TypeError(f"{legend}; got {describe(one)} for {name!r}")
        if isinstance(one, LayerExplanation):
            raise TypeError(
                f"explanations must have one map each; got a LayerExplanation for {name!r}. Choose a map with at(layer, head)"
            )
    counts = {name: len(one) for name, one in explanations.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"explanations must have the same number of samples; got {counts}. Choose some with explanation[i]")
    words = {name: [len(row) for row in one.answer or []] if one.per_token else None for name, one in explanations.items()}
    if any(row_words != next(iter(words.values())) for row_words in words.values()):
        raise ValueError(f"explanations must have the same number of answer words; got {words}")
    if image is not None and not any(one.is_spatial for one in explanations.values()):
        raise ValueError(f"image must be None for explanations without maps; got {describe(image)}")
    if isinstance(image, Mapping) and set(image) != set(explanations):
        raise ValueError(f"image must have the names {list(explanations)}; got {list(image)}")
    check_scale(scale)
    return SideBySide(dict(explanations), image, labels, crop, processor, cmap, scale)
