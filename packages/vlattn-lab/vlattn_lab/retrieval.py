"""Recall at 1, 5 and 10 of image and text retrieval, on precomputed features of Flickr30k or COCO as SCAN and VSE++ have them.

    images, captions = load_features("f30k_precomp", "test")
    recall(score(images, captions))   # your similarity, (images, captions)

In: a folder of features; a matrix of similarities.
Out: shares of queries.
Imports: nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CAPTIONS = 5  # of each image, in their order


def load_features(directory: str | Path, split: str = "test") -> tuple[Tensor, list[str]]:
    """Regions (images, R, D), float32, and the captions, five an image: `{split}_ims.npy` and `{split}_caps.txt`.

    The file of some splits has each image five times, once a caption; here it has each once.

    Raises:
        ValueError: a missing file; numbers of images and captions that do not agree.
    """
    features, texts = Path(directory) / f"{split}_ims.npy", Path(directory) / f"{split}_caps.txt"
    for file in (features, texts):
        if not file.is_file():
            raise ValueError(f"directory must hold {features.name} and {texts.name}; got no {file}")
    images = np.load(features, mmap_mode="r")
    captions = texts.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    repeats = len(images) == len(captions)
    if images.ndim != 3 or len(captions) % CAPTIONS or not (repeats or CAPTIONS * len(images) == len(captions)):
        shape = f"{images.shape} and {len(captions)}"
        raise ValueError(f"features must be (images, regions, size), with {CAPTIONS} captions an image; got {shape} captions")
    chosen = images[::CAPTIONS] if repeats else images
    return torch.from_numpy(np.array(chosen, dtype=np.float32)), captions


def recall(similarity: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Shares of queries that have a right answer among the first K: "text@K" of images, "image@K" of captions.

    Args:
        similarity: (images, captions), higher for a better fit; captions 5 i to 5 i + 4 belong to image i.

    An answer that ties with a wrong one comes after it.

    Raises:
        ValueError: another shape, or a NaN.

    >>> recall(torch.eye(2).repeat_interleave(5, 1), at=(1,))
    {'text@1': 1.0, 'image@1': 1.0}
    """
    if similarity.ndim != 2 or not len(similarity) or similarity.shape[1] != CAPTIONS * len(similarity):
        raise ValueError(f"similarity must be (images, {CAPTIONS} x images); got {tuple(similarity.shape)}")
    if similarity.isnan().any():
        raise ValueError("similarity must hold numbers that can be compared; got NaN")
    right = torch.eye(len(similarity), dtype=torch.bool).repeat_interleave(CAPTIONS, 1)
    similarity = similarity.cpu()
    own = similarity.masked_fill(~right, -torch.inf)
    wrong = ~right
    ranks = {  # wrong answers that are no worse than the best right one
        "text": ((similarity >= own.amax(1, keepdim=True)) & wrong).sum(1),
        "image": ((similarity >= own.amax(0, keepdim=True)) & wrong).sum(0),
    }
    return {f"{name}@{k}": float((rank < k).double().mean()) for name, rank in ranks.items() for k in at}
