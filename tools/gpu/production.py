"""The calls that `make gpu` checks, tunes and profiles: those of `vlattn verify` at several sizes, those of the sizes of models
(full.py), and hot launches.

A rehearsal (`--device cpu`, emulated kernels) checks the same calls, with fewer samples, heads and tokens in those of models;
those of benchmarks have the sizes of a quick run on a CPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from tools.compiled.tile_times import PRODUCTS
from tools.gpu import full
from tools.host import without_launches
from vlattn_fast._ground.score_kinds import UNIT_KINDS
from vlattn_fast.benchmarks import _measure
from vlattn_fast.benchmarks._choice import MODULES, choose
from vlattn_fast.benchmarks._gpu import GRAPH
from vlattn_fast.benchmarks.score_attention import FLEX, FLEX_FLASH
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example, Sizes
from vlattn_fast.checking.tolerance import Errors
from vlattn_fast.kernels import _configurations
from vlattn_fast.ops import OPERATORS

# The cheapest first. Several tiles a loop and ragged tiles, heads of 64, 72 and 128 features, and short lengths for CUDA C++.
SIZES = {
    "uniter": Sizes(60, 100, 64, 64, regions=36, words=20, features=64),
    "N200": Sizes(200, 200, 64, 64, regions=36, words=20, features=64),
    "D64": Sizes(577, 641, 64, 64, regions=36, words=20, features=1024),
    "D128": Sizes(577, 641, 128, 128, regions=289, words=18, features=256),
    "D72": Sizes(200, 264, 72, 72, regions=100, words=30, features=72),
}
EVERY_DTYPE = ("D64",)  # the remaining sizes take bfloat16 alone
EACH_KERNEL = ("N200", "D128")
IN_CUDA = (
    ("score_attention", "additive", "N200"),
    ("relevancy_attention", "gradient one row", "D128"),
    ("congruence_loss", "cacr", "N200"),
)
BACKENDS = ("triton", "cuda")


class Check(NamedTuple):
    """A case at a size in a dtype."""

    operator: str
    name: str
    sizes: str
    dtype: torch.dtype

    @property
    def item(self) -> str:
        return f"{self.operator}/{self.name}/{self.sizes}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def is_full(self) -> bool:
        return self.sizes in full.SIZES

    def example(self, device: str) -> Example:
        if not self.is_full:
            return case_named(self.operator, self.name, self.sizes)
        (one,) = [one for one in full.FULL if (one.operator, one.name, one.sizes) == self[:3]]
        return one.example(rehearsed=device == "cpu")


def backends_of(operator: str) -> tuple[str, ...]:
    """Those that a device has to show. Where Triton has no kernel "auto" takes `streaming`."""
    return BACKENDS if "triton" in OPERATORS[operator].backends else ("streaming",)


def of_each_kernel(rows: Iterable[dict[str, Any]]) -> list[Check]:
    """Checks in bfloat16 that together launch all that each operator launches at these sizes, on Triton and in CUDA C++; first
    those of which no passed row has all."""
    ran = {(row["item"].split("/")[0], kernel) for row in rows if row["passed"] for kernel in row.get("kernels", ())}
    known, chosen = set[tuple[str, str]](), []
    for check in (check for check in checks() if check.dtype == torch.bfloat16 and check.sizes in EACH_KERNEL):
        launched = {(check.operator, kernel) for kernel in launched_by(check)}
        launched |= {(check.item, "cuda") for facts in IN_CUDA if check[:3] == facts}
        if launched - known:
            known |= launched
            chosen.append((launched <= ran, check))
    return [check for _, check in sorted(chosen, key=lambda one: one[0])]


@functools.cache
def launched_by(check: Check) -> frozenset[str]:
    """The kernels of a check on Triton, which are planned and not launched."""
    case, operator, launched = case_named(check.operator, check.name, check.sizes), OPERATORS[check.operator], list[str]()
    tensors = case.in_dtype(check.dtype)
    with without_launches(launched), patch.object(_configurations, "TARGET", _configurations.TARGET or "sm_90"):
        if "triton" in operator.backends and not operator.refusals("triton", case.arguments(tensors)):
            verify._run(case, tensors, "triton")
    return frozenset(launched)


@functools.cache
def checks() -> list[Check]:
    """All checks: the calls of models, then each case in bfloat16 at the smallest size, then the remaining sizes and dtypes.
    Within a size the slowest come first: scores over hidden units, whose formula holds the units for every pair."""
    model_checks = [Check(one.operator, one.name, one.sizes, one.dtype) for one in full.FULL]
    planned = [
        Check(case.operator, case.name, sizes, dtype)
        for sizes in SIZES
        for case in cases(next(iter(SIZES)))  # each size has the same ones
        for dtype in (verify.DTYPES if sizes in EVERY_DTYPE else (torch.bfloat16,))
    ]
    order = list(SIZES)
    planned.sort(key=lambda check: (order.index(check.sizes), check.dtype != torch.bfloat16, -_work(check)))
    return model_checks + planned


def _work(check: Check) -> int:
    return SIZES[check.sizes].head_dim if check.name.startswith(("additive", "hadamard")) else 1


@functools.cache
def cases(sizes: str) -> list[Example]:
    """The cases of `vlattn verify`, masks of every kind, and the calls of the hottest launches."""
    chosen = SIZES[sizes]
    made = verify.cases(sizes=chosen)
    by_name = {(case.operator, case.name): case for case in made}
    generator = torch.Generator().manual_seed(2)
    tanh = _activated(by_name["score_attention", "general"], "tanh")
    sigmoid = _activated(by_name["score_attention", "hadamard tanh"], "sigmoid")
    causal = by_name["score_attention", "scaled_dot causal"]
    dot = replace(causal, name="scaled_dot", options={})
    relevancy = by_name["relevancy_attention", "gradient"]
    one_row = replace(relevancy, name="gradient one row", tensors=_one_row(relevancy.tensors))
    step = by_name["relevancy_step", "gradient"]
    one_row_step = replace(step, name="gradient one row", tensors=_one_row(step.tensors))
    statistics = by_name["attention_statistics", "three groups"]
    groups = torch.randint(0, 2, (chosen.keys,), generator=generator)
    two = replace(
        statistics,
        name="two groups",
        tensors={name: statistics.tensors[name] for name in ("query", "key")},
        options={"key_groups": groups, "num_groups": 2},
    )
    masked = [
        _masked(case, kind, generator)
        for case in (tanh, by_name["score_attention", "additive"], relevancy, *_of(made, "attention_map"), statistics)
        for kind in ("bool", "float")
    ]
    return [*made, tanh, sigmoid, dot, one_row, one_row_step, two, *masked]


def _of(made: list[Example], operator: str) -> list[Example]:
    return [case for case in made if case.operator == operator]


def _activated(case: Example, activation: str) -> Example:
    """The case with another activation of its score."""

    def arrange(t: dict[str, Tensor]) -> dict[str, Any]:
        arranged = case.arrange(t)
        return {**arranged, "score": replace(arranged["score"], activation=activation)}

    return replace(case, name=f"{case.name.split()[0]} {activation}", arrange=arrange)


def _one_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:, :1].contiguous() if name in ("carrier", "relevancy") else x for name, x in tensors.items()}


def _masked(case: Example, kind: str, generator: torch.Generator) -> Example:
    """The case with an attn_mask, whose first row masks everything; a float mask has finfo.min in its second row, and the call is
    causal."""
    tensors = case.tensors
    shape = tensors["query"].shape[2], tensors["key"].shape[2]
    visible = torch.rand(shape, generator=generator) > 0.3
    visible[0] = False
    values = torch.randn(shape, generator=generator).masked_fill(~visible, -torch.inf)
    values[1] = torch.finfo(torch.float32).min

    mask = {"bool": visible, "float": values.double()}[kind]  # the latter in the dtype of sums
    return replace(
        case, name=f"{case.name}, {kind} mask", options={**case.options, "attn_mask": mask, "is_causal": kind == "float"}
    )


def case_named(operator: str, name: str, sizes: str) -> Example:
    return next(case for case in cases(sizes) if (case.operator, case.name) == (operator, name))


def causal_too(case: Example) -> list[Example]:
    """The case, and the same with a causal mask where its operator takes one: tiles are chosen for both alike."""
    if "is_causal" not in inspect.signature(case.call).parameters:
        return [case]
    return [replace(case, options={**case.options, "is_causal": causal}) for causal in (False, True)]


def ratio_of(errors: Errors) -> float:
    """A ratio of `verify`'s rule as JSON has it: 1e6 in place of an infinite one."""
    return min(round(errors.ratio(), 3), 1e6)


