"""score_attention under torch.compile: Inductor, dropout."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops.score_cases import TORCH_JIT
from vlattn_fast import scores as S


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
