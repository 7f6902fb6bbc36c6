"""One model of one class with another function for its attention that must change nothing, beside eager attention.

There are three: "scaled_dot" by the name of `register_attention`, an edit of `va.intervene` that multiplies edges by
1, and "scaled_dot" of `replace_attention`. Logits of real tokens and gradients by all parameters are compared in float64, float32
and bfloat16, for prompts that are padded on either side; then the logits of tokens that the model generates, with each cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode, _push_mode

from tools.model_classes.compare import BOUND, Row, described, next_logits
from vlattn_fast import Steer, intervene
from vlattn_fast.interpret.intervening.traced_model import trace_model
from vlattn_fast.nn import register_attention, replace_attention

NAME = "by_name"
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CACHES: dict[str, dict[str, Any]] = {"no": {"use_cache": False}, "dynamic": {}, "static": {"cache_implementation": "static"}}
LOSS = 4.0  # how much larger than eager attention's an error in float32 or bfloat16 may be, besides a few roundings
NOTHING = 1.0  # the weight of an edit that changes nothing

Results = dict[str, Tensor]
Computes = Callable[[nn.Module, dict[str, Any]], Results]


class Expected(NamedTuple):
    results: Results
    allowed: float


Place = Callable[[], dict[str, Any]]
Changes = Callable[[nn.Module, dict[str, Any]], AbstractContextManager[None]]


@contextlib.contextmanager
def by_name(model: nn.Module, inputs: dict[str, Any], place: Place) -> Iterator[None]:
    """As `from_pretrained(attn_implementation=NAME)` makes the model."""
    registered = register_attention(NAME, "scaled_dot")
    for part in model.modules():
        if hasattr(config := getattr(part, "config", None), "_attn_implementation"):
            config._attn_implementation = NAME
    yield
    registered.scores(model)  # an error if it called no attention by its name


@contextlib.contextmanager
def edited(model: nn.Module, inputs: dict[str, Any], place: Place) -> Iterator[None]:
    with intervene(model, inputs, [Steer(keys=(0, 1), weight=NOTHING, **place())]):
        yield


@contextlib.contextmanager
def replaced(model: nn.Module, inputs: dict[str, Any], place: Place) -> Iterator[None]:
    with replace_attention(model, score="scaled_dot"):
        yield


WAYS = {"by name": by_name, "edited": edited, "replaced": replaced}


@contextlib.contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context within `in_double` in which models run in `dtype`."""
    if dtype == torch.float64:
        yield
        return
    mode = _pop_mode()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float64)
        _push_mode(mode)


