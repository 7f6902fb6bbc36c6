"""The operators that csrc/torch/ registers by torch's stable ABI, in processes that do not import vlattn_fast, and in one without
Python: the same bits as the operators of Python."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlattn_fast as va
from vlattn_fast import ops
from vlattn_fast.backends import native
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops._ops import NAMESPACE
from vlattn_native import building

TORCH = Path(torch.__file__).parent
OPERATORS = getattr(torch.ops, NAMESPACE)


@pytest.fixture(scope="module")
def library() -> Path:
    return building.operators()


def run(*command: Any, kernels: Path = native.library.path) -> str:
    environment = {**os.environ, "VLATTN_CPU_LIBRARY": str(kernels), "LD_LIBRARY_PATH": str(TORCH / "lib")}
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def program(code: str, *arguments: Path, kernels: Path = native.library.path) -> str:
    return run(sys.executable, "-c", code, *arguments, kernels=kernels)


LEFT_OUT = (
    "_second",
    "_weights",
    "_sums",
    *(f"{name}_backward" for name in ("recurrent_step", "maxsim", "stacked_cross_attention")),
)


class Recorder(TorchDispatchMode):
    """Notes each call of an operator that the library has as its name, arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2]
        if func.namespace == NAMESPACE and not name.endswith(LEFT_OUT):
            self.calls.append((name, args, results))
        return results


REPLAY = f"""
import sys, torch
torch.ops.load_library(sys.argv[1])
torch.set_num_threads(1)
operators = torch.ops.{NAMESPACE}
def flat(x): return [x] if isinstance(x, torch.Tensor) else [one for part in x for one in flat(part)]
for name, arguments, expected in torch.load(sys.argv[2]):
    for x, y in zip(flat(getattr(operators, name)(*arguments)), flat(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape) and (x.stride() == y.stride() or x.numel() == 0), name
        assert torch.equal(x.nan_to_num(0.5), y.nan_to_num(0.5)) and torch.equal(x.isnan(), y.isnan()), name
    print(name, getattr(operators, name).default._schema)
x = torch.ones(1, 2, 3)
try: operators.maxsim(x, x, None, None, False, "triton")
except RuntimeError as error: print(str(error).split(chr(10))[0])
assert "vlattn_fast" not in sys.modules
"""


def what_the_cases_leave_out() -> None:
    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def differentiate(*outputs: torch.Tensor | None) -> None:
        differentiable = [x for x in outputs if x is not None and x.requires_grad]
        torch.autograd.backward(differentiable, [torch.randn_like(x) for x in differentiable], retain_graph=True)

    x, mask, key, vector = leaf(2, 3, 5, 4), torch.randn(5, 5, dtype=torch.float64), leaf(2, 1, 5, 4), leaf(3, 4)
    differentiate(va.score_attention(x, x, x, attn_mask=mask, dropout_p=0.3, backend="cpu"))
    differentiate(va.score_attention(x, key, key, score=va.scores.Additive(vector), enable_gqa=True))  # 3 heads over 1
    differentiate(*va.attention_statistics(x, x, statistics=("entropy", "lse"), attn_mask=mask, backend="cpu"))
    differentiate(*va.attention_statistics(x, x, statistics=("max_logit", "lse"), attn_mask=mask, backend="cpu"))
    va.stacked_cross_attention(x[0], x[0], first_norm="clipped", backend="cpu")
    va.stacked_cross_attention(x[0], x[0], score="cosine", backend="cpu")
    some = mask[:4, :4][None].expand(2, 3, 4, 4)[..., :1]
    differentiate(va.relevancy_step(x[:, 0, :1], x[:, :, :4], x, rule="attention", attn_mask=some, backend="cpu"))
    for sizes in ((2, 0, 5, 4), (2, 2, 0, 4)):
        query, key = leaf(*sizes), leaf(*sizes[:2], 6, 4)
        differentiate(va.score_attention(query, key, key, score=va.scores.Cosine()))
        differentiate(*va.attention_statistics(query, key), *va.relevancy_attention(query, query, query, leaf(2, 3, sizes[2])))
        differentiate(va.relevancy_step(leaf(2, 3, sizes[2]), query, key, rule="attention"))
    query = leaf(2, 4, 11, 4)
    for rule in ("gradient", "attention"):
        for heads, rows in ((4, 1), (2, 3), (4, 17)):  # one kernel or the other, and behind the gradients
            key = leaf(2, heads, 11, 4)
            for q, k in ((query, key), (query.detach(), key.detach())):
                out, carried = va.relevancy_attention(q, k, k, leaf(2, rows, 11), rule=rule, enable_gqa=True)
                differentiate(out, carried), differentiate(carried)
        half = leaf(2, 4, 11, 4, dtype=torch.bfloat16)
        differentiate(*va.relevancy_attention(half, half, half, leaf(2, 3, 11), rule=rule, sink=leaf(4)))
    blocks = [torch.randn(2, 3, tokens, 4) for tokens in (5, 6, 5, 6, 5, 6, 6, 5)]
    options = (None, None, "cacr", "softmax", "both", 0.5, "cpu")
    OPERATORS.congruence_loss_backward(torch.randn(2), torch.empty(0), *blocks, *options)  # as torch.func.vmap


