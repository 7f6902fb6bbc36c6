"""Arguments that do not fit: each is refused by name at the public call, in the same words whichever backend is named."""

import inspect
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.properties import PADDED, calls, every, floating
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.ops import OPERATORS
from vlattn_fast.scores import SCORES

# no two dimensions are equal: one more of a size that two arguments share fits no longer
SIZES = Sizes(5, 7, 16, 6, regions=7, words=12, features=9, batch=10, heads=4, rows=11, images=14, captions=15)
BACKENDS = ("reference", "streaming", "cpu")
Arguments = dict[str, Any]


def with_masks(call: Example) -> Arguments:
    """The call's arguments, and the masks and lengths that it can have."""
    tensors = call.in_dtype(torch.float32)
    found = call.arguments(tensors)
    for name in inspect.signature(call.call).parameters:
        for each in [each for each in PADDED.get(name, ()) if each in tensors and found.get(name) is None]:
            batch, length = len(tensors[each]), tensors[each].shape[-2]
            found[name] = torch.full((batch,), length) if name.endswith("lengths") else torch.ones(batch, length).bool()
        if name == "attn_mask" and found.get(name) is None:
            found[name] = torch.zeros(tensors["query"].shape[2], tensors["key"].shape[2])
    return found


def changed(arguments: Arguments) -> Iterator[tuple[str, str, Arguments]]:
    """The argument, what is wrong with it, and all arguments; the members of a pair one after the other."""
    for name, given in arguments.items():
        pair = given if isinstance(given, tuple) and isinstance(given[0], Tensor) else (given,)
        for n, x in enumerate(pair):
            if isinstance(x, Tensor):
                for what, wrong in wrong_tensors(x):
                    both = tuple([wrong if n == k else y for k, y in enumerate(pair)])
                    yield name, what, {**arguments, name: both if isinstance(given, tuple) else wrong}


def wrong_tensors(x: Tensor) -> Iterator[tuple[str, Any]]:
    yield "no tensor", [1.0]
    yield "device", x.to("meta")
    yield "dtype", x.double() if not x.is_floating_point() else x.long()
    yield "dimensions", x[None]
    for n in range(x.dim()):
        yield f"dimension {n}", torch.cat([x, x.narrow(n, 0, 1)], n)


@every(*BACKENDS)
def test_tensors(backend: str, operator: str) -> None:
    """Another device, dtype, rank, or one more of a size; where that fits, the result is right."""
    seen, names = set(), {*inspect.signature(OPERATORS[operator].call).parameters}
    names |= {parameter for kind in SCORES.values() for parameter in kind.parameters}
    for call in calls(operator, backend, SIZES, torch.float32):
        for name, what, arguments in changed(with_masks(call)):
            if (name, what) in seen:
                continue
            seen.add((name, what))
            named = (
                {name} if what in ("no tensor", "dtype", "dimensions") and not (name == "attn_mask" and "dim" in what) else names
            )
            title = f"{call.title}: {what} of {name}"
            try:
                got = call.call(**arguments, backend=backend)
            except (TypeError, ValueError) as error:
                word = re.match(r"\w+", str(error))
                assert word and word[0] in named, f"{title}: {error}"
                continue
            for x, y in zip(floating(got), floating(OPERATORS[operator].formula(**arguments)), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda text, title=title: f"{title}: {text}")


def wrong_options(default: Any) -> tuple[Any, ...]:
    if isinstance(default, bool):
        return (1, None)
    if isinstance(default, str):
        return ("nonsense", 1)
    return ("1", True, math.inf, math.nan)


@every(*BACKENDS)
def test_options(backend: str, operator: str) -> None:
    """Names that are none, numbers that are none, and things that are neither."""
    call = calls(operator, backend, SIZES, torch.float32)[0]
    arguments = call.arguments(call.in_dtype(torch.float32))
    for name, parameter in inspect.signature(OPERATORS[operator].call).parameters.items():
        for wrong in (object(), *wrong_options(parameter.default)):
            title = f"{operator}: {name}={wrong!r}"
            try:
                call.call(**{"backend": backend, **arguments, name: wrong})
            except (TypeError, ValueError) as error:
                groups = name in ("query_groups", "key_groups", "group_bias")
                words = r"\w+ must be given" if groups else name
                assert re.match(rf"{words}\b|{name}\b", str(error)), f"{title}: {error}"
                continue
            raise AssertionError(f"{title} was not refused")


@every("cpu", "triton", "cuda")
def test_kernels_refuse_float64(backend: str, operator: str) -> None:
    call = calls(operator, backend, SIZES, torch.float32)[0]
    tensors = call.in_dtype(torch.float64, torch.get_default_device())
    assert_refused(backend, "float16, bfloat16 and float32", lambda: call.run(tensors, backend=backend))


@every("triton", without=dict.fromkeys(("stacked_cross_attention", "relevancy_residual"), "rows of any size"))
def test_kernels_refuse_more_than_256_features(backend: str, operator: str) -> None:
    for size in ("head_dim", "value_dim", "features"):
        for call in cases_of(operator).verify(torch.Generator().manual_seed(0), SIZES._replace(**{size: 257})):
            tensors = call.in_dtype(torch.float32, torch.get_default_device())
            if any(x.shape[-1:] == (257,) for x in tensors.values()):
                assert_refused(backend, "of at most 256", partial(call.run, tensors, backend=backend))
