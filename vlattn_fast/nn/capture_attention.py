"""Queries and keys of chosen layers of any model, as the congruence losses take them, while the model runs as it is.

Nothing of the model is replaced: a mode of torch sees the attention calls, and the products in front of a softmax where a module
writes attention out by hand. So dropout, autocast and gradients are those of the model. What torch.compile made of it runs as
plain Python meanwhile, since compiled code shows no calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlattn_fast._tensors import expand_heads
from vlattn_fast.interpret._run import uncompiled, unwrapped
from vlattn_fast.interpret.watching import IMAGE, TEXT, AttentionCall, Pair, Watch, check_modality


@dataclass(frozen=True)
class CapturedLayer:
    """One layer's queries and keys, (B, H, N, D) each, keys with as many heads as queries.

    text, image: of self-attention over words alone, and over image tokens alone. cross: ((text query, image key), (image query,
    text key)) where the model has cross-attention both ways. joint: of self-attention over words and image tokens together. None
    where the model has no such attention.
    """

    text: Pair | None = None
    image: Pair | None = None
    cross: tuple[Pair, Pair] | None = None
    joint: Pair | None = None

    def split(self, num_text_tokens: int) -> tuple[Pair, Pair, None]:
        """(text, image, cross) of one sequence with the words first, as `congruence_loss` takes them; cross is None, since one
        attention serves for all."""
        if self.joint is None:
            has = "attention over " + " and over ".join(x for x in ("text", "image") if getattr(self, x) is not None)
            raise ValueError(f"split must be called for a model that attends to words and image together; got {has}")
        query, key = self.joint
        if isinstance(num_text_tokens, bool) or not 0 <= num_text_tokens <= query.shape[2]:
            raise ValueError(f"num_text_tokens must be from 0 to {query.shape[2]}, the tokens; got {num_text_tokens!r}")
        n = num_text_tokens
        return (query[:, :, :n], key[:, :, :n]), (query[:, :, n:], key[:, :, n:]), None


def capture_attention(
    model: nn.Module, *, layers: int | Sequence[int] = -1, modality: Mapping[str, str] | None = None
) -> AttentionCapture:
    """A context in which a forward pass of `model` leaves the queries and keys of some layers behind, with their gradients.

    The last forward pass within it counts, and what it left stays readable behind the context. DDP, FSDP, PEFT and torch.compile
    are seen through; a compiled model runs uncompiled within.

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention, this package's, or
            written out by hand as matmul, softmax, matmul.
        layers: which ones, negative from the end; several give a sequence. They are counted for words, image and both
            together by themselves.
        modality: input name -> "text" or "image", for inputs that do not have the usual names (input_ids, pixel_values,
            visual_feats, ...).

    Raises:
        ValueError: within, a forward pass without such attention, or with fewer layers; an input of unknown modality.

    >>> import torch
    >>> from vlattn_fast.models import UNITER, UNITERConfig
    >>> config = UNITERConfig(99, 32, 2, 4, 64, region_dim=8)
    >>> with capture_attention(UNITER(config)) as seen:
    ...     outputs = seen.model(input_ids=torch.ones(2, 5, dtype=torch.int64), region_features=torch.randn(2, 3, 8),
    ...                          region_positions=torch.randn(2, 3, 7))
    >>> text, image, cross = seen.split(5)
    >>> text[0].shape, image[1].shape
    (torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 3, 8]))
    """
    return AttentionCapture(model, layers, modality)


class AttentionCapture:
    """What `capture_attention` gives: a context, and then the layers. With one layer, its fields are attributes of this."""

    def __init__(self, model: nn.Module, layers: int | Sequence[int], modality: Mapping[str, str] | None) -> None:
        self.model = model
        self._single = isinstance(layers, int)
        asked: Any = tuple(layers) if isinstance(layers, Sequence) else (layers,)
        if not asked or any(isinstance(i, bool) or not isinstance(i, int) for i in asked):
            raise ValueError(f"layers must be an int, or some; got {layers!r}")
        self._layers: tuple[int, ...] = asked
        self._modality = check_modality(modality)
        self._captured: list[CapturedLayer] | None = None
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> AttentionCapture:
        if self._stack is not None:
            raise RuntimeError("capture_attention must not be entered twice")
        inner = unwrapped(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(inner))
            stack.enter_context(Watch(inner, self._modality, self._finish))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        self._stack.__exit__(*error)
        self._stack = None

    def __len__(self) -> int:
        return len(self._found())

    def __getitem__(self, index: int) -> CapturedLayer:
        return self._found()[index]

    def _found(self) -> list[CapturedLayer]:
        if self._captured is None:
            raise ValueError("model must have run within capture_attention; got no forward pass")
        return self._captured

    @property
    def layer(self) -> CapturedLayer:
        """The only layer that was asked for."""
        if not self._single:
            raise ValueError(f"layers must be one index where fields are read directly; got {len(self)}: read capture[i]")
        return self._found()[0]

    @property
    def text(self) -> Pair:
        return self._field("text")

    @property
    def image(self) -> Pair:
        return self._field("image")

    @property
    def cross(self) -> tuple[Pair, Pair] | None:
        return self.layer.cross

    @property
    def query(self) -> Tensor:
        return self._sequence()[0]

    @property
    def key(self) -> Tensor:
        return self._sequence()[1]

    def _sequence(self) -> Pair:
        """Of the joint sequence, or of the only one that there is."""
        layer = self.layer
        pairs = [pair for pair in (layer.text, layer.image) if pair is not None]
        return pairs[0] if layer.joint is None and len(pairs) == 1 else self._field("joint")

    def _field(self, name: str) -> Pair:
        layer = self.layer
        pair: Pair | None = getattr(layer, name)
        if pair is None:
            has = ", ".join(field for field in ("text", "image", "joint") if getattr(layer, field) is not None)
            hint = "; split(num_text_tokens) parts one sequence of both" if name != "joint" and layer.joint is not None else ""
            raise ValueError(f"model must have self-attention over {name} tokens by themselves; got attention over {has}{hint}")
        return pair

    def split(self, num_text_tokens: int) -> tuple[Pair, Pair, None]:
        """(text, image, cross) of one sequence with the words first, see `CapturedLayer.split`."""
        return self.layer.split(num_text_tokens)

    def _finish(self, calls: Sequence[AttentionCall]) -> None:
        own = {kinds: _in_order(c for c in calls if c.kinds == c.key_kinds == kinds) for kinds in (TEXT, IMAGE, TEXT | IMAGE)}
        across = {
            kinds: _in_order(c for c in calls if (c.kinds, c.key_kinds) == kinds) for kinds in ((TEXT, IMAGE), (IMAGE, TEXT))
        }
        lengths = {len(found) for found in own.values() if found}
        if not lengths:
            raise ValueError(
                "model must have self-attention over all tokens of text or image at once, which modality= tells apart where "
                "inputs have other names; got none in its forward pass"
            )
        for index in self._layers:
            if any(not -n <= index < n for n in lengths):
                raise ValueError(f"layers must be among {min(lengths)} layers; got {index}")
        self._captured = [
            CapturedLayer(
                text=_at(own[TEXT], index),
                image=_at(own[IMAGE], index),
                cross=_both(across[TEXT, IMAGE], across[IMAGE, TEXT], index),
                joint=_at(own[TEXT | IMAGE], index),
            )
            for index in self._layers
        ]


def _at(found: Sequence[Pair], index: int) -> Pair | None:
    return found[index] if found else None


def _both(one: Sequence[Pair], other: Sequence[Pair], index: int) -> tuple[Pair, Pair] | None:
    """Cross-attention both ways, in a layer that has it. Layers are counted from the end, where they meet."""
    last = index if index < 0 else index - len(one)
    fits = len(one) == len(other) and -len(one) <= last < 0
    return (one[last], other[last]) if fits else None


def _in_order(calls: Iterable[AttentionCall]) -> list[Pair]:
    """The layers' queries and keys; none where a layer attends part by part, as Qwen-VL's vision tower does, image by image."""
    calls = list(calls)
    if any(call.again for call in calls):
        return []
    return [(call.query, expand_heads(call.key, call.query.shape[1])) for call in calls]
