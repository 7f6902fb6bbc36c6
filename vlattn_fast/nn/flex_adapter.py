"""FlexAttention's score_mod and block_mask as calls of score_attention, which has gradients on CPUs, unlike FlexAttention.

The functions are looked at by what they return: for all places at once, whose shape tells on what a result depends, and for a few
scores, which tell what is done to a score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_attention, describe
from vlattn_fast._ground.tensors import compute_dtype, joined
from vlattn_fast.ops.score_attention import score_attention

Mod = Callable[..., Tensor]
_SCORES = 0.0, 1.0, -2.5, 40.0, 1e6  # what is done to each tells what is done to all; the last is at a softcap


class FlexCall(NamedTuple):
    """What was recognised: arguments of score_attention, and a line for each. `softcap` and `is_causal` cost nothing; `attn_mask`
    and `group_bias`, which has a gradient, are a number for each pair that the functions tell apart."""

    options: dict[str, Any]
    found: dict[str, str]


class flex_adapter:
    """Runs FlexAttention's score_mod and block_mask by `score_attention`, on every backend, with gradients.

    Recognised are causal masks, documents, sliding windows and other masks; softcap; ALiBi, relative positions and other numbers
    that are added to a score, also learned ones; and a softcap followed by any of these. `recognize` shows what was found.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
        >>> attention = va.nn.flex_adapter(lambda score, b, h, i, j: 20 * torch.tanh(score / 20), lambda b, h, i, j: i >= j)
        >>> attention(query, key, value).shape
        torch.Size([1, 2, 6, 8])
        >>> attention.recognize(query, key).found
        {'score_mod': 'softcap 20', 'mask': 'causal'}

    Args:
        score_mod: score_mod(score, b, h, q_idx, kv_idx), as for FlexAttention, of torch functions. Default: none.
        block_mask: a BlockMask, or its mask_mod(b, h, q_idx, kv_idx). Default: none.

    Raises:
        TypeError: if an argument is no function, or a function does not work on tensors of places.
        ValueError: at a call, if a function does something else to scores; the message says what it returns for a few.

    Reference: https://pytorch.org/blog/flexattention
    """

    def __init__(self, score_mod: Mod | None = None, block_mask: Any = None) -> None:
        mask_mod = getattr(block_mask, "mask_mod", block_mask)
        for name, mod in (("score_mod", score_mod), ("block_mask", mask_mod)):
            if mod is not None and not callable(mod):
                raise TypeError(f"{name} must be a function of places, or None; got {describe(mod)}")
        self.score_mod, self.mask_mod = score_mod, mask_mod

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        backend: str = "auto",
    ) -> Any:
        """Returns the output (B, H, N, Dv), or with return_lse that and the log-sum-exp (B, H, N), of query (B, H, N, D), key and
        value; the arguments are those of `score_attention`."""
        check_attention(query, key, enable_gqa, value=value)
        call: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "return_lse": return_lse, "backend": backend}
        return score_attention(query, key, value, **self.recognize(query, key).options, **call)

    def recognize(self, query: Tensor, key: Tensor) -> FlexCall:
        """Returns what a call of these sizes has."""
        sizes = *query.shape[:3], key.shape[2]
        places = [torch.arange(n, device=query.device).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(sizes)]
        options: dict[str, Any] = {}
        found: dict[str, str] = {}
        mask, bias = None, None
        if self.mask_mod is not None:
            mask = _evaluated("block_mask", self.mask_mod, places)
            if mask.dtype != torch.bool:
                raise TypeError(f"block_mask must return bool, True = may attend; got {describe(mask)}")
        if self.score_mod is not None:
            scores = [torch.full((1, 1, 1, 1), x, dtype=compute_dtype(query), device=query.device) for x in _SCORES]
            results = [_evaluated("score_mod", self.score_mod, [x, *places]) for x in scores]
            bias, options["softcap"] = results[0], _softcap(results)
            found["score_mod"] = "" if options["softcap"] is None else f"softcap {options['softcap']:g}"
            if not bool(torch.where(bias.isneginf(), 0.0, bias.detach()).any()) and not bias.requires_grad:
                mask, bias = joined(mask, ~bias.isneginf()), None  # it adds nothing, but may hide pairs
            else:
                found["score_mod"] += f"{' and ' if found['score_mod'] else ''}numbers for {_dependence(bias)}"
        if mask is not None:
            of_mask, found["mask"] = _of_mask(mask, *sizes[2:])
            options |= of_mask
        if bias is not None and bias.requires_grad:
            whole = bias.broadcast_to(*bias.shape[:1], *sizes[1:])
            options |= {"group_bias": whole[0] if len(whole) == 1 else whole}
            options |= {"query_groups": places[2].flatten(), "key_groups": places[3].flatten()}
        elif bias is not None:
            options["attn_mask"] = joined(options.get("attn_mask"), bias)
        return FlexCall(options, {name: text or "nothing" for name, text in found.items()})


def _evaluated(name: str, mod: Mod, places: list[Tensor]) -> Tensor:
    """The function's results for all places, with a size of 1 where a dimension changes nothing."""
    try:
        result = mod(*places)
    except Exception as error:
        raise TypeError(f"{name} must work on tensors of places that broadcast; got {type(error).__name__}: {error}") from error
    if not isinstance(result, Tensor) or result.dim() > 4:
        raise TypeError(f"{name} must return a tensor; got {describe(result)}")
    return result[(None,) * (4 - result.dim())]


