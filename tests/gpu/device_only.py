"""What only a GPU can show: CUDA graphs, no synchronisation, offsets beyond 32 bits, many programs. `make gpu` runs it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks._gpu import without_synchronising
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.dispatch.table import refusals
from vlattn_fast.ops import OPERATORS


def runs(backend: str, case: Example) -> bool:
    operator = OPERATORS[case.operator]
    call = operator.describe(**case.arguments(case.in_dtype(torch.bfloat16)))
    return not refusals(operator.backends, backend, call._replace(device_type="cuda"))


CASES = [
    pytest.param(backend, case, id=f"{backend}-{case.operator}-{case.name}")
    for case in verify.cases()
    for backend in ("triton", "cuda")
    if runs(backend, case)
]


def cuda(x: Tensor) -> Tensor:
    return x.cuda() if isinstance(x, Tensor) else x


def on_device(backend: str, case: Example) -> Callable[[], dict[str, Tensor]]:
    tensors = case.in_dtype(torch.bfloat16, "cuda")
    return lambda: verify._run(case, tensors, backend)


@pytest.mark.parametrize("backend, case", CASES)
def test_capture_in_a_cuda_graph(backend: str, case: Example) -> None:
    """Forward and backward replay to the same bits: no host synchronisation, no address that goes away."""
    torch.set_default_device(None)
    tensors = case.in_dtype(torch.bfloat16, "cuda")
    arguments = case.arguments({name: x.requires_grad_(case.differentiable) for name, x in tensors.items()})
    arguments = {name: cuda(x) for name, x in arguments.items()}

    def run() -> list[Tensor]:
        out = case.call(**arguments, backend=backend)
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()]
        if not case.differentiable:
            return outputs
        sent = [torch.ones_like(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(tensors.values()), sent, materialize_grads=True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which has made the tensors
    with torch.cuda.stream(stream):
        run()
        with without_synchronising(), pytest.MonkeyPatch.context() as patch:
            # outside of a capture lengths on a GPU are read to check them, which waits for it
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            eager = [x.clone() for x in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for x in captured:
        x.detach().fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, eager, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend, case", CASES)
def test_the_same_bits_each_time(backend: str, case: Example) -> None:
    torch.set_default_device(None)
    run = on_device(backend, case)
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_offsets_beyond_32_bits() -> None:
    """A key tensor of more than 2^31 elements, of which the last sample is compared."""
    torch.set_default_device("cuda")
    batch, heads, num_keys, size = 33, 16, 65536, 64
    assert batch * heads * num_keys * size > 2**31
    key = torch.randn(1, 1, num_keys, size, dtype=torch.bfloat16).expand(batch, heads, -1, -1).contiguous()
    query = torch.randn(batch, heads, 3, size, dtype=torch.bfloat16)
    out = va.score_attention(query, key, key, backend="triton", return_lse=True)[0]
    wanted = va.reference.score_attention(query[-1:, -1:], key[-1:, -1:], key[-1:, -1:])
    torch.testing.assert_close(out[-1:, -1:], wanted, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(query)
    rows = torch.ones(batch, 1, 3)
    step = va.relevancy_step(rows, query, key, key, grad, backend="triton")
    last = va.reference.relevancy_step(*(x[-1:].float() for x in (rows, query, key, key, grad)))
    assert (step[-1:] - last).abs().max() <= 5e-2 * last.abs().max()  # numbers of 1e-4


def test_more_programs_than_a_grid_axis_y_has() -> None:
    torch.set_default_device("cuda")
    query = torch.randn(70_000, 1, 2, 16, dtype=torch.bfloat16)
    out = va.score_attention(query, query, query, backend="triton", return_lse=True)[0]
    torch.testing.assert_close(out, va.reference.score_attention(query, query, query), rtol=2e-2, atol=2e-2)


def test_streaming_gives_empty_rows_zeros_on_the_device() -> None:
    """Torch's fused kernels differ in what they make of a row without keys."""
    torch.set_default_device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.randn(2, 4, 33, 64, dtype=dtype, requires_grad=True)
        mask = torch.ones(33, 33, dtype=torch.bool).index_fill(0, torch.tensor([0, 7]), False)
        hidden = torch.ones(2, 33, dtype=torch.bool)
        hidden[1] = False
        for options in ({"attn_mask": mask}, {"key_mask": hidden}):
            out = va.score_attention(query, query, query, backend="streaming", **options)
            wanted = va.reference.score_attention(query, query, query, **options)
            torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
            (grad,) = torch.autograd.grad(out.float().sum(), query)
            assert torch.isfinite(grad).all()
