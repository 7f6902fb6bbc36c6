"""Which backend runs, how a refusal reads, and what wrong input is told: the argument, what came, what is wanted."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import vlattn_fast as va
from vlattn_fast import scores as S
from vlattn_fast._ground.score_kinds import KINDS
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.checking import verify
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch import choice, limits, table
from vlattn_fast.ops import OPERATORS

MODULE = ModuleType("some")  # of functions

Q, K, V = torch.zeros(2, 4, 3, 6), torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 5, 6)
C = torch.zeros(2, 1, 3)
W, U = torch.zeros(6, 6), torch.zeros(6)
TABLES = {name: operator.backends for name, operator in OPERATORS.items()}
WITH_TRITON = [name for name, backends in TABLES.items() if "triton" in backends]


def attend(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: va.score_attention(*(args or (Q, K, V)), **options)


def scored(score: Any, query: Tensor = Q, key: Tensor = K) -> Callable[[], Any]:
    return lambda: va.score_attention(query, key, V, score=score)


def relevancy(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: va.relevancy_attention(*(args or (Q, Q, Q, C)), **options)


def step(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: va.relevancy_step(*(args or (C, Q, K, V, Q)), **options)


# name: the call, the exception, the words
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "head size": (
        attend(Q, K[..., :5], V),
        ValueError,
        "key must have query's head_dim 6; got a torch.float32 tensor of shape (2, 4, 5, 5)",
    ),
    "gqa divides": (attend(Q, K[:, :3], V[:, :3], enable_gqa=True), ValueError, "key's number of heads must divide query's 4"),
    "gqa, no key heads": (
        attend(Q, K[:, :0], V[:, :0], enable_gqa=True),
        ValueError,
        "key's number of heads must divide query's 4",
    ),
    "mask shape": (
        attend(attn_mask=torch.ones(5, 3)),
        ValueError,
        "attn_mask must broadcast to (B, H, N, M) = (2, 4, 3, 5); got",
    ),
    "mask of padding": (attend(attn_mask=torch.ones(2, 5, dtype=torch.bool)), ValueError, "; key_mask takes (B, M)"),
    "dropout over 1": (attend(dropout_p=1.5), ValueError, "dropout_p must be a finite number in [0.0, 1.0); got 1.5"),
    "dropout of 1": (attend(dropout_p=1.0), ValueError, "dropout_p must be a finite number in [0.0, 1.0)"),
    "score is a class": (attend(score=S.Dot), TypeError, "score must be one of"),
    "scale is no float": (attend(scale=10**400), ValueError, "scale must be a finite number; got 1000"),
    "score name": (
        attend(score="softmax"),
        ValueError,
        "score must be one of ('dot', 'scaled_dot', 'cosine') or a va.scores object; got 'softmax'",
    ),
    "backend name": (
        attend(backend="flash"),
        ValueError,
        "backend must be one of ('auto', 'reference', 'streaming', 'sdpa', 'cpu', 'triton', 'cuda'); got 'flash'",
    ),
    "weight shape": (
        scored(S.General(torch.zeros(6, 5))),
        ValueError,
        "weight must have shape (6, 6), or (4, 6, 6) for one per head; got",
    ),
    "slope": (
        scored(S.General(W, activation="leaky_relu", negative_slope=None)),
        TypeError,
        "negative_slope must be a real number",
    ),
    "eps": (scored(S.Cosine(-1.0)), ValueError, "eps must be a finite number in [0.0, inf]; got -1.0"),
    "vector rank": (
        scored(S.Additive(torch.zeros(()))),
        ValueError,
        "vector must have shape (A), or (H, A) for one per head; got",
    ),
    "method": (scored(S.Additive(U, method="fast")), ValueError, "method must be one of ('exact', 'series'); got 'fast'"),
    "no tolerance": (scored(S.Additive(U, method="series")), ValueError, "tolerance must be given with method='series'"),
    "idle tolerance": (scored(S.Additive(U, tolerance=0.1)), ValueError, "tolerance must be None unless method is 'series'"),
    "tolerance of text": (
        scored(S.Additive(U, method="series", tolerance="small")),
        TypeError,
        "tolerance must be a real number",
    ),
    "concat, odd": (
        lambda: S.Additive.concat(U, torch.zeros(6, 11)),
        ValueError,
        "query_size must be given if weight has an odd number",
    ),
    "concat, size": (
        lambda: S.Additive.concat(U, torch.zeros(6, 12), query_size=13),
        ValueError,
        "query_size must be an integer in [0, 12]; got 13",
    ),
    "concat, rank": (lambda: S.Additive.concat(U, torch.zeros(())), ValueError, "weight must have shape (A, D_q + D_k) or"),
    "offset": (scored(S.Hadamard(U, offset=torch.zeros(2))), ValueError, "offset must be a number or a tensor of one element"),
    "offset of text": (scored(S.Hadamard(U, offset="0")), TypeError, "offset must be a real number"),
    "carrier length": (relevancy(Q, Q, Q, C[..., :2]), ValueError, "carrier must have shape (B, T, N) with query's B=2 and N=3"),
    "carrier dtype": (relevancy(Q, Q, Q, C.double()), TypeError, "carrier must be torch.float32 for torch.float32 attention"),
    "carrier of float16": (
        relevancy(Q.half(), Q.half(), Q.half(), C.half()),
        TypeError,
        "carrier must be torch.float32 for torch.float16 attention",
    ),
    "rule": (relevancy(rule="rollout"), ValueError, "rule must be one of ('gradient', 'attention'); got 'rollout'"),
    "grad_output alone": (step(C, Q, K, None, Q, rule="attention"), ValueError, "value must be given with grad_output"),
    "lse dtype": (step(lse=torch.zeros(2, 4, 3, dtype=torch.bfloat16)), ValueError, "lse must be float32 or float64 of shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    "name", ("head size", "mask shape", "dropout over 1", "score name", "backend name", "weight shape", "carrier length", "rule")
)
def test_words_are_kept_under_fullgraph(name: str) -> None:
    torch._dynamo.reset()
    call, _, words = BAD[name]
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(call, backend="eager", fullgraph=True)()
    assert words.split(" tensor of shape")[0].split("; got")[0] in str(caught.value)
    torch._dynamo.reset()


def test_the_error_arrives_as_raised_without_fullgraph() -> None:
    torch._dynamo.reset()
    call, error, words = BAD["mask shape"]
    with pytest.raises(error, match=re.escape(words)):
        torch.compile(call, backend="eager")()
    torch._dynamo.reset()


def a_call(operator: str, device: str = "cpu") -> calls.CallShape:
    case = verify.cases(operators=[operator])[0]
    call = OPERATORS[operator].describe(**case.arguments(case.in_dtype(torch.bfloat16)))
    return call._replace(device_type=device, sizes={**call.sizes, "queries": 577})


@pytest.mark.parametrize("operator", TABLES)
def test_asking_needs_no_tensor_and_no_device(operator: str) -> None:
    """A laptop can ask what an H200 would refuse; reasons are constant words (a printed size costs a graph per size)."""
    for name in ("reference", "streaming", "sdpa", "cpu", "triton", "cuda"):
        for device in ("cpu", "cuda", "xpu"):
            reasons = table.refusals(TABLES[operator], name, a_call(operator, device))
            assert isinstance(reasons, list) and all(isinstance(reason, str) and reason for reason in reasons), name
            assert not any("577" in reason for reason in reasons)
    assert TABLES[operator].keys() >= {"reference", "streaming"}


@pytest.mark.parametrize("operator", TABLES)
def test_auto_takes_the_first_that_can_and_a_name_raises_its_reasons(operator: str) -> None:
    backends, call = TABLES[operator], a_call(operator)
    able = [name for name, backend in backends.items() if not backend.refusals(call)]
    by_torch = operator == "score_attention"  # a scaled dot product, which torch's own attention takes
    assert choice.select(backends, call, "auto") == able[0]
    assert able[0] == ("cpu" if "cpu" in able else "sdpa" if by_torch else "streaming")
    on_a_gpu = "sdpa" if by_torch else "triton" if operator in WITH_TRITON else "streaming"
    assert choice.select(backends, a_call(operator, "cuda"), "auto") == on_a_gpu
    for name in ("reference", "streaming", "sdpa", "cpu", "triton", "cuda"):
        reasons = table.refusals(backends, name, call)
        if not reasons:
            assert choice.select(backends, call, name) == name
            continue
        with pytest.raises(ValueError, match=f"backend='{name}' cannot run {operator}") as caught:
            choice.select(backends, call, name)
        assert all(reason in str(caught.value) for reason in reasons) and "queries=577" in str(caught.value)


@pytest.mark.parametrize("operator", WITH_TRITON)
def test_auto_leaves_the_interpreter_to_those_who_name_it(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "on_cpu", calls.OnCpu())
    triton, call = TABLES[operator]["triton"], a_call(operator)
    assert triton.refusals(call) == []
    assert choice.select(TABLES[operator], call, "auto") in ("sdpa", "cpu", "streaming")
    monkeypatch.setitem(sys.modules, triton.module, object())  # whoever takes it finds no `forward`
    for case in verify.cases(operators=[operator]):
        arguments = case.arguments(case.in_dtype(torch.float32))
        name = choice.select(TABLES[operator], OPERATORS[operator].describe(**arguments), "auto")
        auto, named = case.call(**arguments), case.call(**arguments, backend=name)
        torch.testing.assert_close(auto, named, rtol=0.0, atol=0.0, equal_nan=True)


def test_limits_on_lengths_cost_no_graph_where_no_kernel_runs_anyway() -> None:
    """Lengths on both sides of what the CUDA C++ kernels take."""
    for run in (lambda x, r: va.relevancy_attention(x, x, x, r)[0], lambda x, r: va.congruence_loss((x, x), (x, x))):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(run, backend=counter, fullgraph=True)
        for n in (20, 40, 100, 150, 300, 577):
            compiled(torch.zeros(1, 1, n, 4), torch.zeros(1, 1, n))
        assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32"),
        ({"sizes": {"head_dim": 257}}, "at most 256"),
        ({"device_type": "xpu"}, "CUDA devices"),
        ({"capability": (7, 5)}, "a compute capability of 8.0"),
        ({"capability": (10, 0)}, "install triton 3.9"),
    ],
)
def test_what_no_triton_kernel_takes(change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = calls.CallShape("some", torch.bfloat16, "cuda", {"head_dim": 256}, {})
    assert limits.triton_refusals(call) == [] == limits.triton_refusals(call._replace(capability=(8, 0)))
    monkeypatch.setattr(limits, "_FAULTY_ON_SM_100", False)
    assert limits.triton_refusals(call._replace(capability=(10, 0))) == []
    monkeypatch.setattr(limits, "_FAULTY_ON_SM_100", True)
    assert [words in reason for reason in limits.triton_refusals(call._replace(**change))] == [True]
    monkeypatch.setattr(limits, "_TRITON_MISSING", "triton is not installed")
    assert limits.triton_refusals(call) == ["triton is not installed"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float64}, "the CPU kernels take float16, bfloat16 and float32"),
        ({"device_type": "cuda"}, "the CPU kernels run on CPU tensors"),
    ],
)
def test_what_no_cpu_kernel_takes(change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = table.table(MODULE, cpu=MODULE)["cpu"].refusals
    call = calls.CallShape("some", torch.bfloat16, "cpu", {}, {})
    monkeypatch.setattr(native, "library", native.library._replace(exists=True))
    assert refusals(call) == []
    assert refusals(call._replace(**change)) == [words]
    monkeypatch.setattr(native, "library", native.find(Path("nowhere")))
    assert refusals(call) == ["the CPU kernels are not built (`vlattn info` says why)"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float64}, "the CUDA C++ kernels take float16, bfloat16 and float32"),
        ({"capability": (7, 5)}, "the CUDA C++ kernels need a compute capability of 8.0 (Ampere) or more"),
        ({"sizes": {"rows": 0}}, "an own limit"),
    ],
)
def test_what_no_cuda_kernel_takes(change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(call: calls.CallShape) -> list[tuple[str, bool]]:
        return [("an own limit", "rows" in call.sizes)]

    refusals = table.table(MODULE, cuda=MODULE, limits={"cuda": limits})["cuda"].refusals
    library = _shared_library.library._replace(exists=True, device_type="cuda")
    monkeypatch.setattr(_shared_library, "library", library)
    call = calls.CallShape("some", torch.bfloat16, "cuda", {}, {}, (8, 0))
    assert refusals(call) == [] == refusals(call._replace(capability=None))
    assert refusals(call._replace(**change)) == [words]
    assert refusals(call._replace(device_type="cpu", capability=None)) != []
    monkeypatch.setattr(_shared_library, "library", library._replace(exists=False))
    assert refusals(call) == ["the CUDA C++ kernels are not built (`vlattn info` says why)"]


@pytest.mark.parametrize("operator", TABLES)
def test_a_call_carries_the_capability_of_its_device(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a device that is too old is refused by name, and not failed at the launch."""
    assert a_call(operator).capability is None
    monkeypatch.setattr(calls, "capability", lambda device: (7, 0))
    call = a_call(operator)
    assert call.capability == (7, 0) and "device=cpu (sm_70)" in str(call)


