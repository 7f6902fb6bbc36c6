"""The rules for two towers that attend to one another, on stored maps and with whole matrices.

Chefer, Gur, Wolf (ICCV 2021), equations 5 to 11, and the baselines as their ExplanationGenerator runs them.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.releases import OLDER

Maps = Sequence[tuple[str, Tensor, Tensor | None]]  # "tt", "ti", "it" or "ii", a map (B, H, N, M) and its gradient, as they ran
METHODS = ("gradient", "rollout", "attention", "gradcam")
ABLATIONS = ("gradient:no_aggregation", "gradient:no_normalization", "gradient:no_self_attention")


def published(
    method: str, maps: Maps, rows: Sequence[int], real_t: Tensor | None = None, real_i: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows `rows` (one per sample) of R_tt, their own entries zero, and of R_ti.

    Args:
        real_t, real_i: bool (B, N) and (B, M), False = padding, which Grad-CAM leaves out of its means and rollout of its sum.
    """
    maps = [(kind, a.detach(), torch.zeros_like(a) if g is None else g.detach()) for kind, a, g in maps]
    if method.startswith("gradient"):
        tt, ti = gradient(maps, method.partition(":")[2])
    elif method == "rollout":
        tt, ti = rollout(maps, real_t)
    elif method == "rollout:one_hot":
        tt, ti = rollout(maps, None, one_hot=True)
    else:
        tt, ti = (last(method, maps, kind, real_t, real_i) for kind in ("tt", "ti"))
    batch = torch.arange(len(rows))
    tt, ti = tt[batch, list(rows)].clone(), ti[batch, list(rows)]
    tt[batch, list(rows)] = 0
    return tt, ti


def encoder_decoder_maps(outputs: Any, score: Tensor) -> Maps:
    """Those of an encoder-decoder: each layer of the decoder attends to itself, then to the encoder."""
    decoder = [pair for layer in zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True) for pair in layer]
    maps = [*outputs.encoder_attentions, *decoder]
    kinds = ["ii"] * len(outputs.encoder_attentions) + ["tt", "ti"] * len(outputs.decoder_attentions)
    return with_gradients(kinds, maps, score)


def with_gradients(kinds: Sequence[str], maps: Sequence[Tensor], score: Tensor) -> Maps:
    """The maps of these kinds with the gradients of one score; others may follow from the same graph."""
    if OLDER and not maps:
        pytest.skip("this transformers returns no maps of the model")
    return list(zip(kinds, maps, torch.autograd.grad(score, maps, retain_graph=True, allow_unused=True), strict=True))


def eye(maps: Maps, kind: str) -> Tensor:
    """The identity of a tower, "t" or "i"."""
    sizes = {name: a.shape[-1 - (axis == 0)] for pair, a, _ in maps for axis, name in enumerate(pair)}
    return torch.eye(sizes[kind], dtype=maps[0][1].dtype).expand(len(maps[0][1]), -1, -1)


def bar(relevancy: Tensor) -> Tensor:
    """Equations 8 and 9; a zero row stays zero."""
    identity = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype)
    beside = relevancy - identity
    total = beside.sum(-1, keepdim=True)
    return torch.where(total == 0, beside, beside / total) + identity


def gradient(maps: Maps, ablation: str = "", shares: Sequence[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Tensor]:
    """Both directions of one cross-attention layer, "ti" and then "it", read the state in front of it.

    Without aggregation the published run goes without normalization, too (lxmert/lxmert/perturbation.py, DETR/mask_generator.py).
    With `shares`, a and b (B, N, 1) of each map, the rows of its step sum to one, and an addition gets weights.
    """
    norm = bar if ablation in ("", "no_self_attention") and shares is None else lambda relevancy: relevancy

    def put(old: Tensor, addition: Tensor, behind: int = 0) -> Tensor:
        if shares is not None:
            a, b = shares[number - behind]
            return a * old + b * addition if addition.any() else old
        return addition if ablation == "no_aggregation" else old + addition

    def ten(ss: Tensor, step: Tensor, qq: Tensor) -> Tensor:
        return step if ablation == "no_self_attention" else norm(ss).transpose(1, 2) @ step @ norm(qq)

    tt, ii = eye(maps, "t"), eye(maps, "i")
    ti, it = tt.new_zeros(len(tt), tt.shape[1], ii.shape[1]), tt.new_zeros(len(tt), ii.shape[1], tt.shape[1])
    kinds = [kind for kind, *_ in maps]
    both = None
    for number, (kind, a, g) in enumerate(maps):
        step = (a * g).clamp(min=0).mean(1)
        step = step if shares is None else torch.where(step.sum(-1, keepdim=True) > 0, step / step.sum(-1, keepdim=True), 0.0)
        if kind == "tt":
            tt, ti = put(tt, step @ tt), put(ti, step @ ti)
        elif kind == "ii":
            ii, it = put(ii, step @ ii), put(it, step @ it)
        elif kind == "ti" and kinds[number + 1 : number + 2] == ["it"]:
            both = step
        elif kind == "ti" and "it" in kinds:
            ti, tt = put(ti, ten(tt, step, ii)), put(tt, step @ it)
        elif kind == "ti":  # the other side does not see this one, and rule 11 plays no part
            ti = put(ti, ten(tt, step, ii))
        else:
            assert both is not None, "image to text comes behind text to image"
            add_ti, add_tt = ten(tt, both, ii), both @ it
            add_it, add_ii = ten(ii, step, tt), step @ ti
            tt, ti, it, ii = put(tt, add_tt, 1), put(ti, add_ti, 1), put(it, add_it), put(ii, add_ii)
    return tt, ti


def rollout(maps: Maps, real_t: Tensor | None, one_hot: bool = False) -> tuple[Tensor, Tensor]:
    """With `one_hot` a row of the cross-attention stands for itself."""

    def product(kind: str, count: int) -> Tensor:
        identity = eye(maps, kind[0])
        result = identity
        for one, a, _ in maps[:count]:
            if one == kind:
                mixed = a.mean(1) + identity
                result = mixed / mixed.sum(-1, keepdim=True) @ result
        return result

    cross = max(number for number, (kind, *_) in enumerate(maps) if kind == "ti")
    between = maps[cross][1].mean(1)
    if real_t is not None:
        between = between * real_t[:, :, None]
    through = between @ product("ii", cross)
    return product("tt", len(maps)), through if one_hot else product("tt", cross).transpose(1, 2) @ through


def last(method: str, maps: Maps, kind: str, real_t: Tensor | None, real_i: Tensor | None) -> Tensor:
    """The last map of a kind: raw, or Grad-CAM's."""
    _, a, g = next(one for one in reversed(maps) if one[0] == kind)
    if method == "attention":
        return a.mean(1)
    assert method == "gradcam" and g is not None
    result = torch.zeros_like(a[:, 0])
    for b in range(len(a)):
        masks = {"t": real_t, "i": real_i}
        queries, keys = (torch.ones(size, dtype=torch.bool) if (m := masks[name]) is None else m[b].bool() for name, size in
                         zip(kind, a.shape[2:], strict=True))  # fmt: skip
        weights = g[b][:, queries][:, :, keys].mean((-2, -1), keepdim=True)
        result[b] = (weights * a[b]).mean(0).clamp(min=0)
    return result
