"""The arguments of `evaluate`: methods, tests and their options, checked before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlattn_fast._ground.checks import check_callable, check_integer, check_items, check_names
from vlattn_fast.attach.session import unwrapped
from vlattn_fast.interpret.evaluating.box_scores import BOX_SCORES
from vlattn_fast.interpret.evaluating.curves import CURVES, PARTS, TENTHS
from vlattn_fast.interpret.evaluating.perturbation import Words
from vlattn_fast.interpret.relevancy.method import Method
from vlattn_fast.interpret.relevancy.methods.registry import ABLATIONS, METHODS

PARTS_OF = {**{test: curve.parts for test, curve in CURVES.items()}, **dict.fromkeys((*BOX_SCORES, "sanity"), PARTS)}
INTERVENTION = "intervention"
PARTS_OF[INTERVENTION] = PARTS
TESTS = tuple(PARTS_OF)
# The tests of the table that one test of `evaluate` is
MEASURED = {INTERVENTION: (INTERVENTION, *(f"{INTERVENTION}:{kind}" for kind in ("top", "insertion", "deletion")))}
EDGES = "attribute_edges"  # the first-order effects, compared with maps in the test "intervention"
RANDOM = "random"
_NO_METHODS = (RANDOM, EDGES)  # of `explain`
_DEFAULT_TESTS = ("positive", "negative", "pointing")
_READERS = {
    "steps": tuple(CURVES),
    **{
        measure: tuple(test for test, curve in CURVES.items() if curve.measure == measure)
        for measure in ("accuracy", "probability")
    },
}

CustomMethod = Callable[[nn.Module, Mapping[str, Any], Any], Any]
Measure = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Plan:
    """The arguments of one `evaluate`, checked."""

    model: nn.Module  # without its wrappers
    methods: dict[
        str, str | Method | CustomMethod
    ]  # name in the table -> a method of `explain`, a name of `_NO_METHODS`, or a callable
    tests: tuple[str, ...]
    steps: dict[str, tuple[float, ...]]  # of each test with a curve over perturbed inputs
    accuracy: Measure | None
    probability: Measure | None
    words: Words | None
    sanity_stages: int
    batch_size: int
    seed: int
    options: dict[str, Any]  # further arguments of `explain`

    @classmethod
    def check(cls, model: nn.Module, methods: Any, tests: Any, steps: Any, **rest: Any) -> Plan:
        """The plan; raises the errors of `evaluate`."""
        named, options = named_methods(methods), rest["options"]
        tests = _DEFAULT_TESTS if tests is None else check_names("tests", tests, TESTS, "None or a sequence of names")
        measures = {name: rest[name] for name in ("accuracy", "probability")}
        for name, value in {"steps": steps, **measures}.items():
            if value is not None and not set(_READERS[name]) & set(tests):
                readers = ", ".join(_READERS[name])
                raise ValueError(f"{name} must be given with one of the tests {readers}; got tests {', '.join(tests)}")
        if options and all(callable(method) or method in _NO_METHODS for method in named.values()) and INTERVENTION not in tests:
            raise ValueError(f"{', '.join(options)} must be given with methods of explain; got only callables and 'random'")
        if EDGES in named.values() and INTERVENTION not in tests:
            raise ValueError(f"methods must have {EDGES!r} only with the test {INTERVENTION!r}; got tests {', '.join(tests)}")
        fractions = {test: _checked_steps(steps, test) for test in tests if test in CURVES}
        check_callable(**measures, words=rest["words"])
        check_integer("sanity_stages", rest["sanity_stages"], low=1, high=1000)  # each explains the whole data set again
        check_integer("batch_size", rest["batch_size"], low=1)
        check_integer("seed", rest["seed"])
        return cls(unwrapped(model), named, tests, fractions, **rest)

    @property
    def keys(self) -> list[tuple[str, str, str]]:
        """(method, test, part) of each entry of the table."""
        tests = [(test, part) for named in self.tests for test in MEASURED.get(named, (named,)) for part in PARTS_OF[named]]
        return [(name, *test) for name in self.methods for test in tests]

    @property
    def x_axes(self) -> dict[str, Sequence[float]]:
        """The x axis of each test with a curve."""
        cuts = dict.fromkeys(MEASURED[INTERVENTION], TENTHS)
        return {**self.steps, **cuts, "sanity": [(stage + 1) / self.sanity_stages for stage in range(self.sanity_stages)]}

    @property
    def metadata(self) -> dict[str, Any]:
        steps = {test: list(values) for test, values in self.steps.items()}
        named = {"model": type(self.model).__name__, "methods": list(self.methods), "tests": list(self.tests), "steps": steps}
        return {**named, "seed": self.seed, "sanity_stages": self.sanity_stages}


def named_methods(methods: Any) -> dict[str, str | Method | CustomMethod]:
    check_items("methods", methods, "a sequence or a dict of names and callables")
    if isinstance(methods, Mapping):
        named = dict(methods)
    else:
        named = {}
        for method in methods:
            name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
            name = method.label if isinstance(method, Method) else name
            if name in named:
                raise ValueError(f"methods must have different names (a dict gives them); got {name!r} twice")
            named[name] = method
    if not named:
        raise ValueError("methods must name at least one; got none")
    for method in named.values():
        if callable(method) or isinstance(method, Method):
            continue
        if not isinstance(method, str):
            raise TypeError(f"methods must be names, objects of va.methods and callables; got {type(method).__name__}")
        names = [*METHODS, *ABLATIONS, *_NO_METHODS]
        if method not in names:
            raise ValueError(f"methods must be callables, objects of va.methods or among {', '.join(names)}; got {method!r}")
    return named


def _checked_steps(steps: Any, test: str) -> tuple[float, ...]:
    if steps is None:
        return CURVES[test].steps
    try:
        values = tuple(float(step) for step in steps)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"steps must be two or more increasing fractions from 0 to 1; got {steps!r}") from None
    rising = all(one < two for one, two in zip(values, values[1:], strict=False))
    if len(values) < 2 or not rising or values[0] < 0 or values[-1] > 1:
        raise ValueError(f"steps must be two or more increasing fractions from 0 to 1; got {list(values)}")
    return values
