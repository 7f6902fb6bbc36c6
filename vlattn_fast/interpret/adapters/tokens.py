"""Kinds of tokens: which tokens of a tower are real, which are words, and their positions in an image.

A kind is one subclass of `Tokens` with a name, which a `Tower` has as `tokens`. Its objects are the tokens of a tower in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.image_grids import (
    Grid,
    Layout,
    Maps,
    cut,
    image_tokens,
    only_image,
    patch_shape,
    photos_of,
    square_patches,
    stacked,
)
from vlattn_fast.interpret.adapters.pixels import Box, Shape, numbered, real_grids
from vlattn_fast.interpret.adapters.sound import Seconds, Sound, sound_in


class Named:
    """A base whose subclasses have names by which adapters know them. The last class of a name counts."""

    name: ClassVar[str]
    named: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name is not None:
            cls.name = name
            cls.named[name] = cls

    @classmethod
    def check_name(cls, argument: str, name: str) -> None:
        """ValueError, in which the caller's argument stands, unless a subclass has this name."""
        if name not in tuple(cls.named):
            raise ValueError(f"{argument} must be one of {tuple(cls.named)}; got {name!r}")


@dataclass(frozen=True, eq=False)
class Tokens(Named):
    """The tokens (B, N) of a tower in a batch. This base is the kind of towers without an adapter: only masks tell which are
    real."""

    inputs: Mapping[str, Any]  # the model's
    shape: tuple[int, int]
    config: Any = None  # the tower's; the model's if text and image share a sequence, or a grid is given
    prefix: int = 0  # tokens of the image before its patches, which are CLS and registers
    grid: Grid | None = None  # see `Tower`
    predicts: bool = False  # whether the tower predicts tokens. Its texts then do not end with [SEP].
    end: Any = None  # the ids of end-of-text tokens; None if neither model nor config names one
    special: frozenset[int] | None = None  # ids that are not words, as a tokenizer names them; None = as the config does
    attended: Tensor | None = None  # bool (B, N), False = the attention's masks hide it from every token; None = they hide none

    named: ClassVar[dict[str, type[Any]]] = {}
    text: ClassVar[bool] = False  # it has words of `input_ids`
    image: ClassVar[bool] = False  # it has tokens of an image
    image_ids: ClassVar[bool] = False  # some of `input_ids` stand for tokens of an image
    follows_ids: ClassVar[bool] = False  # token i has the id `input_ids[:, i]`

    def __post_init__(self) -> None:
        """For what a kind derives from its inputs."""

    @property
    def ids(self) -> Tensor | None:
        """int64 (B, T), the ids of the text; CLIP-like inputs may have several texts an image."""
        ids = self.inputs.get("input_ids", self.inputs.get("text"))
        return ids.reshape(-1, ids.shape[-1]) if isinstance(ids, Tensor) and not ids.is_floating_point() else None

    @property
    def before(self) -> int:
        """How many tokens stand before the text."""
        return 0

    def real(self) -> Tensor | None:
        """bool (B, N), True = a real token and no padding; None if all tokens are real, or nothing tells."""
        mask = self.inputs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.shape == self.shape else self.attended

    def words(self) -> Tensor | None:
        """bool (B, N), True = a word: no special token, no padding, no image token. None if the tower has no text."""
        return None

    def image_mask(self) -> Tensor:
        """bool (B, N), True = a token of an image, padding of it included."""
        return torch.ones(self.shape, dtype=torch.bool)

    def maps(self, relevancy: Tensor) -> Maps | None:
        """The image's entries of relevancy (B, N) on their grids (images, h, w), a tuple of (h, w) if grids differ, and the
        sample of each. None without an image, or if its tokens are not patches."""
        if (layouts := self.layouts) is None:
            return None
        is_image = self.image_mask()
        flat = relevancy[is_image.to(relevancy.device)]
        sizes = [layout.size for layout in layouts]
        if sum(sizes) != len(flat):
            grids = [tuple(index.shape) for layout in layouts for index in layout.maps]
            raise ValueError(f"inputs must have {sum(sizes)} image tokens for maps {grids}; got {len(flat)}")
        prompts = [part.unique().tolist() for part in is_image.nonzero()[:, 0].split(sizes)]
        maps, samples = [], []
        for layout, part, row in zip(layouts, flat.split(sizes), prompts, strict=True):
            if len(row) != 1:
                raise ValueError(f"inputs must have all tokens of an image in one prompt; got {layout.size} in prompts {row}")
            maps += [part[index.to(part.device)] for index in layout.maps]
            samples += row * len(layout.maps)
        return stacked(maps), samples

    @cached_property
    def layouts(self) -> list[Layout] | None:
        """The grids of the images of the prompts; None without an image, or if nothing tells."""
        has_images = any(self.inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        return None if self.grid is None or self.ids is None or not has_images else self.grid(self.config, self.inputs)

    def photos(self, count: int) -> tuple[list[int], list[Box | None]]:
        """The number of the photo of each of `count` maps, and the map's x1, y1, x2, y2 relative to it, if the inputs tell."""
        if self.layouts is not None:
            return photos_of(self.layouts)
        found = [self.inputs.get(name) for name in ("pixel_values", "image")] + [only_image(self.inputs)]
        images = next((x for x in found if isinstance(x, Tensor) and len(x) == count), None)
        return list(range(count)) if images is None else numbered([*images]), [None] * count

    def fields(self, row: Tensor) -> dict[str, Any]:
        """Further fields of an `Explanation` from the tower's relevancy vectors (B, N) or (B, K, N)."""
        return {}

    def last_real(self) -> Tensor:
        """(B,) the last real token: the one that predicts a decoder's next token."""
        real = self.real()
        if real is None:
            return torch.full((self.shape[0],), self.shape[1] - 1)
        if not bool(real[:, self.before :].any(-1).all()):
            raise ValueError("attention_mask must have a real token in each sample; got a sample with only padding")
        return self.shape[1] - 1 - real.flip(-1).int().argmax(-1)

    def end_of_text(self) -> Tensor:
        """(B,) the token that CLIP pools: the first end-of-text token; in old configs (eos_token_id 2) and in models without a
        config the largest id; the last real token if the config does not name it."""
        ids = self.ids
        if ids is None:
            raise ValueError("inputs must contain 'input_ids' with CLIP's end-of-text token; got none")
        if self.end is None and self.config is not None:
            return self.last_real()
        if self.end in (None, 2):
            return ids.int().argmax(-1)
        ends = torch.as_tensor(self.end, device=ids.device)
        return torch.isin(ids, ends).int().argmax(-1)


# --- texts ---


class Text(Tokens, name="text"):
    """A text whose special ids the config names."""

    text = follows_ids = True
    mask: ClassVar[str] = "attention_mask"

    def real(self) -> Tensor | None:
        if (mask := self.inputs.get(self.mask)) is None:
            return None
        if isinstance(mask, Tensor) and self.mask == Decoded.mask:  # it may begin with that of the encoder's tokens
            mask = mask[..., -self.shape[1] :]
        if isinstance(mask, Tensor) and mask.shape == self.shape:
            return mask.bool()
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have shape (B, N) = {self.shape}; got {got}")

    def words(self) -> Tensor | None:
        if (ids := self.ids) is None:
            return None
        count, real = ids.shape[1], self.real()
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real[:, self.before :][:, :count].to(ids.device)
        words = real & self.not_special(ids, real)
        return nn.functional.pad(words, (self.before, max(0, self.shape[1] - count - self.before)))

    def not_special(self, ids: Tensor, real: Tensor) -> Tensor:
        """bool (B, T), True = no special token."""
        special = _ids(self.config, _OF_TEXT) if self.special is None else self.special
        return ~torch.isin(ids, torch.tensor(sorted(special | _ids(self.config, _OF_IMAGES)), device=ids.device))

    def image_mask(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.bool)


class ClipText(Text, name="clip_text"):
    """A text between a first token and its end-of-text token."""

    def words(self) -> Tensor | None:
        if (ids := self.ids) is None:
            return None
        position = torch.arange(ids.shape[1], device=ids.device)
        words = (position > 0) & (position < self.end_of_text().to(ids.device)[:, None])
        return words if self.special is None else words & self.not_special(ids, words)


class BertText(Text, name="bert_text"):
    """A text after [CLS], whose parts [SEP] ends."""

    def not_special(self, ids: Tensor, real: Tensor) -> Tensor:
        if self.predicts or self.special is not None:
            return super().not_special(ids, real)
        # BERT's config does not name [SEP], but every sequence ends with it; [CLS] comes first.
        last = ids.shape[1] - 1 - real.flip(-1).int().argmax(-1)
        words = ids != ids.gather(1, last[:, None])
        words[:, 0] = False
        return words


class PromptedText(Text, name="prompted_text"):
    """A text after tokens that the model learned, which stand before every text."""

    follows_ids = False

    @property
    def before(self) -> int:
        return self.shape[1] - int(self.inputs["input_ids"].shape[1])

    def real(self) -> Tensor | None:
        mask = self.inputs.get(self.mask)
        return None if mask is None else nn.functional.pad(mask.bool(), (self.before, 0), value=True)


class Decoded(Text, name="decoded"):
    """A decoder's text after an encoder's prompt."""

    text = follows_ids = False
    mask = "decoder_attention_mask"

    def words(self) -> Tensor | None:
        return None


# --- images ---


class _WithoutPadding(Tokens):
    def real(self) -> Tensor | None:
        return None


class Patches(_WithoutPadding, name="patches"):
    """Patches of images of one size, after `prefix` tokens."""

    image = True

    @property
    def pixels(self) -> Tensor | None:
        """The images (B, C, H, W), by the name that transformers or CLIP's authors give them, or the only input."""
        return self.inputs.get("pixel_values", self.inputs.get("image", only_image(self.inputs)))

    def maps(self, relevancy: Tensor) -> Maps | None:
        if (pixels := self.pixels) is None:
            return None
        if self.config is None:  # of a model that is not of transformers
            if (grid := square_patches(relevancy.shape[1], pixels.shape[-2:], self.prefix)) is None:
                return None
            height, width = grid[1]
        else:
            height, width = patch_shape(self.config, pixels.shape[-2:])
        patches = relevancy[:, self.prefix :]
        if patches.shape[1] != height * width:
            raise ValueError(f"pixel_values must give the {patches.shape[1]} patches of the tower; got {height} x {width}")
        return patches.reshape(-1, height, width), list(range(len(patches)))


class LastPatches(Patches, name="last_patches"):
    """Patches of images of one size, after any number of other tokens."""

    def __post_init__(self) -> None:
        if (pixels := self.pixels) is None:
            return
        if self.config is None:
            grid = square_patches(self.shape[1], pixels.shape[-2:], None)
            before = 0 if grid is None else grid[0]
        else:
            height, width = patch_shape(self.config, pixels.shape[-2:])
            before = max(0, self.shape[1] - height * width)
        object.__setattr__(self, "prefix", before)


class PackedPatches(Tokens, name="packed_patches"):
    """As many rows of patches as the largest image has, and their grids in `spatial_shapes`."""

    image = True

    def real(self) -> Tensor | None:
        mask = self.inputs.get("pixel_attention_mask")
        return mask.bool() if isinstance(mask, Tensor) else None

    def maps(self, relevancy: Tensor) -> Maps | None:
        return cut(relevancy, [(int(h), int(w)) for h, w in self.inputs["spatial_shapes"].tolist()])


class Features(_WithoutPadding, name="features"):
    """A backbone's map, whose stride is a power of two."""

    image = True

    def maps(self, relevancy: Tensor) -> Maps | None:
        """Maps without what of them is padding. The number of features tells the stride."""
        if self.inputs.get("pixel_values") is None:
            return None
        size, count = self.inputs["pixel_values"].shape[-2:], relevancy.shape[1]
        shapes = [(-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(9)]
        shape = next((shape for shape in shapes if shape[0] * shape[1] == count), None)
        if shape is None:
            raise ValueError(
                f"pixel_values must give {count} features with a stride of a power of two; got images of {tuple(size)}"
            )
        grids = real_grids(self.inputs, shape)
        maps = [row.view(shape)[:height, :width] for row, (height, width) in zip(relevancy, grids, strict=True)]
        return stacked(maps), list(range(len(maps)))


class Image(_WithoutPadding, name="image"):
    """Only image tokens, with the positions of `grid`."""

    image = True


class Boxes(Tokens, name="boxes"):
    """Only image regions."""

    image = True

    def real(self) -> Tensor | None:
        mask = self.inputs.get("visual_attention_mask")
        return mask.bool() if isinstance(mask, Tensor) else None

    def fields(self, row: Tensor) -> dict[str, Any]:
        return {"regions": row, "boxes": self.inputs["visual_pos"][..., :4].detach()}


class Sounds(Tokens, name="sound"):
    """A sound in the order of time, in tokens of equal length."""

    @cached_property
    def sound(self) -> Sound | None:
        return sound_in(self.inputs, self.shape)

    def between(self, stretch: Seconds) -> Tensor | None:
        """bool (B, N), True = the middle of the token lies in a stretch of the sound."""
        if self.sound is None:
            return None
        middle = (torch.arange(self.shape[1], dtype=torch.float64) + 0.5) * (self.sound.seconds / self.shape[1])
        return ((stretch.begin <= middle) & (middle <= stretch.end)).expand(self.shape)

    def maps(self, relevancy: Tensor) -> Maps | None:
        """A strip (1, n) of each sample, which ends with the sound."""
        if self.sound is None:
            return None
        ends = self.sound.ends(self.shape[1])
        return stacked([row[None, :end] for row, end in zip(relevancy, ends, strict=True)]), list(range(len(ends)))

    def seconds(self) -> list[float] | None:
        """The length of each strip."""
        if self.sound is None:
            return None
        return [end * self.sound.seconds / self.shape[1] for end in self.sound.ends(self.shape[1])]


class Queries(_WithoutPadding, name="queries"):
    """Learned queries of objects."""


# --- texts and images in one sequence ---


class ImageText(Text, name="image_text"):
    """A text with image tokens in it."""

    image = image_ids = True

    def image_mask(self) -> Tensor:
        return image_tokens(self.config, self.inputs)


class _TextAndImage(BertText):
    """BERT's text, and after it an image."""

    image = True

    def real(self) -> Tensor | None:
        words = real_words(self.inputs)
        image = self.real_image((self.shape[0], self.shape[1] - words.shape[1])).to(words.device)
        return torch.cat([image, words] if self.before else [words, image], 1)

    def real_image(self, shape: Shape) -> Tensor:
        """bool (B, image tokens), True = no padding of an image."""
        return torch.ones(shape, dtype=torch.bool)

    def image_mask(self) -> Tensor:
        column = torch.arange(self.shape[1]) - self.before
        return ((column < 0) | (column >= self.inputs["input_ids"].shape[1])).expand(self.shape)


class Regions(_TextAndImage, name="regions"):
    """BERT's text, then image regions."""

    def _input(self, uniter_name: str, visual_bert_name: str) -> Any:
        return self.inputs.get(visual_bert_name if "visual_embeds" in self.inputs else uniter_name)

    def real_image(self, shape: Shape) -> Tensor:
        mask = self._input("region_mask", "visual_attention_mask")
        return super().real_image(shape) if mask is None else mask.bool()

    def fields(self, row: Tensor) -> dict[str, Any]:
        features = self._input("region_features", "visual_embeds")
        if features is None:
            return {}
        fields = {"regions": row[..., row.shape[-1] - features.shape[1] :]}
        if "region_positions" in self.inputs:
            fields["boxes"] = self.inputs["region_positions"][..., :4].detach()
        return fields


class TextPatches(_TextAndImage, name="text_patches"):
    """BERT's text, then patches."""

    def real_image(self, shape: Shape) -> Tensor:
        real = super().real_image(shape)  # tokens before the patches are
        if self.config is not None and self.inputs.get("pixel_mask") is not None:
            sizes = [height * width for height, width in self._grids()]
            for row, size in zip(real, sizes, strict=True):
                row[shape[1] - max(sizes) + size :] = False
        return real

    def maps(self, relevancy: Tensor) -> Maps | None:
        pixels = self.inputs.get("pixel_values")
        if pixels is None or pixels.ndim != 4:
            return None  # given as embeddings, or frames
        start = 0 if self.before else self.inputs["input_ids"].shape[1]
        end = self.before or self.shape[1]
        return cut(relevancy[:, start + self.prefix : end], self._grids())

    def _grids(self) -> list[Shape]:
        """Rows and columns of patches of each image; `pixel_mask` (B, height, width) says what of it is padding."""
        return real_grids(self.inputs, patch_shape(self.config, self.inputs["pixel_values"].shape[-2:]))


class PatchesText(TextPatches, name="patches_text"):
    """Patches, then text."""

    follows_ids = False

    before = PromptedText.before


# --- parts ---


def real_words(inputs: Mapping[str, Any]) -> Tensor:
    """bool (B, T), True = a real token of the text."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def decoder_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs of the decoder of an encoder-decoder, under a decoder's names; `inputs` themselves of other models."""
    return {name.removeprefix("decoder_"): inputs[name] for name in inputs if name.startswith("decoder_")} or inputs


# The config's names of ids that are not words.
_OF_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_IMAGES = (
    *("image_token_id", "video_token_id", "audio_token_id", "vision_start_token_id"),
    *("vision_end_token_id", "boi_token_id", "eoi_token_id"),
)


def _ids(config: Any, names: Sequence[str]) -> set[int]:
    ids: set[int] = set()
    for value in (getattr(part, name, None) for part in (config, getattr(config, "text_config", None)) for name in names):
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return ids