def _of_mask(mask: Tensor, n: int, m: int) -> tuple[dict[str, Any], str]:
    if bool(mask.all()):
        return {}, "nothing"
    causal = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril()
    if bool((mask == causal).all()):
        return {"is_causal": True}, "causal"
    if mask.shape[1:] == (1, n, n):
        ids = _documents(mask[:, 0])
        given = ids[0] if len(ids) == 1 else ids
        alike = ids[:, None, :, None] == ids[:, None, None, :]
        if bool((mask == alike).all()):
            return {"document_ids": given}, "documents"
        if bool((mask == (alike & causal)).all()):
            return {"document_ids": given, "is_causal": True}, "documents, causal"
    return {"attn_mask": mask}, f"a mask for {_dependence(mask)}"


def _documents(mask: Tensor) -> Tensor:
    """Numbers (B, N) that rise where a token does not attend to the one before, if the mask is one of documents."""
    linked = mask.diagonal(-1, 1, 2)
    return torch.cat([torch.zeros_like(linked[:, :1], dtype=torch.int64), (~linked).long().cumsum(1)], 1)


def _softcap(results: list[Tensor]) -> float | None:
    """The softcap of a function that returns these for `_SCORES`; None if it only adds numbers."""
    first, *others = (x.detach() for x in results)
    visible = ~first.isneginf()
    changes = [(x - first)[visible.expand(x.shape)] if x.shape == first.shape else x[:0] for x in others]
    scores = [first.new_tensor(x) for x in _SCORES[1:]]

    def are_all(numbers: list[Tensor], rounding: float) -> bool:
        pairs = zip(changes, numbers, strict=True)
        return all(torch.allclose(x, number.expand(x.shape), rounding, rounding) for x, number in pairs)

    if all(torch.equal(x.isneginf(), ~visible) for x in others):
        if are_all(scores, 1e-4):
            return None
        cap = changes[-1].flatten()[0] if changes[-1].numel() else first.new_tensor(1.0)
        capped = [cap * torch.tanh(score / cap) for score in scores]
        if cap > 0 and all(
            torch.allclose(x, score.expand(x.shape), 1e-3, 1e-3) for x, score in zip(changes, capped, strict=True)
        ):
            return float(cap)
    pairs = ", ".join(f"{score:g} -> {float(x.flatten()[-1]):.4g}" for score, x in zip(_SCORES, (first, *others), strict=True))
    raise ValueError(
        "score_mod must return the score plus numbers, or softcap * tanh(score / softcap) plus numbers; the last pair's scores "
        f"become {pairs}. Use FlexAttention, or a score of vlattn_fast.scores"
    )


def _dependence(x: Tensor) -> str:
    """What the numbers depend on: "head, query, key"."""
    names = [name for name, size in zip(("sample", "head", "query", "key"), x.shape, strict=True) if size != 1]
    return "each " + ", ".join(names) if names else "all pairs"
