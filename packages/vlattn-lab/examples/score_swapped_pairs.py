"""Does a model see who is where? Winoground's scores for any scoring function: `vlattn_lab.winoground`.

Two pictures show the same digits in exchanged places, and two captions have the same words in another order. "Text" counts pairs
where each picture's own caption scores higher than the other caption, "image" pairs where each caption's own picture scores
higher, and "group" pairs where both are true. The script scores UNITER, one stream over words and regions, and CLIP, two towers
that meet in one product.

`vlattn_lab.winoground.load_pairs(directory)` reads a local copy of Winoground itself.
"""

import torch
from torch import Tensor

import vlattn_lab as lab

PAIRS = 100
one, two = lab.swapped_pairs(PAIRS, seed=1)
uniter, regions_and_words = lab.load_uniter()
clip, pixels_and_words = lab.load_clip()


@torch.no_grad()
def matching(scene: tuple[Tensor, Tensor], caption: str) -> float:
    """UNITER's log odds that the caption is true."""
    image, boxes = scene
    logits = uniter(**regions_and_words([caption], image[None], boxes[None])).logits[0]
    return float(logits[1] - logits[0])


@torch.no_grad()
def similarity(scene: tuple[Tensor, Tensor], caption: str) -> float:
    """CLIP's scaled cosine of the two vectors."""
    image, _ = scene
    return float(clip(**pixels_and_words(image[None], [caption])).logits_per_image)


pairs = [
    (((one.images[i], one.boxes[i]), (two.images[i], two.boxes[i])), (one.captions[i], two.captions[i])) for i in range(PAIRS)
]
results = {
    "UNITER": lab.winoground.evaluate(matching, pairs),
    "CLIP": lab.winoground.evaluate(similarity, pairs),
    "chance": {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6},
}
print(f"{one.captions[0]!r} and {two.captions[0]!r}, and {PAIRS - 1} more pairs")
for name, scores in results.items():
    print(f"  {name:7}" + "".join(f"  {kind} {share:4.0%}" for kind, share in scores.items()))
