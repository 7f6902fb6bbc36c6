"""The bits of the CPU kernels' results: the same again, on every number of threads, and for a sample alone and in a batch.

A table's `shared_sums` name what may differ (vlattn_fast/dispatch/table.py); on one thread that is the same in every batch, too.
Sums over the batch, such as a score's gradients, are no results of a sample. Two kinds of calls rest on torch's own bits, which
depend on where a number lies: those with a sink, whose share is torch's sigmoid, and those that project by a matrix; the matrices
are identities here, without a bias, so that every product is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.helpers.ops.backends import LOW, ROOT
from vlattn_fast.backends.reference.paged_attention_statistics import STATISTICS
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.ops import OPERATORS
from vlattn_fast.ops.paged_attention_statistics import paged_attention_statistics

pytestmark = pytest.mark.usefixtures("threads")

BATCH, THREADS = 9, 8
SIZES = Sizes(70, 70, 24, 18, regions=37, words=5, features=24, images=BATCH, captions=3, batch=BATCH, heads=4)
WITH_CPU = {name: operator for name, operator in OPERATORS.items() if operator.backends["cpu"].exists}
OUTPUTS = {
    "score_attention": ("out", "lse"),
    "relevancy_attention": ("out", "carrier"),
    "relevancy_step": ("relevancy",),
    "recurrent_step": ("relevancy",),
    "attention_map": ("map",),
    "congruence_loss": ("loss",),
    "stacked_cross_attention": ("similarity",),
    "maxsim": ("similarity",),
}


def calls(name: str) -> Iterator[Example]:
    """Of each kind, and where there are keys also with key heads that are shared."""
    if name == "paged_attention_statistics":
        yield _requests()
        return
    sizes = SIZES._replace(images=3, captions=BATCH) if name == "maxsim" else SIZES  # its queries are the samples
    for example in cases_of(name).examples(sizes):
        if example.operator != name or "sink" in example.tensors:
            continue
        tensors = {key: _exact(key, x) for key, x in example.tensors.items()}
        options = {**example.options, **({"reduction": "none"} if name == "congruence_loss" else {})}
        if name == "recurrent_step":  # its gradients are those of streaming
            yield replace(example, tensors=tensors, differentiable=False)
            yield replace(example, tensors={**tensors, "key": tensors["key"][:, :2]}, differentiable=False)
            continue
        yield replace(example, tensors=tensors, options=options)
        if "key" in tensors:
            tensors |= {key: x[:, :2] for key, x in tensors.items() if key in ("key", "value")}
            yield replace(example, tensors=tensors, options={**options, "enable_gqa": True})


def _requests() -> Example:
    """A request a sample, with its newest token."""
    tensors = {"query": torch.randn(BATCH, 4, 24), "key_cache": torch.randn(40, 2, 16, 24)}
    options = {"block_table": torch.randint(40, (BATCH, 5)), "lengths": torch.randint(1, 80, (BATCH,))}
    options |= {"key_groups": torch.randint(-1, 3, (BATCH, 80)), "num_groups": 3, "statistics": STATISTICS}

    def arrange(x: dict[str, Tensor]) -> dict[str, Any]:
        return {**x, "query_starts": torch.arange(len(x["query"]) + 1)}

    return Example(paged_attention_statistics, "", tensors, options, arrange, differentiable=False)


def _exact(name: str, x: Tensor) -> Tensor:
    if name == "bias":
        return torch.zeros_like(x)
    return torch.eye(len(x), dtype=x.dtype) if name in ("weight", "query_weight", "key_weight") else x


class Run:
    """A call on some of the samples: its results by name, with gradients of random cotangents, and tangents for random ones of
    the inputs if a kernel computes them."""

    def __init__(self, example: Example, dtype: torch.dtype) -> None:
        self.example, self.tensors = example, example.in_dtype(dtype)
        self.cotangents: dict[str, Tensor] = {}
        self.tangents = {name: torch.randn_like(x) for name, x in self.tensors.items()} if has_tangents(example) else {}

    def results(self, threads: int, first: int = 0, last: int = BATCH) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        leaves = {name: _samples(x, first, last).detach().clone() for name, x in self.tensors.items()}
        leaves = {name: x.requires_grad_(self.example.differentiable) for name, x in leaves.items()}
        options = {name: _samples(x, first, last) for name, x in self.example.options.items()}
        call = replace(self.example, options=options)
        outputs = self._by_name(call.run(leaves, backend="cpu"))
        used = {name: x for name, x in outputs.items() if x.requires_grad}
        for name, x in used.items():
            self.cotangents.setdefault(name, torch.randn_like(x))
        if not used:
            return outputs
        cotangents = [_samples(self.cotangents[name], first, last) for name in used]
        grads = torch.autograd.grad(
            list(used.values()), list(leaves.values()), cotangents, materialize_grads=True, allow_unused=True
        )
        outputs |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return outputs | self._tangents(call, leaves, first, last) if self.tangents else outputs

    def _tangents(self, call: Example, leaves: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        given = {name: _samples(x, first, last) for name, x in self.tangents.items()}
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(x.detach(), given[name]) for name, x in leaves.items()}
            found = self._by_name(call.run(duals, backend="cpu"))
            return {f"tangent of {name}": forward_ad.unpack_dual(x).tangent for name, x in found.items()}

    def _by_name(self, result: Any) -> dict[str, Tensor]:
        return dict(zip(_names(self.example, result), [result] if isinstance(result, Tensor) else result, strict=False))


def has_tangents(example: Example) -> bool:
    """Whether the CPU kernel computes tangents of this call, and not streaming, which rests on torch's bits."""
    return example.operator == "score_attention" and example.tensors.keys() == {"query", "key", "value"}


