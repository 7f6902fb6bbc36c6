"""torch.compile with lengths and numbers that vary: no graph breaks, and a graph is not made for each value."""

import pytest
import torch
import torch._dynamo.testing

from tests.helpers.ops.every_call import CALLS, every_call, gradients, leaves, outputs_of
from tests.helpers.releases import OLDER_TORCH

# with these aot_eager would trace the operator of another call again: what stands before and after it is left
TRACED = (
    *("score_attention, cosine", "score_attention, general", "score_attention, hadamard", "relevancy_attention, rollout"),
    *("congruence_loss, iais_singular", "congruence_loss, iais_distributed", "stacked_cross_attention, i2t", "damsm_similarity"),
)
AUTOMATIC = ("score_attention", "relevancy_attention")  # a graph of constants first, as torch.compile does by itself


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("name, dynamic", [*((name, True) for name in CALLS), *((name, None) for name in AUTOMATIC)])
@pytest.mark.slow
def test_lengths_and_numbers_that_vary(name: str, dynamic: bool | None) -> None:
    """All of them at once: a graph for each value of one would be too many. test_score_attention_compile.py varies dropout_p."""
    every = every_call(name, 7)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager" if name in TRACED else "aot_eager")
    compiled = torch.compile(lambda x, options: every.run(x, **options), backend=counter, fullgraph=True, dynamic=dynamic)
    for i, n in enumerate((7, 8, 12, 16, 17)):  # 8 is another size, too; from 16 keys on streaming has other means
        torch.manual_seed(n)
        x = leaves(every_call(name, n))
        options = {option: values[i] for option, values in every.floats.items() if option != "dropout_p"}
        results = []
        for function in (compiled, every.run):
            outputs = outputs_of(function(x, options) if function is compiled else function(x, **options))
            results.append([*outputs, *gradients(outputs, x)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    if OLDER_TORCH and "softcap" in name:
        pytest.skip("torch 2.9 makes a graph for each quotient of two numbers")
    assert counter.frame_count <= 2  # one for the first call, one for all others
