"""What pictures and tables show of an Explanation: one `Choice` per row, or per word of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._checks import describe
from vlattn_fast.interpret.words import Word, join_tokens

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]
Maps = Tensor | tuple[Tensor, ...]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Explained(Protocol):
    """What is read of an Explanation; see there."""

    def __len__(self) -> int: ...
    @property
    def relevancy(self) -> dict[str, Tensor]: ...
    @property
    def image(self) -> Maps | None: ...
    @property
    def tower_images(self) -> dict[str, Maps] | None: ...
    @property
    def image_rows(self) -> list[int] | None: ...
    @property
    def text(self) -> Tensor | None: ...
    @property
    def tokens(self) -> list[list[str]] | None: ...
    @property
    def answer_tokens(self) -> list[list[str]] | None: ...
    @property
    def each(self) -> bool: ...
    @property
    def position(self) -> dict[str, Tensor] | None: ...
    @property
    def places(self) -> list[list[int]] | None: ...
    @property
    def own(self) -> dict[str, Tensor]: ...
    @property
    def regions(self) -> Tensor | None: ...
    @property
    def boxes(self) -> Tensor | None: ...
    @property
    def scores(self) -> Tensor | None: ...
    @property
    def target(self) -> list[int] | None: ...
    @property
    def method(self) -> str: ...
    @property
    def start_layer(self) -> int: ...


@dataclass(frozen=True)
class Patch:
    """Values on a part of a picture.

    Args:
        index: the number of the map among all maps, or of the row for regions.
        values: (h, w), evenly over `box`; (1, 1) for a region.
        box: x1, y1, x2, y2 relative to the picture; None: where the caller says.
    """

    index: int
    values: Array
    box: Box | None = None


@dataclass(frozen=True)
class Choice:
    """What one row of the batch rests on, or one word of its answer; the tokens of a word are added up.

    Args:
        row: of the batch.
        label: the row's text, class or the answer's word.
        score: the explained score.
        patches: maps and regions; `towers` may have other maps, by name.
        words: the text, with a value each; the answer's words, if any, are last.
        rows: tower -> its raw row, 0 at the position that is read.
        own: tower -> that position's entry, where it is known; the mean of several.
    """

    row: int
    label: str
    score: float | None
    patches: list[Patch]
    towers: dict[str, list[Patch]]
    words: list[tuple[Word, float]]
    rows: dict[str, Array]
    own: dict[str, float]


def choices(explanation: Explained, labels: Sequence[str] | None = None) -> list[Choice]:
    """All choices of an explanation, row by row.

    Args:
        labels: names of the rows, instead of their text or class.

    Raises:
        ValueError: not one label per row.
    """
    if labels is not None and len(labels) != len(explanation):
        raise ValueError(f"labels must be {len(explanation)}, one per row; got {len(labels)}")
    answers = explanation.answer_tokens
    found = []
    for row in range(len(explanation)):
        if not explanation.each or answers is None:
            label = row_label(explanation, row) if labels is None else labels[row]
            found.append(_choice(explanation, row, label, None))
            continue
        for word in join_tokens(answers[row], _vocabulary(explanation)):
            found.append(_choice(explanation, row, word.text, word.tokens))
    return found


def row_label(explanation: Explained, row: int) -> str:
    """The text of a row; its class or number where it has none. An answer with rows of its own is not repeated."""
    prompt, answer = row_words(explanation, row)
    words = prompt if explanation.each and explanation.text is not None else [*prompt, *answer]
    text = "".join(" " * word.space + word.text for word in words).strip()
    if text:
        return text if len(text) <= 80 else text[:79] + "…"
    return f"row {row}" if explanation.target is None else f"target {explanation.target[row]}"


def row_words(explanation: Explained, row: int) -> tuple[list[Word], list[Word]]:
    """The words of a row's text, and those of its answer, which `Choice.words` has behind them."""
    if explanation.tokens is None or (explanation.text is None and not explanation.each):
        return [], []
    tokens, vocabulary = explanation.tokens[row], _vocabulary(explanation)
    if explanation.answer_tokens is None:
        return join_tokens(tokens, vocabulary), []
    split = len(tokens) - len(explanation.answer_tokens[row])
    answer = join_tokens(tokens[split:], vocabulary)
    moved = [Word(w.text, range(w.tokens.start + split, w.tokens.stop + split), w.space or i == 0) for i, w in enumerate(answer)]
    return join_tokens(tokens[:split], vocabulary), moved


