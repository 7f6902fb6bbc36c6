"""Softcapped logits and attention sinks of the operators on attention: every backend against the formula, and the formula against
what gpt-oss and Gemma 2 compute.

Compiled code, registration and DTensors: every_call.py, whose calls each suite takes, and test_shards.py.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops import map_cases, relevancy_cases
from tests.helpers.ops.backends import F64, HALVES, LOW, assert_refused, each, finest, on
from tests.helpers.ops.masks import masks_of
from tests.helpers.ops.score_cases import H, N, tensors
from vlattn_fast import scores as S
from vlattn_fast.ops._sinks import lse_with_sink, share_of_keys

OPTIONS = ("softcap", "sink", "both")
SIZES = {"streaming": {}, "cpu": {"n": 34, "m": 37}, "triton": {"b": 1}}
BACKENDS = tuple(SIZES)


def options_of(which: str, heads: int = H, dtype: torch.dtype = F64) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sink, which has a gradient, and the softcap, which bends most of the logits."""
    sink = {} if which == "softcap" else {"sink": torch.linspace(-1, 2, heads, dtype=dtype)}
    return sink, {} if which == "sink" else {"softcap": 1.5}


def run(operator: Callable[..., Any], *names: str, **options: Any) -> Callable[..., Any]:
    """The operator as a function of named tensors: those that `names` lists by position, a sink by name."""
    return lambda **x: operator(*[x.pop(name) for name in names if name in x], **x, **options)


def check(backend: str, inputs: dict[str, Tensor], **options: Any) -> None:
    """score_attention's outputs and gradients against the formula."""
    b, h, n, _ = inputs["query"].shape
    both = [
        run(operator, "query", "key", "value", return_lse=True, **options, **named)
        for operator, named in ((va.score_attention, {"backend": backend}), (va.reference.score_attention, {}))
    ]
    cotangents = [torch.randn(b, h, n, inputs["value"].shape[3]), torch.randn(b, h, n)]
    # gradients that cancel over queries or keys are held to what was summed
    assert_all_close_to(*both, inputs, cotangents, what=backend, scales={f"grad {name}": 1.0 for name in inputs})


@each("which", streaming=OPTIONS, cpu=OPTIONS, triton=OPTIONS)
@pytest.mark.parametrize("mask", ("none", "float"))
def test_score_attention(backend: str, which: str, mask: str) -> None:
    """Other masks, of both at once: tests/ops/properties/test_masks.py."""
    inputs, _ = tensors(backend, "scaled_dot", **({} if mask != "none" else SIZES[backend]))
    sink, softcap = options_of(which, dtype=inputs["query"].dtype)
    n, m = inputs["query"].shape[2], inputs["key"].shape[2]
    check(backend, inputs | sink, **softcap, **masks_of(mask, n, m))


@each("dtype", streaming=LOW, cpu=LOW, triton=LOW)
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    """A cap of 50, as Gemma 2 has it, with logits of that size: what stands before a tanh is not rounded."""
    inputs, _ = tensors(backend, "dot", dtype, n=17, m=40, **({"b": 1} if backend == "triton" else {}))
    inputs["query"] = inputs["query"] * 10
    check(backend, inputs | {"sink": torch.tensor([3.0, -4.0], dtype=dtype)}, score="dot", softcap=50.0)


@on("reference", *BACKENDS)
def test_a_row_without_a_key_has_the_sink_alone(backend: str) -> None:
    """Its output is zero, its log-sum-exp the sink; a sink of -inf is none."""
    inputs, _ = tensors(backend, "dot")
    inputs["sink"] = torch.tensor([0.5, -math.inf], dtype=inputs["query"].dtype)
    mask = torch.ones(N, inputs["key"].shape[2], dtype=torch.bool)
    mask[1] = False
    got = outputs_and_grads(
        run(va.score_attention, "query", "key", "value", attn_mask=mask, return_lse=True, backend=backend), inputs
    )
    assert not got["out0"][:, :, 1].any() and not got["grad query"][:, :, 1].any()
    assert (got["out1"][:, 0, 1] == 0.5).all() and (got["out1"][:, 1, 1] == -math.inf).all()
    assert all(x.isfinite().all() for name, x in got.items() if name != "out1") and got["grad sink"][1] == 0
    plain = va.score_attention(*(inputs[name] for name in ("query", "key", "value")), attn_mask=mask, backend=backend)
    torch.testing.assert_close(got["out0"][:, 1], plain[:, 1])


