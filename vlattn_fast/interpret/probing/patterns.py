"""The attention of single heads, drawn over the image and the text of one sample."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice, check_integer
from vlattn_fast.attach.session import at_rest
from vlattn_fast.interpret.probing.labels import Labels, regions_of, tokens_of
from vlattn_fast.interpret.probing.layout import IMAGE, TEXT, Layout
from vlattn_fast.interpret.probing.streams import OneStream
from vlattn_fast.interpret.result.figures.photos import pixels
from vlattn_fast.interpret.result.figures.report import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TESTS = ("coreference", "coreference_class", "relation", "relation_detection", "word_relation")
_LEAST = 0.02  # a lighter arrow is not seen
_LINE = 36  # letters of the text in a line
_STEP = 0.11  # between lines of the text, in heights of the image
_COLOURS = "#e07b00", "#1f66b0"  # from the first part of a label, and from the second
_FRAMES = "#a0a0a0"
_FRAMED = 64  # image tokens of which each gets a frame

Head = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Drawn:
    """The model, the first inputs of a data set, and their labels."""

    stream: OneStream
    inputs: Mapping[str, Any]
    labels: Sequence[Labels]


class Chosen(NamedTuple):
    """A head and what its panel says of it."""

    layer: int
    head: int
    accuracy: float | None
    is_random: bool


class Arrow(NamedTuple):
    """An attention weight that is drawn: from a token to another, by their positions in the sequence."""

    source: int
    target: int
    way: int  # 0 = from the first part of a label, 1 = from the second
    key: tuple[int, int]  # the pair of tokens that the pass is asked for
    back: int  # 1 = the weight from the second token of the pair to the first


def choose_heads(table: Iterable[Mapping[str, Any]], test: str, head: Any, best: int, random: int, seed: int) -> list[Chosen]:
    """The heads that are named, or else the best of a test, and then random ones."""
    check_choice("test", test, TESTS)
    for name, value in (("best", best), ("random", random), ("seed", seed)):
        check_integer(name, value, low=0)
    accuracies = {
        (entry["layer"], entry["head"]): entry["value"]
        for entry in table
        if entry["test"] == test and entry["head"] is not None and entry["value"] is not None
    }
    if not accuracies:
        reason = next((entry["note"] for entry in table if entry["test"] == test), "it was not among tests=")
        raise ValueError(f"test must have values for single heads; got {test!r} without: {reason}")
    named = sorted(accuracies, key=lambda place: (-accuracies[place], place))[:best] if head is None else _heads(head)
    for place in named:
        if place not in accuracies:
            layers, heads = (1 + max(each[part] for each in accuracies) for part in (0, 1))
            raise ValueError(f"head must be (layer, head) of {layers} layers with {heads} heads in {test!r}; got {place}")
    others = sorted(set(accuracies) - set(named))
    drawn = np.random.default_rng(seed).permutation(len(others))[:random].tolist()
    chosen = [(place, False) for place in named] + [(others[index], True) for index in drawn]
    if not chosen:
        raise ValueError(f"head, best and random must name at least one head; got {head}, {best} and {random}")
    return [Chosen(place[0], place[1], accuracies[place], is_random) for place, is_random in chosen]


def _heads(head: Any) -> list[Head]:
    """One head or several as a list without repetition."""
    try:
        several = list(head)
        several = [several] if several and not isinstance(several[0], Sequence) else several
        return list(dict.fromkeys((operator.index(layer), operator.index(number)) for layer, number in several))
    except (TypeError, ValueError):
        raise TypeError(f"head must be (layer, head), a sequence of these, or None; got {head!r}") from None


def draw_patterns(
    drawn: Drawn, test: str, heads: Sequence[Chosen], sample: int, image: Any, boxes: Any, processor: Any
) -> Figure:
    """See `ProbeReport.plot_patterns`."""
    from matplotlib.patches import Rectangle

    check_integer("sample", sample, low=0, high=len(drawn.labels) - 1)
    photo = None if image is None else pixels(image)
    layout, arrows, weights, named = _weights(drawn, test, sample)
    places = {} if test == "word_relation" else _boxes(drawn, layout, sample, boxes)
    texts = _words(drawn, layout, sample, processor)
    beside = _laid_out(texts)
    height = 1 + _STEP * (1 + max((y for _, y in beside.values()), default=0))
    figure, axes = panels(len(heads), most=3, width=3.2)
    figure.set_size_inches(figure.get_figwidth(), -(-len(heads) // min(len(heads), 3)) * (0.5 + 2.9 * height))
    for axis, one in zip(axes, heads, strict=True):
        if photo is not None:
            axis.imshow(photo, extent=(0, 1, 1, 0), alpha=0.55)
        points = {token: ((x1 + x2) / 2, (y1 + y2) / 2) for token, (x1, y1, x2, y2) in places.items()}
        for token, (x1, y1, x2, y2) in places.items():
            colour, width = ("black", 2.0) if token in named else (_FRAMES, 0.6)
            if token in named or len(places) <= _FRAMED:
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))
        for token, (x, line) in beside.items():
            points[token] = (x, 1.08 + _STEP * line)
            bold = "bold" if token in named else "normal"
            axis.text(*points[token], texts[token], ha="center", va="center", fontsize=8, weight=bold, parse_math=False)
        for arrow in arrows:
            weight = float(weights[arrow.key][one.layer, one.head, arrow.back])
            if weight >= _LEAST:
                shape = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.15", "shrinkA": 5, "shrinkB": 5}
                style = {"color": _COLOURS[arrow.way], "alpha": min(1.0, weight), "linewidth": 0.4 + 2.6 * weight}
                axis.annotate("", points[arrow.target], points[arrow.source], arrowprops={**shape, **style})
        kind = "at random: " if one.is_random else ""
        axis.set_title(f"{kind}layer {one.layer}, head {one.head}: {one.accuracy:.2f}", fontsize=9)
        axis.set(xlim=(-0.02, 1.02), ylim=(height, -0.02), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def _weights(drawn: Drawn, test: str, sample: int) -> tuple[Layout, list[Arrow], dict[tuple[int, int], Tensor], set[int]]:
    """The layout of the inputs, the arrows of a sample, the weights (L, H, 2) of each pair of tokens, and the labels' tokens."""
    stream, label = drawn.stream, drawn.labels[sample]
    arrows: list[Arrow] = []
    keys: list[tuple[int, int]] = []
    named: set[int] = set()

    def sets(layout: Layout) -> list[list[tuple[list[int], list[int]]]]:
        if not arrows:  # equal for all layers
            parts = _parts(layout, test, sample, label)
            named.update(token for pair in parts for part in pair for token in part)
            arrows.extend(_arrows(layout, sample, parts))
            keys.extend(dict.fromkeys(arrow.key for arrow in arrows))
        return [[([one], [two]) for one, two in keys] if number == sample else [] for number in range(len(drawn.labels))]

    with torch.no_grad(), at_rest(stream.model):
        run = stream.run(drawn.inputs, sets)
    return run.layout, arrows, dict(zip(keys, run.maxima[sample], strict=True)), named


