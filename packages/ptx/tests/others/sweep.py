# ruff: noqa: E501
"""Kernels of Liger-Kernel and flash-linear-attention by their functions, on each architecture. `python -m tests.others.sweep`, in
packages/ptx, after `python -m pytest tests/others` has installed them, writes kernels.csv: a row a kernel and function.

Each function runs forward and backward with small inputs and is compared with a formula in float64. A kernel passed if nothing was
found in its launches and the function's numbers are right.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import ptx
from ptx.architectures import ARCHITECTURES
from ptx.cuda_tensors import on_cpu

HERE = Path(__file__).parent
ROWS = HERE / "kernels.csv"
sys.path.append(str(HERE.parents[1] / "build" / "others"))

from fla.modules.activations import logsigmoid, sigmoid, swiglu, swish  # noqa: E402
from fla.modules.norm.fused_norm_gate import rms_norm_gated  # noqa: E402
from fla.modules.norm.l2norm import l2norm  # noqa: E402
from fla.modules.norm.layernorm import layer_norm, rms_norm  # noqa: E402
from fla.modules.rotary import rotary_embedding  # noqa: E402
from fla.modules.token_shift import token_shift  # noqa: E402
from fla.ops.attn import parallel_attn  # noqa: E402
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule  # noqa: E402
from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # noqa: E402
from fla.ops.gla import chunk_gla, fused_recurrent_gla  # noqa: E402
from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn  # noqa: E402
from fla.ops.linear_attn import chunk_linear_attn, fused_recurrent_linear_attn  # noqa: E402
from fla.ops.retention import chunk_retention, fused_recurrent_retention  # noqa: E402
from fla.ops.rwkv6 import fused_recurrent_rwkv6  # noqa: E402
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla  # noqa: E402
from liger_kernel.ops.dyt import LigerDyTFunction  # noqa: E402
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # noqa: E402
from liger_kernel.ops.geglu import LigerGELUMulFunction  # noqa: E402
from liger_kernel.ops.group_norm import LigerGroupNormFunction  # noqa: E402
from liger_kernel.ops.jsd import LigerJSDFunction  # noqa: E402
from liger_kernel.ops.kl_div import LigerKLDivLossFunction  # noqa: E402
from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # noqa: E402
from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction  # noqa: E402
from liger_kernel.ops.poly_norm import LigerPolyNormFunction  # noqa: E402
from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction  # noqa: E402
from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # noqa: E402
from liger_kernel.ops.rope import LigerRopeFunction  # noqa: E402
from liger_kernel.ops.softmax import LigerSoftmaxFunction  # noqa: E402
from liger_kernel.ops.sparsemax import LigerSparsemaxFunction  # noqa: E402
from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # noqa: E402
from liger_kernel.ops.tvd import LigerTVDLossFunction  # noqa: E402
from liger_kernel.transformers.functional import liger_cross_entropy  # noqa: E402

Function = Callable[..., Tensor]
FLOAT32, TF32, BF16 = 5e-6, 5e-3, 2e-2  # of the largest number
T, D = 40, 16  # tokens, and head_dim


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, beta: Tensor | None = None, scale: float = D**-0.5
) -> Tensor:
    """Linear attention with a state: decay by exp(decay), and, with beta, the delta rule. (B, T, H, D) each."""
    state, rows = q.new_zeros(*q.shape[:1], q.shape[2], D, D), []
    for t in range(q.shape[1]):
        if decay is not None:
            now = decay[:, t].exp()
            state = state * (now[..., None] if now.dim() == 3 else now[..., None, None])
        change = v[:, t]
        if beta is not None:
            change = (change - torch.einsum("bhkv, bhk -> bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * change[:, :, None]
        rows.append(torch.einsum("bhkv, bhk -> bhv", state, q[:, t]) * scale)
    return torch.stack(rows, 1)


def retained(q: Tensor) -> Tensor:
    """The decay of retention: a number for each of two heads."""
    return (1 - 2.0 ** (-5 - torch.arange(2, dtype=q.dtype))).log().expand(*q.shape[:3])


def rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    state, rows = r.new_zeros(1, 2, D, D), []
    for t in range(r.shape[1]):
        new = k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhkv, bhk -> bhv", state + u[None, :, :, None] * new, r[:, t]))
        state = state * w[:, t].exp()[..., None] + new
    return torch.stack(rows, 1)


def gated(x: Tensor, g: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = state * g[:, t].exp() + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def shifted(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1] - x


def sparsemax(x: Tensor) -> Tensor:
    ordered, ranks = x.sort(-1, descending=True).values, torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    support = (1 + ranks * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    return (x - (ordered.cumsum(-1).gather(-1, support - 1) - 1) / support).relu()


def jsd(x: Tensor, y: Tensor) -> Tensor:
    middle = (0.5 * (x.exp() + y.exp())).log()
    return 0.5 * (
        F.kl_div(middle, x, reduction="batchmean", log_target=True) + F.kl_div(middle, y, reduction="batchmean", log_target=True)
    )


def x(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def logs(*shape: int) -> Tensor:
    return torch.randn(shape).log_softmax(-1).requires_grad_()


def heads(count: int = 3, last: int = D) -> list[Tensor]:
    return [x(1, T, 2, last) for _ in range(count)]


def cosines() -> tuple[Tensor, Tensor]:
    angles = torch.arange(T)[:, None] / 100 ** (torch.arange(D // 2) / (D // 2))
    return tuple(torch.cat([one, one], -1)[None] for one in (angles.cos(), angles.sin()))  # type: ignore[return-value]


def half_angles() -> tuple[Tensor, Tensor]:
    return tuple(one[0, :, : D // 2] for one in cosines())  # type: ignore[return-value]


def rope(q: Tensor, k: Tensor) -> Tensor:
    return torch.cat(LigerRopeFunction.apply(q * 1, k * 1, *cosines()), 1)


# function, formula, error, inputs that have gradients
FUNCTIONS: dict[str, tuple[Function, Function, float, Callable[[], list[Tensor]]]] = {
    "liger rms_norm": (lambda a, w: LigerRMSNormFunction.apply(a, w, 1e-6), lambda a, w: rms(a) * w, FLOAT32, lambda: [x(7, 96), x(96)]),
    "liger layer_norm": (lambda a, w, b: LigerLayerNormFunction.apply(a, w, b, 1e-5), lambda a, w, b: F.layer_norm(a, (96,), w, b, 1e-5), FLOAT32, lambda: [x(7, 96), x(96), x(96)]),
    "liger fused_add_rms_norm": (lambda a, r, w: sum(LigerFusedAddRMSNormFunction.apply(a, r, w, 1e-6)), lambda a, r, w: rms(a + r) * w + a + r, FLOAT32, lambda: [x(7, 96), x(7, 96), x(96)]),
    "liger modulated_rms_norm": (lambda a, w, s, b: LigerModulatedRMSNormFunction.apply(a, w, s, b, 1e-6), lambda a, w, s, b: rms(a) * w * (1 + s[:, None]) + b[:, None], FLOAT32, lambda: [x(2, 5, 96), x(96), x(2, 96), x(2, 96)]),
    "liger group_norm": (lambda a, w, b: LigerGroupNormFunction.apply(a, w, b, 6, 2, 1e-5), lambda a, w, b: F.group_norm(a, 2, w, b, 1e-5), FLOAT32, lambda: [x(3, 6, 50), x(6), x(6)]),
    "liger poly_norm": (lambda a, w, b: LigerPolyNormFunction.apply(a, w, b, 1e-6), lambda a, w, b: w[0] * rms(a**3) + w[1] * rms(a**2) + w[2] * rms(a) + b, FLOAT32, lambda: [x(7, 96), x(3), x()]),
    "liger dyt": (LigerDyTFunction.apply, lambda a, s, w, b: torch.tanh(s * a) * w + b, FLOAT32, lambda: [x(7, 96), x(1), x(96), x(96)]),
    "liger softmax": (LigerSoftmaxFunction.apply, lambda a: a.softmax(-1), FLOAT32, lambda: [x(7, 100)]),
    "liger sparsemax": (lambda a: LigerSparsemaxFunction.apply(a, -1), sparsemax, FLOAT32, lambda: [x(7, 100)]),
    "liger swiglu": (LigerSiLUMulFunction.apply, lambda a, b: F.silu(a) * b, FLOAT32, lambda: [x(7, 96), x(7, 96)]),
    "liger geglu": (LigerGELUMulFunction.apply, lambda a, b: F.gelu(a, approximate="tanh") * b, FLOAT32, lambda: [x(7, 96), x(7, 96)]),
    "liger relu_squared": (LigerReLUSquaredFunction.apply, lambda a: a.relu().square(), FLOAT32, lambda: [x(7, 96)]),
    "liger kl_div": (lambda a: LigerKLDivLossFunction.apply(a, y(7, 100)), lambda a: F.kl_div(a, y(7, 100).double(), reduction="batchmean"), FLOAT32, lambda: [logs(7, 100)]),
    "liger jsd": (lambda a: LigerJSDFunction.apply(a, y(7, 100).log()), lambda a: jsd(a, y(7, 100).double().log()), FLOAT32, lambda: [logs(7, 100)]),
    "liger cross_entropy": (lambda a: liger_cross_entropy(a, target(3000)), lambda a: F.cross_entropy(a, target(3000)), FLOAT32, lambda: [x(6, 3000)]),
    "liger tvd": (lambda a: LigerTVDLossFunction.apply(a, y(7, 100)), lambda a: 0.5 * (a - y(7, 100).double()).abs().sum() / 7, FLOAT32, lambda: [torch.rand(7, 100).requires_grad_()]),
    "liger rope": (rope, lambda q, k: torch.cat([rotated(one, *(c.double() for c in cosines())) for one in (q, k)], 1), FLOAT32, lambda: [x(1, 2, T, D), x(1, 2, T, D)]),
    "fla sigmoid": (sigmoid, torch.sigmoid, FLOAT32, lambda: [x(7, 96)]),
    "fla l2norm": (l2norm, lambda a: a * (a.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), FLOAT32, lambda: [x(7, 96)]),
    "fla rms_norm": (lambda a, w: rms_norm(a, w, None, eps=1e-6), lambda a, w: rms(a) * w, FLOAT32, lambda: [x(7, 96), x(96)]),
    "fla layer_norm": (lambda a, w, b: layer_norm(a, w, b, eps=1e-5), lambda a, w, b: F.layer_norm(a, (96,), w, b, 1e-5), FLOAT32, lambda: [x(7, 96), x(96), x(96)]),
    "fla rms_norm_gated": (lambda a, g, w: rms_norm_gated(a, g, w, None, activation="swish", eps=1e-6), lambda a, g, w: rms(a) * w * F.silu(g), FLOAT32, lambda: [x(7, 96), x(7, 96), x(96)]),
    "fla rotary_embedding": (lambda a: rotary_embedding(a, *half_angles()), lambda a: rotated(a.transpose(1, 2), *(torch.cat([c, c], -1)[None].double() for c in half_angles())).transpose(1, 2), FLOAT32, lambda: [x(1, T, 2, D)]),
    "fla logsigmoid": (logsigmoid, F.logsigmoid, FLOAT32, lambda: [x(7, 96)]),
    "fla swish": (swish, F.silu, FLOAT32, lambda: [x(7, 96)]),
    "fla swiglu": (swiglu, lambda a, b: F.silu(a) * b, FLOAT32, lambda: [x(7, 96), x(7, 96)]),
    "fla token_shift": (token_shift, shifted, FLOAT32, lambda: [x(2, T, 24)]),
    "fla chunk_hgrn": (lambda a, g: chunk_hgrn(a, g)[0], gated, FLOAT32, lambda: [x(2, T, 24), gates(2, T, 24)]),
    "fla fused_recurrent_hgrn": (lambda a, g: fused_recurrent_hgrn(a, g)[0], gated, FLOAT32, lambda: [x(2, T, 24), gates(2, T, 24)]),
    "fla fused_recurrent_linear_attn": (lambda q, k, v: fused_recurrent_linear_attn(q, k, v, normalize=False)[0], recurrence, FLOAT32, heads),
    "fla fused_recurrent_gla": (lambda q, k, v, g: fused_recurrent_gla(q, k, v, gk=g)[0], recurrence, FLOAT32, lambda: [*heads(), gates(1, T, 2, D)]),
    "fla fused_recurrent_simple_gla": (lambda q, k, v, g: fused_recurrent_simple_gla(q, k, v, g=g)[0], recurrence, FLOAT32, lambda: [*heads(), gates(1, T, 2)]),
    "fla fused_recurrent_delta_rule": (lambda q, k, v, b: fused_recurrent_delta_rule(q, k, v, b)[0], lambda q, k, v, b: recurrence(q, k, v, None, b), FLOAT32, lambda: [x(1, T, 2, D), keys(), x(1, T, 2, D), torch.rand(1, T, 2).requires_grad_()]),
    "fla fused_recurrent_retention": (lambda q, k, v: fused_recurrent_retention(q, k, v)[0], lambda q, k, v: recurrence(q, k, v, retained(q)), FLOAT32, heads),
    "fla fused_recurrent_rwkv6": (lambda r, k, v, w, u: fused_recurrent_rwkv6(r, k, v, w, u, scale=1.0)[0], rwkv6, FLOAT32, lambda: [*heads(), gates(1, T, 2, D), x(2, D)]),
    "fla chunk_retention": (lambda q, k, v: chunk_retention(q, k, v)[0], lambda q, k, v: recurrence(q, k, v, retained(q)), TF32, heads),
    "fla chunk_gla": (lambda q, k, v, g: chunk_gla(q, k, v, g)[0], recurrence, TF32, lambda: [*heads(), gates(1, T, 2, D)]),
    "fla chunk_delta_rule": (lambda q, k, v, b: chunk_delta_rule(q, k, v, b)[0], lambda q, k, v, b: recurrence(q, k, v, None, b), BF16, lambda: [one.detach().bfloat16().requires_grad_() for one in (x(1, T, 2, D), keys(), x(1, T, 2, D), torch.rand(1, T, 2))]),
    "fla chunk_gated_delta_rule": (lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b)[0], recurrence, BF16, lambda: [*(one.detach().bfloat16().requires_grad_() for one in (x(1, T, 2, D), keys(), x(1, T, 2, D))), gates(1, T, 2), torch.rand(1, T, 2).bfloat16().requires_grad_()]),
    "fla parallel_attn": (parallel_attn, attention, TF32, heads),
    "fla chunk_linear_attn": (lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0], recurrence, TF32, heads),
    "fla chunk_simple_gla": (lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0], recurrence, TF32, lambda: [*heads(), gates(1, T, 2)]),
}  # fmt: skip


def y(*shape: int) -> Tensor:
    """Probabilities without gradients, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).softmax(-1)


