"""The operators written out a second time, with whole maps and without torch's softmax, whose derivatives torch knows.

`FORMULAS[operator]` takes the arguments of the public call and returns its floating outputs. No row is scaled by its largest
logit: these are for numbers of order 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.ops.score_formulas import pair_scores

Outputs = tuple[Tensor, ...]


def heads_as(x: Tensor, like: Tensor) -> Tensor:
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1)


def without_padding(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return x if key_mask is None else torch.where(key_mask[:, None, :, None], x, torch.zeros_like(x))


def attention(
    query: Tensor, key: Tensor, score: Any = "scaled_dot", scale: float | None = None, **o: Any
) -> tuple[Tensor, Tensor]:
    """A (B, H, N, M) and its log-sum-exp (B, H, N), 0 for a row without a key and a sink."""
    key = heads_as(without_padding(key, o.get("key_mask")), query)
    scaled = score == "scaled_dot" or getattr(score, "name", "") == "scaled_dot"
    scale = (query.shape[-1] ** -0.5 if scaled else 1.0) if scale is None else scale
    logits = scale * pair_scores(score, query, key)
    if o.get("softcap") is not None:
        logits = o["softcap"] * torch.tanh(logits / o["softcap"])
    visible = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    biases = []
    if (mask := o.get("attn_mask")) is not None:
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            biases.append(mask)
    if o.get("group_bias") is not None:
        biases.append(pair_bias(**{name: o[name] for name in ("group_bias", "query_groups", "key_groups")}))
    for bias in biases:
        visible = visible & ~torch.isneginf(bias)
        logits = logits + torch.where(torch.isneginf(bias), torch.zeros_like(bias), bias)
    if o.get("key_mask") is not None:
        visible = visible & o["key_mask"][:, None, None]
    if o.get("is_causal"):
        visible = visible & torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).tril()
    weight = torch.where(visible, torch.exp(torch.where(visible, logits, torch.zeros_like(logits))), torch.zeros_like(logits))
    total = weight.sum(-1, keepdim=True)
    if o.get("sink") is not None:
        total = total + torch.exp(o["sink"].to(total.dtype))[:, None, None]
    total = torch.where(total == 0, torch.ones_like(total), total)
    return weight / total, torch.log(total)[..., 0]


def pair_bias(group_bias: Tensor, query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """By one-hot vectors and a product, and not by an index; -inf of a group by a second product."""
    rows, columns = (
        (x[..., None] == torch.arange(n, device=x.device)).to(group_bias.dtype).reshape(-1, 1, x.shape[-1], n)
        for x, n in ((query_groups, group_bias.shape[-2]), (key_groups, group_bias.shape[-1]))
    )
    masked = torch.isneginf(group_bias)
    finite = rows @ torch.where(masked, torch.zeros_like(group_bias), group_bias) @ columns.mT
    return torch.where(rows @ masked.to(rows.dtype) @ columns.mT > 0, torch.full_like(finite, -torch.inf), finite)


def score_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    head_gate: Tensor | None = None,
    kept: Tensor | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Outputs:
    """`kept`: the factors of dropout."""
    prob, lse = attention(query, key, **options)
    out = (prob if kept is None else prob * kept) @ heads_as(without_padding(value, options.get("key_mask")), query)
    out = out if head_gate is None else out * head_gate[..., None, None]
    return (out, lse) if return_lse else (out,)


def abar_of_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    rule: str = "gradient",
    enable_gqa: bool = False,
    lse: Tensor | None = None,
    **o: Any,
) -> Tensor:
    """lse: a log-sum-exp that is a variable of its own."""
    prob, computed = attention(query, key, **o)
    prob = prob if lse is None else prob * torch.exp(computed - lse)[..., None]
    if rule == "attention":
        return prob
    return F.relu(prob * (grad_output @ heads_as(without_padding(value, o.get("key_mask")), query).mT))


def normalised(abar: Tensor, row_normalize: bool) -> Tensor:
    total = abar.sum(-1, keepdim=True)
    return abar / torch.where(total == 0, torch.ones_like(total), total) if row_normalize else abar


def attention_map(*, rule: str = "attention", row_normalize: bool = False, head_reduction: str = "mean", **x: Any) -> Outputs:
    each = abar_of_heads(rule=rule, **x)
    reduced = {"mean": each.mean(1), "max": each.amax(1), "min": each.amin(1)}[head_reduction]
    return (normalised(reduced, row_normalize),)


def relevancy_step(relevancy: Tensor, *, row_normalize: bool = False, **x: Any) -> Outputs:
    return (relevancy @ normalised(abar_of_heads(**x).mean(1), row_normalize),)


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    key_groups: Tensor | None = None,
    num_groups: int | None = None,
    row_weight: Tensor | None = None,
    enable_gqa: bool = False,
    statistics: Sequence[str] = ("mass", "entropy", "maximum", "received"),
    **o: Any,
) -> Outputs:
    prob, _ = attention(query, key, **o, key_groups=key_groups)
    num_groups = o["group_bias"].shape[-1] if o.get("group_bias") is not None else num_groups or 0
    groups = torch.full(prob.shape[-1:], -1) if key_groups is None else key_groups
    member = (groups[..., None] == torch.arange(num_groups)).to(prob.dtype)
    mass = prob @ (member if member.dim() == 2 else member[:, None])
    entropy = -torch.where(prob > 0, prob * torch.log(torch.where(prob > 0, prob, torch.ones_like(prob))), torch.zeros_like(prob))
    weight = torch.ones(prob.shape[2], dtype=prob.dtype) if row_weight is None else row_weight
    received = torch.einsum("bn,bhnm->bhm", weight.expand(prob.shape[0], -1), prob)
    diagonal = F.pad(prob.diagonal(dim1=2, dim2=3), (0, max(0, prob.shape[2] - prob.shape[3])))
    made = {"mass": mass, "entropy": entropy.sum(-1), "maximum": prob.amax(-1), "received": received, "diagonal": diagonal}
    return tuple([made[name] for name in statistics])


def token_scores(query: Tensor, key: Tensor, *, rule: str) -> Outputs:
    assert rule == "h2o"
    return (attention(query, key, is_causal=True)[0].sum(2),)


def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None) -> Outputs:
    score = torch.einsum("and,bmd->abnm", queries, documents)
    real = torch.ones(score.shape, dtype=torch.bool)
    real = real if query_mask is None else real & query_mask[:, None, :, None]
    real = real if document_mask is None else real & document_mask[None, :, None]
    best = torch.where(real, score, torch.full_like(score, -1e9)).amax(-1)
    return (torch.where(real.any(-1), best, torch.zeros_like(best)).sum(-1),)


def recurrent_step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    diagonal: Tensor | None = None,
    rule: str = "gradient",
    row_normalize: bool = False,
) -> Outputs:
    """The recurrence itself, run on the identity in place of the values: its outputs are the map."""
    batch, heads, length, dim = query.shape
    identity, state, rows = torch.eye(length, dtype=query.dtype), query.new_zeros(batch, heads, dim, length), []
    for t in range(length):
        k, v = key[:, :, t, :, None], identity[t].expand(batch, heads, 1, length)
        if log_decay is not None:
            decay = log_decay[:, :, t].exp()
            state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        state = state + (k @ v if beta is None else beta[:, :, t, None, None] * (k @ (v - k.mT @ state)))
        rows.append((query[:, :, t, None] @ state)[:, :, 0])
    whole = torch.stack(rows, 2) + (0.0 if diagonal is None else torch.diag_embed(diagonal))
    if rule == "attention":
        abar = normalised(whole.abs(), True).mean(1)
    else:
        assert value is not None and grad_output is not None
        abar = F.relu(whole * torch.tril(grad_output @ value.mT)).mean(1)
    return (relevancy @ normalised(abar, row_normalize),)


def relevancy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    *,
    rule: str = "gradient",
    row_normalize: bool = False,
    residual_weight: Any = None,
    attention_weight: Any = None,
    head_gate: Tensor | None = None,
    **o: Any,
) -> Outputs:
    return score_attention(query, key, value, **o, head_gate=head_gate)[0], carrier


def carrier_gradient(
    grad_out: Tensor,
    r: Tensor,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    row_normalize: bool = False,
    residual_weight: Any = None,
    attention_weight: Any = None,
    head_gate: Tensor | None = None,
    **o: Any,
) -> Tensor:
    """r * a + (r * b) Abar: the rule that relevancy_attention has for a backward pass."""
    a, b = (1.0 if w is None else w[:, None] if isinstance(w, Tensor) else w for w in (residual_weight, attention_weight))
    behind = grad_out if head_gate is None else grad_out * head_gate[..., None, None]
    abar = abar_of_heads(query, key, value, behind, **o).mean(1)
    return r * a + (r * b) @ normalised(abar, row_normalize)


def relevancy_residual(
    residual: Tensor, branch: Tensor, residual_carrier: Tensor, branch_carrier: Tensor, weighting: str = "contribution"
) -> Outputs:
    return residual + branch, residual_carrier


def carrier_gradients_of_residual(
    grad: Tensor,
    r: Tensor,
    residual: Tensor,
    branch: Tensor,
    residual_carrier: Tensor,
    branch_carrier: Tensor,
    weighting: str = "contribution",
) -> tuple[Tensor, Tensor]:
    """r * a and r * b: the rule, whose weights are constants."""
    shares = {
        "contribution": lambda x: (grad * x).sum(-1).abs(),
        "norm": lambda x: x.square().sum(-1).sqrt(),
        "magnitude": lambda x: (grad * x).abs().sum(-1),
    }
    a, b = map(shares[weighting], (residual, branch))
    a = torch.where(a + b == 0, 0.5, a / (a + b)).detach()
    return r * a[:, None], r * (1 - a)[:, None]


def softmax(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)


def stacked_cross_attention(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None = None,
    *,
    direction: str = "t2i",
    first_norm: str = "clipped_l2norm",
    smooth: float = 9.0,
    aggregation: str = "logsumexp",
    lambda_lse: float = 6.0,
    score: Any = "dot",
) -> Outputs:
    lengths = [captions.shape[1]] * captions.shape[0] if caption_lengths is None else caption_lengths.tolist()

    def similarity(image: Tensor, caption: Tensor) -> Tensor:
        q, c = (caption, image) if direction == "t2i" else (image, caption)
        s = pair_scores(score, q[None, None], c[None, None])[0, 0]
        if first_norm == "softmax":
            s = softmax(s.mT).mT
        else:
            clipped = torch.where(s > 0, s, 0.1 * s)
            s = clipped / (clipped.square().sum(0).sqrt() + 1e-8)
        context = softmax(smooth * s) @ c
        r = (q * context).sum(1) / (q.square().sum(1) * context.square().sum(1)).sqrt()
        # not of rank 0: there torch makes float64 of the tangent of a product with a number
        return (
            r.mean(0, keepdim=True)
            if aggregation == "mean"
            else torch.exp(lambda_lse * r).sum(0, keepdim=True).log() / lambda_lse
        )

    pairs = [
        torch.cat([similarity(image, caption[:n]) for caption, n in zip(captions, lengths, strict=True)]) for image in images
    ]
    return (torch.stack(pairs),)


def damsm_similarity(images: Tensor, captions: Tensor) -> Outputs:
    (each,) = stacked_cross_attention(images, captions, first_norm="softmax", smooth=4.0, lambda_lse=5.0)
    return (5.0 * each,)


def congruence_loss(
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    *,
    kind: str = "cacr",
    normalize: str = "softmax",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Outputs:
    """Sample by sample, without its padding."""
    losses = []
    for n in range(text[0].shape[0]):
        real = [slice(None) if mask is None else mask[n].nonzero()[:, 0] for mask in (text_mask, image_mask)]
        sides = [[x[n][:, tokens] for x in pair] for pair, tokens in zip((text, image), real, strict=True)]
        losses.append(one_direction(kind, normalize, *sides) + one_direction(kind, normalize, *sides[::-1]))
    each = torch.stack(losses)
    return (each.mean() if reduction == "mean" else each,)


def attention_divergence(
    query: Tensor,
    key: Tensor,
    other_query: Tensor,
    other_key: Tensor,
    *,
    kind: str = "kl",
    beta: float = 0.5,
    head_mean: bool = False,
    scale: float | None = None,
    other_scale: float | None = None,
    **masks: Any,
) -> Outputs:
    sides = ((query, key), scale), ((other_query, other_key), other_scale)
    p, q = (attention(*side, scale=factor, **masks)[0] for side, factor in sides)
    if head_mean:
        p, q = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
    seen = p > 0
    p, q = (torch.where(seen, x, torch.ones_like(x)) for x in (p, q))
    m = beta * p + (1 - beta) * q
    terms = {
        "kl": p * (p.log() - q.log()),
        "reverse_kl": q * (q.log() - p.log()),
        "js": beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log()),
        "hellinger": (p.sqrt() - q.sqrt()).square() / 2,
        "total_variation": (p - q).abs() / 2,
    }
    return (torch.where(seen, terms[kind], torch.zeros_like(p)).sum(-1),)


def indexer_divergence(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    *,
    topk_indices: Tensor | None = None,
    key_block: int = 1,
    scale: float | None = None,
    **masks: Any,
) -> Outputs:
    if topk_indices is not None:
        kept = (topk_indices[..., None] == torch.arange(index_key.shape[1])).any(2)[:, None]
        kept = kept.repeat_interleave(key_block, -1)[..., : key.shape[2]]
        masks["attn_mask"] = kept if masks.get("attn_mask") is None else kept & masks["attn_mask"]
    p = attention(query, key, scale=scale, **masks)[0].mean(1)
    if key_block > 1:  # no other mask then
        p = F.pad(p, (0, -p.shape[-1] % key_block)).unflatten(-1, (-1, key_block)).sum(-1)
        masks = {"attn_mask": (p > 0)[:, None]}
    index_key = without_padding(index_key[:, None], masks.get("key_mask"))
    terms = index_weights[..., None] * (index_query @ index_key.mT).relu()
    units = torch.eye(index_key.shape[2], dtype=terms.dtype).expand(len(terms), 1, -1, -1)
    q = attention(terms.sum(1, keepdim=True), units, scale=1.0, **masks)[0][:, 0]
    seen = p > 0
    p, q = (torch.where(seen, x, torch.ones_like(x)) for x in (p, q))
    return (torch.where(seen, p * (p.log() - q.log()), torch.zeros_like(p)).sum(-1),)


def one_direction(kind: str, normalize: str, own: list[Tensor], other: list[Tensor]) -> Tensor:
    def block(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return softmax(x[0] @ y[1].mT * x[0].shape[-1] ** -0.5).mean(0)

    p, across = block(own, own), block(own, other)
    if kind == "iais_distributed":
        t = across @ block(other, own)
    elif kind == "cacr":
        t = across.detach() @ block(other, other) @ across.detach().mT
    else:
        t = block(other, other)[across.argmax(-1)][:, across.argmax(-1)]
    epsilon = 1e-6 if normalize == "none" or kind == "iais_distributed" else 0.0
    if normalize == "none":
        return ((p - t) * ((p + epsilon) / (t + epsilon)).log()).sum() / p.shape[0]
    p = softmax(p) if kind == "cacr" else p
    t = t if kind == "iais_distributed" else softmax(t)
    terms = t * (t.log() - (p + epsilon).log()) + p * (p.log() - (t + epsilon).log())
    return terms.sum() / p.shape[0]


class Formulas(dict[str, Callable[..., Outputs]]):
    def __missing__(self, operator: str) -> Callable[..., Outputs]:
        raise AssertionError(
            f"operator {operator!r} has no second formula: write `def {operator}(...)` with the arguments of the public call in "
            "tests/helpers/ops/derivative_formulas.py in plain torch, without the package's code, and name it in FORMULAS there"
        )


FORMULAS = Formulas(
    (each.__name__, each)
    for each in (
        score_attention,
        relevancy_attention,
        relevancy_residual,
        relevancy_step,
        attention_map,
        attention_statistics,
        token_scores,
        maxsim,
        attention_divergence,
        indexer_divergence,
        recurrent_step,
        stacked_cross_attention,
        damsm_similarity,
        congruence_loss,
    )
)