def cases_of_cpu() -> list[Example]:
    """Of operators with a CPU kernel; none beside a given log-sum-exp, where Python has gradients that this library refuses."""
    refusals = {
        case: ops.OPERATORS[case.operator].refusals("cpu", case.arguments(case.in_dtype(torch.float32)))
        for case in verify.cases()
        if case.complete is dict
    }
    return [case for case, reasons in refusals.items() if not reasons]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    with Recorder() as recorder:
        for case in cases_of_cpu():
            for dtype in (torch.float32, torch.bfloat16):
                verify._run(case, case.in_dtype(dtype), "cpu")
        what_the_cases_leave_out()
    path = tmp_path_factory.mktemp("calls") / "calls.pt"
    torch.save([call for call in recorder.calls if call[1][-1] == "cpu" or call[0] == "group_rows"], path)
    return path


def test_they_are_those_of_python_to_the_bit(library: Path, calls: Path) -> None:
    *schemas, refusal = program(REPLAY, library, calls).splitlines()
    said = dict(line.split(" ", 1) for line in schemas)
    assert said == {name: str(getattr(OPERATORS, name).default._schema) for name in said}
    names = {name for case in cases_of_cpu() for name in (case.operator, f"{case.operator}_backward")}
    of_python = {name for name in names if hasattr(OPERATORS, name) and name not in LEFT_OUT}
    assert of_python | {"group_rows"} == said.keys()
    assert "has the kernels of backend='cpu' alone; this graph was exported with backend='triton'. Export it" in refusal


# Each tensor of a backward pass with one row less, along each dimension, unless that is another valid call.
SHORT = f"""
import sys, torch
torch.ops.load_library(sys.argv[1])
UNREAD = "mass", "maximum", "row_max", "mean_x"
FREE = ("key", 1), ("other_key", 1), ("value", 1), ("grad_carrier", 1), ("row_bias", 3), ("topk_indices", 2)
OF_MEANS = "indexer_divergence_backward", "query", 1  # over any number of heads
BROADCAST = "attn_mask", "sink", "residual_weight", "attention_weight"
for name, arguments, _ in torch.load(sys.argv[2]):
    operator = getattr(torch.ops.{NAMESPACE}, name)
    for i, argument in enumerate(operator.default._schema.arguments if name.endswith("_backward") else ()):
        x = arguments[i]
        for dim in range(x.dim() if isinstance(x, torch.Tensor) and argument.name not in UNREAD else 0):
            if x.shape[dim] < (3 if argument.name in BROADCAST else 1) or (argument.name, dim) in FREE: continue
            if (name, argument.name, dim) == OF_MEANS: continue
            try: operator(*arguments[:i], x.narrow(dim, 0, x.shape[dim] - 1), *arguments[i + 1:])
            except RuntimeError: continue
            print(name, argument.name, dim, tuple(x.shape))
"""


def test_a_short_tensor_of_a_backward_pass_is_refused(library: Path, calls: Path) -> None:
    assert program(SHORT, library, calls) == ""


BY_NAME = f"""
import os, sys, torch
torch.ops.load_library(sys.argv[1])
operators, x = torch.ops.{NAMESPACE}, torch.randn(1, 2, 5, 4)
usual = dict(query=x, key=x, score="dot", parameter=0.0, scale=0.5, is_causal=False, dropout_p=0.0, rule="gradient",
    row_normalize=False, need_inputs=True, num_groups=0, backend="cpu")

def call(name, **given):
    operator = getattr(operators, name).default
    return operator(*[(usual | given).get(argument.name) for argument in operator._schema.arguments])
"""

