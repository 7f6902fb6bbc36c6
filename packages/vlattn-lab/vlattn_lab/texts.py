"""From images and texts of DigitScenes to the inputs of the CLIP model and of `CLIPMapper`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_lab.processor import DIGIT_WORDS, word_ids
from vlattn_lab.scenes import CANVAS

_WORDS = (
    *DIGIT_WORDS,
    *("left", "right", "up", "down", "of", "above", "below", "a"),
    *("what", "is", "there", "how", "many", "are", "where", "which", "digits", "yes", "no"),
)
# [END] has the highest id, by which Hugging Face's CLIP finds the end of a text.
TEXT_VOCABULARY = ("[PAD]", "[START]", *_WORDS, "[END]")
ANSWERS = (*DIGIT_WORDS, "yes", "no")
MOST_WORDS = 16  # with [START] and [END]: positions of the text encoders
PAD, START, END = 0, 1, len(TEXT_VOCABULARY) - 1
_IDS = {word: TEXT_VOCABULARY.index(word) for word in _WORDS}


class SceneTokenizer:
    """Maps words to ids and back, as far as `explain` asks a tokenizer of transformers for it."""

    all_special_ids = (PAD, START, END)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Returns the ids of one text, between [START] and [END] if `add_special_tokens`."""
        around = ([START], [END]) if add_special_tokens else ([], [])
        return {"input_ids": word_ids("text", [text], _IDS, _WORDS, *around)["input_ids"][0].tolist()}

    def convert_ids_to_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """Ids (T) -> the T words they stand for."""
        return [TEXT_VOCABULARY[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]


class SceneProcessor:
    """Turns images into pixel values and texts into ids. It has no parameters.

    `processor(images=photo, text=question)` returns the keyword arguments of the CLIP model, and those of a `CLIPMapper`'s
    `forward` and `generate`.

    Args:
        end: texts end with [END], as for the CLIP model and question answering; False = texts are prompts to be continued.
    """

    answers = ANSWERS  # the classes of the model that answers questions
    tokenizer = SceneTokenizer()

    def __init__(self, *, end: bool = True) -> None:
        self.end = end

    def __call__(self, images: Any, text: str | Sequence[str], *, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Returns "pixel_values" (B, 1, 32, 32), "input_ids" and "attention_mask" (B, T).

        Args:
            images: a PIL image, dark ink on white as `Questions.photo` draws it, or a tensor (B, 32, 32), ink in [0, 1].
            text: one text for a single image, or B texts; "" is a prompt without words.
            return_tensors: "pt".
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt'; got {return_tensors!r}")
        pixels = self.pixels(images)
        if isinstance(text, str) and len(pixels) == 1:
            text = [text]
        if isinstance(text, Sequence) and not isinstance(text, str) and len(text) != len(pixels):
            raise ValueError(f"text must be as many texts as images; got {len(text)} for {len(pixels)} images")
        return {"pixel_values": pixels, **self.words(text)}

    def image_processor(self, image: Any) -> Tensor:
        """A PIL image -> (3, H, W), dark where it is dark, by which figures find the part of a photo under a map."""
        return 1 - self.pixels(image)[0].expand(3, -1, -1)

    def pixels(self, images: Any) -> Tensor:
        """A PIL image, or images (B, H, W) -> pixel values (B, 1, H, W)."""
        if hasattr(images, "convert"):
            small = images.convert("L").resize((CANVAS, CANVAS), resample=4)  # the mean over a box, which undoes an enlargement
            return 1 - torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None, None]
        if not isinstance(images, Tensor) or images.ndim != 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a PIL image, or a tensor (B, H, W); got {shape}")
        return images[:, None]

    def words(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """B texts -> input_ids int64 (B, T), attention_mask bool (B, T); shorter texts are padded on the right."""
        inputs = word_ids("text", texts, _IDS, _WORDS, [START], [END] if self.end else [])
        for text in texts:
            if (count := len(text.split())) + 2 > MOST_WORDS:
                raise ValueError(f"text must have at most {MOST_WORDS - 2} words; got {count} in {text!r}")
        return inputs

    def convert_ids_to_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """Ids (T) -> the T words they stand for."""
        return self.tokenizer.convert_ids_to_tokens(ids)

    def decode(self, ids: Tensor) -> list[str]:
        """Ids (B, T), as `CLIPMapper.generate` gives them -> B strings: the words in front of the first [END]."""
        texts = []
        for said in ids.tolist():
            words = said[: said.index(END)] if END in said else said
            texts.append(" ".join(TEXT_VOCABULARY[i] for i in words if i not in (PAD, START)))
        return texts