@on("streaming", "cpu")
def test_second_derivatives_of_the_log_sum_exp(backend: str) -> None:
    """Those of torch.logaddexp are NaN in a row without a key, and where the sink is far above or below the other logits."""
    mask = torch.tensor([[True, True, False], [False, False, False]])
    dtype = torch.float32 if backend == "cpu" else F64
    inputs = [torch.randn(1, 4, n, 4, dtype=dtype) for n in (2, 3, 3)] + [torch.tensor([0.5, 1e3, -1e3, -math.inf], dtype=dtype)]

    def second(name: str, dtype: torch.dtype) -> list[Tensor]:
        query, key, value, sink = (x.to(dtype).requires_grad_() for x in inputs)
        _, lse = va.score_attention(query, key, value, attn_mask=mask, sink=sink, return_lse=True, backend=name)
        leaves = query, key, sink
        first = torch.autograd.grad(torch.where(lse.isfinite(), lse, 0.0).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    for got, exact in zip(second(backend, dtype), second("reference", F64), strict=True):
        torch.testing.assert_close(got, exact.to(dtype))


@pytest.mark.parametrize("function", (lse_with_sink, share_of_keys))
def test_small_shares_keep_their_digits_in_second_derivatives(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Those of torch's logsigmoid subtract 1 from a share that rounds to 1."""
    second = torch.func.vmap(torch.func.hessian(function, (0, 1)))
    lse, sink = torch.full((6,), 2.0), torch.tensor([-30.0, -16.0, 1.0, 3.0, 20.0, 30.0])
    exact = second(lse.double(), sink.double())
    torch.testing.assert_close(second(lse, sink), exact, rtol=1e-5, atol=0.0, check_dtype=False)


@on("reference", "streaming", "cpu")
@pytest.mark.parametrize("lowest", (-1e30, torch.finfo(F64).min))
def test_a_float64_mask_far_below_the_sink(backend: str, lowest: float) -> None:
    """The sink has all of the row's weight."""
    query, key, relevancy = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 900, 4), torch.ones(1, 1, 3)
    options = {"rule": "attention", "sink": torch.zeros(1), "attn_mask": torch.full((1, 1), lowest, dtype=F64)}
    for keys in (5, 900):
        step = va.relevancy_step(relevancy, query, key[:, :, :keys], **options, backend=backend)
        assert torch.equal(step, torch.zeros(1, 1, keys))


@on("streaming", "cpu", "cuda")
def test_a_sink_goes_with_every_score(backend: str) -> None:
    """The offset of a biased score cancels in a softmax without a sink, but not with one."""
    some = ("additive", "hadamard-offset=tensor", "cosine-eps=5", "general-key-bias")
    of_backend = some[:2] if backend == "cuda" else some
    for score in of_backend:
        inputs, make = tensors(backend, score)
        inputs["sink"] = torch.tensor([0.3, -1.0], dtype=inputs["query"].dtype)
        names = [name for name in inputs if name not in ("query", "key", "value", "sink")]

        def scored(operator: Any, make: Any = make, **named: Any) -> Any:
            options = {"return_lse": True, **named}
            return lambda query, key, value, sink, **p: operator(query, key, value, score=make(p), sink=sink, **options)

        scales = {f"grad {name}": 1.0 for name in names}
        pair = scored(va.score_attention, backend=backend), scored(va.reference.score_attention)
        assert_all_close_to(*pair, inputs, what=score, scales=scales)


@on("streaming", "cpu", "triton")
def test_dropout_leaves_the_sink_where_it_is(backend: str) -> None:
    """Dropout drops weights of the share that the sink leaves to the keys."""
    inputs, _ = tensors(backend, "dot")
    tensors_of = [inputs[name] for name in ("query", "key", "value")]
    sink = torch.tensor([0.3, -1.0], dtype=tensors_of[0].dtype)
    options = {"score": "dot", "dropout_p": 0.4, "backend": backend, "return_lse": True}
    torch.manual_seed(3)
    out, lse = va.score_attention(*tensors_of, **options)
    torch.manual_seed(3)
    with_sink, _ = va.score_attention(*tensors_of, sink=sink, **options)
    torch.testing.assert_close(with_sink, out * torch.sigmoid(lse - sink[:, None])[..., None])


def test_the_formula_is_that_of_gpt_oss_and_of_gemma_2() -> None:
    """transformers' functions in front of the models: the sink as one more column, the cap in front of the mask."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    query, key, value, sink = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(4)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)[None, None]

    class Module(torch.nn.Module):
        num_key_value_groups, sinks = 2, sink

    for backend in ("reference", "streaming"):
        options = {"is_causal": True, "enable_gqa": True, "scale": 0.3, "backend": backend}
        module = Module().eval()
        theirs, weights = gpt_oss.eager_attention_forward(module, query, key, value, mask, 0.3)
        torch.testing.assert_close(va.score_attention(query, key, value, sink=sink, **options), theirs.transpose(1, 2))
        abar = va.attention_map(query, key, sink=sink, **options)
        torch.testing.assert_close(abar, weights.mean(1))
        theirs, weights = gemma2.eager_attention_forward(module, query, key, value, mask, scaling=0.3, softcap=0.7)
        torch.testing.assert_close(va.score_attention(query, key, value, softcap=0.7, **options), theirs.transpose(1, 2))
        torch.testing.assert_close(va.attention_map(query, key, softcap=0.7, **options), weights.mean(1))


CASES = tuple(itertools.product(OPTIONS, relevancy_cases.RULES))
FEW = (
    ("both", ("gradient", False)),
    ("sink", ("attention", True)),
    ("both", ("attention", False)),
    ("softcap", ("gradient", True)),
)


@each("case", streaming=CASES, cpu=CASES, triton=FEW)
@pytest.mark.parametrize("mask", ("none", "all", "bool of each H"))
def test_relevancy_attention(backend: str, case: tuple[str, tuple[str, bool]], mask: str) -> None:
    which, (rule, row_normalize) = case
    if backend == "triton" and mask == "bool of each H":
        pytest.skip("the interpreter takes long, and masks are those of the tests without a softcap")
    n = 21 if backend == "cpu" else 9
    inputs = relevancy_cases.tensors(n, b=2, h=2, kv=2 if mask != "none" else 1, dtype=finest(backend))
    sink, softcap = options_of(which, 2, finest(backend))
    options = {"rule": rule, "row_normalize": row_normalize, "enable_gqa": True, **softcap}
    options |= masks_of(mask, n, n)
    weights = {"residual_weight": 0.5, "attention_weight": torch.rand(2, n)}
    names = "query", "key", "value", "carrier"
    assert_all_close_to(
        run(va.relevancy_attention, *names, backend=backend, **weights, **options),
        run(va.reference.relevancy_attention, *names, **weights, **options),
        inputs | sink,
        relevancy_cases.cotangents(inputs),
        what=backend,
        scales={f"grad {name}": 1.0 for name in (*names, "sink")},
    )


@each(
    "case",
    streaming=itertools.product(HALVES, (False, True)),
    cpu=itertools.product(HALVES, (False, True)),
    triton=[(HALVES[0], True)],
)
def test_relevancy_of_values_with_a_large_mean(backend: str, case: tuple[torch.dtype, bool]) -> None:
    """dA is what is left of a sum where the cotangent's mean is 0, as behind a LayerNorm: it has no room for a rounding of the
    cotangent times the share of the keys."""
    dtype, row_normalize = case
    inputs = relevancy_cases.tensors(24, b=2, h=1, kv=1, d=8, dv=8, rows=3, dtype=dtype)
    inputs["value"] = inputs["value"] + 20
    inputs["sink"] = torch.full((1,), 2.0, dtype=dtype)
    grad, rows = relevancy_cases.cotangents(inputs)
    grad = (grad - grad.mean(-1, keepdim=True)).to(dtype)
    pair = [
        run(operator, "query", "key", "value", "carrier", row_normalize=row_normalize, **named)
        for operator, named in ((va.relevancy_attention, {"backend": backend}), (va.reference.relevancy_attention, {}))
    ]
    scales = {f"grad {name}": 20.0 for name in ("query", "key", "sink")}  # they cancel: held to what was summed
    assert_all_close_to(*pair, inputs, [grad, rows], what=backend, scales=scales)


@each("rule", streaming=("gradient", "attention"), cpu=("gradient", "attention"), triton=("gradient", "attention"))
@pytest.mark.parametrize("which", OPTIONS)
def test_step_and_map(backend: str, rule: str, which: str) -> None:
    """With the log-sum-exp of score_attention, and without it; other lengths of queries and keys."""
    dtype = finest(backend)
    inputs = as_dtype(map_cases.map_inputs(rule, n=6, m=9, b=1 if backend == "triton" else 2), dtype)
    sink, softcap = options_of(which, map_cases.H, dtype)
    mask = torch.rand(6, 9) > 0.3
    mask[2] = False
    attended = inputs["query"], inputs["key"], inputs["key"]
    _, lse = va.score_attention(*attended, attn_mask=mask, return_lse=True, backend=backend, **sink, **softcap)
    names = ("query", "key", "value", "grad_output")[: len(inputs)]
    common = {"rule": rule, "attn_mask": mask, **softcap}
    for known in (None, lse):
        for head_reduction, row_normalize in (("mean", False), ("max", True)):
            options = {**common, "head_reduction": head_reduction, "row_normalize": row_normalize}
            if known is None:  # draws change the inputs, and their log-sum-exp
                ours = run(va.attention_map, *names, backend=backend, **options)
                assert_all_close_to(ours, run(va.reference.attention_map, *names, **options), inputs | sink, grads=False)
            else:
                got = va.attention_map(*inputs.values(), lse=known, backend=backend, **sink, **options)
                torch.testing.assert_close(got, va.attention_map(*inputs.values(), backend=backend, **sink, **options))
        relevancy = torch.rand(inputs["query"].shape[0], 2, 6, dtype=dtype)
        for row_normalize in (False, True):
            options = {**common, "row_normalize": row_normalize, **sink}
            got = va.relevancy_step(relevancy, *inputs.values(), lse=known, backend=backend, **options)
            torch.testing.assert_close(got, va.reference.relevancy_step(relevancy, *inputs.values(), **options))


@on("reference", *BACKENDS)
def test_statistics_are_of_what_falls_on_the_keys(backend: str) -> None:
    """One key and a sink of the same logit: each has half. A sink that takes all leaves zeros, one of -inf nothing changed; a row
    without a key has zeros."""
    x = torch.zeros(1, 3, 2, 4, dtype=finest(backend) if backend != "reference" else F64).requires_grad_()
    sink = torch.tensor([0.0, 2000.0, -math.inf], dtype=x.dtype).requires_grad_()
    mask = torch.tensor([[True, False], [False, False]])
    groups = {"key_groups": torch.tensor([0, 1]), "num_groups": 2}
    found = va.attention_statistics(x, x, sink=sink, attn_mask=mask, backend=backend, **groups)
    half, log2 = 0.5, math.log(2.0)
    assert found.mass[0].tolist() == [[[half, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]]
    assert found.maximum[0].tolist() == [[half, 0], [0, 0], [1, 0]] and found.received[0].tolist() == [[half, 0], [0, 0], [1, 0]]
    assert found.entropy[0].tolist() == [[pytest.approx(half * log2), 0], [0, 0], [0, 0]]
    assert found.argmax[0].tolist() == [[0, -1], [-1, -1], [0, -1]]
    grads = torch.autograd.grad(found.mass.sum() + found.entropy.sum() + found.maximum.sum(), (x, sink))
    slope = 2 * -half * half - half * half * (log2 - 1)  # of 2 A - A log A
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1].tolist() == [pytest.approx(slope), 0, 0]


@on("sdpa", "cuda")
def test_what_backends_refuse(backend: str) -> None:
    x = torch.randn(1, 2, 3, 4)
    sink = torch.zeros(2)
    if backend == "sdpa":
        assert_refused(backend, "SDPA has no softcap", lambda: va.score_attention(x, x, x, softcap=2.0, backend=backend))
        assert_refused(backend, "SDPA has no attention sinks", lambda: va.score_attention(x, x, x, sink=sink, backend=backend))
        return
    carrier = torch.zeros(1, 1, 3)
    for name, option in (("no softcap", {"softcap": 2.0}), ("no attention sinks", {"sink": sink})):
        assert_refused(backend, name, lambda o=option: va.relevancy_attention(x, x, x, carrier, backend=backend, **o))


@pytest.mark.parametrize("score", ("cosine", S.General(torch.eye(4)), S.Additive(torch.ones(4))))
def test_a_softcap_is_that_of_a_dot_product(score: Any) -> None:
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="softcap must be None for scores other than 'dot' and 'scaled_dot'; got 2.0 for"):
        va.score_attention(x, x, x, score=score, softcap=2.0)