def _parts(layout: Layout, test: str, sample: int, label: Labels) -> list[tuple[list[int], list[int]]]:
    """The tokens of both parts of each label of a sample."""
    if test.startswith("coreference"):
        phrases = [one for one in label.phrases if test == "coreference" or one[2] is not None]
        parts = [(tokens_of(layout, sample, a, sample), regions_of(layout, sample, b, sample)) for a, b, _ in phrases]
    elif test == "word_relation":
        spans = [(a, b) for a, b, _ in label.word_relations]
        parts = [tuple(tokens_of(layout, sample, x, sample, "word_relations") for x in pair) for pair in spans]  # type: ignore[misc]
    else:
        parts = [tuple(regions_of(layout, sample, [x], sample) for x in (a, b)) for a, b, _ in label.relations]  # type: ignore[misc]
    if not parts:
        raise ValueError(f"sample must have labels for {test!r}; got none in sample {sample} of the first item")
    return parts


def _arrows(layout: Layout, sample: int, parts: Sequence[tuple[list[int], list[int]]]) -> list[Arrow]:
    """From each token of one part to all tokens of the other part's kind, but itself. A pair of tokens has the text first."""
    of_kind = {kind: (layout.parts[sample] == kind).nonzero()[:, 0].tolist() for kind in (TEXT, IMAGE)}
    of_kind[IMAGE] = [token for token in of_kind[IMAGE] if token in set(layout.regions[sample])]
    arrows: dict[tuple[int, int, int], Arrow] = {}
    for first, second in parts:
        for way, (sources, ends) in enumerate(((first, second), (second, first))):
            for source in sources:
                for target in of_kind[int(layout.parts[sample, ends[0]])]:
                    if source != target:
                        back = int(int(layout.parts[sample, source]) > int(layout.parts[sample, target]))
                        key = (target, source) if back else (source, target)
                        arrows[source, target, way] = Arrow(source, target, way, key, back)
    return list(arrows.values())