def target(classes: int) -> Tensor:
    return torch.tensor([1, classes - 1, -100, 5, 0, classes // 2])


def gates(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(shape)).requires_grad_()


def keys() -> Tensor:
    return F.normalize(torch.randn(1, T, 2, D), dim=-1).requires_grad_()


def outcome(name: str, arch: int) -> tuple[float, list[ptx.Launch]]:
    """The error as a multiple of what is allowed, and the launches."""
    call, formula, allowed, make = FUNCTIONS[name]
    torch.manual_seed(0)
    inputs = make()
    exact = [one.detach().double().requires_grad_() for one in inputs]
    expected = formula(*exact)
    cotangent = torch.randn(expected.shape)
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    with on_cpu(arch), ptx.emulated(arch, strict=False) as launches:
        output = call(*inputs)
        got = (output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype)))
    pairs = zip(got, (expected, *gradients), strict=True)
    errors = [float((one.detach().double() - right.detach()).abs().max() / right.detach().abs().max()) for one, right in pairs]
    return max(errors, key=lambda error: error if error == error else float("inf")) / allowed, list(launches)


def rows_of(name: str) -> list[dict[str, str]]:
    """For each kernel of the function, by architecture: passed, or what was found."""
    by_kernel: dict[str, dict[str, str]] = {}
    for arch in ARCHITECTURES:
        try:
            ratio, launches = outcome(name, arch)
        except Exception as error:
            by_kernel.setdefault("-", {})[str(arch)] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            continue
        for launch in launches:
            found = sorted({f"{one.kind} at {one.source}" for one in launch.findings})
            said = "; ".join(found) or ("passed" if ratio <= 1 else f"wrong: error {ratio:.1f} of what is allowed")
            results = by_kernel.setdefault(launch.name, {})
            if results.get(str(arch), "passed") == "passed":
                results[str(arch)] = said
    return [{"function": name, "kernel": kernel, **results} for kernel, results in by_kernel.items()]