WRONG = (
    BY_NAME
    + """
few = torch.randn(1, 2, 3, 4)

def attend(value=x, **given):
    call("score_attention", value=value, **given)

def wrong(words, call):
    try: call()
    except RuntimeError as error: assert words in str(error), error
    else: raise AssertionError(words)

wrong("value must have the shape (1, 2, 5, any); got (1, 2, 3, 4)", lambda: attend(value=few))
wrong("key must have the shape (1, any, any, 4); got (1, 2, 5, 3)", lambda: attend(key=x[..., 1:]))
wrong("key must have the shape (any, any, any, any); got (2, 5, 4)", lambda: attend(key=x[0]))
wrong("key has a dtype", lambda: attend(key=x.half()))
wrong("query has a dtype", lambda: attend(x > 0, query=x > 0, key=x > 0))
wrong("equal numbers of heads", lambda: attend(key=x[:, :0]))
wrong("vector must be given", lambda: attend(score="additive"))
wrong("seed must have the shape ()", lambda: attend(seed=torch.empty(0, dtype=torch.int64)))
wrong("attn_mask must have the shape (1, 2, 5, 5); got (2, 5)", lambda: attend(attn_mask=x[0, :, :, 0]))
wrong("key_mask has a dtype", lambda: attend(key_mask=x[:, 0, :, 0]))
wrong("key_groups must be given", lambda: attend(row_bias=x))
wrong("grad_output must be given", lambda: call(
    "relevancy_step", relevancy=x[:, 0, :1, :1].expand(1, 1, 5), value=x))
wrong("documents must have the shape (any, any, 4)", lambda: operators.maxsim(x[0], x[0, :, :, 1:], None, None, False, "cpu"))
wrong("lengths must lie from 0 to 5; got 9", lambda: operators.stacked_cross_attention(
    x[0], x[0], torch.tensor([9, 1]), None, 0, "t2i", None, 9.0, "mean", 6.0, "cpu"))
wrong("image_key must have the shape", lambda: operators.congruence_loss(
    x, few, x, few, *[x] * 4, None, None, "cacr", "softmax", "both", 0.5, False, "cpu"))

lse = x[..., 0].double()
def backward(grad_out=x, out=x, lse=lse, **given):
    call("score_attention_backward", grad_out=grad_out, value=x, out=out, lse=lse, **given)
wrong("grad_out has a dtype", lambda: backward(x.half()))
wrong("out has a dtype", lambda: backward(out=x.double()))
wrong("lse has a dtype", lambda: backward(lse=lse.float()))
wrong("seed has a dtype", lambda: backward(seed=lse[0, 0, 0]))
wrong("grad_carrier has a dtype", lambda: call(
    "relevancy_attention_backward", grad_carrier=x[:, 0, :, :2].mT.double(), value=x, out=x, lse=lse))
for argmax, words in ((None, "argmax must be given"), (lse, "argmax has a dtype")):
    wrong(words, lambda: call("attention_statistics_backward", argmax=argmax, statistics="entropy"))
wrong("gradients must have the shape (160); got (4)", lambda: operators.congruence_loss_backward(
    x[0, 0, 0, :1], x[0, 0, 0], *[x] * 8, None, None, "cacr", "softmax", "both", 0.5, "cpu"))
print("all were refused")
"""
)


def test_wrong_tensors_are_refused(library: Path) -> None:
    assert program(WRONG, library) == "all were refused\n"


OTHER = f"""
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.ones(1, 2, 3)
try: torch.ops.{NAMESPACE}.maxsim(x, x, None, None, False, "cpu")
except RuntimeError as error: print(str(error).split(chr(10))[0])
"""


def test_a_library_without_kernels_is_refused(library: Path) -> None:
    said = program(OTHER, library, kernels=library)
    assert f"{library} has no vlattn_set_threads: VLATTN_CPU_LIBRARY must name libvlattn_cpu.so" in said


GROWTH = (
    BY_NAME
    + """
torch.set_num_threads(1)
x, queries = torch.randn(2, 2, 3, 4), torch.randn(2, 3, 4)
given = dict(query=x, key=x, value=x, grad_out=x, out=x, lse=x[..., 0].double())

def calls(count):
    for _ in range(count):
        operators.maxsim(queries, x[0], None, None, False, "cpu")
    for _ in range(count):
        call("attention_statistics", statistics="entropy maximum received", **given)
    for _ in range(count):
        call("score_attention_backward", **given | {"key": x[:, :1]})
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = calls(2000)
print(calls(8000) - before)
"""
)


def test_calls_leave_no_memory(library: Path) -> None:
    assert int(program(GROWTH, library)) < 2**20


def test_a_program_in_cpp_calls_them(library: Path, tmp_path: Path) -> None:
    program, source = tmp_path / "program", Path(__file__).with_name("stable.cpp")
    include, link = ["-isystem", TORCH / "include"], [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    version = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    run("c++", "-std=c++17", "-O0", version, *include, source, "-o", program, *link, "-Wl,--no-as-needed,--allow-shlib-undefined")
    expected = 7.0, 0.25 * 8 + 0.75 * 4, math.log(1 + 3)
    assert [float(x) for x in run(program, library).split()] == pytest.approx(expected, abs=1e-6)


PACKAGED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
query, expected = torch.load(sys.argv[3])
for x, y in zip(model(query), expected, strict=True): torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
assert "vlattn_fast" not in sys.modules
"""


class Attending(torch.nn.Module):
    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = va.score_attention(query, query, query, is_causal=True, backend="cpu")
        statistics = va.attention_statistics(query, query, statistics=("entropy", "received"), backend="cpu")
        return out * 2, statistics.received


def test_a_package_of_aotinductor_runs_without_vlattn_fast(library: Path, tmp_path: Path) -> None:
    query = torch.randn(2, 3, 17, 8)
    torch.save((query, Attending()(query)), tmp_path / "query.pt")
    exported = torch.export.export(Attending(), (query,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "attending.pt2"))
    program(PACKAGED, library, package, tmp_path / "query.pt")
