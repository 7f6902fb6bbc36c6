"""Photos under maps: reading them, and the part of each that the model saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.numbers.choices import WHOLE, Array, Box, to_array
from vlattn_fast.interpret.result.numbers.explained import Explained


def read_images(explanation: Explained, image: Any, numbers: Sequence[int] | None = None) -> list[Array] | None:
    """The user's image or images as (H, W, 3) or (H, W, 4) arrays of bytes: one for all maps, or one per map; maps of one photo
    then have the same array. `numbers`: the samples to draw, None = all."""
    if image is None:
        return None
    if explanation.seconds is not None:
        raise ValueError("image must be None for a sound, whose maps are strips of time; got one: leave it out")
    if not explanation.is_spatial:
        why = explanation.no_map
        if why is None:  # made by hand, or by a model that only saw words
            names = ", ".join(explanation.relevancy)
            way = "explain with patches=va.PatchGrid(rows, columns)"
            why = f"no token of {names} has a place in an image. If the model saw one, {way}"
        raise ValueError(f"image must be None for an explanation without maps and boxes; got one, but {why}")
    many = isinstance(image, (list, tuple)) or (hasattr(image, "ndim") and image.ndim == 4)
    images = [pixels(part) for part in image] if many else [pixels(image)]
    owners = list(range(len(explanation))) if explanation.image_samples is None else explanation.image_samples
    photos, got = explanation.photos, len(images)
    drawn = dict.fromkeys(
        photo for photo, owner in zip(photos or [], owners, strict=False) if numbers is None or owner in numbers
    )
    if got == len(owners) or (photos is None and got == 1):
        return images
    if photos and got == len(set(photos)):
        return [images[photo] for photo in photos]
    if photos and got == len(drawn):
        of = dict(zip(drawn, images, strict=True))
        return [of.get(photo, images[0]) for photo in photos]
    raise ValueError(_wanted(explanation, owners, len(drawn), got))


def _wanted(explanation: Explained, owners: list[int], photos: int, got: int) -> str:
    """The message for a wrong number of photos. `owners`: the sample of each map; `photos`: how many there are, if known."""
    count = len(owners)
    kinds = f"one image or {count} of them (one per map)"
    if explanation.photos is not None:
        kinds = f"{photos} photos, one for each image that the model saw" + (
            f", or {count}, one per map" if photos < count else ""
        )
    step = got // count if count and got % count == 0 else 1
    if step > 1:
        way = f". If each map stands for {step} frames of a video, pass image[::{step}]"
    elif explanation.photos is None:
        way = ""
    elif got == 1 and None in (explanation.crops or [None]) and max(map(owners.count, owners), default=0) > 1:
        way = ", in the order of the prompts. If some are crops of one photo, their places in it are not known: pass crop="
    else:
        way = ", in the order of the samples"
    return f"image must be {kinds}; got {got}{way}"


def each_once(images: list[Array] | None, change: Callable[[Array], Array]) -> list[Array] | None:
    """The images, changed; images that are the same array stay the same array."""
    changed = {id(image): change(image) for image in {id(image): image for image in images or []}.values()}
    return None if images is None else [changed[id(image)] for image in images]


def open_image(path: Any) -> Any:
    """The image in the file `path`, RGB and upright, as cameras note it. ValueError if it is not an image, or has 32 bits."""
    return to_rgb(_opened(path, "image"))


def read_mask(image: Any) -> Tensor:
    """bool (h, w) of a PIL image or of the file of one: True if a pixel, or its index in the palette, is not 0."""
    values = np.asarray(image if hasattr(image, "convert") else _opened(image, "boxes"))
    return torch.from_numpy((values[..., :3] != 0).any(-1) if values.ndim == 3 else values != 0)


def _opened(path: Any, name: str) -> Any:
    """The image in the file `path` as it is stored, upright. ValueError, about the argument `name`, if it is not an image."""
    with extra("viz"):
        from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
    except FileNotFoundError:
        raise ValueError(f"{name} must be a file; got {path}, which does not exist") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"{name} must have at most {most:,} pixels, twice PIL.Image.MAX_IMAGE_PIXELS; got more in {path}. Scale the image "
            "down, as the model's processor would do anyway, or raise PIL's limit if the file can be trusted"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's, by the kind of damage
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name} must be an image file; got {path}, which PIL cannot read: {reason}") from error
    return image


def to_rgb(image: Any) -> Any:
    """A PIL image in RGB. 16-bit images keep their upper eight bits; PIL itself makes all above 255 white.
    ValueError for an image of 32 bits, which defines no white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # "I" in older versions of PIL
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"image must have 8 or 16 bits a channel; got an image of mode {image.mode!r}, which has 32")
    return image.convert("RGB")