def _names(example: Example, result: Any) -> tuple[str, ...]:
    return getattr(result, "_fields", None) or OUTPUTS[example.operator]


def _samples(x: Any, first: int, last: int) -> Any:
    """These samples of what has some: no other size is as large as the batch."""
    return x[first:last] if isinstance(x, Tensor) and x.shape[:1] == (BATCH,) else x


def differing(whole: dict[str, Tensor], part: dict[str, Tensor], first: int, last: int) -> set[str]:
    """The results of samples that have other bits in `part`, which has some of the samples of `whole`."""
    of_samples = {name for name, x in whole.items() if x.shape[:1] == (BATCH,)}
    return {name for name in of_samples if not torch.equal(whole[name][first:last], part[name])}


@pytest.mark.parametrize("name", WITH_CPU)
def test_same_bits(name: str) -> None:
    seen, results = set(), set()
    for example in calls(name):
        for dtype in LOW:
            run = Run(example, dtype)
            whole = run.results(1)
            again = run.results(THREADS), run.results(THREADS)
            assert all(torch.equal(x, again[1][result]) for result, x in again[0].items()), (example.title, dtype)
            for first, size in [(BATCH - size, size) for size in range(2, BATCH + 1)] + [(first, 1) for first in range(BATCH)]:
                samples = first, first + size
                alone = differing(whole, run.results(1, *samples), *samples)
                assert not alone, (example.title, dtype, samples, alone)
                seen |= differing(whole, run.results(1 + (first + size) % THREADS, *samples), *samples)
            results |= set(whole)
    assert seen == results & set(WITH_CPU[name].backends["cpu"].shared_sums)


def test_few_queries_over_many_keys() -> None:
    """Threads share the keys of a head, so all results may differ."""
    example = next(cases_of("score_attention").examples(SIZES._replace(queries=1, keys=4200, heads=1)))
    run = Run(example, torch.float32)
    whole, samples = run.results(1), (3, 5)
    assert not differing(whole, run.results(1, *samples), *samples)
    assert "out" in differing(whole, run.results(THREADS, *samples), *samples)


def row(operator: Operator) -> str:
    """The operator's line of the table in docs/reliability.md."""
    results = [result for results in _results(operator) for result in results]
    cells = [f"`{operator.stem}`"]
    for name in ("cpu", "triton", "cuda"):
        backend = operator.backends[name]
        others = ", ".join(x for x in backend.shared_sums if x in results)
        cells.append("no kernel" if not backend.exists else f"all but {others}" if others else "all")
    return f"| {' | '.join(cells)} |"


def _results(operator: Operator) -> Iterator[dict[str, Tensor]]:
    for example in calls(operator.stem):
        yield Run(example, torch.float32).results(1, 0, 1)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    missing = [line for line in map(row, WITH_CPU.values()) if line not in page]
    assert not missing, "write into docs/reliability.md:\n" + "\n".join(missing)
