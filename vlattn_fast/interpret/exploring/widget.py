"""`widget`: a picture of a model whose heads and edges are edited by clicks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.explaining.request import renamed
from vlattn_fast.interpret.exploring.exploration import Exploration
from vlattn_fast.interpret.intervening.token_sets import TokenGroup
from vlattn_fast.interpret.relevancy.method import Method

if TYPE_CHECKING:
    from vlattn_fast.interpret.exploring.notebook import Explorer


@renamed
def widget(
    models: nn.Module | Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    groups: Mapping[str, TokenGroup] | Sequence[str],
    *,
    image: Any = None,
    methods: str | Method | Sequence[str | Method] = "gradient",
    target: Any = None,
    answer: Any = None,
    generate: int = 8,
    tower: str | tuple[str, str] | None = None,
    processor: Any = None,
    labels: Sequence[Any] | None = None,
    crop: Any = None,
    cmap: str = "inferno",
) -> Explorer:
    """A notebook's widget: a picture under its map, words, layers and heads, and the flow between groups of tokens. A click cuts
    an edge of attention or scales a head; the model answers again, and its map is computed again.

    Maps are those of `explain`, inside of `intervene` where there are edits; `widget.edits` and `widget.explanations` are what is
    shown. The effects of heads are the first-order ones of `attribute_edges`, of the model as it is. `widget.save_html(path)`
    writes a page that shows the same without a kernel.

    Args:
        models: a model, or several side by side by their names, as two checkpoints: of the same towers, layers and heads.
        inputs, groups, tower: as in `attribute_edges`.
        image, labels, crop, cmap: as in `Explanation.plot`.
        methods: the method of `explain`, or several side by side; each sees attention.
        target, answer: as in `explain`. A target of None is the one that the first model gives without edits.
        generate: how many tokens a decoder answers with; 0 = none. A classifier names its likeliest classes.
        processor: as in `explain`; without `crop` also as in `Explanation.plot`.

    Raises:
        TypeError, ValueError: models of other towers, layers or heads; a method that sees no attention; and what `explain`,
            `attribute_edges` and `Explanation.plot` raise.
        ModuleNotFoundError: anywidget, matplotlib or jinja2 is not installed.
    """
    with extra("widget"):
        from vlattn_fast.interpret.exploring.notebook import Explorer
    question = {"target": target, "answer": answer, "processor": processor, "tower": tower}
    exploration = Exploration(models, inputs, groups, methods, generate, question)
    with extra("viz"):
        return Explorer(exploration, image, labels, crop, None if image is None or crop is not None else processor, cmap)
