"""`widget`: an interactive view of a model, whose heads and edges you edit by clicks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.exploring.exploration import Exploration
from vlattn_fast.interpret.intervening.token_sets import TokenGroup
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.result.figures.scale import RELEVANCY

if TYPE_CHECKING:
    from vlattn_fast.interpret.exploring.notebook import Explorer


def widget(
    models: nn.Module | Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    groups: Mapping[str, TokenGroup] | Sequence[str] | None = None,
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
    cmap: str = RELEVANCY,
) -> Explorer:
    """Shows a model in a notebook: the image under its map, words, layers and heads, and the flow between groups of tokens.

    A click cuts an edge of attention or scales a head; then the model answers and is explained again. Maps are those of
    `explain`, inside of `intervene` if there are edits. The colours of heads are the first-order effects of `attribute_edges` on
    the unedited model. A click can also show which parts of the stream make a head attend there, by `score_parts`.

    Returns a widget: `widget.edits` and `widget.explanations` hold what is shown, and `widget.save_html(path)` writes a page that
    shows the same without a kernel.

    Examples:
        >>> va.widget(model, inputs, ["image", "question", "last"], image=photo, processor=processor)  # doctest: +SKIP

    Args:
        models: a model, or a dict of several to show side by side, such as two checkpoints: with the same towers, layers and
            heads.
        inputs, groups, tower: as in `attribute_edges`.
        image, labels, crop, cmap: as in `Explanation.plot`.
        methods: a method of `explain`, or several to show side by side; each must use attention.
        target, answer: as in `explain`. None = the target that the first model chooses without edits.
        generate: the number of tokens in a decoder's answer; 0 = no answer. A classifier names its likeliest classes.
        processor: as in `explain`; without `crop` also as in `Explanation.plot`.

    Raises:
        TypeError, ValueError: models with different towers, layers or heads; a method that uses no attention; and what `explain`,
            `attribute_edges` and `Explanation.plot` raise.
        ModuleNotFoundError: anywidget, matplotlib or jinja2 is not installed.
    """
    with extra("widget"):
        from vlattn_fast.interpret.exploring.notebook import Explorer
    question = {"target": target, "answer": answer, "processor": processor, "tower": tower}
    exploration = Exploration(models, inputs, groups, methods, generate, question)
    with extra("viz"):
        return Explorer(exploration, image, labels, crop, None if image is None or crop is not None else processor, cmap)
