"""The losses as the authors' code computes them (KhoomeiK/CACR and lancopku/IAIS), as a yardstick and not for use.

Four blocks are computed for the whole batch; then a Python loop over the samples cuts off the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def published_loss(t: Mapping[str, Tensor], kind: str, direction: str = "both") -> Tensor:
    """(B) losses; the masks give the length by which a sample is cut out.

    t: text_query, text_key (B, H, L, D), image_query, image_key (B, H, V, D), text_mask (B, L), image_mask (B, V).
    """
    text, image = t["text_mask"], t["image_mask"]
    ll, vv = _block(t["text_query"], t["text_key"], text, text), _block(t["image_query"], t["image_key"], image, image)
    lv, vl = _block(t["text_query"], t["image_key"], text, image), _block(t["image_query"], t["text_key"], image, text)
    losses = []
    for i in range(len(ll)):
        n, m = int(text[i].sum().item()), int(image[i].sum().item())
        within, cross = (ll[i, :n, :n], vv[i, :m, :m]), (lv[i, :n, :m], vl[i, :m, :n])
        parts = []
        if direction != "image":
            parts.append(_direction(kind, *within, *cross))
        if direction != "text":
            parts.append(_direction(kind, *within[::-1], *cross[::-1]))
        losses.append(sum(parts[1:], parts[0]))
    return torch.stack(losses)


def uneven_masks(text: int, image: int, batch: int) -> dict[str, Tensor]:
    """Masks (B, L) and (B, V) of uneven captions and pictures, as in a real batch: from a quarter of the length to all of it."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, longest in (("text_mask", text), ("image_mask", image)):
        lengths = torch.randint(max(longest // 4, 1), longest + 1, (batch, 1), generator=generator)
        masks[name] = torch.arange(longest) < lengths
    return masks


def _block(query: Tensor, key: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    real = (queries[:, None, :, None] & keys[:, None, None, :]).to(query.dtype)
    scores = query @ key.mT * query.shape[-1] ** -0.5 + (1.0 - real) * -10000.0
    return (torch.softmax(scores, dim=-1) * real).mean(dim=1)


def _direction(kind: str, within: Tensor, opposite: Tensor, cross: Tensor, back: Tensor) -> Tensor:
    if kind == "cacr":
        change = cross.detach()
        return _symmetric(torch.softmax(within, dim=-1), torch.softmax(change @ opposite @ change.mT, dim=-1), 0.0)
    if kind == "iais_singular":
        index = cross.argmax(dim=-1)
        return _symmetric(within, torch.softmax(opposite[index][:, index], dim=-1), 0.0)
    return _symmetric(within, cross @ back, 1e-6)


def _symmetric(p: Tensor, t: Tensor, epsilon: float) -> Tensor:
    divergence = partial(F.kl_div, reduction="batchmean")
    return divergence((p + epsilon).log(), t) + divergence((t + epsilon).log(), p)
