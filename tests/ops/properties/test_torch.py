"""What torch makes of a call: autocast, and torch.compile with sizes that vary."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.ops.properties import SMALL, calls, every, floating
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import OPERATORS

F32, BF16 = torch.float32, torch.bfloat16
Tensors = dict[str, Tensor]


def leaves(call: Example) -> Tensors:
    return {name: x.detach().clone().requires_grad_(call.differentiable) for name, x in call.in_dtype(F32).items()}


def with_gradients(outputs: tuple[Tensor, ...], inputs: Tensors) -> list[Tensor]:
    """The outputs, and gradients of a function of them that is not linear."""
    totals = [x.sin().sum() for x in outputs if x.requires_grad]
    grads = torch.autograd.grad(sum(totals), [*inputs.values()], materialize_grads=True) if totals else ()
    return [*outputs, *grads]


# tensors that stay in float32, beside those of the call
WIDE = {"row_weight", "log_decay", "beta", "diagonal", "group_bias", "head_gate"}
WITHOUT_AUTOCAST = {
    "paged_attention_statistics": "its cache stays as it is: tests/ops/test_paged_attention_statistics.py",
    "relevancy_residual": "its terms may have two dtypes: tests/ops/test_relevancy_residual.py",
}


@every("streaming", "cpu", without=WITHOUT_AUTOCAST)
def test_autocast(backend: str, operator: str) -> None:
    """The results are those of the call whose tensors were cast. Scores and sinks, which stay in float32, stand elsewhere."""
    for call in calls(operator, backend, SMALL, F32):
        if "sink" in call.tensors or "score" in call.arguments(call.tensors):
            continue
        results = []
        for within in (True, False):
            x = leaves(call)
            cast = x if within else {name: y if name in (*WIDE, *call.in_float32) else y.to(BF16) for name, y in x.items()}
            with torch.autocast("cpu", BF16, enabled=within):
                outputs = floating(call.run(cast, backend=backend))
            results.append(with_gradients(outputs, x))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text, call=call: f"{call.title}: {text}")


WITHOUT_COMPILED = {
    "paged_attention_statistics": "its tokens and blocks vary in number, too: tests/ops/test_paged_attention_statistics.py",
    "relevancy_residual": "torch warns of its Function, which has tests in tests/ops/test_relevancy_residual.py",
}
QUICK = ("attention_map", "maxsim", "recurrent_step")


@every("streaming", "cpu", without=WITHOUT_COMPILED)
@pytest.mark.slow(*(name for name in OPERATORS if name not in QUICK))
@pytest.mark.parametrize("which", ("first", "rest"))
def test_compiled(backend: str, operator: str, which: str) -> None:
    """One graph, forward and backward; the second serves all sizes that follow."""
    sizes = [SMALL._replace(queries=n, keys=n + 3, words=n, regions=n + 3) for n in (5, 9, 14)]
    some = slice(0, 1) if which == "first" else slice(1, None)
    for of_sizes in zip(*[calls(operator, backend, each, F32)[some] for each in sizes], strict=True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def run(tensors: Tensors, options: dict[str, Any], call: Example = of_sizes[0]) -> tuple[Tensor, ...]:
            return floating(replace(call, options=options).run(tensors, backend=backend))

        compiled = torch.compile(run, fullgraph=True, backend=counter)
        for call in of_sizes:
            results = []
            for function in (compiled, run):
                x = leaves(call)
                results.append(with_gradients(function(x, call.placed_options(x)), x))
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, msg=lambda text, call=call: f"{call.title}: {text}")
        assert counter.frame_count <= 2, f"{of_sizes[0].title}: {counter.frame_count} graphs"
