"""The result of `explain`: raw values, what they belong to, and pictures of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlattn_fast._extras import extra

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

_FORMAT = "vlattn_fast.explanation.1"


@dataclass(frozen=True, eq=False)
class Explanation:
    """Relevancy of the tokens of an input to a score. All values are raw; only pictures scale them.

    Args:
        relevancy: tower -> (B, N), the read-out row over all of that tower's tokens, special ones included.
        image: the patch entries on their grid (B, h, w); (images, h, w) where prompts hold several images; a tuple of (h, w)
            where the grids differ; None without an image.
        image_rows: the row of the batch each map of `image` belongs to.
        text: the word entries (B, T), without special tokens and padding; shorter texts end in zeros.
        token_ids: the ids of the entries of `text`, row by row, as long as each text is.
        words: the same as strings, see `with_tokens`.
        regions: (B, R), the entries of image regions, for models that see boxes instead of patches.
        boxes: (B, R, 4), x1, y1, x2, y2 of the regions relative to the image.
        scores: (B,) the explained scores; None where a method has none.
        target: text, class or token index of each score; None for a callable.
        method, start_layer: the arguments of `explain`.
    """

    relevancy: dict[str, Tensor]
    image: Tensor | tuple[Tensor, ...] | None = None
    image_rows: list[int] | None = None
    text: Tensor | None = None
    token_ids: list[list[int]] | None = None
    words: list[list[str]] | None = None
    regions: Tensor | None = None
    boxes: Tensor | None = None
    scores: Tensor | None = None
    target: list[int] | None = None
    method: str = "gradient"
    start_layer: int = 0

    @property
    def tokens(self) -> list[list[str]] | None:
        """The words that the entries of `text` belong to; the ids as strings until `with_tokens` has named them."""
        if self.words is not None or self.token_ids is None:
            return self.words
        return [[str(index) for index in row] for row in self.token_ids]

    def with_tokens(self, tokenizer: Any) -> Explanation:
        """The same explanation with `tokens` named by `convert_ids_to_tokens` of a Hugging Face tokenizer or processor."""
        if self.token_ids is None:
            raise ValueError("tokenizer must have text to name; got an explanation without text")
        convert = getattr(tokenizer, "tokenizer", tokenizer).convert_ids_to_tokens
        return replace(self, words=[[str(word) for word in convert(row)] for row in self.token_ids])

    def to_numpy(self) -> dict[str, Any]:
        """Every tensor as a NumPy array: "relevancy" a dict, "image" (a list where grids differ), "text", "regions", "scores"."""
        parts = {"image": self.image, "text": self.text, "regions": self.regions, "boxes": self.boxes, "scores": self.scores}
        arrays: dict[str, Any] = {"relevancy": {name: _array(value) for name, value in self.relevancy.items()}}
        for name, value in parts.items():
            if value is not None:
                arrays[name] = [_array(part) for part in value] if isinstance(value, tuple) else _array(value)
        return arrays

    def save(self, path: str | Path) -> Path:
        """Write values (safetensors) and facts (JSON in its metadata) to `path`; `Explanation.load` reads them back."""
        with extra("explain"):
            from safetensors.torch import save_file

        tensors = {f"relevancy.{name}": value for name, value in self.relevancy.items()}
        maps = self.image if isinstance(self.image, tuple) else () if self.image is None else (self.image,)
        tensors |= {f"image.{i}": value for i, value in enumerate(maps)}
        tensors |= {name: value for name in ("text", "regions", "boxes", "scores") if (value := getattr(self, name)) is not None}
        facts = {
            "format": _FORMAT,
            "towers": list(self.relevancy),
            "images": len(maps) if isinstance(self.image, tuple) else None,
            **{name: getattr(self, name) for name in ("image_rows", "token_ids", "words", "target", "method", "start_layer")},
        }
        # safetensors refuses tensors that share memory, and a map may be a view of its row.
        values = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        save_file(values, path, metadata={"explanation": json.dumps(facts)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read what `save` wrote. ValueError where `path` holds something else."""
        with extra("explain"):
            from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("explanation", "{}"))
            if facts.pop("format", None) != _FORMAT:
                raise ValueError(f"path must be a file that Explanation.save wrote ({_FORMAT}); got {path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        towers, images = facts.pop("towers"), facts.pop("images")
        image = tensors.get("image.0") if images is None else tuple(tensors[f"image.{i}"] for i in range(images))
        parts: dict[str, Any] = {name: tensors.get(name) for name in ("text", "regions", "boxes", "scores")}
        return cls({name: tensors[f"relevancy.{name}"] for name in towers}, image, **parts, **facts)

    def plot(self, image: Any = None, *, rows: Sequence[int] | None = None, cmap: str = "turbo", alpha: float = 0.6) -> Figure:
        """Draw maps and words, each scaled to its own smallest and largest value (words: to the largest magnitude).

        Args:
            image: what the maps lie on: a PIL image, array or tensor (H, W, 3) or (3, H, W), floats in [0, 1] or bytes; or one
                per row. None draws the maps alone.
            rows: rows of the batch to draw; all by default.
            cmap, alpha: matplotlib's names for colours and the map's opacity over an image.

        Returns:
            A matplotlib Figure (without pyplot: nothing is shown or kept open).
        """
        from vlattn_fast.interpret.pictures import draw

        with extra("viz"):
            return draw(self, image, rows, cmap, alpha)

    def save_html(self, path: str | Path, image: Any = None, *, title: str = "Relevancy", cmap: str = "turbo") -> Path:
        """Write one self-contained page: maps as inline PNG, words coloured by relevancy; no script, nothing from a network.

        Args:
            path: the file to write.
            image, cmap: as for `plot`.
            title: heading of the page.
        """
        from vlattn_fast.interpret.pictures import render_html

        with extra("viz"):
            page = render_html(self, image, title, cmap)
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def __len__(self) -> int:
        """Rows of the batch."""
        return next(iter(self.relevancy.values())).shape[0]

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.relevancy.items()}
        return f"Explanation(method={self.method!r}, relevancy={shapes}, target={self.target})"


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
