"""DigitScenes: handwritten digits on a canvas, captions that name two of them and their relation, boxes as ground truth.

Digits are scikit-learn's `load_digits` scans (1,797, 8 x 8 pixels), split by scan into train and test. Training captions leave
out some pairs of digits. A swapped pair is two scenes whose captions have the same words in another order, as in Winoground
(Thrush et al., CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_lab.processor import DIGIT_WORDS, RELATIONS, DigitProcessor

CANVAS = 32  # pixels, both sides
DIGIT = 8  # pixels, both sides of a scan and of its box
REGIONS = 4  # digits a scene
CLEARANCE = 4  # pixels between two centres from which a relation holds
NEGATIVES = ("digit", "relation", "order")
PAIRS = ("all", "seen", "held_out")
SPLITS = ("train", "test", "fit", "validation")
Batch = TypeVar("Batch", bound=Any)  # `Scenes` or `Questions`: tensors and tuples with an entry a sample


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes, each with R = 4 digits, no two alike, and one caption.

    images: float32 (B, 32, 32), ink in [0,1].
    boxes: float32 (B, R, 4), x1, y1, x2, y2 in pixels, the second corner exclusive.
    digits: int64 (B, R), 0 to 9.
    captions: B strings of five words, such as "three left of a seven".
    input_ids: int64 (B, 7), [CLS] five words [SEP].
    label: int64 (B), 1 = the caption is true of its scene.
    named: bool (B, R), the regions whose digit the caption names.
    """

    images: Tensor
    boxes: Tensor
    digits: Tensor
    captions: tuple[str, ...]
    input_ids: Tensor
    label: Tensor
    named: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of `UNITER.forward`: `model(**scenes.inputs())`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids, dtype=torch.bool),
            **DigitProcessor().regions(self.images, self.boxes),
        }

    def render(self, index: int = 0, *, scale: int = 8, boxes: bool = False) -> Tensor:
        """Scene `index` for a plot: uint8 (32*scale, 32*scale, 3), dark ink on white; boxes=True frames the named digits
        red and the rest grey."""
        if not 0 <= index < len(self):
            raise ValueError(f"index must be from 0 to {len(self) - 1}; got {index}")
        if scale < 1:
            raise ValueError(f"scale must be at least 1; got {scale}")
        image = self.images[index].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        picture = ((1.0 - image) * 255).round().to(torch.uint8)[..., None].repeat(1, 1, 3)
        if boxes:
            for box, named in zip((self.boxes[index] * scale).long().tolist(), self.named[index].tolist(), strict=True):
                x1, y1, x2, y2 = box
                frame = picture[y1:y2, x1:x2]
                inside = frame[1:-1, 1:-1].clone()
                frame[:] = torch.tensor([220, 30, 30] if named else [160, 160, 160], dtype=torch.uint8)
                frame[1:-1, 1:-1] = inside
        return picture


def select(whole: Batch, samples: Sequence[int]) -> Batch:
    """Some samples of scenes or questions, in this order."""
    parts = vars(whole).items()
    chosen = {name: x[list(samples)] if isinstance(x, Tensor) else tuple(x[i] for i in samples) for name, x in parts}
    return type(whole)(**chosen)


def batches(whole: Batch, size: int) -> Iterator[Batch]:
    """The samples of scenes or questions, `size` at a time."""
    return (select(whole, range(start, min(start + size, len(whole)))) for start in range(0, len(whole), size))


def joined(parts: Sequence[Batch]) -> Batch:
    """The samples of several scenes or questions, one after the other."""
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    together = {name: torch.cat(x) if isinstance(x[0], Tensor) else tuple(chain(*x)) for name, x in columns.items()}
    return type(parts[0])(**together)


