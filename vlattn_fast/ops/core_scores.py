"""attention_map and relevancy_step of score_attention: for any core score of vlattn_fast.scores. The operators take only
dot products.

They run in plain PyTorch, tile by tile (backends/streaming/), without checks and without gradients. Their callers are layers and
methods that traced an attention call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vlattn_fast._ground.tensors import product, without_autocast
from vlattn_fast.backends.inputs import AttentionMapInputs, RelevancyStepInputs, ScoreAttentionInputs
from vlattn_fast.backends.streaming import attention_map, relevancy_attention, score_attention
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.ops._groups import group_bias_inputs
from vlattn_fast.ops._sinks import lse_with_sink
from vlattn_fast.scores import Core


def core_logits(core: Core, scale: float) -> Tensor:
    """Returns the scores (B, H, N, M) before the masks. They have a gradient if the core score is "dot"."""
    if core.kind == "dot":
        return product(core.query, core.key.mT) * scale
    vector = None if core.vector is None else core.vector.to(core.query.dtype)
    return score_tile(core.kind, core.query, core.key, vector, core.parameter) * scale


def core_map(
    core: Core,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    rule: str,
    sink: Tensor | None = None,
    **masks: Any,
) -> Tensor:
    """Returns Abar (B, N, M), the mean over the heads; see `attention_map`. masks: attn_mask, key_mask, is_causal and scale, and
    groups and their bias if the call had them. sink: that of ScoreAttentionInputs."""
    options: dict[str, Any] = {"rule": rule, "head_reduction": "mean", "row_normalize": False, **_options(core, masks)}
    with without_autocast(core.query):
        lse = None if sink is None else lse_with_sink(core_lse(core, **masks), sink)
        return attention_map.forward(AttentionMapInputs(core.query, core.key, value, grad_output, lse, **options), core.vector)


def core_step(
    relevancy: Tensor,
    core: Core,
    value: Tensor | None,
    grad_output: Tensor | None,
    *,
    rule: str,
    row_normalize: bool,
    sink: Tensor | None = None,
    **masks: Any,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M); see `relevancy_step`. masks: as in `core_map`."""
    options: dict[str, Any] = {"rule": rule, "row_normalize": row_normalize, **_options(core, masks)}
    with without_autocast(core.query):
        lse = None if sink is None else lse_with_sink(core_lse(core, **masks), sink)
        inputs = RelevancyStepInputs(relevancy, core.query, core.key, value, grad_output, lse, **options)
        return relevancy_attention.step(inputs, core.vector)


class _Grouped(NamedTuple):
    query: Tensor
    query_groups: Tensor | None
    key_groups: Tensor | None
    group_bias: Tensor | None


def _options(core: Core, masks: dict[str, Any]) -> dict[str, Any]:
    """The score and the masks of a call as backends take them."""
    groups = [masks.get(name) for name in _Grouped._fields[1:]]
    row_bias, key_groups = group_bias_inputs(_Grouped(core.query, *groups))
    without_groups = {name: x for name, x in masks.items() if name not in _Grouped._fields}
    score = {"score": core.kind, "parameter": core.parameter, "backend": "streaming"}
    return {**score, **without_groups, "row_bias": row_bias, "key_groups": key_groups}


def core_lse(core: Core, **masks: Any) -> Tensor:
    """The log-sum-exp (B, H, N) without a sink. masks: as in `core_map`."""
    options = {"dropout_p": 0.0, **_options(core, masks)}
    inputs = ScoreAttentionInputs(core.query, core.key, core.key[..., :1], core.vector, seed=None, sink=None, **options)
    _, lse = score_attention.forward(inputs)
    return lse
