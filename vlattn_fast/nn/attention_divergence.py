"""The divergence of two models' attention as a module for training loops: student and teacher, a model and its frozen copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.checks import check_bool, check_choice, check_token_mask
from vlattn_fast._ground.tensors import joined
from vlattn_fast.attach.written import is_masked
from vlattn_fast.nn.capture_attention import AttentionCapture
from vlattn_fast.nn.captured_layer import CapturedLayer, QueryKey
from vlattn_fast.ops import BACKEND_NAMES
from vlattn_fast.ops._documents import Ids
from vlattn_fast.ops.attention_divergence import attention_divergence, check_kind

_Layer = CapturedLayer | QueryKey
Captured = AttentionCapture | _Layer | Sequence[_Layer]


class AttentionDivergence(nn.Module):
    """Computes how far the attention of one model is from that of another on the same tokens: `vlattn_fast.attention_divergence`
    of captured layers.

    Returns the mean over layers, heads and real tokens; no map is stored. A model that ran under torch.no_grad() costs nothing in
    the backward pass.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> teacher, student = (va.models.UNITER(va.models.UNITERConfig(99, 32, 4, heads, 64, region_dim=8)) for heads in (4, 2))
        >>> inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "region_features": torch.randn(2, 3, 8),
        ...           "region_positions": torch.randn(2, 3, 7)}
        >>> with torch.no_grad(), va.nn.capture_attention(teacher, layers=[1, 3]) as target:
        ...     output = teacher(**inputs)
        >>> with va.nn.capture_attention(student, layers=[0, 3]) as captured:
        ...     output = student(**inputs)
        >>> va.nn.AttentionDivergence()(target, captured).backward()

    Args:
        kind, beta, backend: see `vlattn_fast.attention_divergence`. "kl" is KL(attention || other): pass the teacher first for
            the usual loss of distillation.
        head_mean: whether the means of the heads' attention are compared. Default: only if the numbers of heads differ.
        reduction: "mean", or "none" for a number per token (B, N), the mean over layers and heads; 0 for other tokens than real
            ones.
    """

    def __init__(
        self,
        kind: str = "kl",
        *,
        beta: float = 0.5,
        head_mean: bool | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_kind(kind, beta)
        check_choice("reduction", reduction, ("mean", "none"))
        check_choice("backend", backend, BACKEND_NAMES)
        if head_mean is not None:
            check_bool(head_mean=head_mean)
        self.kind, self.beta, self.head_mean, self.reduction, self.backend = kind, beta, head_mean, reduction, backend

    def forward(
        self,
        attention: Captured,
        other: Captured,
        query_mask: Tensor | None = None,
        *,
        document_ids: Ids = None,
        cu_seqlens: Ids = None,
    ) -> Tensor:
        """Computes the divergence of `attention` from `other`.

        Args:
            attention, other: captures, captured layers, or their pairs such as `layer.text` and `layer.cross[0]`; as many of one
                side as of the other, compared in order. A pair that either side masks counts on neither.
            query_mask: bool (B, N), the tokens that count, e.g. those of a response. Default: of a layer's own sequence those
                that any token may attend to, so no padding; of a pair all tokens.
            document_ids, cu_seqlens: see `vlattn_fast.attention_divergence`.
        """
        one, two = _layers("attention", attention), _layers("other", other)
        if len(one) != len(two):
            raise ValueError(f"other must have as many layers as attention, {len(one)}; got {len(two)}: choose them with layers=")
        documents: dict[str, Any] = {"document_ids": document_ids, "cu_seqlens": cu_seqlens}
        rows = [self._of_layer(*layers, query_mask, documents) for layers in zip(one, two, strict=True)]
        return torch.stack(rows).mean(0)

    def _of_layer(self, layer: _Layer, other: _Layer, query_mask: Tensor | None, documents: dict[str, Any]) -> Tensor:
        """Returns (B, N), or their mean."""
        one, two = (x.sequence if isinstance(x, CapturedLayer) else x for x in (layer, other))
        (query, key), (other_query, other_key) = one, two
        dtype = torch.promote_types(query.dtype, other_query.dtype)  # a teacher may be in half precision
        tensors = [x.to(dtype) for x in (query, key, other_query, other_key)]
        visible, others = _visible(one), _visible(two)
        visible = visible if others is None else joined(visible, others)
        rows = attention_divergence(
            *tensors,
            kind=self.kind,
            beta=self.beta,
            head_mean=query.shape[1] != other_query.shape[1] if self.head_mean is None else self.head_mean,
            attn_mask=visible,
            is_causal=one.is_causal or two.is_causal,
            scale=one.scale,
            other_scale=two.scale,
            backend=self.backend,
            **documents,
        ).mean(1)
        if query_mask is not None:
            check_token_mask("query_mask", query_mask, "query", query, query.shape[2], "(B, N)")
        elif isinstance(layer, CapturedLayer) and query.shape[2] == key.shape[2]:
            query_mask = one.real_keys(visible)
        if query_mask is not None:
            rows = torch.where(query_mask, rows, 0.0)
        if self.reduction == "none":
            return rows
        return rows.sum() / (rows.numel() if query_mask is None else query_mask.sum().clamp(min=1))

    def extra_repr(self) -> str:
        return f"{self.kind!r}, beta={self.beta}, head_mean={self.head_mean}, reduction={self.reduction!r}"


def _layers(name: str, attention: Captured) -> list[_Layer]:
    layers = [attention] if isinstance(attention, _Layer) else list(attention)
    if not layers or not all(isinstance(layer, _Layer) for layer in layers):
        given = ", ".join(type(layer).__name__ for layer in layers) or "none"
        raise TypeError(
            f"{name} must be a capture, captured layers or their pairs; got {given}: va.attention_divergence takes tensors"
        )
    return layers


def _visible(pair: QueryKey) -> Tensor | None:
    """Returns bool, broadcastable to (B, H, N, M), which pairs the layer's mask leaves; None if it leaves all."""
    mask = pair.attn_mask
    if mask is None or mask.dtype == torch.bool:
        return mask
    masked = is_masked(mask)
    if bool(mask.masked_fill(masked, 0.0).any()):
        raise ValueError(
            "the captured layers must only scale and mask the product of queries and keys; one adds a bias of positions to it: "
            "pass queries, keys and their attn_mask to va.attention_divergence"
        )
    return ~masked