@cache
def digit_scans(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scans float32 (S,8,8) in [0,1], digits int64 (S), index int64 (S) into `load_digits`) of a split: every fifth scan of
    each digit is a "test" scan, the rest are "train". A choice between trainings uses no test scan: trainings run on "fit" and
    are compared on "validation", which is every fifth training scan of each digit."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
    from sklearn.datasets import load_digits

    data = load_digits()
    digits = torch.from_numpy(data.target).long()
    rank = torch.nn.functional.one_hot(digits, 10).cumsum(0).gather(1, digits[:, None]).squeeze(1) - 1
    test = rank % 5 == 0
    validation = ~test & ((rank - rank // 5 - 1) % 5 == 0)  # the rank among training scans
    chosen = {"train": ~test, "test": test, "fit": ~test & ~validation, "validation": validation}[split]
    index = torch.nonzero(chosen).squeeze(1)
    return torch.from_numpy(data.images).float()[index] / 16.0, digits[index], index


def held_out_captions() -> Tensor:
    """bool (10,10,4): [first digit, second digit, relation] that no training caption says, true or false.

    No training caption names a pair whose sum is a multiple of five (nine pairs). Pairs whose sum leaves one over (nine, too)
    have only the relations "left of" and "right of".
    """
    digit = torch.arange(10)
    rest = (digit[:, None] + digit) % 5
    vertical = torch.tensor([False, False, True, True])
    return (rest == 0)[..., None] | ((rest == 1)[..., None] & vertical)


def sayable_captions(split: str, pairs: str | None) -> Tensor:
    """bool (10,10,4): [first digit, second digit, relation] that captions of `pairs` may say; None = "all" for the test split
    and "seen" for the rest."""
    if pairs is not None and pairs not in PAIRS:
        raise ValueError(f"pairs must be None or one of {PAIRS}; got {pairs!r}")
    held_out = held_out_captions()
    pairs = ("all" if split == "test" else "seen") if pairs is None else pairs
    return {"all": torch.ones_like(held_out), "seen": ~held_out, "held_out": held_out}[pairs]


def digit_scenes(
    count: int, *, split: str = "test", seed: int = 0, negative: str | None = None, pairs: str | None = None
) -> Scenes:
    """`count` scenes with a caption each; the same arguments give the same tensors.

    Args:
        count: how many, at least 1.
        split: the scans that are drawn, see `digit_scans`.
        seed: of the generator; scenes and true captions depend on seed, count, split and pairs only.
        negative: None = every caption is true (label 1). Otherwise every caption is false (label 0), because it names
            "digit": a digit outside the scene in place of a digit in it; "relation": another relation;
            "order": the two digits in the wrong order, with the words of the true caption.
        pairs: which captions (see `held_out_captions`): "seen" in training, "held_out", or "all"; None = "all" for the test
            split and "seen" for the rest.
    """
    check_integer("count", count, low=1)
    check_integer("seed", seed, high=2**64 - 1)  # the range of torch's generators
    if negative is not None and negative not in NEGATIVES:
        raise ValueError(f"negative must be None or one of {NEGATIVES}; got {negative!r}")
    kind = 0 if negative is None else 1 + NEGATIVES.index(negative)
    return sample_scenes(torch.full((count,), kind), split, pairs, torch.Generator().manual_seed(seed))


def sample_scenes(kind: Tensor, split: str, pairs: str | None, generator: torch.Generator) -> Scenes:
    """As `digit_scenes`, one scene per entry of kind int64 (B): 0 = true caption, 1 + i = false as in NEGATIVES[i]."""
    sayable = sayable_captions(split, pairs)
    scan, corners, chosen = _draw(kind.numel(), split, sayable, generator)
    scans, scan_digits, _ = digit_scans(split)
    digits = scan_digits[scan]
    true = chosen // 16, chosen // 4 % 4, chosen % 4
    wrong = torch.ones_like(sayable) if pairs == "held_out" else sayable  # a false caption need not be held out
    words, named = caption_words(kind, digits, corners, true, wrong, generator)

    captions = tuple(f"{DIGIT_WORDS[a]} {RELATIONS[r]} a {DIGIT_WORDS[b]}" for a, r, b in words.tolist())
    return Scenes(
        images=paint(scans[scan], corners),
        boxes=torch.cat([corners, corners + DIGIT], dim=-1).float(),
        digits=digits,
        captions=captions,
        input_ids=DigitProcessor().words(captions)["input_ids"],
        label=(kind == 0).long(),
        named=named,
    )


def swapped_pairs(count: int, *, split: str = "test", seed: int = 0, pairs: str | None = None) -> tuple[Scenes, Scenes]:
    """`count` pairs of scenes as in Winoground: the second scene exchanges the two named scans of the first, and its caption
    exchanges the two digits. Each caption is true of its scene and false of its partner's. Arguments as in `digit_scenes`."""
    true = digit_scenes(count, split=split, seed=seed, pairs=pairs)
    false = digit_scenes(count, split=split, seed=seed, pairs=pairs, negative="order")
    region = torch.arange(REGIONS).expand(count, -1).clone()
    region[true.named] = torch.nonzero(true.named)[:, 1].view(-1, 2).flip(1).reshape(-1)
    boxes = true.boxes.gather(1, region[..., None].expand(-1, -1, 4))
    crops = DigitProcessor().regions(true.images, true.boxes)["region_features"]
    images = paint(crops.unflatten(-1, (DIGIT, DIGIT)), boxes[..., :2].long())
    swapped = Scenes(images, boxes, true.digits, false.captions, false.input_ids, true.label, true.named)
    return true, swapped


def paint(crops: Tensor, corners: Tensor) -> Tensor:
    """crops (B, R, 8, 8) at corners (B, R, 2) x, y -> images (B, 32, 32)."""
    samples = torch.arange(len(crops))[:, None, None, None]
    y, x = (corners[..., axis, None] + torch.arange(DIGIT) for axis in (1, 0))
    images = torch.zeros(len(crops), CANVAS, CANVAS)
    images[samples, y[..., :, None], x[..., None, :]] = crops
    return images


def displacement(corners: Tensor) -> Tensor:
    """corners (B, R, 2) x, y -> (B, R, R, 4): how many pixels i lies left of, right of, above and below j."""
    right, down = (corners[:, None, :, :] - corners[:, :, None, :]).unbind(-1)
    return torch.stack([right, -right, down, -down], dim=-1)


@cache
def by_digit(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """(int64 (S): the scans of a split, sorted by digit; int64 (10): where those of a digit start, and how many there are)."""
    _, digits, _ = digit_scans(split)
    count = torch.bincount(digits, minlength=10)
    return digits.argsort(stable=True), count.cumsum(0) - count, count


def _draw(count: int, split: str, sayable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws scenes until `count` have no overlapping digits and something to say: (scan (B, R), corners (B, R, 2), caption
    (B) = 16 * first region + 4 * second region + relation)."""
    order, start, per_digit = by_digit(split)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    while sum(len(part[0]) for part in kept) < count:
        trials = 10 * count + 64
        corners = torch.randint(0, CANVAS - DIGIT + 1, (trials, REGIONS, 2), generator=generator)
        distance = (corners[:, :, None] - corners[:, None]).abs().amax(-1)
        apart = ((distance >= DIGIT) | torch.eye(REGIONS, dtype=torch.bool)).flatten(1).all(1)
        corners = corners[apart]
        digits = torch.rand(len(corners), 10, generator=generator).argsort(1)[:, :REGIONS]
        pick = (torch.rand(digits.shape, generator=generator) * per_digit[digits]).long()
        true = (displacement(corners) >= CLEARANCE) & sayable[digits[:, :, None], digits[:, None, :]]
        true = true.flatten(1)
        told = true.any(1)
        caption = torch.multinomial(true[told].float(), 1, generator=generator).squeeze(1)
        kept.append((order[start[digits] + pick][told], corners[told], caption))
    scan, corners, caption = (torch.cat(part)[:count] for part in zip(*kept, strict=True))
    return scan, corners, caption


def caption_words(
    kind: Tensor, digits: Tensor, corners: Tensor, true: Sequence[Tensor], sayable: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(words int64 (B, 3) = first digit, relation, second digit; named bool (B, R)), false where kind is not 0. `true`: first
    region, second region and relation (B) of true captions."""
    first, second, relation = true
    samples = torch.arange(len(kind))
    a, b = digits[samples, first], digits[samples, second]

    absent = torch.ones(len(kind), 10, dtype=torch.bool).scatter_(1, digits, False)
    replace_first = torch.rand(len(kind), generator=generator) < 0.5
    kept = torch.where(replace_first, b, a)
    allowed = torch.where(replace_first[:, None], sayable[:, kept, relation].T, sayable[kept, :, relation])
    stranger = torch.multinomial((absent & allowed).float(), 1, generator=generator).squeeze(1)

    false_relations = (displacement(corners)[samples, first, second] <= 0) & sayable[a, b]
    other_relation = torch.multinomial(false_relations.float(), 1, generator=generator).squeeze(1)

    wrong_digit, wrong_relation, wrong_order = (kind == 1 + i for i in range(3))
    words = torch.stack(
        [
            torch.where(wrong_digit & replace_first, stranger, torch.where(wrong_order, b, a)),
            torch.where(wrong_relation, other_relation, relation),
            torch.where(wrong_digit & ~replace_first, stranger, torch.where(wrong_order, a, b)),
        ],
        dim=1,
    )
    named = (digits[..., None] == words[:, None, ::2]).any(-1)
    return words, named