def in_that(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    with in_dtype(dtype):
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with in_dtype(dtype):
        return copy.deepcopy(model).to(dtype)


def logits_of(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits (n, vocabulary) of all real tokens; of those that are read if the logits are of other tokens."""
    mask, logits = inputs.get("attention_mask"), getattr(outputs, "logits", None)
    if mask is not None and logits is not None and logits.ndim == 3 and logits.shape[:2] == mask.shape:
        real: Tensor = logits[mask.bool()]
        return real
    return next_logits(outputs, inputs)


def logits_and_gradients(model: Any, inputs: dict[str, Any]) -> Results:
    model.zero_grad()
    logits = logits_of(model(**inputs), inputs)
    logits.double().square().mean().backward()
    return {"logits": logits.detach(), **{f"gradient of {k}": x.grad for k, x in model.named_parameters() if x.grad is not None}}


def generated(model: Any, inputs: dict[str, Any], cache: dict[str, Any]) -> Results:
    """The logits of three tokens."""
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        answer = model.generate(**inputs, **options, **cache, return_dict_in_generate=True, pad_token_id=0)
    return {"logits": torch.stack(answer.logits)}


def distance(ours: Results, theirs: Results) -> float:
    """The largest difference of logits, and of all gradients, as a part of the largest of them."""
    if ours.keys() != theirs.keys():
        return float("inf")
    shares = []
    for names in (["logits"], [name for name in theirs if name != "logits"]):
        largest = max((float(theirs[name].abs().max()) for name in names), default=0.0)
        differences = [float((ours[name].double() - theirs[name].double()).abs().max()) for name in names]
        shares.append(max(differences, default=0.0) / (largest or 1.0))
    return float("nan") if any(share != share for share in shares) else max(shares)


def last_tower(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The last tower of several tokens that attends to itself, and its layers with a softmax."""
    calls = [call for call in trace_model(model, inputs).calls if not call.crosses and call.tower.shape[1] > 1]
    if not calls:
        raise ValueError("no tower of several tokens attends to itself")
    last = calls[-1].tower
    return {"tower": (last.name, last.name), "layers": {call.layer for call in calls if call.tower is last}}


def compared(mapping: str, model: nn.Module, eager: nn.Module, inputs: dict[str, Any]) -> Row:
    """The row of a model; `eager` is the same model with eager attention."""
    place = functools.cache(lambda: last_tower(copy.deepcopy(eager), inputs))
    ways = {name: functools.partial(way, place=place) for name, way in WAYS.items()}
    known: dict[tuple[str, int], Expected | None] = {}
    rows = {name: _row(way, model, eager, inputs, known) for name, way in ways.items()}
    outcomes = {row.outcome for row in rows.values()}
    outcome = next(each for each in ("wrong", "equal", "refused", "cannot be compared") if each in outcomes)
    return Row(outcome, "; ".join(f"{way}: {row.outcome}, {row.reason}" for way, row in rows.items()))


def _row(
    way: Changes, model: Any, eager: nn.Module, inputs: dict[str, Any], known: dict[tuple[str, int], Expected | None]
) -> Row:
    """What one of the functions gives."""
    runs: dict[str, tuple[torch.dtype, Computes]] = {str(d).removeprefix("torch."): (d, logits_and_gradients) for d in DTYPES}
    if model.can_generate() and "input_ids" in inputs and "noise" not in inputs:
        runs |= {f"{name} cache": (torch.float64, functools.partial(generated, cache=CACHES[name])) for name in CACHES}
    shares, wrong, left_out = list[float](), list[str](), list[str]()
    for name, (dtype, run) in runs.items():
        given = in_that(inputs, dtype)
        share, allowed = math.inf, 0.0
        for index, (ours, theirs) in enumerate(_pairs(model, eager, dtype)):
            if (name, index) not in known:
                known[name, index] = _expected(theirs, given, dtype, run)
            if (expected := known[name, index]) is None:
                left_out.append(name)
                break
            try:
                with in_dtype(dtype), way(changed := copy.deepcopy(ours), given):
                    share = distance(run(changed, given), expected.results)
            except Exception as error:
                return Row("refused", f"{name}, {described(error)}")
            if share <= (allowed := expected.allowed):
                shares += [share] * (dtype == torch.float64)
                break
        else:
            wrong.append(f"{name} {share:.1e} for {allowed:.1e}")
    if wrong or not shares:
        return Row("wrong" if wrong else "cannot be compared", ", ".join(wrong or left_out))
    return Row("equal", f"{max(shares):.0e}" + (f" without {', '.join(left_out)}" if left_out else ""))


def _expected(model: nn.Module, given: dict[str, Any], dtype: torch.dtype, run: Computes) -> Expected | None:
    """In float64: results in float32 and bfloat16 may be as far from it as the model's own, or nearly. None = it does not run."""
    try:
        with in_dtype(dtype):
            results = run(copy.deepcopy(model), given)
    except Exception:
        return None
    if dtype == torch.float64:
        return Expected(results, BOUND)
    exact = run(copied(model, torch.float64), in_that(given, torch.float64))
    return Expected(exact, LOSS * distance(results, exact) + 8 * torch.finfo(dtype).eps)


def _pairs(model: nn.Module, eager: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A model to change, and one to compare with. Some pair must agree: what a query gives that sees no key is up to the model's
    attention, and routers and indexers may choose differently after a rounding."""
    ours = copied(eager, dtype)
    yield ours, ours
    yield ours, copied(model, dtype)
    for seed in range(3 * (dtype != torch.float64)):
        generator, varied = torch.Generator().manual_seed(seed), copied(eager, dtype)
        with torch.no_grad():
            for parameter in varied.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
        yield varied, varied
