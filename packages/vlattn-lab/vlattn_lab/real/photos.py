"""The photos: two that scikit-learn ships, four that scikit-image ships."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 224  # of the pictures that the models see
SOURCES = {
    "china": "`china.jpg` of scikit-learn, by danielbuechele (Flickr), CC BY 2.0",
    "flower": "`flower.jpg` of scikit-learn, by vultilion (Flickr), CC BY 2.0",
    "astronaut": "`astronaut` of scikit-image, by NASA, public domain",
    "cat": "`cat` of scikit-image, by Stefan van der Walt, CC0",
    "coffee": "`coffee` of scikit-image, by Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0",
    "rocket": "`rocket` of scikit-image, by SpaceX, public domain",
}
MEAN, DEVIATION = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def square(name: str) -> Any:
    """The largest square in the middle of a photo, as a PIL image."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        array = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data

        array = getattr(skimage.data, name)()
    photo = Image.fromarray(array).convert("RGB")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))


def pixels(photo: Any, side: int = SIDE) -> Tensor:
    """(1, 3, side, side), normalised as the models of ImageNet are."""
    values = np.array(photo.resize((side, side)), dtype=np.float32) / 255
    return ((torch.from_numpy(values).permute(2, 0, 1) - MEAN) / DEVIATION)[None]