def _boxes(drawn: Drawn, layout: Layout, sample: int, boxes: Any) -> dict[int, Box]:
    """x1, y1, x2, y2 of a sample's image tokens, relative to the image, by their position in the sequence."""
    regions = layout.regions[sample]
    if boxes is None:
        boxes = _known_boxes(drawn, layout, sample)
    got = torch.as_tensor(boxes).double()
    if tuple(got.shape) != (len(regions), 4) or not bool(((got >= -0.01) & (got <= 1.01)).all()):
        raise ValueError(
            f"boxes must be x1, y1, x2, y2 from 0 to 1 of {len(regions)} image tokens; got {tuple(got.shape)}, "
            f"{float(got.min()) if got.numel() else 0:.3g} to {float(got.max()) if got.numel() else 0:.3g}"
        )
    every = zip(regions, got.tolist(), strict=True)
    return {token: (x1, y1, x2, y2) for token, (x1, y1, x2, y2) in every if layout.parts[sample, token] == IMAGE}


def _known_boxes(drawn: Drawn, layout: Layout, sample: int) -> Tensor:
    """The boxes of a sample's image tokens, as the inputs tell them: of regions, or of the cells of a grid."""
    layouts, inputs = drawn.stream.layouts, drawn.inputs
    count, size = layout.parts.shape
    start = 0 if layouts.pair is None else int(inputs["input_ids"].shape[1])
    tower = layouts.tower if layouts.pair is None else layouts.pair[1]
    if tower is not None:
        numbers = torch.arange(start, size, dtype=torch.float64).expand(count, -1)
        tokens = tower.tokens_in(drawn.stream.model, inputs, (count, size - start))
        if (boxes := tokens.fields(numbers).get("boxes")) is not None:
            known: Tensor = boxes[sample]
            return known
        maps = tokens.maps(numbers)
        of_sample = [] if maps is None else [one for one, owner in zip(*maps, strict=True) if owner == sample]
        if len(of_sample) == 1:
            grid = of_sample[0].long()
            rows, columns = grid.shape
            place = {int(token): (y, x) for (y, x), token in np.ndenumerate(grid.numpy())}
            if set(place) == set(layout.regions[sample]):
                cells = [place[token] for token in layout.regions[sample]]
                return torch.tensor([[x / columns, y / rows, (x + 1) / columns, (y + 1) / rows] for y, x in cells])
    raise ValueError("boxes must be given for a model whose inputs do not tell the places of its image tokens; got None")


def _words(drawn: Drawn, layout: Layout, sample: int, processor: Any) -> dict[int, str]:
    """The text's tokens as strings, by their position in the sequence."""
    ids = drawn.inputs["input_ids"][sample].tolist()
    if processor is None:
        words = [str(one) for one in ids]
    else:
        convert = getattr(getattr(processor, "tokenizer", processor), "convert_ids_to_tokens", None)
        if convert is None:
            raise TypeError(f"processor must have convert_ids_to_tokens, or a tokenizer with it; got {type(processor).__name__}")
        words = [str(word) for word in convert(ids)]
    placed = {column + layout.offset: word for column, word in enumerate(words)}
    return {token: word for token, word in placed.items() if layout.parts[sample, token] == TEXT}


def _laid_out(words: Mapping[int, str]) -> dict[int, tuple[float, int]]:
    """x from 0 to 1 and the number of the line of each word."""
    lines: list[list[int]] = [[]]
    length = 0
    for token, word in words.items():
        if lines[-1] and length + len(word) > _LINE:
            lines.append([])
            length = 0
        lines[-1].append(token)
        length += len(word) + 1
    placed: dict[int, tuple[float, int]] = {}
    for number, line in enumerate(lines):
        letters = sum(len(words[token]) + 1 for token in line)
        end = 0.0
        for token in line:
            size = (len(words[token]) + 1) / max(letters, _LINE)
            placed[token] = (end + size / 2, number)
            end += size
    return placed
