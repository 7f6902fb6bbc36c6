"""NaN and infinity in one number of one argument: where the formula's results are not finite, those of a backend are not, either,
and its other rows are those of the formula."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops.properties import SMALL, Turn, calls, every_choice, floating
from vlattn_fast.checking.cases import Example

F32 = torch.float32


def results(call: Example, backend: str, tensors: dict[str, Tensor], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    def run(**x: Tensor) -> tuple[Tensor, ...]:
        return floating(call.run(x, backend=backend))

    if call.differentiable:
        return outputs_and_grads(run, tensors, cotangents)
    return {f"out{n}": x for n, x in enumerate(run(**tensors))}


WITHOUT = {"paged_attention_statistics": "keys that no token sees: tests/ops/test_paged_attention_statistics.py"}
# an infinite sink takes all, which leaves zeros; a bias cancels; a sigma must be a number; units may be Inf times 0
NO_NUMBERS = "sink", "sigma", "vector", "bias"


@every_choice((torch.nan, torch.inf, -torch.inf), "streaming", "cpu", "triton", "cuda", without=WITHOUT)
@pytest.mark.slow("triton", "cuda")
@pytest.mark.usefixtures("small_tiles")
def test_where_the_formula_is_not_finite(backend: str, operator: str, turn: Turn) -> None:
    """Also of carried rows. What masks hide, and other gradients, which are NaN or not by autograd's way, stand elsewhere."""
    sizes = SMALL._replace(queries=17, keys=19, regions=19, words=17, heads=2) if backend != "streaming" else SMALL
    for call, number in turn.meet(calls(operator, backend, sizes, F32)):
        options = {name: x for name, x in call.options.items() if not name.endswith(("_mask", "is_causal", "_lengths"))}
        call, tensors = replace(call, options=options), call.in_dtype(F32, torch.get_default_device())
        cotangents = [torch.randn_like(x) for x in floating(call.run(tensors, backend="reference"))]
        for name, x in tensors.items():
            if name in NO_NUMBERS or "sigma" in tensors:  # infinite distances are a row without keys in the formula
                continue
            filled = {**tensors, name: x.clone()}
            filled[name].view(-1)[x.numel() // 3] = number
            got, want = (results(call, of, filled, cotangents) for of in (backend, "reference"))
            for result, formula in want.items():
                title = f"{call.title}: {result} with {number} in {name}"
                ours, theirs = got[result].isfinite(), formula.isfinite()
                lost, more = (ours & ~theirs).nonzero()[:3].tolist(), (theirs & ~ours).nonzero()[:3].tolist()
                if "grad" not in result or "carrier" in result:
                    assert not lost, f"{title} is finite at {lost}"
                    assert not more or "vector" in tensors, f"{title} is not finite at {more}"
