"""The result of `explain`: raw values, the tokens they belong to, and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from vlattn_fast._ground.checks import check_items, check_writable, describe
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.result.figures.figure import draw
from vlattn_fast.interpret.result.figures.overlay import overlay
from vlattn_fast.interpret.result.figures.page import Page, render
from vlattn_fast.interpret.result.figures.scale import RELEVANCY
from vlattn_fast.interpret.result.numbers import table
from vlattn_fast.interpret.result.numbers.explained import Explained
from vlattn_fast.interpret.result.numbers.interference import subtract_earlier
from vlattn_fast.interpret.result.numbers.samples import chosen_rows, some_samples
from vlattn_fast.interpret.result.numbers.table import Comparison, Entry
from vlattn_fast.interpret.result.numbers.tensor_files import open_tensors, write_tensors

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image as PILImage

_FORMAT = "vlattn_fast.explanation.7"
_OF_TOWERS = ("relevancy", "position", "contribution")
_TENSORS = ("text", "regions", "boxes", "scores", "gap")
_METADATA = (
    *("image_samples", "token_ids", "words", "target", "method", "start_layer", "answer", "text_positions", "photos", "crops"),
    *("token_names", "sinks", "no_map", "of", "seconds"),
)


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Explained):
    """The relevancy of an input's tokens to a score: tensors, tokens, figures, pages and tables.

    `plot`, `overlay` and `to_html` show it, `top` and `to_pandas` list it, `save` stores it. All values are raw; only figures
    scale them. `explanation[i]` is one sample of the batch.

    Args:
        relevancy: tower -> (B, N), the relevancy vector over all tokens of that tower, special tokens included. A vision tower
            has the tokens of all images, or tiles, of a prompt in order, and zeros after shorter prompts.
        image: the patch entries on their grid (B, h, w); (images, h, w) if prompts hold several maps; a tuple of (h, w) if the
            grids differ; None without an image. Maps are in the order of their tokens. An image in tiles has one map of all tiles
            and one of its thumbnail if the places of the tiles are known, else a map per tile. A video has a map per frame, and
            a sound a strip of time (B, 1, n) that ends with it.
        image_samples: the sample of the batch that each map of `image` belongs to; default: one map per sample.
        text: the word entries (B, L), without special tokens and padding; shorter texts end in zeros.
        token_ids: the ids of the entries of `text`, a list per sample, without padding.
        words: the tokens of `token_ids` as strings, see `with_tokens`.
        scores: (B,), the explained scores; None for methods without scores.
        target: the text, class or token index of each score; None for a callable.
        answer: the token ids of a decoder's explained answer, a list per sample, or of a prompt with maps; else None.
        method: the name of the method of `explain`, with those of its options that differ from the defaults. `start_layer`: one
            of these, 0 = all layers.
        of: what the scores are, "logit", "log_probability" or "margin": known for every answer, and for a target if the method's
            `of` is set. None = a target's logit or similarity, or what a callable returns.
        position: tower -> (B,) int64, the index of the explained token. Towers without one (mean, pooling head) are missing.
        contribution: tower -> (B, N), for towers with several explained tokens, such as a mean: the contribution of attention,
            i.e. `relevancy` without the part of the positions' weights that the residual connections keep.
        gap: (B,), for "integrated_gradients": the sum of all entries minus the score's gain over the baseline. It is not 0 if
            there are few steps. None for methods whose entries need not add up, and with `freeze`.
        regions: (B, R), the entries of image regions, for models that see boxes instead of patches.
        boxes: (B, R, 4), x1, y1, x2, y2 of the regions relative to the image.
        photos: the number of the photo under each map of `image` (or under the boxes of each sample), counted from 0 in the order
            of the maps. Tiles and their thumbnail have one photo, and so have images with the same pixels; each frame of a video
            has its own. None = not known.
        crops: x1, y1, x2, y2 of each map relative to its photo, if the inputs determine it, else None: (0, 0, 1, 1) for tiles
            that show the whole photo, and more than 1 if the model's processor added an edge.
        text_positions: the position of each entry of `text` in its tower, a list per sample; an encoder-decoder's answer has its
            positions in the decoder.
        token_names: the tokens of the first tower, if they are neither words nor patches, such as a robot's state and its steps.
        sinks: the tokens of each sample that receive attention without content, for methods with `sinks="remove"`; else None.
        no_map: why there is no map although the model was given an image or a sound, as for BLIP-2; else None.
            Figures and pages show it, too.
        seconds: how long the sound under each map of `image` is, if the input is sound; None = the maps are of images.
        tower_images: tower -> maps like `image`, if several towers see the images. `image` is that of the tower nearest to the
            pixels.

    The explained token always gives itself the most relevancy: about 1 on a single token, 1/N on each token of a mean. So
    `image`, `text`, `regions`, figures and tables leave that part out: for a single token its whole entry, for several what is
    not `contribution`. `self_relevancy` holds it, and `relevancy` contains both.

    With an answer of T tokens, the last `len(answer[b])` entries of `text[b]` and of `token_ids[b]` are the answer's, in order
    and special tokens included: the relevancy of earlier words of the answer for later ones. There are two forms:

    - `per_token`, each token by itself: `relevancy` holds (B, T, N), `scores` (B, T), `text` (B, T, L), `image` (images, T, h, w)
      or a tuple of (T, h, w), `position` (B, T). Entry t explains token t. Shorter answers end in zeros.
    - all tokens at once: shapes as without an answer, but `position` (B, T) lists all explained positions (shorter answers repeat
      one).
    """

    def __getitem__(self, index: int | slice) -> Self:
        """Returns one sample of the batch as an explanation, by its number; several by a slice."""
        return some_samples(self, chosen_rows(index, len(self)))

    def __iter__(self) -> Iterator[Explanation]:
        """Yields the explanations of the samples, one by one."""
        return (self[number] for number in range(len(self)))

    def with_tokens(self, processor: Any) -> Self:
        """Returns a copy whose `tokens` are strings, by `convert_ids_to_tokens` of a Hugging Face tokenizer or processor."""
        if self.token_ids is None:
            raise ValueError("with_tokens needs an explanation with text; got one without token_ids. Leave with_tokens out")
        convert = getattr(processor, "tokenizer", processor).convert_ids_to_tokens
        return replace(self, words=[[str(word) for word in convert(row)] for row in self.token_ids])

    def to_numpy(self) -> dict[str, Any]:
        """Returns every tensor as a NumPy array by the name of its field; dicts stay dicts, tuples of maps become lists."""
        arrays = {name: _arrays(getattr(self, name)) for name in (*_TENSORS, *_OF_TOWERS, "image", "tower_images")}
        return {name: value for name, value in arrays.items() if value is not None}

    def save(self, path: str | Path) -> Path:
        """Writes tensors (safetensors) and metadata (JSON in its header) to `path`; `load` of this class reads them back."""
        check_writable("path", Path(path))
        tensors = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        for of in _OF_TOWERS:
            tensors |= {f"{of}.{name}": value for name, value in (getattr(self, of) or {}).items()}
        towers = {f"tower_images.{name}": maps for name, maps in (self.tower_images or {}).items()}
        maps = {"image": self.image, **towers} if self.image is not None else towers
        for name, value in maps.items():
            tensors |= {f"{name}.{i}": part for i, part in enumerate(value if isinstance(value, tuple) else (value,))}
        metadata = {
            "format": _FORMAT,
            "towers": {of: None if (value := getattr(self, of)) is None else list(value) for of in _OF_TOWERS},
            "maps": {name: len(value) if isinstance(value, tuple) else None for name, value in maps.items()},
            "tower_images": None if self.tower_images is None else list(self.tower_images),
            **{name: getattr(self, name) for name in _METADATA},
            "of_class": json.dumps({name: getattr(self, name) for name in further}) if (further := self._further()) else None,
        }
        # safetensors does not support tensors that share memory, and a map may be a view of its relevancy vector.
        values = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        write_tensors(Path(path), values, {"explanation": json.dumps(metadata, default=asdict)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: `path` holds something else, or a truncated file.
        """
        with open_tensors(Path(path), f"path must be a file that Explanation.save wrote ({_FORMAT}); got {path}") as file:
            metadata = json.loads((file.metadata() or {}).get("explanation", "{}"))
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')}")
            further: dict[str, Any] = json.loads(metadata.get("of_class") or "{}")
            if set(further) != set(cls._further()):
                reader = "vlattn_fast.interpret.LayerExplanation" if further else "vlattn_fast.Explanation"
                raise ValueError(f"it is not a file of {cls.__name__}. Load it with {reader}.load")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # file is not a mapping
            maps: dict[str, Any] = {
                name: tensors[f"{name}.0"] if count is None else tuple(tensors[f"{name}.{i}"] for i in range(count))
                for name, count in metadata["maps"].items()
            }
            towers = metadata["tower_images"]
            tower_fields: dict[str, Any] = {
                of: None if names is None else {name: tensors[f"{of}.{name}"] for name in names}
                for of, names in metadata["towers"].items()
            }
            fields: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
            fields |= {name: metadata.get(name) for name in _METADATA}
            return cls(
                image=maps.get("image"),
                tower_images=None if towers is None else {name: maps[f"tower_images.{name}"] for name in towers},
                **tower_fields,
                **fields,
                **further,
            )

    @classmethod
    def _further(cls) -> list[str]:
        """The fields that a subclass adds."""
        return [name for name in cls.__dataclass_fields__ if name not in Explained.__dataclass_fields__]

    def top(self, k: int = 5) -> list[Entry]:
        """Returns the `k` largest entries of each tower, per sample and per token of an answer, largest first.

        The entries are a tower's patches, words or regions if these are known, else all its tokens. Towers have scales of their
        own.

        Examples:
            >>> explanation = Explanation({"text": torch.tensor([[0.0, 0.3, 0.5]])})
            >>> explanation.top(1)
            [Entry(sample=0, answer=None, tower='text', part='token', position=2, place=None, word=None, value=0.5)]
        """
        return table.largest(self, k)

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line per entry: sample, answer (the token's number), tower, part, position,
        image, y, x, word, value."""
        with extra("tables"):
            return table.to_frame(self)

    def compare(self, other: Explanation) -> Comparison:
        """Returns the similarity of two explanations per tower and sample, e.g. of two methods, models or inputs. The entry at
        `position` is left out.

        Examples:
            >>> plain = Explanation({"text": torch.tensor([[0.0, 0.3, 0.5]])})
            >>> double = Explanation({"text": torch.tensor([[0.0, 0.6, 1.0]])})
            >>> plain.compare(double).table
            [{'tower': 'text', 'sample': 0, 'cosine': 1.0, 'rank': 1.0}]
        """
        return table.compare(self, other)

    def subtract_earlier(self, *, rank_filter: bool = False) -> Explanation:
        """Returns a copy in which each word's map is without the maps of earlier words of the answer, as in method "tam".

        The map M of a word becomes max(M - a I, 0), where I is the mean of the maps of the earlier words, weighted with their
        relevancy for this word, and a minimises the square of M - a I (Li et al. 2025, arXiv 2506.23270). Words of the same token
        are left out, and negative relevancy counts as zero. Only `image` changes. The model does not run.

        Args:
            rank_filter: also remove outliers from each map, with the rank Gaussian filter of the paper.

        Raises:
            ValueError: an explanation without an answer explained per token, or without an image.
        """
        return subtract_earlier(self, rank_filter)

    def plot(
        self,
        image: Any = None,
        *,
        samples: Sequence[int] | None = None,
        labels: Sequence[Any] | None = None,
        crop: Any = None,
        processor: Any = None,
        cmap: str = RELEVANCY,
        alpha: float = 0.85,
        scale: str = "max",
        common: bool = False,
    ) -> Figure:
        """Draws maps and words: a line per sample, or a map per word of an answer with a table of its words.

        The maps of a sample share a scale, from 0 (transparent over an image, and on the scale) to their largest value. If some
        values are below 0, the scale goes as far below as above, and they are blue. The range of the values is next to it.

        Args:
            image: the photo under the maps: a path or file, a PIL image, array or tensor (H, W, 3) or (3, H, W), floats in [0, 1]
                or bytes; or one per map. None draws only the maps.
            processor: the model's processor, or timm's or open_clip's function from a PIL image to a tensor, to find the part of
                the photo under the maps: it is measured on images of the photo's size.
            crop: that part, in place of `processor`: x1, y1, x2, y2 relative to the image, or one box per map. For example,
                CLIP's processor shows the model the middle square. Without both, a map whose shape differs from the photo's gives
                a warning.
            samples: those of the batch to draw. Default: all.
            labels: names of the samples, such as classes or their numbers. Default: their text.
            scale: where the colours of the maps end: "max" = at the largest value; "quantile" = at the value that 99 % of the
                patches do not exceed, for a map in which one patch is many times the others. Larger values then have the last
                colour, the scale ends in a point, and the range next to it shows where it clips.
            common: one scale for all samples and all words, as the box "One scale" of the page.
            cmap: a matplotlib colormap, by its name.
            alpha: opacity of the largest value over an image.

        If the model saw a photo in tiles, one map is called "thumbnail" and one "tiles". More than six samples wrap into a grid,
        and more than four panels of a sample into lines; with more than six, its photos are only under the maps. An answer of
        more than 40 words, or a video of more than 40 frames, has its maps on one sheet with one scale, and the answer's table
        has fewer names than words. A sample without maps and words shows the entries of its towers. Characters that matplotlib's
        font lacks (Chinese, Japanese, Korean, emoji) are drawn in an installed font that has them, if any.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        with extra("viz"):
            return draw(self, image, samples, labels, crop, processor, cmap, alpha, scale, common)

    def overlay(
        self,
        image: Any,
        *,
        sample: int = 0,
        word: int | None = None,
        panel: int = 0,
        crop: Any = None,
        processor: Any = None,
        cmap: str = RELEVANCY,
        alpha: float = 0.85,
        scale: str = "max",
    ) -> PILImage:
        """Returns a photo under the map of one sample, as an image of the photo's size, without title and scale. The ends of the
        scale, which begins at 0 as in `plot`, and the range of the values are in the image's `info["scale"]` and `info["range"]`.

        Args:
            image, processor, crop, scale, cmap, alpha: as for `plot`.
            sample: its number in the batch.
            word: the number of a word of the answer, if each word has a map; None = the sum of their maps.
            panel: which of the sample's maps, if it has several, such as the frames of a video, or a thumbnail and tiles.

        Returns:
            A PIL image in RGB.
        """
        with extra("viz"):
            return overlay(self, image, sample, word, panel, crop, processor, cmap, alpha, scale)

    def to_html(
        self,
        image: Any = None,
        *,
        labels: Sequence[Any] | None = None,
        crop: Any = None,
        processor: Any = None,
        title: str = "Relevancy",
        cmap: str = RELEVANCY,
        scale: str = "max",
        others: Sequence[Explanation] = (),
    ) -> Page:
        """Returns one self-contained page that needs no network: you choose a sample, or a word of the answer, and see its map
        and words.

        The page stores the image once, in its resolution or, above 300 kB, in a smaller one.

        Args:
            image, processor, crop, labels, scale, cmap: as for `plot`. The page has a box that switches the scale.
            title: heading of the page.
            others: explanations of the same input with other methods, which the page can switch to.

        Returns:
            The page's text, a `str`. A notebook shows it in a frame.
        """
        with extra("viz"):
            check_items("others", others, "a sequence of explanations")
            if isinstance(others, Explanation):  # its samples are explanations, too
                raise TypeError(f"others must be a sequence of explanations; got {others!r}. Pass [explanation]")
            for one in others:
                if not isinstance(one, Explanation):
                    raise TypeError(f"others must be a sequence of explanations; got {describe(one)}")
            return render([self, *others], image, labels, crop, processor, title, cmap, scale)

    def save_html(self, path: str | Path, image: Any = None, **options: Any) -> Path:
        """Writes the page of `to_html`, with the same options, to `path`."""
        check_writable("path", Path(path))
        page = self.to_html(image, **options)
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str | None:
        """The page for a notebook; None, i.e. plain text, if a package for pages is missing."""
        try:
            return self.to_html()._repr_html_()
        except ModuleNotFoundError:
            return None


def _arrays(value: Any) -> Any:
    """Tensors inside dicts and tuples as NumPy arrays."""
    if isinstance(value, dict):
        return {name: _arrays(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_arrays(part) for part in value]
    if value is None:
        return None
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
