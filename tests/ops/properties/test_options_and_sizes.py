"""Memory layouts, dtypes, shared heads, tiles, many keys and equal bits: the results of the formula, and the same each time."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import DTYPES
from tests.helpers.ops.choices import CHOICES, chosen
from tests.helpers.ops.properties import BACKENDS, SMALL, Turn, calls, check, every, every_choice, floating
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.cases._dice import LAYOUTS, VECTOR_LAYOUTS, lay_out


@every_choice(LAYOUTS[1:])
@pytest.mark.slow("triton")  # tests/kernels/test_unaligned_rows.py and test_wide_strides.py are quick
@pytest.mark.usefixtures("small_tiles")
def test_layouts(backend: str, operator: str, turn: Turn) -> None:
    """Of inputs, masks, groups, lengths, parameters and cotangents, each another one. NaN lies between their numbers."""
    for call, first in turn.meet(calls(operator, backend, SMALL)):
        some = itertools.cycle(LAYOUTS[LAYOUTS.index(first) :] + LAYOUTS)

        def place(name: str, x: Tensor, some: Iterator[str] = some) -> Tensor:
            layout = next(some)
            if x.dim() < 2:
                return lay_out(x, VECTOR_LAYOUTS[layout < "m"])
            tie = not x.is_floating_point() or "key" in name or name == "documents"  # if equal
            return lay_out(x, "fused" if tie and layout.endswith("for all") else layout)

        check(replace(call, name=f"{call.name}, {first} first"), backend, place=place)


@every_choice({name: DTYPES[name] for name in BACKENDS})
@pytest.mark.slow("triton", "cuda")
def test_dtypes(backend: str, operator: str, turn: Turn) -> None:
    for call, dtype in turn.meet(calls(operator, backend, dtype=turn.choices[0])):
        check(call, backend, dtype)


WITHOUT_SHARED_HEADS = {
    "paged_attention_statistics": "heads of its cache are always shared, and so in all its calls",
    "congruence_loss": "its sides have as many heads",
    "stacked_cross_attention": "it has no heads",
    "maxsim": "it has no heads",
    "recurrent_step": "its heads are those of its largest tensor: tests/ops/test_recurrent_step.py",
    "relevancy_residual": "it has no heads",
}


@every_choice((1, 2), without=WITHOUT_SHARED_HEADS)
@pytest.mark.slow("triton")  # tests/kernels/ has quick ones
@pytest.mark.usefixtures("small_tiles")
def test_shared_heads(backend: str, operator: str, turn: Turn) -> None:
    """Four query heads read one or two of keys."""
    sizes = SMALL._replace(queries=17, keys=17) if backend == "sdpa" else SMALL
    for call, heads in turn.meet(calls(operator, backend, sizes)):
        tensors = {name: x[:, :heads] if name in ("key", "value", "other_key") else x for name, x in call.tensors.items()}
        check(replace(call, name=f"{call.name}, {heads}", tensors=tensors, options={**call.options, "enable_gqa": True}), backend)


@every_choice((1, 30, 80, 1 << 19), "streaming")  # a row of a head, some rows, some heads, everything
def test_tiles_of_streaming(backend: str, operator: str, turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the masks of its own rows, heads and samples."""
    for call, elements in turn.meet(calls(operator, backend)):
        monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
        check(replace(call, name=f"{call.name}, {elements}"), backend)


@every_choice({"cpu": tile_edges.CPU, "triton": tile_edges.TRITON, "cuda": tile_edges.CUDA})
@pytest.mark.slow("triton", "cuda")  # calls of the other tests have more keys than a tile, too
def test_edges_of_tiles(backend: str, operator: str, turn: Turn) -> None:
    pairs = [pair for pair in turn.choices if len(turn.choices) == 1 or max(pair) < 200]  # blocks of keys each by itself
    if (backend, operator) == ("cuda", "congruence_loss"):
        pairs = [(min(n, 100), min(m, 100)) for n, m in pairs]  # its maps are in shared memory
    for n, m in pairs:
        sizes = SMALL._replace(queries=n, keys=m, regions=m, words=max(4, n), heads=2)
        first = None if turn.first is None else turn.first + pairs.index((n, m))
        for call, pair in Turn(((n, m),), first).meet(calls(operator, backend, sizes)):
            check(replace(call, name=f"{call.name} {pair}"), backend, scale=2.0 if 1 in pair else 0.0)


@every("streaming", "cpu", "triton", "cuda", without={"congruence_loss": "its maps have all pairs of tokens of a side"})
@pytest.mark.slow("triton", "cuda")
def test_one_query_and_many_keys(backend: str, operator: str) -> None:
    keys = 4099 if backend in ("streaming", "cpu") else 700
    sizes = SMALL._replace(queries=1, keys=keys, regions=keys, words=4, heads=2)
    made = [call for call in calls(operator, backend, sizes) if "query" not in call.tensors or 1 in call.tensors["query"].shape]
    for call in made[: 1 if backend == "triton" else 4]:
        check(call, backend)


@every()
@pytest.mark.slow("triton", "cuda")  # tests/kernels/test_same_bits.py has a quick one
@pytest.mark.usefixtures("small_tiles")
def test_equal_bits(backend: str, operator: str) -> None:
    """Twice, forward and backward; emulated launches draw another order of threads each time."""
    for call in calls(operator, backend)[: 1 if backend == "triton" else None]:
        tensors = call.in_dtype(torch.float32)

        def run(call: Example = call, **x: Tensor) -> tuple[Tensor, ...]:
            return floating(call.run(x, backend=backend))

        first, second = (outputs_and_grads(run, tensors) if call.differentiable else {"": run(**tensors)[0]} for _ in range(2))
        assert all(torch.equal(x, second[name]) for name, x in first.items()), call.title


SHARING = ("key", "value", "other_key")


@every("cpu", "triton")
@pytest.mark.slow("triton")
@pytest.mark.parametrize("part", (1, 2, 3, 4, 5, 0))  # make test has the first; the last takes longest
def test_all_of_these_at_once(backend: str, operator: str, part: int, threads: None) -> None:
    """Sizes at edges, features, dtypes, masks, layouts, heads that share keys, rows and threads, each with others."""
    for n, choice in enumerate(CHOICES[backend][part::6]):
        some = chosen(operator, backend, choice)
        call = some[(n + part) % len(some)]
        tensors, options = dict(call.tensors), dict(call.options)
        if operator not in WITHOUT_SHARED_HEADS and "enable_gqa" not in options and backend != "triton":
            tensors = {name: x[:, : choice.heads] if name in SHARING else x for name, x in tensors.items()}
            options["enable_gqa"] = True
        if options.get("rule") == "gradient" or operator == "relevancy_step" and "grad_output" in tensors:
            # in odd numbers of columns they never add up to 0, at which gradients jump
            odd = tensors["value"].shape[-1] - 1 + tensors["value"].shape[-1] % 2
            tensors |= {name: tensors[name].sign()[..., :odd] for name in ("value", "grad_output")}
        call = replace(call, name=f"{call.name} {choice}", tensors=tensors, options=options)
        torch.set_num_threads(choice.threads)
        place = lambda _, x, layout=choice.layout: lay_out(x, layout if x.dim() > 1 else "contiguous")  # noqa: E731
        check(call, backend, choice.dtype, place, scale=1.0)
