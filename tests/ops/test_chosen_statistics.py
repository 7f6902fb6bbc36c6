"""attention_statistics of which only some are asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import as_dtype, outputs_and_grads
from tests.helpers.ops.backends import arguments_of, finest, on
from tests.helpers.ops.map_cases import B, M, groups, statistics_inputs
from tests.helpers.ops.masks import real_keys
from vlattn_fast.backends.inputs import AttentionStatisticsInputs
from vlattn_fast.ops.attention_statistics import AttentionStatistics, attention_statistics

FAST = ("streaming", "cpu", "triton")


@on("reference", *FAST)
@pytest.mark.parametrize(
    "asked", [("mass",), ("received",), ("entropy", "argmax"), ("received", "maximum", "mass")], ids=" ".join
)
def test_only_what_is_named(asked: tuple[str, ...], backend: str) -> None:
    """The same as beside the others, with the same gradients; None for the others."""
    inputs = as_dtype(statistics_inputs(), finest(backend))
    fixed = {"key_mask": real_keys(B, M), "backend": backend, **groups()}
    whole = attention_statistics(**inputs, **fixed)
    found = attention_statistics(**inputs, statistics=asked, **fixed)
    for name in AttentionStatistics._fields:
        if name not in asked:
            assert getattr(found, name) is None
        else:
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    floating = [name for name in asked if name != "argmax"]
    cotangents = [torch.randn_like(getattr(whole, name)) for name in floating]

    def run(statistics: tuple[str, ...] | None) -> Callable[..., tuple[Tensor, ...]]:
        def call(**tensors: Tensor) -> tuple[Tensor, ...]:
            got = attention_statistics(**tensors, statistics=statistics, **fixed)
            return tuple(getattr(got, name) for name in floating)

        return call

    named, every = outputs_and_grads(run(asked), inputs, cotangents), outputs_and_grads(run(None), inputs, cotangents)
    for name, x in every.items():
        torch.testing.assert_close(named[name], x, rtol=1e-5, atol=1e-6)


def test_what_is_named_is_a_name() -> None:
    query = torch.randn(1, 1, 3, 4)
    for bad, words in (
        (["mode"], "statistics must be among mass, .*; got 'mode'"),
        ([], "statistics must name at least one; got none"),
        (["entropy", "mass"], "key_groups must be given if statistics names 'mass', .*; got None"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_statistics(query, query, statistics=bad)
    with pytest.raises(TypeError, match="statistics must be a sequence of names; got 'mass'"):
        attention_statistics(query, query, statistics="mass")
    assert attention_statistics(query, query, statistics=["mass"], num_groups=0).mass.shape == (1, 1, 3, 0)


def test_nothing_but_what_is_named_is_made() -> None:
    """The operator's other outputs have no elements, also under torch.compile."""
    query = torch.randn(1, 2, 9, 4, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return attention_statistics(x, x, statistics=["received"], backend="streaming").received.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), run(query))
    (grad,), (eager,) = (torch.autograd.grad(f(query), query) for f in (compiled, run))
    torch.testing.assert_close(grad, eager)
    given = {"query": query.detach(), "key": query.detach(), "num_groups": 0, "statistics": "received", "backend": "streaming"}
    outputs = torch.ops.vlattn.attention_statistics(*arguments_of(AttentionStatisticsInputs, **given))
    sizes = [x.numel() for x in outputs]
    assert sizes == [0, 0, 0, 0, 18, 0, 0, 0]


@on(*FAST)
@pytest.mark.parametrize("asked", ("received", "maximum"))
def test_row_weights_alone_may_be_differentiated(asked: str, backend: str) -> None:
    """The backward pass may read argmax, which is not asked for."""
    inputs = as_dtype(statistics_inputs(), finest(backend))
    weight = inputs.pop("row_weight").requires_grad_()
    found = attention_statistics(**inputs, row_weight=weight, statistics=[asked], backend=backend)
    every = attention_statistics(**inputs, row_weight=weight, backend=backend)
    grads = [torch.autograd.grad(getattr(x, asked).sum(), weight)[0] for x in (found, every)]
    torch.testing.assert_close(*grads)
    assert bool(grads[0].any()) == (asked == "received")
