"""The relevancy methods: the operator settings of each, the two that read the last attention alone, and the papers' ablations.

gradient, weighted and rollout are one recursion from the last layer to the first, r <- a*r + b*(r Abar)
(Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6 for one row). They differ only in Abar, a and b. Raw attention and
Grad-CAM read the last attention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import expand_heads
from vlattn_fast.attach.tensor_parallel import mean_over
from vlattn_fast.backends.reference.relevancy_residual import Weighting
from vlattn_fast.interpret.relevancy.through_call import logits
from vlattn_fast.ops.relevancy_residual import relevancy_residual


@dataclass(frozen=True)
class Method:
    """How a method uses the layers.

    Args:
        name: the value of `explain`'s argument `method`.
        rule: Abar of a layer: "gradient" = mean_h relu(A * dA), "attention" = mean_h A.
        carries: a carrier passes through the layers; otherwise the method reads the last attention alone.
        needs_score: the method uses the gradient of a score.
        row_normalize: each row of Abar is divided by its sum.
        residual_weight, attention_weight: a and b of the recursion.
        weighted: a and b come from the residual sum behind each layer (after Huang et al. 2023, see `relevancy_residual`).
        aggregates: what a call adds is added to the relevancy; False = it takes its place ("no aggregation").
        normalizes: equations 8 and 9 are applied in rule 10.
        mixes: rule 10 multiplies by the relevancies within the two towers; False = it adds the cross-attention alone.
    """

    name: str
    rule: str
    carries: bool = True
    needs_score: bool = True
    row_normalize: bool = False
    residual_weight: float = 1.0
    attention_weight: float = 1.0
    weighted: bool = False
    aggregates: bool = True
    normalizes: bool = True
    mixes: bool = True

    @property
    def between_alone(self) -> bool:
        """Whether it differs from another method only where towers attend to one another."""
        return self.aggregates and not (self.normalizes and self.mixes)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("gradient", "gradient"),
        # The attention operator returns r Abar alone; the residual sum adds r itself.
        Method("weighted", "gradient", row_normalize=True, residual_weight=0.0, weighted=True),
        # Rollout divides A + I by its row sum, which is 2 wherever a row of A sums to one.
        Method("rollout", "attention", needs_score=False, residual_weight=0.5, attention_weight=0.5),
        Method("attention", "attention", carries=False, needs_score=False),
        Method("gradcam", "gradient", carries=False),
    )
}


def _ablations() -> dict[str, Method]:
    gradient, weighted = METHODS["gradient"], METHODS["weighted"]
    ablations = (
        # As published it goes without the normalization, too: what takes the place of the identity may have no residual.
        ("no_aggregation", replace(gradient, residual_weight=0.0, aggregates=False, normalizes=False)),
        ("no_normalization", replace(gradient, normalizes=False)),
        ("no_self_attention", replace(gradient, mixes=False)),
        ("no_normalization", replace(weighted, row_normalize=False)),
    )
    return {name: replace(method, name=name) for name, method in ((f"{m.name}:{part}", m) for part, m in ablations)}


ABLATIONS: dict[str, Method] = _ablations()


def find_method(name: str) -> Method:
    """The record of a method or an ablation; ValueError names the known ones."""
    if isinstance(name, str) and (found := METHODS.get(name) or ABLATIONS.get(name)):
        return found
    raise ValueError(f"method must be one of {', '.join([*METHODS, *ABLATIONS])}; got {name!r}")


def check_weighting(weighting: str | Weighting) -> None:
    """ValueError unless `weighting` is a known name or a callable."""
    if not callable(weighting) and not (isinstance(weighting, str) and weighting in ("contribution", "norm", "equal")):
        raise ValueError(f"weighting must be 'contribution', 'norm', 'equal' or a callable; got {weighting!r}")


def weigh(
    stream: Tensor, branch: Tensor, carrier: Tensor, branch_carrier: Tensor, weighting: str | Weighting
) -> tuple[Tensor, Tensor]:
    """`relevancy_residual` for a residual sum y = stream + branch that the model computes itself.

    A hook sees the branch, but not the sum. The gradients at both are equal, since the sum has slope one in the branch. So
    this function computes the sum on its own graph and returns branch + (sum - sum): the value of the branch, with a
    backward pass that goes through `relevancy_residual`. The carrier takes the same node of the graph, so autograd runs the
    attention's backward pass only after the weights a and b are known.

    Args:
        stream, branch: the two terms (B, N, C); `stream` is detached.
        carrier, branch_carrier: (B, T, N), around the attention and through it.

    Returns:
        The branch (B, N, C) with unchanged values, and the carrier (B, T, N) behind the sum.
    """
    total, carrier = relevancy_residual(stream, branch, carrier, branch_carrier, weighting=weighting)
    return branch.detach() + (total - total.detach()).to(branch.dtype), carrier


@dataclass(frozen=True)
class Attended:
    """One attention call that is read later: query, key, value (B, H, N, D) as the operators take them, and its output.

    `mesh`: the processes that share its heads; None = all heads are here.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    masks: dict[str, Any]
    output: Tensor
    mesh: Any = None