def test_the_capability_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_CAPABILITIES", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert calls.capability(torch.device("cpu")) is None and calls.capability(torch.device("cuda", 3)) is None
    monkeypatch.setattr(calls, "_CAPABILITIES", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: asked.append(device) or SimpleNamespace(major=9, minor=0)
    )
    assert [calls.capability(torch.device("cuda", 1)) for _ in range(2)] == [(9, 0)] * 2 and len(asked) == 1
    monkeypatch.setattr(torch.version, "hip", "6.4")  # where 9.4 is an MI300, and no Hopper
    assert calls.capability(torch.device("cuda", 1)) is None


@pytest.mark.parametrize("operator", WITH_TRITON)
def test_auto_takes_no_triton_kernel_that_a_device_cannot_run(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before Ampere, and not on AMD, whose devices torch calls cuda as well."""
    call = a_call(operator, "cuda")._replace(capability=(9, 0))
    backends = {name: backend for name, backend in TABLES[operator].items() if name != "sdpa"}
    assert choice.select(backends, call, "auto") == "triton"
    assert choice.select(backends, call._replace(capability=(7, 5)), "auto") == "streaming"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choice.select(backends, call._replace(capability=None), "auto") == "streaming"


@pytest.mark.skipif("VLATTN_PTX" in os.environ, reason="the emulator takes tensors of the CPU from its first kernel on")
@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_a_backend_that_cannot_run_is_refused_at_the_public_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing falls back silently from what the caller named."""
    monkeypatch.setattr(calls, "on_cpu", None)
    for call in (attend(backend=backend), relevancy(backend=backend), step(backend=backend)):
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run .*: .+"):
            call()


@pytest.mark.parametrize("backend", ("cpu", "triton"))
def test_kernels_refuse_a_kind_of_score_that_the_table_does_not_give_them(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_PLANS", {})
    monkeypatch.setitem(KINDS, "dot_tanh", KINDS["dot_tanh"]._replace(kernels=()))
    x, score = torch.randn(1, 2, 3, 4), va.scores.General(torch.eye(4), activation="tanh")
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run .* kernels do not have this kind of score"):
        va.score_attention(x, x, x, score=score, scale=0.3, backend=backend)
    expected = va.reference.score_attention(x, x, x, score=score, scale=0.3)
    torch.testing.assert_close(va.score_attention(x, x, x, score=score, scale=0.3), expected)


def test_a_kind_that_is_not_in_the_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(va.scores.General, "kind", "dot_cube")
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="the kind of a core score must be one of .*; got 'dot_cube'"):
        va.score_attention(x, x, x, score=va.scores.General(torch.eye(4)))