# --- launches at the workloads of the benchmarks ---


class Hot(NamedTuple):
    """A launch that calls spend their time in.

    key: the first facts in the question to `kernels/_configurations.py`. kernels: the launched functions. check: name and size of
    the case that the tiles must keep right. most: the most queries of a tile (backward passes pad rows to 64). stages: the
    allowed numbers of stages.
    """

    key: str
    kernels: tuple[str, ...]
    benchmark: str
    check: tuple[str, str]
    most: int = 64
    stages: tuple[int, ...] = (1, 2, 3)

    @property
    def operator(self) -> str:
        return "relevancy_step" if self.kernel == "step" else self.key.split()[0]

    @property
    def kernel(self) -> str:
        return self.key.split()[1]

    @property
    def name(self) -> str:
        return f"{self.key} {self.check[1]}"

    @property
    def size(self) -> int:
        return SIZES[self.check[1]].head_dim

    @property
    def has_estimate(self) -> bool:
        """Whether tile_times.py knows such kernels, which multiply tiles of pairs."""
        return self.kernel in PRODUCTS and not set(self.key.split()) & set(UNIT_KINDS)

    @property
    def has_ahead(self) -> bool:
        """Whether the kernel can compute the next tile's scores under this one's softmax."""
        return self.has_estimate and self.kernel == "forward"


