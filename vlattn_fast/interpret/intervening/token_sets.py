"""Groups of tokens as callers name them, as masks over the tokens of a tower."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.adapters.pixels import WHOLE, Box
from vlattn_fast.interpret.adapters.sound import Seconds
from vlattn_fast.interpret.adapters.tokens import Patches, Sounds, TextPatches, Tokens
from vlattn_fast.interpret.intervening.traced_model import TracedTower

NAMES = ("image", "sound", "text", "question", "answer", "last", "special")
PARTS = tuple(name for name in NAMES if name != "text")  # a text is a question and an answer
_ONE_IMAGE = re.compile(r"image:(\d+)$")
_LESS = " - "  # "question - last": the tokens of one name without those of another
_KEEP = ("answer", "last", "special")  # in a table a token with several names belongs to the first of these
# A name; a span (start, stop), or several; bool (B, N) or (N,); the patches of an image whose centres lie in a box of it, and the
# tokens of a sound whose middles lie in a stretch of it.
TokenGroup = str | tuple[int, int] | Sequence[tuple[int, int]] | Tensor | tuple[str, Box] | Seconds


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Tokens (B, N) of a tower, and whether tokens that a model generates after them belong to the set, too."""

    mask: Tensor  # bool (B, N), on the CPU
    grows: bool = False  # it takes each new token
    runs: bool = False  # its generated tokens: as queries each new token, as keys only the newest


def check_group(name: str, group: Any) -> None:
    """TypeError or ValueError unless `group` is a name of `NAMES`, spans, or a bool mask; None = all tokens."""
    if group is None or isinstance(group, Seconds):
        return
    if isinstance(group, str):
        if not is_name(group):
            allowed = f"one of {', '.join(map(repr, NAMES))} or 'image:0', 'image:1', ..."
            raise ValueError(f"{name} must be {allowed}, or one minus others, e.g. 'question - last'; got {group!r}")
    elif isinstance(group, Tensor):
        if group.dtype != torch.bool or group.ndim not in (1, 2):
            raise ValueError(f"{name} must be bool (B, N) or (N,), True = a token of the group; got {describe(group)}")
    elif _is_of_box(group):
        if not (group[0] == "image" or _ONE_IMAGE.match(group[0])) or not _is_box(group[1]):
            raise ValueError(
                f"{name} must be ('image', (x1, y1, x2, y2)), or of 'image:0', with x1 < x2 and y1 < y2 relative to the image, "
                f"in [0, 1]; got {group!r:.80}"
            )
    elif not isinstance(group, Sequence) or not group or not all(_is_span(span) for span in _spans(group)):
        kinds = "a name, spans (start, stop) with 0 <= start < stop, va.Seconds, or bool (B, N)"
        raise ValueError(f"{name} must be {kinds}; got {group!r:.80}")


def is_name(group: str) -> bool:
    """Whether it is a name of `NAMES`, "image:0", or such a name minus others."""
    return all(name in NAMES or _ONE_IMAGE.match(name) for name in group.split(_LESS))


def _is_of_box(group: Any) -> bool:
    return isinstance(group, Sequence) and len(group) == 2 and isinstance(group[0], str) and not isinstance(group[1], str)


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, Sequence) and len(box) == 4 and all(type(part) in (int, float) for part in box)
    return numbers and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


def _spans(group: Any) -> list[Any]:
    return [group] if len(group) == 2 and all(isinstance(part, int) for part in group) else list(group)


def _is_span(span: Any) -> bool:
    if not isinstance(span, Sequence) or len(span) != 2 or not all(type(part) is int for part in span):
        return False
    return 0 <= span[0] < span[1]


def token_set(name: str, group: Any, tower: TracedTower) -> TokenSet | str:
    """The tokens of a checked group, or why the tower has none."""
    (batch, size), where = tower.shape, f"tower '{tower.name}' of {tower.shape[1]} tokens"
    if group is None:
        return TokenSet(torch.ones(batch, size, dtype=torch.bool), grows=True)
    if isinstance(group, Tensor):
        if group.shape[-1] != size or (group.ndim == 2 and len(group) not in (1, batch)):
            return f"{name} must have the shape (B, N) = ({batch}, {size}) of tower '{tower.name}'; got {tuple(group.shape)}"
        chosen = TokenSet(group.cpu().expand(batch, size))
    elif isinstance(group, str):
        mask, *less = (_named(each, tower) for each in group.split(_LESS))
        if mask is None:
            return f"{name}={group!r} has no meaning in {where}"
        for taken in less:
            mask = mask if taken is None else mask.cpu() & ~taken.cpu()
        chosen = TokenSet(mask.cpu(), grows=group in ("answer", "text"), runs=group == "last")
    elif isinstance(group, Seconds) or _is_of_box(group):
        mask = _between(group, tower) if isinstance(group, Seconds) else _in_box(str(group[0]), group[1], tower)
        if mask is None:
            return f"{name}={group!r} has no meaning in {where}"
        chosen = TokenSet(mask)
    else:
        mask = torch.zeros(batch, size, dtype=torch.bool)
        for start, stop in _spans(group):
            if stop > size:
                return f"{name} must end within {where}; got the span ({start}, {stop})"
            mask[:, start:stop] = True
        chosen = TokenSet(mask)
    if not bool(chosen.mask.any()) and not chosen.grows:
        return f"{name} must have a token; got {describe_group(group)}, which is empty in {where}"
    return chosen


