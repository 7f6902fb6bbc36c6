"""One attention call: its output, rows of its map, and relevancy through it.

A call is torch's scaled_dot_product_attention, with its options as `masks`. Or it is this package's score_attention, with any
score function: then `masks` also holds a `Scored`, and query and key are the features that the core score takes. Relevancy
through a dot product takes the operators; through any other core score the map is made again, one tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.attach.tensor_parallel import local, mean_over, on_mesh
from vlattn_fast.ops.attention_map import attention_map
from vlattn_fast.ops.core_scores import core_logits, core_map, core_step
from vlattn_fast.ops.relevancy_attention import relevancy_attention, relevancy_step
from vlattn_fast.scores import Core


@dataclass(frozen=True, eq=False)
class Scored:
    """A call of score_attention that ran: its core score (see vlattn_fast.scores) and its output (B, H, N, Dv)."""

    kind: str
    vector: Tensor | None
    parameter: float
    output: Tensor

    def core(self, query: Tensor, key: Tensor) -> Core:
        return Core(self.kind, query, key, self.vector, self.parameter)


def attention(query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any]) -> Tensor:
    """The output (B, H, N, Dv), as the model asked for it."""
    score: Scored | None = masks.get("score")
    return nn.functional.scaled_dot_product_attention(query, key, value, **masks) if score is None else score.output


def logits(query: Tensor, key: Tensor, masks: dict[str, Any]) -> Tensor:
    """The scores (B, H, R, M) of some queries (B, H, R, D) with all keys (B, H, M, D), in front of the masks."""
    scale = query.shape[-1] ** -0.5 if masks["scale"] is None else masks["scale"]
    score: Scored | None = masks.get("score")
    return core_logits(Core("dot", query, key) if score is None else score.core(query, key), scale)


def relevancy_through(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    masks: dict[str, Any],
    *,
    rule: str,
    row_normalize: bool,
    residual_weight: float,
    attention_weight: float,
    mesh: Any = None,
) -> tuple[Tensor, Tensor]:
    """The output and the carrier (B, T, N), whose cotangent r becomes r * a + (r * b) Abar; see `relevancy_attention`."""
    if "score" not in masks:
        (query, key, value), masks, carrier = on_mesh(mesh, (query, key, value), masks, carrier)
        output, carrier = relevancy_attention(
            query,
            key,
            value,
            carrier,
            rule=rule,
            row_normalize=row_normalize,
            residual_weight=residual_weight,
            attention_weight=attention_weight,
            **masks,
        )
        return local(output), local(carrier)
    output = attention(query, key, value, masks)
    options = rule, row_normalize, residual_weight, attention_weight, mesh
    return Through.apply(output, carrier, query, key, value, masks, *options)


def mean_map(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, masks: dict[str, Any], mesh: Any = None) -> Tensor:
    """Abar = mean_h relu(A * dA), (B, N, M)."""
    score: Scored | None = masks.get("score")
    if score is None or score.kind == "dot":
        tensors, options = on_mesh(mesh, (query, key, value, grad_output), _for_operators(masks))
        return local(attention_map(*tensors, rule="gradient", **options))
    abar = core_map(score.core(query, key), value, grad_output, rule="gradient", **_core_options(masks))
    return mean_over(mesh, abar)


def step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor | None,
    masks: dict[str, Any],
    rule: str,
    row_normalize: bool,
    mesh: Any = None,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M)."""
    score: Scored | None = masks.get("score")
    if score is None or score.kind == "dot":
        heads, options, relevancy = on_mesh(mesh, (query, key, value, grad_output), _for_operators(masks), relevancy)
        return local(relevancy_step(relevancy, *heads, rule=rule, row_normalize=row_normalize, **options))
    if mesh is not None and row_normalize:
        raise ValueError(
            f"method must be one without normalized rows where processes share heads of {score.kind} scores; got 'weighted'"
        )
    options = {"rule": rule, "row_normalize": row_normalize, **_core_options(masks)}
    return mean_over(mesh, core_step(relevancy, score.core(query, key), value, grad_output, **options))


def _for_operators(masks: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in masks.items() if name != "score"}


def _core_options(masks: dict[str, Any]) -> dict[str, Any]:
    return {name: masks[name] for name in ("attn_mask", "key_mask", "is_causal", "scale")}


class Through(torch.autograd.Function):
    """The identity on the output of an attention call that ran. Its backward pass turns the relevancy r of the queries into that
    of the keys, r * a + (r * b) Abar; a is 0 where they are different tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        carrier: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: dict[str, Any],
        rule: str,
        row_normalize: bool,
        residual_weight: float,
        attention_weight: float,
        mesh: Any = None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, masks["attn_mask"])
        ctx.masks, ctx.rule, ctx.row_normalize = masks, rule, row_normalize
        ctx.weights, ctx.mesh = (residual_weight, attention_weight), mesh
        # A copy, since the model may write into it.
        return output.clone(), carrier.new_zeros(carrier.shape[0], carrier.shape[1], query.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, relevancy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        masks, (residual_weight, attention_weight) = {**ctx.masks, "attn_mask": mask}, ctx.weights
        grad_output = grad if ctx.rule == "gradient" else None
        rows = relevancy * attention_weight
        rows = step(rows, query, key, value, grad_output, masks, ctx.rule, ctx.row_normalize, ctx.mesh)
        if residual_weight:
            rows = rows + relevancy * residual_weight
        return grad, rows, *(None,) * 9
