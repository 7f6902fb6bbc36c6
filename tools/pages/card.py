"""The table of docs/developers/kernels.md, from the tables of backends: which passes of which operator the GPU kernels have, and
their limits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlattn_fast.checking.verify import cases
from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.choice import load
from vlattn_fast.dispatch.table import Backend, Table
from vlattn_fast.ops import OPERATORS, core_scores

PASSES = {
    "forward": "forward",
    "step": "forward",
    "backward": "backward",
    "step_backward": "backward",
    "jvp": "forward mode",
    "second": "second derivatives",
}
STEPS = ("step", "step_backward")
LANGUAGES = {"triton": "Triton", "cuda": "CUDA C++"}


def card() -> str:
    """A row for each operator with GPU kernels."""
    lines = [f"| operator | {' | '.join(LANGUAGES.values())} | what the kernels do not support |", "| --- | --- | --- | --- |"]
    for name, backends, call in _tables():
        chosen = {language: backends[language] for language in LANGUAGES if language in backends}
        if chosen:
            cells = [_passes(name, chosen, language) for language in LANGUAGES]
            limits = dict.fromkeys(reason for backend in chosen.values() for reason in _limits(backend, call))
            lines.append(f"| {name} | {' | '.join([*cells, '<br>'.join(limits)])} |")
    return "\n".join(lines)


def _tables() -> Iterator[tuple[str, Table, CallShape]]:
    """The operators' names, tables and a call, and those of other scores than dot products."""
    for name, operator in OPERATORS.items():
        case = cases(operators=[name])[0]
        yield f"`{name}`", operator.backends, operator.describe(**case.arguments(case.in_dtype(torch.float32)))
    call = CallShape("step", torch.float32, "cuda", {"head_dim": 1, "value_dim": 1}, {"score": "dot", "traced": False})
    yield "`relevancy_step` of other scores", core_scores.STEP, call
    yield "`attention_map` of other scores", core_scores.MAP, call


def _passes(name: str, backends: Table, language: str) -> str:
    if language not in backends:
        return "no"
    module = load(backends, language)
    has = [function for function in PASSES if hasattr(module, function) and (function in STEPS) == ("step" in name)]
    return ", ".join(dict.fromkeys(PASSES[function] for function in has if "other scores" not in name or "back" not in function))


def _limits(backend: Backend, call: CallShape) -> list[str]:
    """All reasons of the operator's own kernels, whether or not they hold for this call."""
    return [reason for reason, _ in backend.refusals.keywords["limits"](call)]  # type: ignore[attr-defined]