def disjoint(groups: Mapping[str, Any], towers: Iterable[TracedTower]) -> dict[str, Any]:
    """The groups of a table, which has each token once: in the towers a token with several names belongs to the first of `_KEEP`.

    Raises:
        ValueError: other groups overlap.
    """
    kept = dict(groups)
    order = sorted(kept, key=lambda name: _strength(kept[name]))
    for tower, (one, two) in itertools.product(dict.fromkeys(towers), itertools.combinations(order, 2)):
        first, second = (token_set(name, kept[name], tower) for name in (one, two))
        if isinstance(first, str) or isinstance(second, str) or not bool((shared := first.mask & second.mask).any()):
            continue
        if not isinstance(kept[two], str) or _strength(kept[one]) == _strength(kept[two]):
            sample = int(shared.any(1).nonzero()[0])
            tokens = ", ".join(map(str, shared[sample].nonzero()[:, 0].tolist()[:10]))
            raise ValueError(
                f"groups of a table must hold each token once; got {one!r} and {two!r}, which share tokens {tokens} of sample "
                f"{sample} in tower '{tower.name}' (edits of va.intervene may overlap)"
            )
        kept[two] += _LESS + kept[one].split(_LESS)[0]
    return kept


def _strength(group: Any) -> int:
    """The index of a name in `_KEEP`; others come after these."""
    name = group.split(_LESS)[0] if isinstance(group, str) else None
    return _KEEP.index(name) if name in _KEEP else len(_KEEP)


def describe_group(group: Any) -> str:
    return describe(group) if isinstance(group, Tensor) else repr(group)


def _named(group: str, tower: TracedTower) -> Tensor | None:
    """bool (B, N); None if the name has no meaning for such tokens."""
    tokens = tower.tokens
    if group == "last":
        return tower.last
    words = tokens.words() if tokens.text else None
    if group == "answer":
        return tower.answered if tokens.predicts or bool(tower.answered.any()) else None
    if group in ("text", "question"):
        if words is None:
            return None
        answered = tower.answered
        return words.cpu() & ~answered if group == "question" else words.cpu() | answered
    is_image = _of_image(tokens)
    if (one := _ONE_IMAGE.match(group)) is not None:
        return None if is_image is None else _one_of_several(tokens, is_image, int(one[1]))
    if group == "image":
        return is_image
    heard = _real(tokens) if isinstance(tokens, Sounds) else None
    if group == "sound":
        return heard
    if words is None and is_image is None and heard is None:  # the kinds of its tokens are not known
        return None
    special = _real(tokens)
    for part in (words, is_image, heard, tower.answered):
        special = special if part is None else special & ~part.cpu()
    return special


def _real(tokens: Tokens) -> Tensor:
    real = tokens.real()
    return torch.ones(tokens.shape, dtype=torch.bool) if real is None else real.cpu()


def _of_image(tokens: Tokens) -> Tensor | None:
    """bool (B, N), the real tokens of images without those before their patches; None if there can be none."""
    if not tokens.image:
        return None
    is_image = tokens.image_mask().cpu().clone()
    if isinstance(tokens, Patches):
        is_image[:, : tokens.prefix] = False
    elif isinstance(tokens, TextPatches):
        start = 0 if tokens.before else tokens.shape[1] - int(is_image[0].sum())
        is_image[:, start : start + tokens.prefix] = False
    return is_image & _real(tokens)


def _between(stretch: Seconds, tower: TracedTower) -> Tensor | None:
    tokens = tower.tokens
    mask = tokens.between(stretch) if isinstance(tokens, Sounds) else None
    return None if mask is None else mask & _real(tokens)


def _in_box(image: str, box: Box, tower: TracedTower) -> Tensor | None:
    """bool (B, N), the patches of an image whose centres lie in a box relative to it; None if their places are not known."""
    tokens, is_image = tower.tokens, _named(image, tower)
    # the token of each patch
    numbered = None if is_image is None else tokens.maps(torch.arange(tokens.shape[1]).expand(tokens.shape))
    if is_image is None or numbered is None:
        return None
    maps, rows = numbered
    inside = torch.zeros_like(is_image)
    for places, row, part in zip(maps, rows, tokens.photos(len(maps))[1], strict=True):
        left, top, right, bottom = part or WHOLE
        y, x = ((torch.arange(size) + 0.5) / size for size in places.shape)
        x, y = left + x * (right - left), top + y * (bottom - top)
        cells = ((box[1] <= y) & (y <= box[3]))[:, None] & (box[0] <= x) & (x <= box[2])
        inside[row, places[cells]] = True
    return inside & is_image.cpu()


def _one_of_several(tokens: Tokens, is_image: Tensor, number: int) -> Tensor | None:
    """bool (B, N), the tokens of each sample's image of this number; None if the images of its
    tokens are not known."""
    if isinstance(tokens, Patches):
        return is_image if number == 0 else torch.zeros_like(is_image)
    if tokens.layouts is None:
        return None
    sizes = [layout.size for layout in tokens.layouts]
    samples, columns = is_image.nonzero().unbind(1)
    if sum(sizes) != len(samples):
        return None
    chosen, before = torch.zeros_like(is_image), dict[int, int]()
    for rows, places in zip(samples.split(sizes), columns.split(sizes), strict=True):
        if not len(rows):
            continue
        sample = int(rows[0])
        if before.setdefault(sample, 0) == number:
            chosen[rows, places] = True
        before[sample] += 1
    return chosen
