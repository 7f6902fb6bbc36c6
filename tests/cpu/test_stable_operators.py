"""The operators that csrc/torch/ registers by torch's stable ABI, in processes that do not import vlattn_fast, and in one without
Python: the same bits as the operators of Python."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlattn_fast as va
from tests.helpers import programs
from tests.helpers.cuda import building
from tests.helpers.releases import needs_stable_abi
from vlattn_fast.backends import native
from vlattn_fast.checking import verify
from vlattn_fast.ops._ops import NAMESPACE

pytestmark = [needs_stable_abi, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")]
TORCH = Path(torch.__file__).parent
OPERATORS = getattr(torch.ops, NAMESPACE)


@pytest.fixture(scope="module")
def library() -> Path:
    return building.build("torch", f"-DVLATTN_TORCH={TORCH}") / "libvlattn_torch.so"


def run(*command: Any) -> str:
    environment = {**os.environ, "VLATTN_CPU_LIBRARY": str(native.library.path), "LD_LIBRARY_PATH": str(TORCH / "lib")}
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def program(code: str, *arguments: Path, kernels: Path = native.library.path) -> str:
    done = programs.run(code, *arguments, VLATTN_CPU_LIBRARY=str(kernels))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Recorder(TorchDispatchMode):
    """Notes each call of a forward operator as its name, arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2]
        if func.namespace == NAMESPACE and not name.endswith(("_backward", "_second", "_sums")):
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


def test_they_are_those_of_python_to_the_bit(library: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with Recorder() as recorder:
        for case in verify.cases():
            for dtype in (torch.float32, torch.bfloat16):
                verify._run(case, case.in_dtype(dtype), "cpu")
        x, mask = torch.randn(2, 3, 5, 4), torch.randn(5, 5, dtype=torch.float64)  # what the cases leave out
        va.score_attention(x, x, x, attn_mask=mask, dropout_p=0.3, backend="cpu")
        va.attention_statistics(x, x, statistics=("max_logit", "lse"), attn_mask=mask, backend="cpu")
        va.stacked_cross_attention(x[0], x[0], first_norm="clipped", backend="cpu")
        va.relevancy_step(x[:, 0, :1], x[:, :, :4], x, rule="attention", attn_mask=mask[:4, :4][None].expand(2, 3, 4, 4)[..., :1])
        key, vector = torch.randn(2, 1, 5, 4), torch.randn(3, 4)
        va.score_attention(x, key, key, score=va.scores.Additive(vector), enable_gqa=True)
    calls = [call for call in recorder.calls if call[1][-1] == "cpu" or call[0] == "group_rows"]
    torch.save(calls, tmp_path / "calls.pt")
    *schemas, refusal = program(REPLAY, library, tmp_path / "calls.pt").splitlines()
    said = dict(line.split(" ", 1) for line in schemas)
    assert said == {name: str(getattr(OPERATORS, name).default._schema) for name in said}
    of_python = {name for name in {case.operator for case in verify.cases()} if hasattr(OPERATORS, name)}
    assert of_python | {"group_rows"} == said.keys()
    assert "has the kernels of backend='cpu' alone; this graph was exported with backend='triton'. Export it" in refusal


WRONG = f"""
import sys, torch
torch.ops.load_library(sys.argv[1])
operators = torch.ops.{NAMESPACE}
x, few, none = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4), [None] * 7

def attend(query=x, key=x, value=x, vector=None, mask=None, keys=None, bias=None, groups=None, seed=None, score="dot"):
    operators.score_attention(query, key, value, vector, mask, keys, bias, groups, seed, None, score, 0.0, 0.5, 0.0, False, "cpu")

def wrong(words, call):
    try: call()
    except RuntimeError as error: assert words in str(error), error
    else: raise AssertionError(words)

wrong("value must have the shape (1, 2, 5, any); got (1, 2, 3, 4)", lambda: attend(value=few))
wrong("key must have the shape (1, any, any, 4); got (1, 2, 5, 3)", lambda: attend(key=x[..., 1:]))
wrong("key must have the shape (any, any, any, any); got (2, 5, 4)", lambda: attend(key=x[0]))
wrong("key has a dtype", lambda: attend(key=x.half()))
wrong("query has a dtype", lambda: attend(*[x > 0] * 3))
wrong("equal numbers of heads", lambda: attend(key=x[:, :0]))
wrong("vector must be given", lambda: attend(score="additive"))
wrong("seed must have the shape ()", lambda: attend(seed=torch.empty(0, dtype=torch.int64)))
wrong("attn_mask must have the shape (1, 2, 5, 5); got (2, 5)", lambda: attend(mask=x[0, :, :, 0]))
wrong("key_mask has a dtype", lambda: attend(keys=x[:, 0, :, 0]))
wrong("key_groups must be given", lambda: attend(bias=x))
wrong("grad_output must be given", lambda: operators.relevancy_step(
    x[:, 0, :1, :1].expand(1, 1, 5), x, x, x, *none[:6], "gradient", False, "dot", 0.0, 0.5, False, "cpu"))
wrong("documents must have the shape (any, any, 4)", lambda: operators.maxsim(x[0], x[0, :, :, 1:], None, None, False, "cpu"))
wrong("lengths must lie from 0 to 5; got 9", lambda: operators.stacked_cross_attention(
    x[0], x[0], torch.tensor([9, 1]), None, "t2i", None, 9.0, "mean", 6.0, "cpu"))
wrong("image_key must have the shape", lambda: operators.congruence_loss(
    x, few, x, few, *[x] * 4, None, None, "cacr", "both", 0.5, False, "cpu"))
print("all were refused")
"""


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


GROWTH = f"""
import os, sys, torch
torch.ops.load_library(sys.argv[1])
torch.set_num_threads(1)
operators, x, queries = torch.ops.{NAMESPACE}, torch.randn(2, 2, 3, 4), torch.randn(2, 3, 4)

def calls(count):
    for _ in range(count):
        operators.maxsim(queries, x[0], None, None, False, "cpu")
    for _ in range(count):
        operators.attention_statistics(x, x, *[None] * 5, 0, "entropy maximum received", "dot", 0.0, 0.5, False, "cpu")
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = calls(2000)
print(calls(8000) - before)
"""


@pytest.mark.skipif("VLATTN_TEST_SANITIZED" in os.environ, reason="a sanitizer has memory of its own")
def test_calls_leave_no_memory(library: Path) -> None:
    assert int(program(GROWTH, library)) < 2**20


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_without_vlattn_fast(library: Path, tmp_path: Path) -> None:
    query = torch.randn(2, 3, 17, 8)
    torch.save((query, Attending()(query)), tmp_path / "query.pt")
    exported = torch.export.export(Attending(), (query,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "attending.pt2"))
    program(PACKAGED, library, package, tmp_path / "query.pt")