def to_array(tensor: Tensor) -> Array:
    """A tensor as NumPy's float32, or float64 where it is."""
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype.itemsize > 4 else tensor.float()).numpy()


def _vocabulary(explanation: Explained) -> list[str]:
    return [token for row in explanation.tokens or [] for token in row]


def _choice(explanation: Explained, row: int, label: str, tokens: range | None) -> Choice:
    def pick(values: Tensor) -> Array:
        """The entries of the choice among values (T, ...) of its row, or the row itself."""
        array = to_array(values)
        return array if tokens is None else array[tokens.start : tokens.stop].sum(0)

    size = slice(None) if tokens is None else slice(tokens.start, tokens.stop)
    entries = {name: values for name, values in explanation.own.items() if len(values) == len(explanation)}
    own = {name: float(np.mean(np.atleast_1d(to_array(values[row]))[size])) for name, values in entries.items()}
    rows = {name: pick(tower_row(explanation, name, row)) for name in explanation.relevancy}
    values = None if explanation.text is None else pick(text_row(explanation, row))
    prompt, answer = row_words(explanation, row)
    words = [] if values is None else [(w, float(values[w.tokens.start : w.tokens.stop].sum())) for w in (*prompt, *answer)]
    scores = None if explanation.scores is None else pick(explanation.scores[row])
    others = explanation.tower_images or {}
    return Choice(
        row=row,
        label=label,
        score=None if scores is None else float(scores.sum()),
        patches=_maps(explanation, explanation.image, row, pick) + _regions(explanation, row, pick),
        towers={name: _maps(explanation, maps, row, pick) for name, maps in others.items()},
        words=words,
        rows=rows,
        own=own,
    )


def without_own(explanation: Explained, tower: str) -> Tensor:
    """The relevancy of a tower, 0 at the positions that are read."""
    values, position = explanation.relevancy[tower], (explanation.position or {}).get(tower)
    if position is None:
        return values
    index = position.to(values.device)
    return values.scatter(-1, index[..., None] if index.ndim < values.ndim else index, 0.0)


def tower_row(explanation: Explained, tower: str, row: int) -> Tensor:
    """A tower's entries for one row of the batch, 0 at the position that is read; those of all its images in turn."""
    values = without_own(explanation, tower)
    if len(values) == len(explanation):
        return values[row]
    images = [values[i] for i, owner in enumerate(explanation.image_rows or []) if owner == row]
    return torch.cat(images, -1) if images else torch.zeros_like(values[0])


def home(explanation: Explained, *names: str) -> str:
    """The tower that a part was cut from: the first of the names that there is, or the first tower."""
    return next((name for name in names if name in explanation.relevancy), next(iter(explanation.relevancy)))


def text_row(explanation: Explained, row: int) -> Tensor:
    """The text's entries for one row of the batch, 0 at the position that is read."""
    values = explanation.text[row] if explanation.text is not None else torch.zeros(0)
    tower = home(explanation, "text", "language")
    position = (explanation.position or {}).get(tower)
    # Between towers that entry is zero, and `text` may be of another tower.
    if position is None or explanation.places is None or not bool(explanation.own[tower].any()):
        return values
    places = torch.tensor([*explanation.places[row], *[-1] * (values.shape[-1] - len(explanation.places[row]))])
    read = position[row].cpu().reshape(-1, 1) == places  # (1, L) or (T, L)
    read = read if values.ndim == 2 else read.any(0)
    return values.masked_fill(read.to(values.device), 0.0)


