"""attention_map and relevancy_step of score_attention: for any core score of vlattn_fast.scores. The operators take only
dot products.

They run without checks and without gradients, by the kernels that take the core score; PyTorch, tile by tile, takes all of them
(backends/streaming/). Their callers are layers and methods that traced an attention call.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import is_transformed
from vlattn_fast._ground.score_kinds import kind_of
from vlattn_fast._ground.tensors import mask_padding, product, without_autocast
from vlattn_fast.backends.cuda import score_attention as hidden_units
from vlattn_fast.backends.inputs import Attention, AttentionMapInputs, RelevancyStepInputs, ScoreAttentionInputs
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.dispatch import choice
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import load
from vlattn_fast.dispatch.table import Table, table
from vlattn_fast.ops import _score_attention_backends, attention_map, relevancy_attention
from vlattn_fast.ops._groups import group_bias_inputs
from vlattn_fast.ops._sinks import lse_with_sink
from vlattn_fast.scores import Core


def _limits(call: CallShape, kernels: str) -> list[tuple[str, bool]]:
    return [
        ("the kernels do not have this kind of score", kernels not in kind_of(call.flags["score"]).kernels),
        ("no operator of torch stands for the kernels of a core score: nothing traces or transforms them", call.flags["traced"]),
    ]


def _cuda_limits(call: CallShape) -> list[tuple[str, bool]]:
    sizes, most = max(call.sizes["head_dim"], call.sizes["value_dim"]), hidden_units.MOST_SIZE
    words = f"the CUDA C++ kernel takes at most {most} hidden units and values of at most {most}"
    return [*_limits(call, "cuda"), (words, sizes > most)]


def _table(of: Table, cuda: ModuleType | None) -> Table:
    streaming, cpu, triton = (of[name].module for name in ("streaming", "cpu", "triton"))
    limits = {name: partial(_limits, kernels=name) for name in ("cpu", "triton")} | {"cuda": _cuda_limits}
    return table(streaming, cpu=cpu, triton=triton, cuda=cuda, limits=limits)


STEP, _LSE = (_table(of.BACKENDS, hidden_units) for of in (relevancy_attention, _score_attention_backends))
MAP = _table(attention_map.BACKENDS, None)


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
    lse: Tensor | None = None,
    backend: str = "auto",
    **masks: Any,
) -> Tensor:
    """Returns Abar (B, N, M), the mean over the heads; see `attention_map`. masks: attn_mask, key_mask, is_causal and scale, and
    groups and their bias if the call had them. sink: that of ScoreAttentionInputs. lse: that of the attention without its sink,
    if it is known."""
    with without_autocast(core.query):
        lse = _lse_for(core, sink, lse, backend, masks)
        inputs = AttentionMapInputs(_attention(core, masks), value, grad_output, lse, rule, "mean", False, "auto")
        return _run(MAP, "forward", inputs, backend)


def core_step(
    relevancy: Tensor,
    core: Core,
    value: Tensor | None,
    grad_output: Tensor | None,
    *,
    rule: str,
    row_normalize: bool,
    sink: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    **masks: Any,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M); see `relevancy_step`. sink, lse and masks: as in `core_map`."""
    with without_autocast(core.query):
        lse = _lse_for(core, sink, lse, backend, masks)
        inputs = RelevancyStepInputs(relevancy, _attention(core, masks), value, grad_output, lse, rule, row_normalize, "auto")
        return _run(STEP, "step", inputs, backend)


def _lse_for(core: Core, sink: Tensor | None, lse: Tensor | None, backend: str, masks: dict[str, Any]) -> Tensor | None:
    """The log-sum-exp that probabilities are made with, with the sink; None if the map computes its own.

    The attention's own saves a pass over the scores. In float32, and next to what is added to the scores, its rounding shows: as
    in the backward pass of relevancy_attention it is computed anew there.
    """
    mask = masks["attn_mask"]
    added = (mask is not None and mask.dtype != torch.bool) or masks.get("group_bias") is not None
    if lse is not None and (added or core.query.dtype.itemsize > 2):
        lse = None
    if sink is None:
        return lse
    return lse_with_sink(core_lse(core, backend=backend, **masks) if lse is None else lse, sink)


def core_lse(core: Core, *, backend: str = "auto", **masks: Any) -> Tensor:
    """The log-sum-exp (B, H, N) without a sink. masks: as in `core_map`."""
    attention = _attention(core, masks)
    inputs = ScoreAttentionInputs(attention, core.key[..., :1], seed=None, sink=None, dropout_p=0.0, backend="auto")
    _, lse = _run(_LSE, "forward", inputs, backend)
    return lse


def _attention(core: Core, masks: dict[str, Any]) -> Attention:
    bias = group_bias_inputs(core.query, *[masks.get(name) for name in ("query_groups", "key_groups", "group_bias")])
    tensors = core.query, core.key, core.vector, masks["attn_mask"], masks["key_mask"], *bias
    return Attention(*tensors, core.kind, core.parameter, masks["scale"], masks["is_causal"])


def _run(backends: Table, function: str, inputs: Any, backend: str) -> Any:
    """Runs the function of the backend with these inputs."""
    x, value = inputs.attention, inputs.value
    (_, _, queries, features), keys = x.query.shape, x.key.shape[2]
    sizes = {"queries": queries, "keys": keys, "head_dim": features}
    sizes["value_dim"] = 0 if value is None else value.shape[3]
    flags = {"score": x.score, "traced": is_transformed() or torch.compiler.is_compiling()}
    flags["group_bias"] = x.row_bias is not None
    name = choice.select(backends, call_shape(f"{function} of a core score", x.query, sizes, flags), backend)
    name = "streaming" if name == "reference" else name  # formulas take scores, and not their features
    if not backends[name].masks_padding:
        key, value = mask_padding(x.key_mask, x.key, value)
        inputs = inputs._replace(attention=x._replace(key=key), value=value)
    return getattr(load(backends, name), function)(inputs._replace(backend=name))