def pixels(image: Any) -> Array:
    """One image of a user as an array (H, W, 3) or (H, W, 4) of bytes."""
    if isinstance(image, (str, Path)) or hasattr(image, "read"):
        image = open_image(image)
    if hasattr(image, "convert"):  # the array of a PIL image may hold indices of a palette
        image = to_rgb(image)
    array = to_array(image) if isinstance(image, Tensor) and image.is_floating_point() else np.asarray(image)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"image must be a PIL image, an array or a tensor; got {describe(image)}")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ValueError(f"image must have shape (H, W), (H, W, 3) or (3, H, W); got {array.shape}")
    if array.size == 0:
        raise ValueError(f"image must have at least one pixel; got shape {array.shape}")
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    if array.dtype.kind != "f":
        if not (array.min() >= 0 and array.max() <= 255):
            raise ValueError(f"image must be bytes, or floats from 0 to 1; got {array.min()} to {array.max()}")
        return array.astype(np.uint8)
    if not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        got = f"{array.min():.3g} to {array.max():.3g}"
        raise ValueError(f"image must be bytes, or floats from 0 to 1 (not a model's normalised pixel_values); got {got}")
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)


# --- the part that the model saw ---


def read_boxes(explanation: Explained, images: list[Array] | None, crop: Any, processor: Any) -> list[Box]:
    """The box of every map on its image: `crop`, or that of the explanation's `crops` or of `processor`, else the whole image,
    with a warning if its shape differs. ValueError if `crop` and `processor` are both given, or `processor` without an image."""
    if crop is not None and processor is not None:
        raise ValueError(f"crop must be None if processor is given, which determines the part that the model saw; got {crop}")
    if processor is not None and images is None:
        raise ValueError("processor must be given together with an image; got image=None")
    boxes = _read_crops(explanation, crop)
    if crop is not None or images is None:
        return boxes
    sizes = [images[0 if len(images) == 1 else number].shape[1::-1] for number in range(len(boxes))]
    shapes = [tuple(part.shape[-2:]) for part in explanation.image] if explanation.image is not None else []
    told = explanation.crops or [None] * len(boxes)
    told = [box if box and _fits(box, *of) else None for box, *of in zip(told, shapes, sizes, strict=False)]
    seen: dict[tuple[int, int], Box | None] = {}
    if processor is not None:
        seen = {size: seen_part(processor, size) for size in dict.fromkeys(sizes) or [images[0].shape[1::-1]]}
    _warn_of_shapes([of for box, *of in zip(told, shapes, sizes, strict=False) if box is None and seen.get(of[1]) is None])
    return [tuple(box or seen.get(size) or WHOLE) for box, size in zip(told or [None] * len(boxes), sizes, strict=True)]


