"""Functions of Liger-Kernel and flash-linear-attention, forward and backward, beside formulas in float64. A finding fails a test.

The libraries are imported outside of the emulation: some ask torch for the GPU that Triton names.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fla.modules.norm.fused_norm_gate import rms_norm_gated
from fla.ops.attn import parallel_attn
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.linear_attn import chunk_linear_attn
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from liger_kernel.transformers.functional import liger_cross_entropy
from torch import Tensor
from torch.nn import functional as F

import ptx
from ptx.architectures import ARCHITECTURES

FLOAT32, TF32, BF16 = 2e-6, 5e-3, 2e-2  # of the largest number, by what the kernels multiply
on_each = pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.ptx(arch=arch)) for arch in ARCHITECTURES])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def compare(call: Callable[..., Tensor], formula: Callable[..., Tensor], allowed: float, *inputs: Tensor) -> None:
    """Output and gradients. The formula goes first: some of these functions write to their inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = formula(*exact)
    cotangent = torch.randn(expected.shape)
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    output = call(*inputs)
    got = (output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype)))
    for one, other in zip(got, (expected, *gradients), strict=True):
        error = (one.detach().double() - other.detach()).abs().max() / other.detach().abs().max()
        assert error <= allowed, float(error)


@on_each
def test_rms_norm(arch: int) -> None:
    compare(
        lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6),
        lambda x, weight: F.rms_norm(x, (96,), weight, 1e-6),
        FLOAT32,
        random(7, 96),
        random(96),
    )


@on_each
def test_layer_norm(arch: int) -> None:
    compare(
        lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5),
        lambda x, weight, bias: F.layer_norm(x, (96,), weight, bias, 1e-5),
        FLOAT32,
        random(7, 96),
        random(96),
        random(96),
    )


@on_each
def test_swiglu(arch: int) -> None:
    compare(LigerSiLUMulFunction.apply, lambda a, b: F.silu(a) * b, FLOAT32, random(7, 96), random(7, 96))


def compare_cross_entropy(classes: int) -> None:
    target = torch.randint(0, classes, (6,))
    target[2] = -100
    compare(lambda x: liger_cross_entropy(x, target), lambda x: F.cross_entropy(x, target), FLOAT32, random(6, classes))


@on_each
def test_cross_entropy(arch: int) -> None:
    compare_cross_entropy(3000)


@pytest.mark.parametrize("classes, race", [(300, True), (1000, False)])
def test_a_row_that_fewer_threads_could_hold_is_a_race(classes: int, race: bool) -> None:
    """The kernel has 1024 threads. With 300 classes several of them load one element, and one stores it, in place. Of the loaded
    values none but that one's is stored, so the results are right."""
    with ptx.emulated(90, strict=False) as launches:
        compare_cross_entropy(classes)
    findings = [one for launch in launches for one in launch.findings]
    assert {one.kind.partition(":")[0] for one in findings} == ({"race in global memory"} if race else set())
    assert {one.source.partition(":")[0] for one in findings} == ({"cross_entropy.py", "utils.py"} if race else set())


@on_each
def test_gated_norm(arch: int) -> None:
    compare(
        lambda x, gate, weight: rms_norm_gated(x, gate, weight, None, activation="swish", eps=1e-6),
        lambda x, gate, weight: F.rms_norm(x, (96,), weight, 1e-6) * F.silu(gate),
        FLOAT32,
        random(7, 96),
        random(7, 96),
        random(96),
    )


@on_each
def test_linear_attention(arch: int) -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhnm, bmhd -> bnhd", 0.2 * torch.einsum("bnhd, bmhd -> bhnm", q, k).tril(), v)

    inputs = (random(1, 80, 2, 32) for _ in range(3))
    compare(lambda q, k, v: chunk_linear_attn(q, k, v, scale=0.2, normalize=False)[0], formula, TF32, *inputs)


@on_each
def test_attention(arch: int) -> None:
    def formula(*inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), is_causal=True).transpose(1, 2)

    compare(parallel_attn, formula, TF32, *(random(1, 80, 2, 32) for _ in range(3)))


@on_each
def test_gated_delta_rule(arch: int) -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        key, state, rows = F.normalize(k, dim=-1), q.new_zeros(2, 32, 32), []
        for t in range(q.shape[1]):
            state = state * gate[0, t].exp()[:, None, None]
            change = (v[0, t] - torch.einsum("hkv, hk -> hv", state, key[0, t])) * beta[0, t][:, None]
            state = state + torch.einsum("hk, hv -> hkv", key[0, t], change)
            rows.append(torch.einsum("hkv, hk -> hv", state, q[0, t]) * 32**-0.5)
        return torch.stack(rows)[None]

    compare(
        lambda q, k, v, gate, beta: chunk_gated_delta_rule(q, F.normalize(k, dim=-1), v, gate, beta)[0],
        formula,
        BF16,
        *(random(1, 80, 2, 32, dtype=torch.bfloat16) for _ in range(3)),
        F.logsigmoid(torch.randn(1, 80, 2)).requires_grad_(),
        torch.rand(1, 80, 2).bfloat16().requires_grad_(),
    )
