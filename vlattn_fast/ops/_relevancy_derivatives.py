"""The derivatives of relevancy_attention's backward pass, which is that of score_attention beside one relevancy_step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import weigh_rows
from vlattn_fast.backends.inputs import RelevancyStepBackwardInputs, named
from vlattn_fast.ops._derivatives import Named, has_any, named_inputs, of_tensors, plus, save, saved
from vlattn_fast.ops._registration import differentiable
from vlattn_fast.ops._sinks import lse_with_sink
from vlattn_fast.ops.relevancy_attention import named_attention
from vlattn_fast.ops.relevancy_step import DERIVATIVES as STEP
from vlattn_fast.ops.score_attention import DERIVATIVES as ATTENTION

_FIELDS = "query", "key", "value", "row_bias"
_OUTPUTS = "query", "key", "value", "grad_carrier", "row_bias"  # what the outputs are gradients of


def _step_of(x: Named) -> Named | None:
    """The inputs of the relevancy_step; None where Abar is zero."""
    behind = x["grad_behind_sink"]
    grad_output = x["grad_out"] if behind is None else behind
    if x["grad_carrier"] is None or (grad_output is None and x["rule"] == "gradient"):
        return None
    lse = lse_with_sink(x["lse"], x["sink"]) if _has_sink(x) else x["lse"]
    relevancy = weigh_rows(x["grad_carrier"], x["attention_weight"])
    return x | {"relevancy": relevancy, "grad_output": grad_output, "lse": lse}


def _has_sink(x: Named) -> bool:
    """Whether A has the share of the keys as a factor. Else dA has it, by the gradient of the output before the sink."""
    return x["sink"] is not None and (x["rule"] == "attention" or x["grad_behind_sink"] is not None)


def _shares(x: Named, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What the keys and the sink have of the softmax, the derivatives of its log-sum-exp `lse`."""
    shares = [torch.where(torch.isinf(lse), 0.0, torch.exp(part - lse)) for part in (x["lse"], x["sink"])]
    return shares[0], shares[1]


def _jvp(inputs: Any, tangents: Named, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = named(inputs)
    attention, u = named_attention(x), {field: tangents[field] for field in _FIELDS}
    h, h_tangent = _of_outputs(x), _of_outputs(tangents)
    changes: Named = {}
    if has_any(h):
        changes |= ATTENTION.tangents_of_gradients(attention, h, u | {"vector": None}, h_tangent)
    if x["grad_carrier"] is not None:
        changes["grad_carrier"] = _jvp_of_carrier(x, tangents, u)
    pairs = [(changes.get(name), out) for name, out in zip(_OUTPUTS, outputs, strict=True)]
    return tuple([torch.zeros_like(out) if y is None or y.shape != out.shape else y for y, out in pairs])


def _jvp_of_carrier(x: Named, tangents: Named, u: Named) -> Tensor | None:
    """The tangent of r * a + (r * b) Abar."""
    step, carrier = _step_of(x), tangents["grad_carrier"]
    direct = None if carrier is None else weigh_rows(carrier, x["residual_weight"])
    if step is None:
        return direct
    behind = x["grad_behind_sink"] is not None
    v = u | {
        "relevancy": None if carrier is None else weigh_rows(carrier, x["attention_weight"]),
        "grad_output": tangents["grad_behind_sink" if behind else "grad_out"],
        "lse": None,
    }
    if _has_sink(x):
        of_keys, of_sink = _shares(x, step["lse"])
        if has_any(u):
            _, lse = ATTENTION.tangents_of_outputs(named_attention(x), u | {"vector": None})
            v["lse"] = of_keys * lse
        if tangents["sink"] is not None:
            v["lse"] = plus(v["lse"], of_sink * tangents["sink"])
    return plus(direct, STEP.tangents_of_outputs(step, v)[0] if has_any(v) else None)


def _of_outputs(x: Named) -> Named:
    return {"grad_out": x["grad_out"], "grad_lse": x["grad_lse"]}


def _backward(ctx: Any, *cotangents: Tensor | None) -> Named:
    x = saved(ctx)
    attention, h = named_attention(x), _of_outputs(x)
    c = {
        name: y if y is not None and x[name] is not None and y.shape == x[name].shape else None
        for name, y in zip(_OUTPUTS, cotangents, strict=True)
    }
    u = {field: c[field] for field in _FIELDS}
    gradients: Named = {}
    if has_any(u) and has_any(h):
        rows, gradients = ATTENTION.second_gradients(attention, h, u | {"vector": None}, with_jvp=True)
        gradients |= {grad: y for grad, y in zip(h, rows, strict=True) if h[grad] is not None}
    if c["grad_carrier"] is not None:
        for name, y in _backward_of_carrier(x, attention, c["grad_carrier"]).items():
            gradients[name] = plus(gradients.get(name), y)
    return of_tensors(gradients, x)


def _backward_of_carrier(x: Named, attention: Named, cotangent: Tensor) -> Named:
    """The gradients of the product of `cotangent` with r * a + (r * b) Abar."""
    step = _step_of(x)
    grads: Named = {"grad_carrier": weigh_rows(cotangent, x["residual_weight"])}
    if step is None:
        return grads
    has_sink = _has_sink(x)
    inputs = named_inputs(RelevancyStepBackwardInputs, step | {"grad": cotangent, "need_lse": has_sink})
    by_step = dict(zip(STEP.fields, STEP.backward(inputs), strict=True))
    grads["grad_carrier"] = grads["grad_carrier"] + weigh_rows(by_step["relevancy"], x["attention_weight"])
    if x["rule"] == "gradient":
        grads["grad_out" if x["grad_behind_sink"] is None else "grad_behind_sink"] = by_step["grad_output"]
    grads |= {name: by_step[name] for name in _FIELDS if x[name] is not None and (name != "value" or x["rule"] == "gradient")}
    if has_sink:
        of_keys, of_sink = _shares(x, step["lse"])
        grads["sink"] = (of_sink * by_step["lse"]).sum_to_size(x["sink"].shape)
        through = ATTENTION.gradients(attention, {"grad_out": None, "grad_lse": of_keys * by_step["lse"]})
        grads |= {field: plus(grads.get(field), through[field]) for field in _FIELDS}
    return grads


differentiable("relevancy_attention_backward", _backward, save, _jvp)
