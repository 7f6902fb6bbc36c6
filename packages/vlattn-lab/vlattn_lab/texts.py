"""From images and texts of DigitScenes to the inputs of the CLIP model and of `CLIPMapper`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlattn_lab.processor import DIGIT_WORDS, word_ids

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


class SceneProcessor:
    """Images to pixel values and texts to ids, without parameters.

    `processor(images, texts)` gives the keyword arguments of the CLIP model, and of a `CLIPMapper`'s `forward` and `generate`.

    Args:
        end: texts end with [END], as for the CLIP model and question answering; False = texts are prompts to be continued.
    """

    answers = ANSWERS  # the classes of the model that answers questions

    def __init__(self, *, end: bool = True) -> None:
        self.end = end

    def __call__(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """images (B, 32, 32) float in [0, 1]; texts: B strings, "" for a prompt without words."""
        if isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) != len(images):
            raise ValueError(f"texts must be as many as images; got {len(texts)} for {len(images)} images")
        return {"pixel_values": self.pixels(images), **self.words(texts)}

    def pixels(self, images: Tensor) -> Tensor:
        """images (B, H, W) -> pixel values (B, 1, H, W)."""
        if not isinstance(images, Tensor) or images.ndim != 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor (B, H, W); got {shape}")
        return images[:, None]

    def words(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """B texts -> input_ids int64 (B, T), attention_mask bool (B, T); shorter texts are padded on the right."""
        inputs = word_ids("texts", texts, _IDS, _WORDS, [START], [END] if self.end else [])
        for text in texts:
            if (count := len(text.split())) + 2 > MOST_WORDS:
                raise ValueError(f"texts must have at most {MOST_WORDS - 2} words; got {count} in {text!r}")
        return inputs

    def convert_ids_to_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """Ids (T) -> the T words they stand for."""
        return [TEXT_VOCABULARY[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]

    def decode(self, ids: Tensor) -> list[str]:
        """Ids (B, T), as `CLIPMapper.generate` gives them -> B strings: the words in front of the first [END]."""
        texts = []
        for said in ids.tolist():
            words = said[: said.index(END)] if END in said else said
            texts.append(" ".join(TEXT_VOCABULARY[i] for i in words if i not in (PAD, START)))
        return texts