def _fits(box: Box, shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a map of `shape` (rows, columns), which reaches over the edge of a photo, has square cells on one of `size` (width,
    height): a dark edge of the photo itself may look like one of the processor's."""
    x1, y1, x2, y2 = box
    if min(x1, y1) >= 0 and max(x2, y2) <= 1:
        return True
    (rows, columns), (width, height) = shape, size
    across, down = columns / (x2 - x1), rows / (y2 - y1)  # cells on the photo
    return abs(across - down * width / height) <= 1 or abs(down - across * height / width) <= 1


def seen_part(processor: Any, size: tuple[int, int]) -> Box | None:
    """x1, y1, x2, y2 of the part of an image of `size` (width, height) that the model sees, relative to the image; outside of
    0 to 1 if the processor puts an edge around it. None if the processor makes several images of it, such as tiles, or packs
    patches.

    The part is measured: the processor gets a black image, a white one, and two that grow evenly from black to white.

    Args:
        processor: of Hugging Face, or a function from a PIL image to a tensor (3, h, w), such as those of timm and open_clip.

    Raises:
        TypeError: `processor` is neither.
        ValueError: it does more than resize and cut out.
    """
    ramps = [(np.arange(pixels) + 0.5) / pixels for pixels in size]
    shades = (np.zeros((1, 1)), np.ones((1, 1)), ramps[0][None], ramps[1][:, None])
    prepared = [_prepared(processor, np.broadcast_to(np.rint(255 * shade).astype(np.uint8), size[::-1])) for shade in shades]
    shown = [one for one in prepared if one is not None]
    if len(shown) < len(prepared):
        return None
    black, white, *grown = shown
    real = (white - black) > 0.99 * (white - black).max()  # an edge has one colour
    along, down = (np.where(real, ramp - black, np.nan) / np.where(real, white - black, 1) for ramp in grown)
    (x1, x2), (y1, y2) = _side(along, 1), _side(down, 0)
    return x1, y1, x2, y2


def _prepared(processor: Any, grey: Array) -> Array | None:
    """An image of grey values (H, W) as a processor prepares it, (h, w); None if it does not make exactly one image of it."""
    from PIL import Image

    image, prepare = Image.fromarray(grey).convert("RGB"), getattr(processor, "image_processor", processor)
    if hasattr(prepare, "convert_ids_to_tokens") or not callable(prepare):
        raise TypeError(f"processor must prepare images for the model; got {type(processor).__name__}")
    if hasattr(prepare, "model_input_names"):  # of Hugging Face
        pixels = prepare(images=image, return_tensors="pt").get("pixel_values")
    else:
        pixels = prepare(image)
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    return to_array(pixels[0]).astype(float) if isinstance(pixels, Tensor) and pixels.ndim == 3 and len(pixels) == 3 else None


def _side(shares: Array, axis: int) -> tuple[float, float]:
    """Where an image (h, w) begins and ends along an axis; `shares` are 0 at one side of the photo and 1 at the other, and NaN
    outside of the photo."""
    count, line = shares.shape[axis], np.moveaxis(shares, axis, 0)
    centres, share = np.broadcast_to((np.arange(count)[:, None] + 0.5) / count, line.shape), line
    inner = (share > 0.05) & (share < 0.95)  # resizing bends the sides
    slope, start = np.polyfit(centres[inner], share[inner], 1) if inner.sum() > 1 else (0.0, 0.0)
    if slope <= 0 or np.abs(start + slope * centres[inner] - share[inner]).max() > 0.03:
        raise ValueError("processor must only resize and crop images; got one that changes them otherwise. Pass crop=")
    end, rounding = start + slope, 0.5 * slope / count  # half a pixel of the model's
    return (0.0 if abs(start) <= rounding else float(start)), (1.0 if abs(end - 1) <= rounding else float(end))


def _warn_of_shapes(drawn: list[list[tuple[int, int]]]) -> None:
    """Warns if a map, of (rows, columns), has another shape than the image, of (width, height), under it."""
    for (rows, columns), (width, height) in drawn:
        if abs(columns - rows * width / height) > 1 and abs(rows - columns * height / width) > 1:  # one is rounding
            warnings.warn(
                f"A map of {columns} x {rows} patches is stretched over a photo of {width} x {height} pixels. Pass processor= or "
                "crop= if the model saw a part of the photo, e.g. the middle, as with CLIP's processor; crop=(0, 0, 1, 1) if all",
                stacklevel=5,
            )
            return


def _read_crops(explanation: Explained, crop: Any) -> list[Box]:
    """The box of every map on its image. ValueError if `crop` is neither a box nor one box per map."""
    count = 0 if explanation.image_samples is None else len(explanation.image_samples)
    if crop is None:
        return [WHOLE] * count
    if explanation.image_samples is None:
        raise ValueError(f"crop must be None for an explanation without maps; got {crop}")
    try:
        array = np.asarray(crop.detach().cpu() if isinstance(crop, Tensor) else crop, dtype=float)
        fits = array.shape in ((4,), (count, 4)) and (array[..., 2:] > array[..., :2]).all() and np.isfinite(array).all()
    except (TypeError, ValueError):  # not numbers
        fits = False
    if not fits:
        raise ValueError(f"crop must be x1, y1, x2, y2 relative to the image, x1 < x2, y1 < y2, or one box per map; got {crop}")
    return [tuple(box) for box in np.broadcast_to(array, (count, 4)).tolist()]