def raw_attention(rows: Tensor, call: Attended) -> Tensor:
    """rows @ mean_h A of one attention call: (B, 1, N) -> (B, 1, M). Only rows with a weight are computed."""
    key = expand_heads(call.key.to(rows.dtype), call.query.shape[1])
    return _read(rows, call.query.to(rows.dtype), key, call.masks, lambda attention: mean_over(call.mesh, attention.mean(1)))


def gradcam(rows: Tensor, call: Attended, grad_output: Tensor, real_queries: Tensor | None, real_keys: Tensor | None) -> Tensor:
    """rows @ relu(mean_h w_h A_h) with w_h = mean_ij G_h, Grad-CAM on attention as the baseline of Chefer et al. has it.

    mean_ij G_h = (sum_i dO_i).(sum_j v_j) / (N M) needs no map. Only rows of A with a weight are computed.

    Args:
        rows: (B, 1, N), the weight of each row.
        grad_output: (B, H, N, D), the gradient of the score at the attention's output.
        real_queries, real_keys: bool (B, N) and (B, M), False = padding, which the mean leaves out; None = no padding. The
            mean includes pairs that a causal mask masks, as in the published code.

    Returns:
        (B, 1, M).
    """
    query, key, value = call.query, call.key, call.value
    dtype = rows.dtype
    query, grad_output = query.to(dtype), grad_output.to(dtype)
    key, value = (expand_heads(tensor.to(dtype), query.shape[1]) for tensor in (key, value))
    queries = torch.ones_like(rows[:, 0]) if real_queries is None else real_queries.to(dtype)
    keys = key.new_ones(key.shape[0], key.shape[2]) if real_keys is None else real_keys.to(dtype)
    gradient_sum = torch.einsum("bhnd,bn->bhd", grad_output, queries)
    value_sum = torch.einsum("bhmd,bm->bhd", value, keys)
    pairs = (queries.sum(-1) * keys.sum(-1)).clamp(min=1)
    weights = (gradient_sum * value_sum).sum(-1) / pairs[:, None]

    def combine(attention: Tensor) -> Tensor:
        mean = torch.einsum("bh,bhnm->bnm", weights, attention).div(query.shape[1])
        return mean_over(call.mesh, mean).relu()

    return _read(rows, query, key, call.masks, combine)


def _read(rows: Tensor, query: Tensor, key: Tensor, masks: dict[str, Any], combine: Callable[[Tensor], Tensor]) -> Tensor:
    """rows (B, 1, N) @ combine(A), where combine takes some rows of A (B, H, R, M) to (B, R, M)."""
    result = torch.zeros(rows.shape[0], 1, key.shape[2], dtype=rows.dtype, device=rows.device)
    for index in _rows_to_read(rows):
        result += rows.gather(2, index.unsqueeze(1)) @ combine(_attention_rows(query, key, index, masks))
    return result


def _rows_to_read(rows: Tensor, chunk: int = 128) -> list[Tensor]:
    """Query indices (B, R) covering every non-zero entry of rows (B, 1, N): one row where each sample has one, else chunks."""
    batch, _, count = rows.shape
    if count == 0 or batch == 0:
        return []
    if bool(((rows != 0).sum(-1) <= 1).all()):
        return [rows.abs().argmax(-1)]
    return [part.expand(batch, -1) for part in torch.arange(count, device=rows.device).split(chunk)]


def _attention_rows(query: Tensor, key: Tensor, index: Tensor, masks: dict[str, Any]) -> Tensor:
    """Rows `index` (B, R) of the attention probabilities: (B, H, R, M); fully masked rows are zero."""
    batch, heads, _, dim = query.shape
    count = key.shape[2]
    scores = logits(query.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim)), key, masks)
    mask = masks["attn_mask"]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]  # torch takes (N, M) and (H, N, M) as well
        mask = mask.expand(batch, mask.shape[1], query.shape[2], count)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, count))
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if masks.get("key_mask") is not None:
        scores = scores.masked_fill(~masks["key_mask"][:, None, None], -torch.inf)
    if masks["is_causal"]:
        later = torch.arange(count, device=key.device) > index[:, None, :, None]
        scores = scores.masked_fill(later, -torch.inf)
    fully_masked = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(fully_masked, 0.0)
