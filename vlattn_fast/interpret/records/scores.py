"""Scores: which number of a model's outputs is explained, and among which the default one is chosen.

A score is one subclass of `Score` with a name, which a `Family` has as `score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlattn_fast.interpret.records.named import Named
from vlattn_fast.interpret.records.tokens import Tokens

_NO_LOGITS = "target must be a callable(outputs) -> (B,) scores where the outputs have no logits; got none"


@dataclass(frozen=True)
class Score(Named):
    """A logit (B, classes) of each row: `logits[b, class]`.

    Args:
        field: of the outputs, which holds the logits.
        kind: of the tokens of the first tower.
        background: of object queries: the last logit is that of no object.
    """

    field: str
    kind: type[Tokens]
    background: bool

    named: ClassVar[dict[str, type[Any]]] = {}
    among: ClassVar[str] = "classes"  # what a target's index counts
    pairs: ClassVar[bool] = False  # a row is an image with a text
    predicts: ClassVar[bool] = False  # the next token is scored, so that an answer may be
    names_row: ClassVar[bool] = False  # a target names the row that is read

    def logits(self, outputs: Any) -> Tensor | None:
        """The logits as the model gives them; None where it gives none."""
        return getattr(outputs, self.field, None)

    def per_row(self, logits: Any, arguments: Mapping[str, Any]) -> Tensor:
        """The logits (B, classes) that a target chooses from.

        Args:
            arguments: what the model was called with.
        """
        if not isinstance(logits, Tensor):
            raise ValueError(_NO_LOGITS)
        if logits.ndim != 2:
            raise ValueError(f"target must be a callable where logits are not (B, classes); got logits {tuple(logits.shape)}")
        return logits

    def pick(self, logits: Tensor, target: Any) -> list[int]:
        """The index of each row of logits (B, classes): `target`, by default the largest."""
        return logits.argmax(-1).tolist() if target is None else indices(target, len(logits), logits.shape[1], self.among)

    def choose(self, outputs: Any, target: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
        """Scores (B,) and the index each belongs to."""
        logits = self.per_row(self.logits(outputs), arguments)
        chosen = self.pick(logits, target)
        return logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0], chosen


class Class(Score, name="class"):
    pass


class Token(Score, name="token"):
    """The next token behind a prompt: `logits[b, position, token]`."""

    among = "tokens"
    predicts = True

    def per_row(self, logits: Any, arguments: Mapping[str, Any]) -> Tensor:
        if isinstance(logits, Tensor) and logits.ndim == 3:
            # All logits have the length of the sequence, which may begin with patches, or be a decoder's behind an encoder.
            kept = arguments.get("logits_to_keep")
            shape = prompt_shape(arguments) if isinstance(kept, Tensor) else (logits.shape[0], logits.shape[1])
            position = self.kind(arguments, shape).last_real().to(logits.device)
            if isinstance(kept, Tensor):
                position = torch.searchsorted(kept.to(logits.device), position)
            logits = logits[torch.arange(len(logits), device=logits.device), position]
        return super().per_row(logits, arguments)


class Pair(Score, name="pair"):
    """The similarity of an image and a text: `logits_per_image[i, i]`."""

    among = "texts"
    pairs = True

    def logits(self, outputs: Any) -> Tensor:
        return outputs.logits_per_image

    def pick(self, logits: Tensor, target: Any) -> list[int]:
        """The text of each image of logits (images, texts): its own, where they are as many."""
        images, texts = logits.shape
        return list(range(images)) if target is None and images == texts else super().pick(logits, target)

    def choose(self, outputs: Any, target: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
        """Images and texts are paired already: a target is the text of each row."""
        return self.logits(outputs).diagonal(), target


class Query(Score, name="query"):
    """The largest class logit of an object query: `max logits[b, query, :-1]`."""

    among = "object queries"
    names_row = True

    def choose(self, outputs: Any, target: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
        """By default the query that is surest of its class."""
        logits = getattr(outputs, self.field)
        objects = logits[..., :-1] if self.background else logits
        if target is None:
            # Where a logit stands for no object, the others are sure relative to it; else each is sure by itself.
            sure = logits.softmax(-1)[..., :-1] if self.background else logits
            chosen = sure.amax(-1).argmax(-1).tolist()
        else:
            chosen = indices(target, len(logits), logits.shape[1], self.among)
        return objects[torch.arange(len(chosen), device=logits.device), chosen].max(-1).values, chosen


def prompt_shape(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(B, N) of the prompts, which are ids or embeddings."""
    prompts = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
    return prompts.shape[0], prompts.shape[1]


def indices(target: Any, batch: int, size: int, what: str) -> list[int]:
    """`target` as one index per row: an int for all, or (B,) ints.

    Raises:
        TypeError: neither an int nor a sequence or tensor of ints.
        ValueError: wrong count, or an index outside 0 ... size - 1.
    """
    if hasattr(target, "tolist"):  # torch's and NumPy's tensors and scalars
        target = target.tolist()
    chosen = [target] * batch if isinstance(target, int) else target
    if not isinstance(chosen, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise TypeError(f"target must be None, an int, (B,) ints or a callable; got {target!r}")
    if len(chosen) != batch:
        raise ValueError(f"target must be one index or {batch} indices (one per row); got {len(chosen)}")
    for index in chosen:
        if not 0 <= index < size:
            raise ValueError(f"target must be from 0 to {size - 1} ({what}); got {index}")
    return list(chosen)
