"""From captions, images and boxes of DigitScenes to the inputs of `UNITER`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "up above", "down below")
VOCABULARY = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", *DIGIT_WORDS, "left", "right", "up", "down", "of", "above", "below", "a")
FREQUENCIES = 4  # sine and cosine pairs per coordinate of a box centre
POSITION_DIM = 7 + 4 * FREQUENCIES
REGION_DIM = 64
_IDS = {word: i for i, word in enumerate(VOCABULARY)}


def word_ids(
    name: str, texts: Sequence[str], ids: Mapping[str, int], words: Sequence[str], begin: list[int], end: list[int]
) -> dict[str, Tensor]:
    """B texts -> input_ids int64 (B, L), attention_mask bool (B, L); shorter texts are padded with 0. `ids` of words; an error
    calls the texts `name` and shows `words`; `begin` and `end` stand around each text."""
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a sequence of strings; got the string {texts!r}")
    for text in texts:
        if unknown := [word for word in text.split() if word not in ids]:
            raise ValueError(f"{name} must have words of {words} alone; got the words {unknown} in {text!r}")
    said = [[*begin, *(ids[word] for word in text.split()), *end] for text in texts]
    length = max(map(len, said), default=0)
    input_ids = torch.tensor([one + [0] * (length - len(one)) for one in said], dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": input_ids != 0}


def box_positions(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """boxes (B, R, 4) in pixels of an image of this width and height -> (B, R, POSITION_DIM): UNITER's seven box features and
    sines of the centre."""
    x1, y1, x2, y2 = (boxes / torch.tensor([*size, *size], device=boxes.device)).unbind(-1)
    features = [x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)]
    for centre in ((x1 + x2) / 2, (y1 + y2) / 2):
        for frequency in range(1, FREQUENCIES + 1):
            angle = math.pi * frequency * centre
            features += [angle.sin(), angle.cos()]
    return torch.stack(features, dim=-1)


class DigitProcessor:
    """Words to ids and boxes to region features, without parameters.

    `processor(captions, images, boxes)` gives the keyword arguments of `UNITER.forward`.
    """

    def __call__(self, captions: Sequence[str], images: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """captions: B strings; images (B, H, W) float in [0,1]; boxes (B, R, 4) as in `Scenes`."""
        if len(captions) != len(images):
            raise ValueError(f"captions must be as many as images; got {len(captions)} for {len(images)} images")
        return {**self.words(captions), **self.regions(images, boxes)}

    def words(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions -> input_ids int64 (B, L), attention_mask bool (B, L); shorter captions are padded."""
        return word_ids("captions", captions, _IDS, VOCABULARY[4:], [_IDS["[CLS]"]], [_IDS["[SEP]"]])

    def regions(self, images: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """images (B, H, W), boxes (B, R, 4) of 8 x 8 pixels -> region_features (B, R, 64): the pixels in the box;
        region_positions (B, R, 23): UNITER's seven box features and sines of the centre; region_mask bool (B, R)."""
        if images.ndim != 3:
            raise ValueError(f"images must be (B, H, W); got {tuple(images.shape)}")
        if boxes.ndim != 3 or boxes.shape[::2] != (len(images), 4):
            raise ValueError(f"boxes must be ({len(images)}, R, 4); got {tuple(boxes.shape)}")
        height, width = images.shape[1:]
        corners = boxes.long()
        size = corners[..., 2:] - corners[..., :2]
        limit = torch.tensor([width, height], device=boxes.device)
        if bool((corners != boxes).any() | (size != 8).any() | (corners[..., :2] < 0).any() | (corners[..., 2:] > limit).any()):
            raise ValueError(f"boxes must be 8 x 8 whole pixels inside {width} x {height}; got {boxes.tolist()!r:.80}")
        span = torch.arange(8, device=boxes.device)
        x, y = (corners[..., axis, None] + span for axis in (0, 1))
        samples = torch.arange(len(images), device=boxes.device)[:, None, None, None]
        features = images[samples, y[..., :, None], x[..., None, :]].flatten(2)
        return {
            "region_features": features,
            "region_positions": box_positions(boxes, (width, height)),
            "region_mask": torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device),
        }

    def convert_ids_to_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """Ids (L) -> the L words they stand for."""
        return [VOCABULARY[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
