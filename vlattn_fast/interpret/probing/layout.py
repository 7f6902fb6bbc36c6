"""Which tokens of one sequence are words, image tokens, special tokens and padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.adapters.adapter import WITHOUT_ADAPTER, Adapter, Tower
from vlattn_fast.interpret.adapters.tokens import Boxes, Patches

TEXT, IMAGE, SPECIAL, NONE = 0, 1, 2, -1
Parts = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of a batch of sequences."""

    parts: Tensor  # int64 (B, N), 0 = text, 1 = image, -1 = padding
    special: Tensor  # bool (B, N), tokens of either part that are neither a word nor a region, such as [CLS]
    position: Tensor  # int64 (B), the explained position of `explain`
    offset: int  # the position of the first input id in the sequence
    regions: list[list[int]]  # of each sample the positions of its image tokens, special ones left out, padding included

    def groups(self, special: bool) -> Tensor:
        """int64 (B, N): 0 = text, 1 = image, 2 = special if these are separate, -1 = padding."""
        return self.parts if special else torch.where(self.special & (self.parts != NONE), SPECIAL, self.parts)

    @property
    def words(self) -> Tensor:
        """bool (B, N): words, without special tokens and padding."""
        return (self.parts == TEXT) & ~self.special

    def words_of(self, ids: Tensor) -> Tensor:
        """bool (B, T), which input ids are words. With the caller's `parts`, they are the first or the last T tokens of the
        sequence, if these contain all the text and nothing of the image."""
        size, count = self.parts.shape[1], ids.shape[1]
        starts = (self.offset, size - count) if size > count else (self.offset,)
        text, image = ((self.parts == kind).any(0) for kind in (TEXT, IMAGE))
        for start in starts:
            here = slice(start, start + count)
            if size == count or (int(text[here].sum()) == int(text.sum()) and not bool(image[here].any())):
                return self.words[:, here].cpu()
        raise ValueError(
            f"parts must have all the text first or all of it last in the sequence, for linguistic probes of {count} input ids; "
            f"got text at {text.nonzero()[:, 0].tolist()} of {size} tokens"
        )


class Layouts:
    """Makes the layout of a model's inputs, from its adapter or from the caller's `parts`, see `probe`."""

    def __init__(self, model: nn.Module, adapter: Adapter | None, parts: Parts | None) -> None:
        self.model, self.adapter, self.parts = model, WITHOUT_ADAPTER if adapter is None else adapter, parts
        towers = self.adapter.towers
        texts = [tower for tower in towers if tower.kind.text]
        images = [tower for tower in towers if issubclass(tower.kind, (Patches, Boxes))]
        two = len(towers) == 2 and len(images) == len(texts) == 1 and not texts[0].kind.image
        self.pair = (texts[0], images[0]) if two and parts is None else None
        one_stream = adapter is not None and len(texts) == 1 and not adapter.bimodal and not two
        self.tower = texts[0] if one_stream else None  # no other tower with words has an explained position

    def of(self, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Layout:
        """The layout of a sequence of tokens (B, N)."""
        if self.parts is not None:
            return _layout_of_parts(self.parts(inputs), shape)
        if self.tower is None:
            name = type(self.model).__name__
            raise ValueError(f"model must have an adapter with one stream; got {name}. Pass parts=")
        return self._listed(self.tower, inputs, shape)

    def text(self, inputs: Mapping[str, Any]) -> Layout:
        """The layout of the words of a model with two streams."""
        assert self.pair is not None
        return self._listed(self.pair[0], inputs, tuple(inputs["input_ids"].shape))

    def two_streams(self, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Layout:
        """The layout of words, followed by the image tokens (B, R) of a stream of their own."""
        assert self.pair is not None
        words, image = self.text(inputs), self.pair[1]
        if len(words.parts) != shape[0]:
            raise ValueError(f"inputs must have one text for each image; got {len(words.parts)} texts and {shape[0]} images")
        mask = inputs.get("visual_attention_mask")
        real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        parts = torch.where(real, IMAGE, NONE)
        special = torch.zeros(shape, dtype=torch.bool)
        special[:, : image.prefix] = True
        start = words.parts.shape[1]
        regions = [list(range(start + image.prefix, start + shape[1]))] * shape[0]
        return Layout(torch.cat([words.parts, parts], 1), torch.cat([words.special, special], 1), words.position, 0, regions)

    def _listed(self, tower: Tower, inputs: Mapping[str, Any], shape: tuple[int, int]) -> Layout:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape[0] != shape[0]:
            raise ValueError("inputs must contain 'input_ids' (B, T), one text for each sample of the sequence; got none")
        tokens = tower.tokens_in(self.model, inputs, shape)
        real, words = tokens.real(), tokens.words()
        if words is None:
            raise ValueError(f"model must have words among the tokens of '{tower.name}'; got {tower.tokens}")
        real = torch.ones(shape, dtype=torch.bool) if real is None else real.cpu()
        is_image = tokens.image_mask().cpu()
        before = is_image.cumsum(1) <= tokens.prefix  # the patches
        special = torch.where(is_image, before, ~words.cpu())
        regions = [sample.nonzero()[:, 0].tolist() for sample in is_image & ~special]
        position = tower.rule.token
        row = torch.zeros(shape[0], dtype=torch.long) if position is None else position(tokens).cpu()
        parts = torch.where(is_image, IMAGE, TEXT)
        return Layout(torch.where(real, parts, NONE), special, row, tokens.before, regions)


def _layout_of_parts(returned: Any, shape: tuple[int, int]) -> Layout:
    """The layout of tokens with the caller's parts."""
    parts = torch.as_tensor(returned).long().cpu()
    if tuple(parts.shape) not in (shape, shape[1:]):
        raise ValueError(f"parts must return (N) or (B, N) = {shape}; got {tuple(parts.shape)}")
    if bool(((parts < NONE) | (parts > IMAGE)).any()):
        raise ValueError(f"parts must return 0 (text), 1 (image) or -1 (neither); got {sorted(set(parts.flatten().tolist()))}")
    parts = parts.expand(shape)
    regions = [(sample == IMAGE).nonzero()[:, 0].tolist() for sample in parts]
    return Layout(parts, torch.zeros_like(parts, dtype=torch.bool), torch.zeros(shape[0], dtype=torch.long), 0, regions)
