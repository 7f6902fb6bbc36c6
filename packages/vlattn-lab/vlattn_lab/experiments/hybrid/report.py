"""The records of the experiment as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import having, markdown, spread
from vlattn_lab.experiments.experiment import Effect, Record, dots, effects_of, less, paired_change

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("hybrid", "transformer")
LAST = "gradient, last layer"
CARRIED = ("gradient", "weighted", "rollout", "attention", LAST)
METHODS = (*CARRIED, "input_gradient", "integrated_gradients", "random")
TESTS = ("pointing", "mass", "insertion", "deletion")


def of(records: Sequence[Record], kind: str) -> list[Record]:
    return sorted(having(records, kind=kind), key=lambda record: record["seed"])


def values(records: Sequence[Record], kind: str, method: str, test: str) -> list[float]:
    """One a seed."""
    return [row["value"] for record in of(records, kind) for row in having(record["table"], method=method, test=test)]


def tables(records: Sequence[Record]) -> Iterator[str]:
    lines = []
    for kind in KINDS:
        truth = [spread([record["truth"][name] for record in of(records, kind)]) for name in ("true", "other image")]
        begin = [having(record["curves"], method=METHODS[0], test="deletion")[0]["mean"][0] for record in of(records, kind)]
        lines.append([kind, *truth, spread(begin)])
    yield markdown(["captioner", "true captions", "true of another scene", "probability of the explained words"], lines)
    for test in TESTS:
        yield markdown([test, *KINDS, "hybrid less transformer", "p"], [_compared(records, method, test) for method in METHODS])


def _compared(records: Sequence[Record], method: str, test: str) -> list[str]:
    hybrid, transformer = (values(records, kind, method, test) for kind in KINDS)
    name = method if method == LAST else f"`{method}`"
    return [name, spread(hybrid), spread(transformer), *paired_change(hybrid, transformer)]


def effects(records: Sequence[Record]) -> list[Effect]:
    """`gradient` and `input_gradient` of the hybrid less those of the transformer, and the last layer's map less that of all
    layers."""
    found = []
    for method, tests in (("gradient", TESTS), ("input_gradient", TESTS[:2])):
        for test in tests:
            change = less(*(values(records, kind, method, test) for kind in KINDS))
            found.append((f"`{method}`: hybrid less transformer", test, change))
    for kind in KINDS:
        for test in TESTS:
            change = less(*(values(records, kind, method, test) for method in (LAST, "gradient")))
            found.append((f"`gradient` in the {kind}: last layer less all layers", test, change))
    return effects_of(found)


def figure(records: Sequence[Record]) -> Figure:
    """Pointing and mass of each model's maps."""
    drawn, (axes,) = panels(1, 2, (7.6, 3.6), sharey=True)
    for axis, test in zip(axes, TESTS[:2], strict=True):
        for kind, colour, shift in zip(KINDS, ("#c2410c", "#4456b5"), (-0.18, 0.18), strict=True):
            dots(axis, {method: values(records, kind, method, test) for method in METHODS}, colour, shift, label=kind)
        axis.set(title=test, ylim=(-0.03, 1.03))
    axes[1].legend(frameon=False, loc="upper right")
    return drawn