JUDGED = {
    "liger group_norm": "Triton's, by reading, in the last bit: [a fused square](../../findings/triton_fused_square.md)",
    "liger rope": "harmless: in place, threads that do not store load the same element; with 512 elements nothing is found",
    "fla chunk_gla": "harmless: elements above the diagonal, which `tl.where` drops next",
}


def table() -> str:
    """Of the stored rows: by function, how many kernels passed on each architecture."""
    with ROWS.open() as file:
        rows = list(csv.DictReader(file))
    lines = [f"| function | kernels |{''.join(f' sm_{arch} |' for arch in ARCHITECTURES)} what was found, judged |"]
    lines.append("| --- | ---: |" + " ---: |" * len(ARCHITECTURES) + " --- |")
    for name in dict.fromkeys(one["function"] for one in rows):
        chosen = [one for one in rows if one["function"] == name]
        passed = [sum(one[str(arch)] == "passed" for one in chosen) for arch in ARCHITECTURES]
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(map(str, passed))} | {JUDGED.get(name, '')} |")
    kernels = {one["kernel"] for one in rows}
    return "\n".join([*lines, "", f"{len(kernels)} kernels in {len(rows)} rows."])


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with ROWS.open("w") as file:
        writer = csv.DictWriter(file, ["function", "kernel", *map(str, ARCHITECTURES)], lineterminator="\n")
        writer.writeheader()
        for name in names or FUNCTIONS:
            writer.writerows(rows_of(name))
            file.flush()


if __name__ == "__main__":
    print(table()) if sys.argv[1:] == ["table"] else main(sys.argv[1:])
