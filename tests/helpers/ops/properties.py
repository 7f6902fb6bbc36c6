"""What the properties of tests/ops/properties/ have in common: the calls of every operator, the backends that support them, and
the comparison with the formula.

`@every()` runs a test for each operator on each of its backends. A backend takes those calls of
`vlattn_fast/checking/cases/` that its limits allow; one that takes none fails. `without` names operators and backends that do
not have the property, and why.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.backends import INTERPRET, finest
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.ops import OPERATORS

BACKENDS = ("streaming", "cpu", "triton", "cuda", "sdpa")
# no two dimensions of a tensor are equal: one in place of another shows
SMALL = Sizes(5, 7, 8, 6, regions=7, words=5, features=8, batch=2, heads=4, rows=3, images=3, captions=2)
PADDED = {  # the tensors that have padding, by the argument that says where it lies
    "key_mask": ("key", "value", "other_key", "index_key"),
    "text_mask": ("text_query", "text_key"),
    "image_mask": ("image_query", "image_key"),
    "query_mask": ("queries",),
    "document_mask": ("documents",),
    "image_lengths": ("images",),
    "caption_lengths": ("captions",),
}
Without = Mapping[str | tuple[str, str], str]
APART = {("relevancy_attention", "cuda")}  # more than 256 queries of 16 bits: tests/cuda/test_relevancy_attention_long.py


def pairs_of(backends: Sequence[str], without: Without) -> list[tuple[str, str]]:
    """Backends and operators, without those that do not have a property."""
    unknown = {name if isinstance(name, str) else name[0] for name in without} - {*OPERATORS}
    assert not unknown, f"without must name operators; got {sorted(unknown)}"
    pairs = [(backend, name) for backend in backends for name, each in OPERATORS.items() if backend in each.backends]
    excluded = {*without, *APART}
    return [(backend, name) for backend, name in pairs if name not in excluded and (name, backend) not in excluded]


def every(*backends: str, without: Without | None = None) -> pytest.MarkDecorator:
    """The test runs for each operator on each of its backends, or on these. `without` says of operators, or of pairs of an
    operator and a backend, why they do not have the property."""
    rows = [pytest.param(*pair, id="-".join(pair)) for pair in pairs_of(backends or BACKENDS, without or {})]
    return pytest.mark.parametrize(("backend", "operator"), rows, indirect=["backend"])


class Turn(NamedTuple):
    """Some choices that calls meet: in turn, so that each choice and each call occurs; or each with all calls."""

    choices: tuple[Any, ...]
    first: int | None  # the call of the first choice; None for all calls

    def meet(self, calls: Sequence[Example]) -> Iterator[tuple[Example, Any]]:
        if self.first is None:
            yield from ((call, choice) for choice in self.choices for call in calls)
            return
        for n in range(max(len(calls), len(self.choices)) if len(self.choices) > 1 else 1):
            yield calls[(self.first + n) % len(calls)], self.choices[n % len(self.choices)]


def every_choice(
    choices: Sequence[Any] | Mapping[str, Sequence[Any]], *backends: str, without: Without | None = None
) -> pytest.MarkDecorator:
    """As `every`, and `turn` has the choices, which may be those of each backend: first all in turn, then each by itself with all
    calls; where kernels are interpreted or emulated, each by itself with one call."""
    rows = []
    of_backends = choices if isinstance(choices, Mapping) else dict.fromkeys(backends or BACKENDS, choices)
    for backend, operator in pairs_of(tuple(of_backends), without or {}):
        found = tuple(of_backends[backend])
        turns = {"in turn": Turn(found, 0)} | {str(x): Turn((x,), None) for x in found}
        if backend in ("triton", "cuda") and INTERPRET:
            turns = {str(x): Turn((x,), n) for n, x in enumerate(found)}
        rows += [pytest.param(backend, operator, turn, id=f"{backend}-{operator}-{name}") for name, turn in turns.items()]
    return pytest.mark.parametrize(("backend", "operator", "turn"), rows, indirect=["backend"])


def sizes_of(backend: str) -> Sizes:
    """More than one tile in either direction, streaming's with the fixture `small_tiles`; where the interpreter takes long, of
    keys."""
    sizes = SMALL._replace(queries=34, keys=37, regions=37, words=34)
    return {"streaming": SMALL, "triton": sizes._replace(queries=5, words=5, heads=2)}.get(backend, sizes)


def calls(operator: str, backend: str, sizes: Sizes | None = None, dtype: torch.dtype | None = None) -> list[Example]:
    """Those of `vlattn verify` that the backend supports."""
    sizes = sizes_of(backend) if sizes is None else sizes
    made = list(cases_of(operator).verify(torch.Generator().manual_seed(0), sizes))
    # `vlattn verify` and the fuzzer ask the others, whose lse or blocks belong to the call as it is
    made = [call for call in made if call.complete is dict and "key_block" not in call.options]
    return supported(made, backend, dtype)


def supported(made: Sequence[Example], backend: str, dtype: torch.dtype | None = None) -> list[Example]:
    """The calls that the backend supports: at least one, or the test would ask nothing."""
    dtype = finest(backend) if dtype is None else dtype
    refusals = [
        [] if (of := OPERATORS.get(call.operator)) is None else of.refusals(backend, call.arguments(call.in_dtype(dtype)))
        for call in made  # without a table, it is made of operators
    ]
    found = [call for call, reasons in zip(made, refusals, strict=True) if not reasons]
    assert found, (
        f"{backend!r} supports none of {[call.title for call in made]}: {refusals}; add a call that it supports to "
        "vlattn_fast/checking/cases/, or say in `without` why it has none"
    )
    return found


def check(
    call: Example,
    backend: str,
    dtype: torch.dtype | None = None,
    place: Callable[[str, Tensor], Tensor] = lambda _, x: x,
    scale: float = 0.0,
) -> dict[str, Tensor]:
    """Outputs and gradients against the formula; nothing that goes in is written to. `place(name, tensor)` lays it out.
    `scale`: the least that numbers are taken for, where they cancel."""
    dtype = finest(backend) if dtype is None else dtype
    tensors = call.in_dtype(dtype, torch.get_default_device())
    tensors = {name: place(name, x) for name, x in tensors.items()}
    options = {
        name: place(name, x) if isinstance(x, Tensor) and x.dim() else x for name, x in call.placed_options(tensors).items()
    }
    versions = [x._version for x in (*tensors.values(), *options.values()) if isinstance(x, Tensor)]
    call = replace(call, options=options)

    def ours(**x: Tensor) -> tuple[Tensor, ...]:
        return floating(call.run(x, backend=backend))

    def theirs(**x: Tensor) -> tuple[Tensor, ...]:
        return floating(OPERATORS[call.operator].formula(**call.arguments(x)))

    expected = outputs_of(OPERATORS[call.operator].formula(**call.arguments(tensors)))
    cotangents = [place("cotangent", torch.randn_like(x, dtype=torch.float32)) for x in floating(expected)]
    cancel = list(tensors) if dtype == torch.float64 else ["bias", "vector", "offset"]
    scales = {f"out{n}": scale for n, x in enumerate(expected) if not x.any()} | {f"grad {name}": scale for name in tensors}
    scales |= {f"grad {name}": 1.0 for name in cancel}  # where a gradient cancels, what is summed is about 1
    what = f"{backend} {call.title}"
    for got, index in zip(outputs_of(call.run(tensors, backend=backend)), expected, strict=True):
        if not index.is_floating_point() and dtype.itemsize > 2:  # in 16 bits many numbers tie
            assert torch.equal(got, index), what
    found = assert_all_close_to(ours, theirs, tensors, cotangents, what=what, scales=scales, grads=call.differentiable)
    assert versions == [x._version for x in (*tensors.values(), *options.values()) if isinstance(x, Tensor)], what
    return found


def outputs_of(result: Any) -> list[Tensor]:
    return [x for x in ([result] if isinstance(result, Tensor) else result) if x is not None]


def floating(result: Any) -> tuple[Tensor, ...]:
    """The floating outputs of a call."""
    return tuple([x for x in outputs_of(result) if x.is_floating_point()])
