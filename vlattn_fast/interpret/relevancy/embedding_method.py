"""Methods that use the embeddings that enter the towers, and need no attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import describe
from vlattn_fast.interpret.relevancy.embedding_trace import Embeddings
from vlattn_fast.interpret.relevancy.method import BackwardPass, Enter, Method
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace

IMAGE_BASELINES = BLACK, WHITE, BLUR, MEAN = ("black", "white", "blur", "mean")  # baselines that are images
PAD = "pad"
Baseline = None | str | int | Tensor | Mapping[str, str | int | Tensor]


class BaselineMethod(Method):
    """A method that compares the embeddings of the input with those of a baseline, another input.

    Attributes:
        baseline: the option, see `__init__`.
    """

    needs = "embeddings"
    uses_position = False
    option: ClassVar[str] = "baseline"  # its name
    lenient: ClassVar[bool] = False  # inputs without images are compared with embeddings of zero, for baselines that are images
    default_baseline: ClassVar[Baseline] = None

    def __init__(self, baseline: Baseline = None, *, freeze: Sequence[str] | None = None, of: str | None = None) -> None:
        """
        Args:
            baseline: what the input is compared with. None = embeddings of zero. For images: "black" or "white", from mean and
                standard deviation of the `processor` that `explain` is given, else the smallest or the largest number of each
                image; "mean", the mean of each channel; "blur", the image under a Gaussian whose standard deviation is a
                twentieth of the shorter side; or a tensor (C, H, W), or of more dimensions, that broadcasts to the images. For
                words: a token's id, or "pad". A tensor of any other shape must broadcast to the embeddings (B, N, C). A dict
                names inputs, such as {"pixel_values": "white", "input_ids": 0}; other inputs stay as they are. Tokens with the
                baseline's embedding, such as words if only the image is black, get 0.
            freeze: see `Method`.
            of: see `Method`.

        Raises:
            TypeError, ValueError: an option has a wrong type or value.
        """
        values = baseline.values() if isinstance(baseline, Mapping) else [] if baseline is None else [baseline]
        for value in values:
            if isinstance(value, str):
                if value not in (*IMAGE_BASELINES, PAD):
                    known = ", ".join(map(repr, (*IMAGE_BASELINES, PAD)))
                    raise ValueError(f"{self.option} must be one of {known}, a token id, a tensor or a dict; got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, Tensor)):
                raise TypeError(
                    f"{self.option} must be a name, a token id, a tensor, or a dict from inputs to these; got {describe(value)}"
                )
        self.baseline = baseline
        super().__init__(freeze=freeze, of=of)

    def origin(self, origins: Mapping[str, Sequence[Tensor]] | None, tower: TowerTrace, values: Tensor) -> Tensor | None:
        """The baseline's embeddings for those that enter next. `origins`: those of its run, by tower, if it is an input."""
        if origins is None:
            if not isinstance(self.baseline, Tensor):
                return None
            try:
                return self.baseline.detach().to(values).expand_as(values)
            except RuntimeError:
                raise ValueError(
                    f"{self.option} must broadcast to the images in inputs, or to the embeddings of each tower; got "
                    f"{tuple(self.baseline.shape)} for {tuple(values.shape)} of '{tower.name}'"
                ) from None
        found = [origin for origin in origins.get(tower.name, ())[len(tower.cached) :][:1] if origin.shape == values.shape]
        if not found:
            raise ValueError(
                f"{self.option} must give embeddings of the same number and shapes as the input; got others in tower "
                f"'{tower.name}'"
            )
        return found[0]


def scaled(share: float) -> Enter:
    """A share of the way from the baseline's embeddings to those of the input."""

    def enter(tower: TowerTrace, values: Tensor, origin: Tensor | None) -> Tensor:
        return values * share if origin is None else origin + (values - origin) * share

    return enter


class EmbeddingMethod(BaselineMethod):
    """The relevancy of a token is its embedding, less the baseline's, times the gradient there, combined over the features."""

    def combine(self, products: Tensor, dim: int) -> Tensor:
        """Embedding times gradient, combined over the features: their sum."""
        return products.sum(dim)

    def carried(self, backward: BackwardPass) -> list[Tensor]:
        towers = [*backward.towers, *backward.attended]
        parts = [tower.cached for tower in towers]
        every = [part for tower_parts in parts for part in tower_parts]
        if every and all(part.origin is not None and torch.equal(part.origin, part.values) for part in every):
            raise ValueError(
                f"{self.option} must change the embeddings of the towers {', '.join(tower.name for tower in towers)}; got "
                "those of the input. Pass another one, or a dict that names further inputs"
            )
        grads = iter(backward.gradients([part.passed for part in every]))
        return [torch.stack([self.row_of(part, next(grads)) for part in tower_parts]).sum(0) for tower_parts in parts]

    def row_of(self, part: Embeddings, grad: Tensor | None) -> Tensor:
        """The relevancy vector (B, 1, N) of embeddings, zero if the score does not depend on them."""
        values = part.values.detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if part.origin is not None:
            values = values - part.origin.to(values)
        return part.per_token(self.combine, values * (0.0 if grad is None else grad.to(values.dtype)))[:, None]
