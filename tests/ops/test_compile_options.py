"""torch.compile: lengths and numbers that vary do not make a graph each; Inductor, dropout."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops.every_call import CALLS, every_call, gradients, leaves, outputs_of
from tests.helpers.ops.score_cases import TORCH_JIT
from tests.helpers.releases import OLDER_TORCH
from vlattn_fast import scores as S

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
    """All of them at once: a graph for each value of one would be too many. test_dropout_under_compile varies dropout_p."""
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


@TORCH_JIT
@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    """A fake layout that differs from the real one shows here: Inductor writes code for the fake's."""
    torch._dynamo.reset()
    score = {"w": torch.randn(6, 6)}
    x = {name: torch.randn(2, 3, 9, 6) for name in ("query", "key")} | {"value": torch.randn(2, 3, 9, 4)} | score

    def fn(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
        mask = torch.ones(2, 9, dtype=torch.bool).index_fill(1, torch.tensor([8]), False)
        a, lse = va.score_attention(query, key, value, score="dot", return_lse=True, key_mask=mask)
        b = va.score_attention(query, key, value, score=S.General(w, activation="tanh"), key_mask=mask)
        return (a * lse[..., None].sigmoid() + b).transpose(1, 2).reshape(2, 9, 12)

    found = outputs_and_grads(torch.compile(fn, fullgraph=True), x)
    expected = outputs_and_grads(fn, x)
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch.compile
@pytest.mark.slow
def test_dropout_under_compile() -> None:
    """Drawn anew at each call, and one graph for all probabilities but the first."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eye = torch.eye(30).expand(1, 2, 30, 30)
    x = torch.randn(1, 2, 40, 4)
    compiled = torch.compile(lambda q, k, p: va.score_attention(q, k, eye, dropout_p=p), backend=counter, fullgraph=True)
    first, second = compiled(x, x[:, :, :30], 0.3), compiled(x, x[:, :, :30], 0.3)
    assert not torch.equal(first, second)
    for p in (0.3, 0.45, 0.6, 0.85):
        assert abs((compiled(x, x[:, :, :30], p) != 0).double().mean() - (1 - p)) < 0.05
    assert counter.frame_count <= 2
    torch._dynamo.reset()