def _maps(explanation: Explained, maps: Maps | None, row: int, pick: Any) -> list[Patch]:
    if maps is None or explanation.image_rows is None:
        return []
    owners = enumerate(zip(maps, explanation.image_rows, strict=True))
    return [Patch(index, pick(part)) for index, (part, owner) in owners if owner == row]


def _regions(explanation: Explained, row: int, pick: Any) -> list[Patch]:
    if explanation.regions is None or explanation.boxes is None:
        return []
    values, boxes = pick(explanation.regions[row]), to_array(explanation.boxes[row]).tolist()
    return [Patch(row, value.reshape(1, 1), tuple(box)) for value, box in zip(values, boxes, strict=True)]


def limits(patches: Sequence[Patch]) -> tuple[float, float]:
    """The smallest and the largest value on all of them; 0 and 0 for none."""
    values = np.concatenate([np.zeros(0), *(patch.values.ravel() for patch in patches)])
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def shares(values: Array, low: float, high: float) -> Array:
    """Values mapped to [0, 1]; zeros where `low` equals `high`."""
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


# --- the user's pictures ---


def read_pictures(explanation: Explained, image: Any) -> list[Array] | None:
    """The user's image or images as (H, W, 3) or (H, W, 4) arrays of bytes: one for all maps, or one per map."""
    if image is None:
        return None
    many = isinstance(image, (list, tuple)) or (hasattr(image, "ndim") and image.ndim == 4)
    pictures = [_picture(part) for part in image] if many else [_picture(image)]
    count = len(explanation) if explanation.image_rows is None else len(explanation.image_rows)
    if len(pictures) not in (1, count):
        raise ValueError(f"image must be one image or {count} of them (one per map); got {len(pictures)}")
    return pictures


def to_rgb(picture: Any) -> Any:
    """A PIL image in RGB. Of 16 bits the upper eight count; PIL takes all above 255 for white.

    Raises:
        ValueError: 32 bits, of which nobody says what is white.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):  # "I": older versions of PIL
        from PIL import Image

        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"image must have 8 or 16 bits a channel; got a picture of mode {picture.mode!r}, which has 32")
    return picture.convert("RGB")


def _picture(image: Any) -> Array:
    if hasattr(image, "convert"):  # a PIL image, whose array may hold indices of a palette
        image = to_rgb(image)
    array = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"image must be a PIL image, an array or a tensor; got {describe(image)}")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ValueError(f"image must have shape (H, W), (H, W, 3) or (3, H, W); got {array.shape}")
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    if array.dtype.kind != "f":
        if array.size and not (array.min() >= 0 and array.max() <= 255):
            raise ValueError(f"image must be bytes, or floats from 0 to 1; got {array.min()} to {array.max()}")
        return array.astype(np.uint8)
    if array.size and not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        got = f"{array.min():.3g} to {array.max():.3g}"
        raise ValueError(f"image must be bytes, or floats from 0 to 1 (not a model's normalised pixel_values); got {got}")
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)


def read_crops(explanation: Explained, crop: Any) -> list[Box]:
    """The box of every map on its picture.

    Raises:
        ValueError: `crop` is neither a box nor one box per map.
    """
    count = 0 if explanation.image_rows is None else len(explanation.image_rows)
    if crop is None:
        return [WHOLE] * count
    if explanation.image_rows is None:
        raise ValueError(f"crop must be None for an explanation without maps; got {crop}")
    array = np.asarray(crop.detach().cpu() if isinstance(crop, Tensor) else crop, dtype=float)
    if array.shape not in ((4,), (count, 4)) or not ((array[..., 2:] > array[..., :2]).all() and np.isfinite(array).all()):
        raise ValueError(f"crop must be x1, y1, x2, y2 relative to the image, x1 < x2, y1 < y2, or one box per map; got {crop}")
    return [tuple(box) for box in np.broadcast_to(array, (count, 4)).tolist()]
