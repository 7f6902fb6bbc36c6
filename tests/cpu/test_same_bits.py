"""The bits of the CPU kernels' results: the same again, on every number of threads, and for a sample alone and in a batch.

Outputs, gradients, gradients of these, and tangents, as far as a backend's module has `second` and `jvp`. A table's
`shared_sums` name what may differ (vlattn_fast/dispatch/table.py). Sums over the batch, such as a score's gradients, are no
results of a sample.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.ops.backends import LOW, ROOT
from tests.helpers.ops.same_bits import Run, calls
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.ops import OPERATORS

pytestmark = pytest.mark.usefixtures("threads")

THREADS = 8
SIZES = Sizes(70, 70, 24, 18, regions=37, words=5, features=24, images=5, captions=3, batch=5, heads=4)
LARGE = SIZES._replace(queries=200, keys=60, batch=3, heads=8)  # rows and heads are cut into parts
WITH_CPU = {name: operator for name, operator in OPERATORS.items() if "cpu" in operator.backends}


def differing(example: Example, dtype: torch.dtype, batch: int) -> tuple[set[str], set[str]]:
    """The results that differ somewhere, and all."""
    run, found = Run(example, "cpu", dtype, batch), set[str]()
    torch.set_num_threads(THREADS)
    on_many = run.results()
    assert not run.differing(on_many, 0, batch), (example.title, dtype)
    torch.set_num_threads(1)
    whole = run.results()
    parts = [(batch - size, batch) for size in range(2, batch + 1)] + [(first, first + 1) for first in range(batch)]
    for n, samples in enumerate(parts):
        torch.set_num_threads(1 + n % THREADS)
        other = run.differing(whole, *samples)
        assert n % THREADS or not other, (example.title, dtype, other)
        found |= other
    return found, set(whole)


@pytest.mark.parametrize("name", WITH_CPU)
def test_same_bits(name: str) -> None:
    found, results = set(), set()
    for example in calls(name, SIZES):
        for dtype in LOW:
            some, of_call = differing(example, dtype, SIZES.batch)
            found |= some
            results |= of_call
    assert found == results & set(WITH_CPU[name].backends["cpu"].shared_sums)


@pytest.mark.parametrize("name", [name for name in WITH_CPU if "key" in next(iter(calls(name, SIZES))).tensors])
def test_same_bits_of_parts(name: str) -> None:
    for example in calls(name, LARGE):
        for dtype in LOW[:2]:
            found, _ = differing(example, dtype, LARGE.batch)
            assert found <= set(WITH_CPU[name].backends["cpu"].shared_sums), (example.title, dtype, found)


def test_few_queries_over_many_keys() -> None:
    """The keys of a head are cut into parts."""
    example = next(cases_of("score_attention").examples(SIZES._replace(queries=1, keys=4200, heads=1)))
    assert differing(example, torch.float32, SIZES.batch)[0] == set()


def test_packed_panels() -> None:
    """Where bfloat16 products take tiles of the processor, only many rows of a key head are cut into parts."""
    example = next(cases_of("score_attention").examples(SIZES._replace(queries=1600, keys=40, batch=3, heads=2)))
    tensors = {name: x[:, :1] if name in ("key", "value") else x for name, x in example.tensors.items()}
    assert differing(replace(example, tensors=tensors, options={"enable_gqa": True}), torch.bfloat16, 3)[0] == set()


def row(operator: Operator) -> str:
    """The operator's line of the table in docs/developers/same_bits.md."""
    results = [result for results in _results(operator) for result in results]
    cells = [f"`{operator.stem}`"]
    for name in ("cpu", "triton", "cuda"):
        backend = operator.backends.get(name)
        others = ", ".join(x for x in (backend.shared_sums if backend else ()) if x in results)
        cells.append("no kernel" if backend is None else f"all but {others}" if others else "all")
    return f"| {' | '.join(cells)} |"


def _results(operator: Operator) -> Iterator[dict[str, Tensor]]:
    for example in calls(operator.stem, SIZES):
        yield Run(example, "cpu", torch.float32, SIZES.batch).results(0, 1)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "developers" / "same_bits.md").read_text().splitlines()
    missing = [line for line in map(row, WITH_CPU.values()) if line not in page]
    assert not missing, "write into docs/developers/same_bits.md:\n" + "\n".join(missing)
