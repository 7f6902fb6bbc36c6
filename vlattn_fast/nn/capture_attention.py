"""Captures queries and keys of some layers of any model, for the congruence losses, without changing the model.

A mode of torch intercepts the attention calls, and the products before a softmax if a module writes attention out by hand. So
dropout, autocast and gradients are those of the model. Compiled code runs as plain Python inside of the context, since it shows
no calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.attach.events import AttentionEvent
from vlattn_fast.attach.session import uncompiled, unwrapped
from vlattn_fast.attach.token_kinds import IMAGE, TEXT, TokenKinds, check_modality
from vlattn_fast.nn.captured_layer import CapturedLayer, Positions, QueryKey, pair_of


def capture_attention(
    model: nn.Module, *, layers: int | Sequence[int] = -1, modality: Mapping[str, str] | None = None
) -> AttentionCapture:
    """Captures the queries and keys of some layers during the model's forward pass, with their gradients.

    Returns a context. Afterwards it holds the layers of the last forward pass that ran inside. Memory is that of the captured
    queries and keys, O(N) per layer; no map is stored, and the model computes its attention as before. With `va.intervene` it
    holds those of the edited model, and edited edges are a mask (B, H, N, M).

    Examples:
        >>> import torch, vlattn_fast as va
        >>> config = va.models.UNITERConfig(99, 32, 2, 4, 64, region_dim=8)
        >>> with va.nn.capture_attention(va.models.UNITER(config)) as captured:
        ...     outputs = captured.model(input_ids=torch.ones(2, 5, dtype=torch.int64), region_features=torch.randn(2, 3, 8),
        ...                              region_positions=torch.randn(2, 3, 7))
        >>> text, image, cross = captured.split(5)
        >>> text[0].shape, image[1].shape
        (torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 3, 8]))

    Args:
        model: any model whose attention is torch's scaled_dot_product_attention or nn.MultiheadAttention, this package's, or
            written out by hand as matmul, softmax, matmul. Wrappers (DDP, FSDP, PEFT, torch.compile) are supported; a compiled
            model runs uncompiled inside the context.
        layers: an index, negative from the end; several give a sequence. Text, image and joint layers are counted separately.
        modality: input name -> "text" or "image", for inputs with other names than input_ids, pixel_values, visual_feats, ...

    Raises:
        ValueError: if a forward pass has no such attention, or fewer layers; if the modality of an input is unknown.
    """
    return AttentionCapture(model, layers, modality)


class AttentionCapture:
    """Holds the result of `capture_attention`: a context, then a sequence of layers.

    If you asked for a single layer, its fields (text, image, joint, cross, ...) are attributes of the capture, too.
    """

    text: QueryKey
    image: QueryKey
    joint: QueryKey
    cross: tuple[QueryKey, QueryKey] | None
    is_image: Tensor | None
    query: Tensor
    key: Tensor
    scale: float
    is_causal: bool
    attn_mask: Tensor | None

    def __init__(self, model: nn.Module, layers: int | Sequence[int], modality: Mapping[str, str] | None) -> None:
        self.model = model
        self._single = isinstance(layers, int)
        asked: Any = tuple(layers) if isinstance(layers, Sequence) else (layers,)
        if not asked or any(isinstance(i, bool) or not isinstance(i, int) for i in asked):
            raise ValueError(f"layers must be an int or several ints; got {layers!r}")
        self._layers: tuple[int, ...] = asked
        self._modality = check_modality(modality)
        self._captured: list[CapturedLayer] | None = None
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> AttentionCapture:
        if self._stack is not None:
            raise RuntimeError("this capture_attention is already entered; make another one")
        inner = unwrapped(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(inner))
            stack.enter_context(TokenKinds(inner, self._modality, self._finish).observer())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        self._stack.__exit__(*error)
        self._stack = None

    def __len__(self) -> int:
        return len(self._layers_of_last_pass())

    def __getitem__(self, index: int) -> CapturedLayer:
        return self._layers_of_last_pass()[index]

    def _layers_of_last_pass(self) -> list[CapturedLayer]:
        if self._captured is None:
            raise ValueError("capture_attention captured no forward pass; run the model within its `with` block")
        return self._captured

    @property
    def layer(self) -> CapturedLayer:
        """Returns the only captured layer."""
        if not self._single:
            raise ValueError(f"layers must be one index for fields of the capture itself; got {len(self)}: use capture[i]")
        return self._layers_of_last_pass()[0]

    def __getattr__(self, name: str) -> Any:
        """Returns a field of the only captured layer."""
        if name not in AttentionCapture.__annotations__:
            raise AttributeError(f"AttentionCapture has no attribute {name!r}")
        layer, sequences = self.layer, ("text", "image", "joint")
        value = getattr(layer, name)
        if value is None and name in sequences:
            has = ", ".join(field for field in sequences if getattr(layer, field) is not None)
            hint = "; split() separates one sequence of both" if name != "joint" and layer.joint is not None else ""
            raise ValueError(f"the captured layer has no self-attention over only {name} tokens, but over {has}{hint}")
        return value

    def split(
        self, num_text_tokens: int | None = None, *, text: Positions | None = None, image: Positions | None = None
    ) -> tuple[QueryKey, QueryKey, None]:
        """Splits one sequence into (text, image, cross); see `CapturedLayer.split`."""
        return self.layer.split(num_text_tokens, text=text, image=image)

    def _finish(self, calls: Sequence[AttentionEvent]) -> None:
        within = {kinds: _in_order(c for c in calls if c.kinds == c.key_kinds == kinds) for kinds in (TEXT, IMAGE, TEXT | IMAGE)}
        is_image = next((call.image for call in calls if call.image is not None), None)
        across = {
            kinds: _in_order(c for c in calls if (c.kinds, c.key_kinds) == kinds) for kinds in ((TEXT, IMAGE), (IMAGE, TEXT))
        }
        lengths = {len(layers) for layers in within.values() if layers}
        if not lengths:
            hint = "its attention must be a function of torch or of this package, or matmul, softmax, matmul"
            if calls:
                hint = "modality= names the kind of inputs with unusual names"
            raise ValueError(f"capture_attention captured no self-attention over all tokens of text or image at once; {hint}")
        for index in self._layers:
            if any(not -n <= index < n for n in lengths):
                raise ValueError(f"layers must be among {min(lengths)} layers; got {index}")
        self._captured = [
            CapturedLayer(
                text=_layer(within[TEXT], index),
                image=_layer(within[IMAGE], index),
                cross=_both(across[TEXT, IMAGE], across[IMAGE, TEXT], index),
                joint=_layer(within[TEXT | IMAGE], index),
                is_image=is_image,
            )
            for index in self._layers
        ]


def _layer(layers: Sequence[QueryKey], index: int) -> QueryKey | None:
    return layers[index] if layers else None


def _both(forth: Sequence[QueryKey], back: Sequence[QueryKey], index: int) -> tuple[QueryKey, QueryKey] | None:
    """Returns the cross-attention of a layer both ways, or None. Layers are counted from the end, which both ways share."""
    last = index if index < 0 else index - len(forth)
    fits = len(forth) == len(back) and -len(forth) <= last < 0
    return (forth[last], back[last]) if fits else None


def _in_order(calls: Iterable[AttentionEvent]) -> list[QueryKey]:
    """Returns the layers' queries and keys; none if a layer attends part by part, e.g. Qwen-VL's vision tower, image by image."""
    calls = list(calls)
    if any(call.again for call in calls):
        return []
    return [pair_of(call.query, expand_heads(call.key, call.query.shape[1]), call.masks, call.score) for call in calls]