FORWARD, Q, KV = ("_forward_kernel",), ("_backward_q_kernel",), ("_backward_kv_kernel",)
ONE_ROW_D64, ONE_ROW_D128, SIGMOID_D128 = ("gradient one row", "D64"), ("gradient one row", "D128"), ("general sigmoid", "D128")
DOT_D64, DOT_D128, DOT_N200 = ("scaled_dot", "D64"), ("scaled_dot causal", "D128"), ("scaled_dot", "N200")
DOT, PAGED = "score_attention/scaled dot, forward+backward", "paged_attention_statistics/forward/paged-answers"
CLIP_RELEVANCY, LLAVA_RELEVANCY = (f"relevancy_attention/gradient, forward+backward/{one}" for one in ("clip", "llava"))
# Those first of which an SM of an H100 held one program, and those that were never timed by themselves
TELLING = (
    Hot("score_attention backward_kv dot", KV, f"{DOT}/llava", DOT_D128),
    Hot("relevancy_attention backward_kv", KV, LLAVA_RELEVANCY, ONE_ROW_D128),
    Hot("attention_map map gradient", ("_map_kernel",), "attention_map/gradient/clip", ("gradient", "D64"), 128),
    Hot("relevancy_attention backward_kv", KV, CLIP_RELEVANCY, ONE_ROW_D64),
    Hot("relevancy_attention backward_q", Q, CLIP_RELEVANCY, ONE_ROW_D64),
    Hot("relevancy_attention step", ("_step_kernel",), "relevancy_attention/step alone/clip", ONE_ROW_D64),
    Hot("attention_statistics rows", ("_rows_kernel",), "attention_statistics/forward/clip", ("two groups", "D64"), 128),
    Hot("attention_statistics received", ("_received_kernel",), "attention_statistics/forward/clip", ("two groups", "D64"), 128),
    Hot("paged_attention_statistics rows", ("_rows_kernel",), PAGED, ("new tokens", "D128")),
    Hot("paged_attention_statistics received", ("_received_kernel",), PAGED, ("new tokens", "D128")),
    Hot("score_attention forward dot", FORWARD, f"{DOT}/llava", DOT_D128, 128),
    Hot("attention_map map gradient", ("_map_kernel",), "attention_map/gradient/llava", ("gradient", "D128"), 128),
    Hot("relevancy_attention step", ("_step_kernel",), "relevancy_attention/step alone/llava", ONE_ROW_D128),
    Hot(
        "congruence_loss gradient cacr", ("gradient_kernel",), "congruence_loss/cacr, forward+backward/uniter", ("cacr", "uniter")
    ),
    Hot(
        "score_attention forward_whole",
        ("_whole_forward_kernel",),
        "score_attention/scaled dot, padding, forward+backward/uniter",
        DOT_N200,
        128,
    ),
)
HOTTEST = (
    *TELLING,
    Hot("score_attention forward dot", FORWARD, f"{DOT}/clip", DOT_D64, 128),
    Hot("score_attention backward_kv dot", KV, f"{DOT}/clip", DOT_D64),
    Hot("score_attention backward_q dot", Q, f"{DOT}/clip", DOT_D64),
    Hot("score_attention backward_q dot", Q, f"{DOT}/llava", DOT_D128),
    Hot("relevancy_attention backward_q", Q, LLAVA_RELEVANCY, ONE_ROW_D128),
    Hot(
        "score_attention backward_kv additive",
        ("_units_backward_kernel",),
        "score_attention/additive, forward+backward/clip",
        ("additive", "D64"),
        stages=(1,),
    ),
    Hot("score_attention forward additive", FORWARD, "score_attention/additive, forward/clip", ("additive", "D64"), 128),
    Hot("attention_statistics backward_kv", KV, "attention_statistics/forward+backward/uniter", ("two groups", "N200")),
    Hot("attention_statistics backward_q", Q, "attention_statistics/forward+backward/uniter", ("two groups", "N200")),
    Hot(
        "score_attention backward_kv dot_tanh", KV, "score_attention/general tanh, forward+backward/clip", ("general tanh", "D64")
    ),
    Hot("score_attention backward_q dot_tanh", Q, "score_attention/general tanh, forward+backward/clip", ("general tanh", "D64")),
    Hot("score_attention forward dot_tanh", FORWARD, "score_attention/general tanh, forward/clip", ("general tanh", "D64"), 128),
    Hot("score_attention backward_kv dot_sigmoid", KV, "score_attention/general sigmoid, forward+backward/llava", SIGMOID_D128),
    Hot("score_attention backward_q dot_sigmoid", Q, "score_attention/general sigmoid, forward+backward/llava", SIGMOID_D128),
    Hot(
        "score_attention forward dot_sigmoid",
        FORWARD,
        "score_attention/general sigmoid, forward+backward/llava",
        SIGMOID_D128,
        128,
    ),
)
# The benchmarks that are timed first: plain dot products, and those of the launches above
PLAIN = (f"{DOT}/clip", "score_attention/scaled dot, forward/llava", "score_attention/scaled dot, forward/highres")
# what was written or changed since a device ran it
LATE = (
    *(f"attention_divergence/{kind}, both sides, forward+backward/tokens-2048" for kind in ("kl", "js")),
    "indexer_divergence/all keys, forward+backward/tokens-2048",
    "score_attention/hadamard tanh, forward+backward/clip",
    "relevancy_attention/gradient, forward+backward/highres",
    "congruence_loss/cacr, forward+backward/uniter",
    "maxsim/forward+backward/colpali",
)
# of which the first step has ours, and the attentions of torch
VARIANTS = [f"{name}{ending}" for name in (*BACKENDS, "SDPA", "SDPA cuDNN", FLEX, FLEX_FLASH) for ending in ("", GRAPH)]
NAMED = tuple(dict.fromkeys((*PLAIN, *LATE, *(hot.benchmark for hot in HOTTEST))))


