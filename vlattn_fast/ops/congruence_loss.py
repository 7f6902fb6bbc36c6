"""Congruence of attention within and between modalities: CACR (Pandey et al., ACL 2023) and IAIS (Ren et al., ACL 2021).

Formulas: reference/congruence_loss.py. Without per-head maps: streaming/congruence_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import check_choice, check_floating, check_tensor, check_token_mask, describe, has_forward_mode
from vlattn_fast._ground.tensors import as_fake_outputs, cast_by_autocast, compute_dtype, resolve_scale, scaled_dot_default
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import congruence_loss as cpu
from vlattn_fast.backends.cuda import congruence_loss as cuda
from vlattn_fast.backends.inputs import CongruenceLossBackwardInputs, CongruenceLossInputs
from vlattn_fast.backends.reference.congruence_loss import (
    DIRECTIONS,
    KINDS,
    NORMALIZATIONS,
    REDUCTIONS,
    block_inputs,
    num_gradients,
)
from vlattn_fast.backends.streaming import congruence_loss as streaming
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, planned, select
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents


def _triton_limits(call: CallShape) -> list[tuple[str, bool]]:
    return [("Triton kernels take at most 16384 tokens of each modality", max(call.sizes["L"], call.sizes["V"]) > 16384)]


def _cuda_limits(call: CallShape) -> list[tuple[str, bool]]:
    longest, head_dim = max(call.sizes["L"], call.sizes["V"]), call.sizes["head_dim"]
    rows = -(-longest // 16) * 16
    # of a tile of one head, and of the gradients at a map
    float32_bytes = 4 * ((64 if rows <= 64 else 128) * (68 if head_dim <= 64 else 132) + rows * (rows + 8))
    return [
        ("the CUDA C++ kernel takes the kinds cacr and iais_distributed", call.flags["kind"] == "iais_singular"),
        ('the CUDA C++ kernel takes normalize="softmax"', call.flags["normalize"] == "none"),
        ("the CUDA C++ kernel takes at most 128 tokens of each modality", longest > 128),
        ("the CUDA C++ kernel takes a head_dim of at most 128", head_dim > 128),
        (
            "the CUDA C++ kernel takes no more float32 tokens than fit into shared memory at this head_dim",
            call.dtype == torch.float32 and float32_bytes > 96 * 1024,
        ),  # every GPU since Ampere has 99 KB
    ]


BACKENDS = table(
    streaming,
    cpu=cpu,
    triton=lambda: kernels.congruence_loss,
    cuda=cuda,
    limits={"triton": _triton_limits, "cuda": _cuda_limits},
    masks_padding=("cpu", "triton", "cuda"),
    saves={"cpu": ("gradients",)},
)


def congruence_loss(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    *,
    kind: str = "cacr",
    normalize: str = "softmax",
    direction: str = "both",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "mean",
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Tensor:
    """Computes the distance of a modality's attention from the attention that the other modality implies through cross attention.

    Returns a loss in nats. Only backend "reference" stores a map per head; "streaming" holds O(L V) for a few samples at a time.
    If an input requires a gradient, "cpu" computes the gradients together with the loss and stores them in float32.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> text = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
        >>> image = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
        >>> va.congruence_loss(text, image, kind="iais_distributed", reduction="none").shape
        torch.Size([2])

    With the blocks LL (L, L), VV (V, V), LV (L, V), VL (V, L), each a softmax over its own keys averaged over the heads, and
    sym(p, t) = KL(p || t) + KL(t || p) averaged over the queries, the text direction is (the image direction swaps L and V):

    - "cacr": sym(softmax(LL), softmax(LV VV LV^T)), LV a constant (Pandey et al., ACL 2023, "soft").
    - "iais_singular": sym(LL, softmax(VV[c, c])), c_i the image token that text token i attends to most (Ren et al., ACL 2021,
      "singular").
    - "iais_distributed": sym(LL, LV VL) with e = 1e-6 in the denominators, p log(p / (t + e)) + t log(t / (p + e)) (Ren et al.,
      ACL 2021, "distributed").

    A softmax ignores a constant of its row, so a softmax loss can be 0 for maps that differ. With normalize="none" each kind is
    sym(LL + e, T + e) = mean_i sum_j (LL - T) log((LL + e) / (T + e)), T the other side before its softmax: LV VV LV^T, VV[c, c]
    or LV VL. It is never negative, and 0 if and only if LL = T, of which the rows need not sum to 1.

    Args:
        text: (query, key), each (B, H, L, D), of the text tokens; float16, bfloat16, float32 or float64.
        image: (query, key), each (B, H, V, D), of the image tokens.
        cross: ((text query (B, H, L, D), image key (B, H, V, D)), (image query (B, H, V, D), text key (B, H, L, D))): the
            projections of a separate cross attention. Default: those of text and image.
        kind: "cacr", "iais_singular" or "iais_distributed".
        normalize: "softmax", as published, or "none".
        direction: "text", "image", or "both" for their sum.
        text_mask, image_mask: bool (B, L) and (B, V), True = a real token, in any pattern. Padding has no influence and gradient
            0.
        scale: multiplies the scores. Default: 1/sqrt(D).
        reduction: "mean" over the batch (0 for an empty one), or "none".
        document_ids, cu_seqlens: see score_attention; a pair, of the text tokens and of the image tokens. A document is a pair of
            a text and an image, and counts as a sample.
        backend: "auto", "reference", "streaming", "cpu", "triton" or "cuda".

    Returns:
        The loss in nats, a scalar or (B), float32 (float64 for float64 input). A sample without text or without image tokens
        gives 0 and counts in the mean. Twice differentiable in all queries and keys; "cacr" and "iais_singular" send no gradient
        through the cross block.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.
    """
    if document_ids is not None or cu_seqlens is not None or _is_nested(text):
        return _of_documents(**locals())
    backend, scale = planned(
        _plan, backend, scale, text, image, cross, kind, normalize, direction, text_mask, image_mask, reduction
    )
    if backend == "reference":
        options: dict[str, Any] = {"direction": direction, "text_mask": text_mask, "image_mask": image_mask, "scale": scale}
        return reference.congruence_loss(text, image, cross, kind=kind, normalize=normalize, reduction=reduction, **options)
    if cross is not None:
        cross = (cast_by_autocast(*cross[0]), cast_by_autocast(*cross[1]))
    written = (None, None) if BACKENDS[backend].masks_padding else (text_mask, image_mask)
    queries, keys = block_inputs(cast_by_autocast(*text), cast_by_autocast(*image), cross, *written)
    # in forward mode none are saved: its tangents need them from a pass of their own
    saves = torch.is_grad_enabled() and any([x.requires_grad for x in (*queries, *keys)]) and not has_forward_mode()
    blocks = *queries, *keys, text_mask, image_mask
    loss, _ = _derivatives.forward(CongruenceLossInputs(*blocks, kind, normalize, direction, scale, saves, backend))
    return _reduced(loss, reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if losses.shape[0] else losses.sum()


_BLOCKS = (
    ("text_query", "text_key"),
    ("image_query", "image_key"),
    ("cross_text_query", "cross_image_key"),
    ("cross_image_query", "cross_text_key"),
)


def _is_nested(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and any([getattr(x, "is_nested", False) for x in pair])


def _of_documents(text: Any, image: Any, cross: Any, reduction: str, **options: Any) -> Tensor:
    """The losses of pairs of a text and an image, each a document of both."""
    check_choice("reduction", reduction, REDUCTIONS)
    pairs = zip(_BLOCKS, (text, image, *(cross or ())), strict=False)
    tensors = {name: x for names, pair in pairs for name, x in zip(names, pair, strict=True)}

    def losses(**x: Any) -> Tensor:
        words, regions, *crossed = [(x.pop(query), x.pop(key)) for query, key in _BLOCKS if query in x]
        return congruence_loss(words, regions, (crossed[0], crossed[1]) if crossed else None, reduction="none", **x)

    return _reduced(over_documents(losses, tensors | options, ["b"]), reduction)


def _plan(backend: str, scale: float | None, *arguments: Any) -> tuple[str, float]:
    """The backend and the scale."""
    call = _describe(*arguments)
    return select(BACKENDS, call, backend), resolve_scale(scale, scaled_dot_default(call.sizes["head_dim"]))


def _describe(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    kind: str,
    normalize: str,
    direction: str,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    reduction: str,
) -> CallShape:
    """Checks a call except for its scale, and returns its metadata."""
    check_choice("kind", kind, KINDS)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    tensors = _named_tensors(text, image, cross)
    for name, each in tensors.items():
        check_tensor(name, each, rank=4, shape="(B, H, L, D)" if "text" in name else "(B, H, V, D)")
    check_floating(**tensors)
    batch, num_heads, L, head_dim = text[0].shape
    V = image[0].shape[2]
    text_shape, image_shape = (batch, num_heads, L, head_dim), (batch, num_heads, V, head_dim)
    for name, each in tensors.items():
        shape = text_shape if "text" in name else image_shape
        if each.shape != shape:
            raise ValueError(f"{name} must have the shape {shape} of text and image queries; got {describe(each)}")
    check_token_mask("text_mask", text_mask, "text query", text[0], L, "(B, L)")
    check_token_mask("image_mask", image_mask, "text query", text[0], V, "(B, V)")
    sizes = {"L": L, "V": V, "head_dim": head_dim, "num_heads": num_heads}
    return call_shape("congruence_loss", text[0], sizes, {"kind": kind, "normalize": normalize, "direction": direction})


def _named_tensors(text: Any, image: Any, cross: Any) -> dict[str, Any]:
    """The queries and keys by the names that messages give them; their pairs are checked."""
    _check_pair("text", text, "(query (B, H, L, D), key (B, H, L, D))")
    _check_pair("image", image, "(query (B, H, V, D), key (B, H, V, D))")
    tensors = {"text query": text[0], "text key": text[1], "image query": image[0], "image key": image[1]}
    if cross is not None:
        _check_pair("cross", cross, "((text query, image key), (image query, text key))")
        _check_pair("cross[0]", cross[0], "(text query, image key)")
        _check_pair("cross[1]", cross[1], "(image query, text key)")
        names = "cross text query", "cross image key", "cross image query", "cross text key"
        tensors |= dict(zip(names, (*cross[0], *cross[1]), strict=True))
    return tensors


def _check_pair(name: str, x: Any, legend: str) -> None:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"{name} must be the pair {legend}; got {describe(x)}")


def _forward_fake(inputs: Any) -> tuple[Tensor, Tensor]:
    text, image = inputs.text_query, inputs.image_query
    loss = text.new_empty(text.shape[0], dtype=compute_dtype(text))
    saves = getattr(inputs, "saves", False) and "gradients" in BACKENDS[inputs.backend].saves
    return loss, loss.new_empty(num_gradients(inputs.kind) * (text.numel() + image.numel()) if saves else 0)


def _backward_fake(inputs: Any) -> tuple[Tensor | None, ...]:
    n, tensors = num_gradients(inputs.kind), [getattr(inputs, field) for field in CongruenceLossInputs._fields[:8]]
    return as_fake_outputs([x if k % 4 < n else None for k, x in enumerate(tensors)])


_derivatives = Derivatives(
    "congruence_loss",
    (CongruenceLossInputs, CongruenceLossBackwardInputs),
    CongruenceLossInputs._fields[:8],
    # `gradients`: those of each sample's loss, if the backend computes them with it; empty if the backward pass computes them
    outputs=("loss", "gradients"),
    grads={"grad_loss": "loss"},
    passes=[launcher(BACKENDS, each) for each in (streaming.forward, streaming.backward, streaming.jvp, streaming.second)],
    fake=_forward_fake,
    fake_backward=_backward_fake,
    fake_second=_backward_fake,
)

OPERATOR = Operator(congruence_loss, _describe, BACKENDS)
