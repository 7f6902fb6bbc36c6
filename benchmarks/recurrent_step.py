"""The product r Abar through a linear recurrence: a gated delta rule, and a scalar decay; with its gradients or without.

Bound: plain SDPA, causal, of as many tokens and features. Unit impulses: the recurrence token by token on the identity, which
stores the map of each head.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._bounds import pairs, passes, sdpa, standard
from vlattn_fast.benchmarks._formula import whole
from vlattn_fast.benchmarks._measure import QKV, Benchmark, Problem, Tensors, Variant, in_bfloat16, operator_problem, randoms
from vlattn_fast.benchmarks._workloads import DELTA_RULE, SCALAR_DECAY, Sizes, Workload

STEP = "step"


def inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Decays that remember hundreds of tokens, and the last token's row."""
    tensors = standard(sizes, randoms(device, dtype))
    tensors["rows"] = tensors.pop("query") / sizes["D"] ** 0.5
    tensors["key"] = F.normalize(tensors["key"], dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    gates = randoms(device, wide)
    b, h, n = sizes["B"], sizes["H"], sizes["N"]
    tensors["log_decay"] = -torch.sigmoid(gates(b, h, n)) / 50
    if sizes.get("delta", 1):
        tensors["beta"] = torch.sigmoid(gates(b, h, n))
    tensors["relevancy"] = torch.rand(b, 1, n, device=device, dtype=wide)
    return tensors


def impulses(t: Tensors) -> Tensor:
    """r Abar with the map A (B, H, N, N) that the recurrence makes of unit impulses."""
    query, key, decay, beta = t["rows"], t["key"], t["log_decay"].exp(), t.get("beta")
    wide = decay.dtype
    length = query.shape[2]
    one = torch.eye(length, device=query.device, dtype=wide)
    state = torch.zeros(*key.shape[:2], key.shape[3], length, device=query.device, dtype=wide)
    rows = []
    for n in range(length):
        k = key[:, :, n, :, None].to(wide)
        state = state * decay[:, :, n, None, None]
        written = one[n] if beta is None else beta[:, :, n, None, None] * (one[n] - k.mT @ state)
        state = state + k * written
        rows.append(query[:, :, n, None].to(wide) @ state)
    whole = torch.cat(rows, 2)
    return t["relevancy"] @ (whole * (t["grad_output"] @ t["value"].mT).to(wide)).clamp(min=0).mean(1)


def build(what: str, delta: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = inputs({**sizes, "delta": delta}, device, dtype)
    names = [name for name in tensors if name != "rows"]

    def arguments(t: Tensors) -> Tensors:
        return {"query": t["rows"], **{name: t[name] for name in names}}

    both = what != STEP
    bound_tensors = {"query": tensors["rows"], **{name: tensors[name] for name in ("key", "value", "grad_output")}}
    tensors |= {"cotangent": torch.rand_like(tensors["relevancy"])} if both else {}
    finish, plain = _measure.finished(both, [*names, "rows"], ("cotangent",)), _measure.finished(both, QKV, ("grad_output",))
    bound, floor = plain(partial(sdpa, is_causal=True)), passes(sizes, dtype, (2.0, 4.0, 0.0), (6.0, 8.0, 0.0))[: 1 + both]
    baselines = {} if both else {"unit impulses": Variant(_measure.forward(impulses), 3)}
    problem = operator_problem(
        "recurrent_step", arguments, tensors, finish, 6 if both else 3,
        lambda _: bound(bound_tensors), whole, pairs(sizes), floor, baselines=baselines,
    )  # fmt: skip
    # A loop over thousands of tokens is no graph.
    return problem._replace(variants={name: one for name, one in problem.variants.items() if not one.compiled})


def _declared(what: str, workload: Workload, delta: bool) -> Benchmark:
    return Benchmark(__name__, what, workload, partial(build, what, delta))


STEPS = [_declared(STEP, DELTA_RULE, True), _declared(STEP, SCALAR_DECAY, False)]
BENCHMARKS = [*STEPS, _declared("step, forward+backward", DELTA_RULE, True), *in_bfloat16(STEPS[0])]