def calls() -> list[tuple[str, str]]:
    """The profiled calls: the operators' benchmarks on each backend. Benchmarks with gradients include the forward passes."""
    names = [benchmark.name for benchmark in choose([name for name in MODULES if name in OPERATORS], "cuda")]
    whole = [name for name in names if "forward/" not in name or name.replace("forward/", "forward+backward/") not in names]
    return [(name, backend) for name in whole for backend in BACKENDS]


def call_of(benchmark: str, backend: str, device: str, batch: int | None = None) -> Callable[[], Any] | None:
    """The benchmark's variant of this backend, ready to run; None where the backend does not take the call.

    batch: at most this batch at full size, to be compiled and not run.
    """
    (chosen,) = choose([benchmark])
    place = torch.device(device)
    sizes = dict(chosen.workload.full) if batch else chosen.workload.sizes(place, quick=True)
    if batch:
        sizes |= {name: min(batch, sizes[name]) for name in ("B", "images", "captions") if name in sizes}
    with emulated_too():
        problem = chosen.build(sizes, place, chosen.cuda_dtype)
    variant = problem.variants.get(backend)
    return None if variant is None else functools.partial(variant.run, problem.tensors)


@contextmanager
def emulated_too() -> Iterator[None]:
    """Inside, benchmarks on a CPU have the GPU's kernels as variants."""
    before, _measure.EMULATED = _measure.EMULATED, ()
    try:
        yield
    finally:
        _measure.EMULATED = before


def function_name(kernel: str) -> str:
    """The function's name in the line of a profiler or of the emulator, without namespaces, template arguments and parameters."""
    name = kernel.replace("(anonymous namespace)::", "").split("<")[0].split("(")[0].split("::")[-1].split(".")[-1]
    return name.split()[-1] if name.strip() else kernel  # a lambda has no name
