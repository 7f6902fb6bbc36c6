"""relevancy_attention and relevancy_step: the row form in one backward pass against the whole maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from compare import as_dtype, assert_all_close_to, assert_close_to, outputs_and_grads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vlattn_fast as va
from vlattn_fast._tensors import expand_heads
from vlattn_fast.reference._softmax import attend
from vlattn_fast.reference.relevancy_attention import head_mean
from vlattn_fast.streaming import _tiles

F64 = torch.float64
B, H, HKV, N, D, DV, T = 2, 4, 2, 6, 5, 3, 2


def t(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


# One head, N = 2. Equal queries and keys of zeros: A = 1/2 everywhere. value = [1], [3] and grad_out = [2], [-1]:
# dA = grad_out value^T = [2, 6], [-1, -3]; relu(A dA) = [1, 3], [0, 0].
ZEROS, VALUE, GRAD = torch.zeros(1, 1, 2, 4, dtype=F64), t([1], [3])[None, None], t([2], [-1])[None, None]
BY_HAND = {
    # name: options, r -> r * a + (r * b) Abar for r = [1, 10]
    "gradient": ({}, t([1 + 1, 10 + 3])),
    "attention": ({"rule": "attention"}, t([1 + 5.5, 10 + 5.5])),
    "rollout": ({"rule": "attention", "residual_weight": 0.5, "attention_weight": 0.5}, t([0.5 + 2.75, 5 + 2.75])),
    "row_normalize": ({"row_normalize": True}, t([1 + 0.25, 10 + 0.75])),  # the second row is zero and stays zero
    "no residual": ({"residual_weight": 0.0}, t([1, 3])),
    "no attention": ({"attention_weight": 0}, t([1, 10])),
    "weights": ({"residual_weight": t([2, 3]), "attention_weight": t([4, 5])}, t([2 + 4, 30 + 12])),
    "causal": ({"is_causal": True}, t([1 + 2, 10])),  # A = [1, 0], [1/2, 1/2]
    "key_mask": ({"key_mask": torch.tensor([[False, True]])}, t([1, 10 + 6])),  # A = [0, 1], [0, 1]
    "empty row": ({"attn_mask": torch.tensor([[False, False], [True, True]])}, t([1, 10])),
}


@pytest.mark.parametrize("operator", (va.relevancy_attention, va.reference.relevancy_attention), ids=("streaming", "reference"))
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str, operator: Callable[..., Any]) -> None:
    options, wanted = BY_HAND[name]
    options = {k: x[None] if isinstance(x, Tensor) and "weight" in k and x.dim() == 1 else x for k, x in options.items()}
    start = torch.zeros(1, 1, 2, dtype=F64, requires_grad=True)
    out, carrier = operator(ZEROS, ZEROS, VALUE, start, **options)
    assert torch.equal(carrier, start)
    (moved,) = (
        torch.autograd.grad([out, carrier], [start], [GRAD, t([1, 10])[None]])
        if out.requires_grad
        else torch.autograd.grad([carrier], [start], [t([1, 10])[None]])
    )
    if not out.requires_grad and options.get("rule", "gradient") == "gradient":
        wanted = None  # without an output gradient rule 5 has nothing to take; the next test sends one
        value = VALUE.clone().requires_grad_()
        out, carrier = operator(ZEROS, ZEROS, value, start, **options)
        moved, _ = torch.autograd.grad([out, carrier], [start, value], [GRAD, t([1, 10])[None]])
        wanted = BY_HAND[name][1]
    torch.testing.assert_close(moved[0], wanted)


@pytest.mark.parametrize("operator", (va.relevancy_step, va.reference.relevancy_step), ids=("streaming", "reference"))
def test_step_by_hand(operator: Callable[..., Any]) -> None:
    r = t([1, 10])[None]
    torch.testing.assert_close(operator(r, ZEROS, ZEROS, VALUE, GRAD)[0], t([1, 3]))
    torch.testing.assert_close(operator(r, ZEROS, ZEROS, VALUE, GRAD, row_normalize=True)[0], t([0.25, 0.75]))
    torch.testing.assert_close(operator(r, ZEROS, ZEROS, rule="attention")[0], t([5.5, 5.5]))


def tensors(*, kv: int = H, rows: int = T, n: int = N, dv: int = DV) -> dict[str, Tensor]:
    return {
        "query": torch.randn(B, H, n, D, dtype=F64),
        "key": torch.randn(B, kv, n, D, dtype=F64),
        "value": torch.randn(B, kv, n, dv, dtype=F64),
        "carrier": torch.rand(B, rows, n, dtype=F64),
    }


def visible() -> Tensor:
    mask = torch.rand(B, 1, N, N) > 0.35
    mask[0, :, 1] = False
    return mask


def padding() -> Tensor:
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, -2:] = False
    mask[1] = False
    return mask


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "row_normalize": lambda: {"row_normalize": True},
    "numbers": lambda: {"residual_weight": 0.25, "attention_weight": 2},
    "zeros": lambda: {"residual_weight": 0.0, "attention_weight": 0.0},
    "tensors": lambda: {"residual_weight": torch.rand(B, N, dtype=F64), "attention_weight": torch.rand(B, N, dtype=F64)},
    "bool": lambda: {"attn_mask": visible(), "row_normalize": True},
    "float": lambda: {"attn_mask": torch.randn(H, N, N, dtype=F64).masked_fill(~visible()[0], -torch.inf)},
    "key": lambda: {"key_mask": padding()},
    "causal": lambda: {"is_causal": True, "scale": -0.4},
    "scale=0": lambda: {"scale": 0.0},
    "all": lambda: {"attn_mask": visible(), "key_mask": padding(), "is_causal": True, "row_normalize": True},
}


def call(operator: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda query, key, value, carrier: operator(query, key, value, carrier, **options)


def cotangents(rows: int = T, n: int = N, dv: int = DV) -> list[Tensor]:
    return [torch.randn(B, H, n, dv, dtype=F64), torch.rand(B, rows, n, dtype=F64)]


@pytest.mark.parametrize("kv", (H, HKV, 1))
@pytest.mark.parametrize("rule", ("gradient", "attention"))
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_formula_in_float64(name: str, rule: str, kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 20)
    options = {"rule": rule, "enable_gqa": kv != H, **OPTIONS[name]()}
    found = assert_all_close_to(
        call(va.relevancy_attention, **options),
        call(va.reference.relevancy_attention, **options),
        tensors(kv=kv),
        cotangents(),
        scales={"grad query": 1.0, "grad key": 1.0},
    )
    assert not any(torch.isnan(x).any() for x in found.values())


@pytest.mark.parametrize("rows", (0, 1, 3))
def test_number_of_rows(rows: int) -> None:
    assert_all_close_to(
        call(va.relevancy_attention), call(va.reference.relevancy_attention), tensors(rows=rows), cotangents(rows)
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("plain", "row_normalize", "tensors", "key"))
def test_low_precision_is_as_good_as_the_formula(name: str, dtype: torch.dtype) -> None:
    """The carrier stays float32. Outside float64 the gradients are torch's fused kernel's (see test_score_attention)."""
    options = OPTIONS[name]()
    inputs = as_dtype(tensors(), dtype) | {"carrier": torch.rand(B, T, N)}
    got = assert_all_close_to(
        call(va.relevancy_attention, **options), call(va.reference.relevancy_attention, **options), inputs, cotangents()
    )
    assert got["grad carrier"].dtype == torch.float32


@pytest.mark.parametrize(
    "rule, row_normalize, weighted", list(itertools.product(("gradient", "attention"), (False, True), (False, True)))
)
def test_rows_of_the_full_product_over_layers(rule: str, row_normalize: bool, weighted: bool) -> None:
    """b.2: R = (a_L + b_L Abar_L) ... (a_1 + b_1 Abar_1) from stored maps; one backward pass gives its rows."""
    layers = 4
    projections = [[0.6 * torch.randn(H, D, D, dtype=F64) for _ in range(3)] for _ in range(layers)]
    weights = [
        {"residual_weight": torch.rand(B, N, dtype=F64), "attention_weight": torch.rand(B, N, dtype=F64)} if weighted else {}
        for _ in range(layers)
    ]
    x0, readout, seed = torch.randn(B, H, N, D, dtype=F64), torch.randn(B, H, N, D, dtype=F64), torch.rand(B, T, N, dtype=F64)

    start = torch.zeros(B, T, N, dtype=F64, requires_grad=True)
    x, carrier = x0, start  # the carrier alone requires a gradient: a frozen model
    for projection, weight in zip(projections, weights, strict=True):
        out, carrier = va.relevancy_attention(
            *(x @ w for w in projection), carrier, rule=rule, row_normalize=row_normalize, **weight
        )
        x = x + out
    if rule == "gradient":
        x_leaf = x0.clone().requires_grad_()
        x, carrier = x_leaf, start
        for projection, weight in zip(projections, weights, strict=True):
            out, carrier = va.relevancy_attention(
                *(x @ w for w in projection), carrier, rule=rule, row_normalize=row_normalize, **weight
            )
            x = x + out
        (rows,) = torch.autograd.grad([(x * readout).sum(), carrier], [start], [torch.tensor(1.0, dtype=F64), seed])
    else:
        (rows,) = torch.autograd.grad([carrier], [start], [seed])

    z, maps = x0.clone().requires_grad_(), []
    for projection in projections:
        q, k, v = (z @ w for w in projection)
        prob = torch.softmax(q @ k.mT / D**0.5, -1)
        prob.retain_grad()
        maps.append(prob)
        z = z + prob @ v
    (z * readout).sum().backward()
    relevancy = torch.eye(N, dtype=F64).expand(B, N, N)
    for prob, weight in zip(maps, weights, strict=True):
        abar = (prob * prob.grad).clamp(min=0).mean(1) if rule == "gradient" else prob.mean(1)
        abar = abar.detach() / (abar.detach().sum(-1, keepdim=True) if row_normalize else 1.0)
        a, b = (w[..., None] for w in weight.values()) if weighted else (1.0, 1.0)
        relevancy = a * relevancy + b * (abar @ relevancy)
    assert_close_to(rows, seed @ relevancy, None, what="rows")


class Products(TorchDispatchMode):
    """Counts matrix products with a weight of H * D rows, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in ("aten.mm.default", "aten.addmm.default")
        return func(*args, **(kwargs or {}))


class Model(torch.nn.Module):
    """Two layers of self-attention with residuals; carrier in, (score, carrier) out."""

    def __init__(self, layers: int = 2, remat: bool = False) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(0.5 * torch.randn(3, H * D, H * D, dtype=F64)) for _ in range(layers)
        )
        self.remat = remat

    def layer(self, x: Tensor, carrier: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        b, n = x.shape[:2]
        q, k, v = ((x @ w).view(b, n, H, D).transpose(1, 2) for w in weight)
        out, carrier = va.relevancy_attention(q, k, v, carrier)
        return x + out.transpose(1, 2).reshape(b, n, H * D), carrier

    def forward(self, x: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
        for weight in self.weights:
            x, carrier = (
                checkpoint(self.layer, x, carrier, weight, use_reentrant=False) if self.remat else self.layer(x, carrier, weight)
            )
        return x.pow(2).sum(), carrier


def relevancy_of(model: Callable[..., Any], x: Tensor) -> Tensor:
    start = torch.zeros(B, 1, x.shape[1], dtype=F64, requires_grad=True)
    score, carrier = model(x, start)
    row = torch.zeros_like(start)
    row[:, :, 0] = 1.0
    (rows,) = torch.autograd.grad([score, carrier], [start], [torch.ones_like(score), row])
    return rows


def test_no_weight_gradient_that_nobody_asked_for() -> None:
    """As many matrix products as with frozen weights, fewer than training takes."""
    x, counts = torch.randn(B, N, H * D, dtype=F64).requires_grad_(), {}
    for name in ("relevancy", "frozen", "training"):
        model = Model().requires_grad_(name != "frozen")
        start = torch.zeros(B, 1, N, dtype=F64, requires_grad=True)
        score, carrier = model(x, start)
        with Products() as products:
            if name == "training":
                score.backward()
            else:
                torch.autograd.grad([score, carrier], [start], [torch.ones_like(score), torch.ones_like(carrier)])
        counts[name] = products.count
        assert name == "training" or all(p.grad is None for p in model.parameters())
    assert counts["relevancy"] == counts["frozen"] < counts["training"], counts


def test_frozen_parameters_and_checkpointing_change_nothing() -> None:
    torch.manual_seed(3)
    model = Model()
    x = torch.randn(B, N, H * D, dtype=F64)
    wanted = relevancy_of(model, x)
    model.remat = True
    assert torch.equal(relevancy_of(model, x), wanted)
    model.remat = False
    model.requires_grad_(False)
    assert torch.equal(relevancy_of(model, x.clone().requires_grad_()), wanted)


def test_carrier_only_and_output_only() -> None:
    """Rollout needs no output gradient; training needs no relevancy; rule 5 without an output gradient adds nothing."""
    inputs = tensors()
    for rule in ("gradient", "attention"):
        for sent in ([None, cotangents()[1]], [cotangents()[0], None]):
            assert_all_close_to(
                call(va.relevancy_attention, rule=rule), call(va.reference.relevancy_attention, rule=rule), inputs, sent
            )
    found = outputs_and_grads(call(va.relevancy_attention), inputs, [None, cotangents()[1]])
    assert not found["grad query"].any()
    leaf = inputs["query"].clone().requires_grad_()
    out, _ = va.relevancy_attention(leaf, inputs["key"], inputs["value"], inputs["carrier"])
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(leaf, inputs["key"], inputs["value"]).sum(), leaf)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf), wanted)


# ------------------------------------------------------------------------------------------------- relevancy_step


@pytest.mark.parametrize("kv, m", ((H, N), (HKV, 9), (1, 4)))
@pytest.mark.parametrize("rule, row_normalize", list(itertools.product(("gradient", "attention"), (False, True))))
def test_step_matches_formula(rule: str, row_normalize: bool, kv: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross attention, grouped heads, with the attention's own lse or without."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 20)
    query, grad = torch.randn(B, H, N, D, dtype=F64), torch.randn(B, H, N, DV, dtype=F64)
    key, value, r = torch.randn(B, kv, m, D, dtype=F64), torch.randn(B, kv, m, DV, dtype=F64), torch.rand(B, T, N, dtype=F64)
    key_mask = torch.ones(B, m, dtype=torch.bool)
    key_mask[0, -1], key_mask[1] = False, False
    for masks in ({}, {"key_mask": key_mask}, {"is_causal": True, "attn_mask": torch.randn(N, m, dtype=F64)}):
        options = {"rule": rule, "row_normalize": row_normalize, "enable_gqa": True, **masks}
        wanted = va.reference.relevancy_step(r, query, key, value, grad, **options)
        _, lse = va.score_attention(query, key, value, return_lse=True, enable_gqa=True, **masks)
        for given in (None, lse, torch.where(torch.isneginf(lse), torch.inf, lse)):
            got = va.relevancy_step(r, query, key, value, grad, lse=given, **options)
            assert_close_to(got, wanted, None, what="step", scale=1e-3)


def test_an_infinite_lse_empties_the_row() -> None:
    """Whatever the masks here say: the attention that ran had no key for that row."""
    query, r = torch.randn(1, 1, 3, 4), torch.ones(1, 1, 3)
    lse = torch.logsumexp(query @ query.mT / 2, -1)
    for infinite in (torch.inf, -torch.inf):
        given = lse.index_fill(2, torch.tensor([1]), infinite)
        got = va.relevancy_step(r, query, query, rule="attention", lse=given)
        wanted = va.relevancy_step(r.index_fill(2, torch.tensor([1]), 0.0), query, query, rule="attention")
        torch.testing.assert_close(got, wanted)


def test_step_behind_a_foreign_attention_by_a_hook() -> None:
    """F.scaled_dot_product_attention with a tensor hook that takes one step gives relevancy_attention's numbers."""
    inputs = {name: x.requires_grad_() for name, x in tensors().items()}
    r, sent = torch.rand(B, T, N, dtype=F64), torch.randn(B, H, N, DV, dtype=F64)
    query, key, value, carrier = inputs.values()
    found = []
    out = F.scaled_dot_product_attention(query, key, value)
    out.register_hook(lambda g: found.append(r + va.relevancy_step(r, query.detach(), key.detach(), value.detach(), g)))
    torch.autograd.grad(out, query, sent)
    ours = va.relevancy_attention(query, key, value, carrier)
    (wanted,) = torch.autograd.grad(ours, carrier, [sent, r])
    torch.testing.assert_close(found[0], wanted)


def test_step_refuses_a_backward_pass() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    moved = va.relevancy_step(torch.ones(1, 1, 3), query, query, rule="attention")
    with pytest.raises(RuntimeError, match="relevancy has no gradient; pass tensors that do not require one"):
        moved.sum().backward()


def test_second_derivative_is_refused() -> None:
    inputs = {name: x.requires_grad_() for name, x in tensors().items()}
    out, _ = va.relevancy_attention(*inputs.values())
    (grad,) = torch.autograd.grad(out.pow(2).sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="relevancy_attention has no second derivative"):
        grad.sum().backward()


# ------------------------------------------------------------------------------------------------- edges and registration


def test_garbage_in_padding_stays_there() -> None:
    inputs, mask = tensors(), padding()
    sent = cotangents()
    clean = outputs_and_grads(call(va.relevancy_attention, key_mask=mask), inputs, sent)
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(~mask[:, None, :, None], torch.nan)
    dirty = outputs_and_grads(call(va.relevancy_attention, key_mask=mask), inputs, sent)
    for name, x in clean.items():
        assert torch.equal(x, dirty[name]), name
    r, grad = torch.rand(B, T, N, dtype=F64), sent[0]
    got = va.relevancy_step(r, *(inputs[x] for x in ("query", "key", "value")), grad, key_mask=mask)
    assert torch.isfinite(got).all() and not got.masked_fill(mask[:, None], 0.0).any()


@pytest.mark.parametrize("empty", ("B", "H", "N", "D", "Dv", "T"))
def test_empty_sizes(empty: str) -> None:
    b, h, n, d, dv, rows = (
        0 if empty == name else size for name, size in zip(("B", "H", "N", "D", "Dv", "T"), (2, 3, 4, 5, 2, 2), strict=True)
    )
    inputs = {
        name: torch.randn(shape, dtype=F64)
        for name, shape in {"query": (b, h, n, d), "key": (b, h, n, d), "value": (b, h, n, dv), "carrier": (b, rows, n)}.items()
    }
    for rule, row_normalize in itertools.product(("gradient", "attention"), (False, True)):
        found = outputs_and_grads(call(va.relevancy_attention, rule=rule, row_normalize=row_normalize), inputs)
        assert found["out0"].shape == (b, h, n, dv)
        for name, x in inputs.items():
            assert found[f"grad {name}"].shape == x.shape and torch.isfinite(found[f"grad {name}"]).all()


@pytest.mark.parametrize("layout", ("transposed", "strided", "expanded"))
def test_layouts(layout: str) -> None:
    def lay(x: Tensor) -> Tensor:
        match layout:
            case "transposed":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            case "strided":
                return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        return x[:1].expand(x.shape)

    given = {name: lay(x) for name, x in tensors().items()}
    sent = [lay(x) for x in cotangents()]
    wanted = outputs_and_grads(
        call(va.relevancy_attention), {k: x.contiguous() for k, x in given.items()}, [x.contiguous() for x in sent]
    )
    for name, x in outputs_and_grads(call(va.relevancy_attention), given, sent).items():
        torch.testing.assert_close(x, wanted[name], rtol=1e-12, atol=1e-12)
    zero_stride = outputs_and_grads(call(va.relevancy_attention), given)
    ones = outputs_and_grads(call(va.relevancy_attention), given, [torch.ones_like(x) for x in sent])
    for name, x in zero_stride.items():
        torch.testing.assert_close(x, ones[name], rtol=1e-12, atol=1e-12)


def test_inputs_are_never_written_and_runs_are_bit_equal() -> None:
    inputs = tensors(n=N) | {}
    options = OPTIONS["tensors"]() | {"attn_mask": visible(), "key_mask": padding()}
    watched = inputs | {name: x for name, x in options.items() if isinstance(x, Tensor)}
    before = {name: (x.clone(), x._version) for name, x in watched.items()}
    sent = cotangents()
    first, second = (outputs_and_grads(call(va.relevancy_attention, **options), inputs, sent) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(watched[name], copy) and watched[name]._version == version for name, (copy, version) in before.items())


def test_autocast_does_as_sdpa() -> None:
    inputs = as_dtype(tensors(), torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    with torch.autocast("cpu", torch.bfloat16):
        out, carrier = va.relevancy_attention(*leaves)
    assert (out.dtype, carrier.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(
        [out, carrier], leaves, [x.to(y.dtype) for x, y in zip(cotangents(), (out, carrier), strict=True)]
    )
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
@pytest.mark.parametrize("rule", ("gradient", "attention"))
def test_opcheck(rule: str, layout: str) -> None:
    lay = (lambda x: x) if layout == "contiguous" else (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    x = {name: lay(y) for name, y in as_dtype(tensors(kv=HKV, dv=D if layout == "contiguous" else DV), torch.float32).items()}
    query, key, value, carrier = (y.detach().requires_grad_() for y in x.values())
    weights = (torch.rand(B, N), torch.full((1, 1), 0.5)) if rule == "gradient" else (None, None)
    masks = (None, padding()) if layout == "contiguous" else (visible(), None)
    options = (rule, rule == "gradient", 0.5, layout == "transposed")
    torch.library.opcheck(
        torch.ops.vlattn.relevancy_attention, (query, key, value, carrier, *weights, *masks, *options, "streaming")
    )
    q, k, v, c = x.values()
    out, _, lse = torch.ops.vlattn.relevancy_attention(q, k, v, c, *weights, *masks, *options, "streaming")
    for grad_out, grad_carrier, need in ((out, c, True), (out, None, True), (None, c, True), (out, c, False)):
        torch.library.opcheck(
            torch.ops.vlattn.relevancy_attention_backward,
            (grad_out, grad_carrier, q, k, v, out, lse, *weights, *masks, *options, need, "streaming"),
        )
    torch.library.opcheck(torch.ops.vlattn.relevancy_step, (c, q, k, v, out, lse, *masks, *options, "streaming"))


def test_every_operator_here_is_checked() -> None:
    ours = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vlattn::")}
    mine = {name for name in ours if name.startswith(("score_attention", "relevancy"))}
    assert mine == {
        "score_attention",
        "score_attention_backward",
        "relevancy_attention",
        "relevancy_attention_backward",
        "relevancy_step",
    }


def test_fullgraph_two_layers_with_grad_outside_and_two_graphs_over_ten_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Model()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for n in range(8, 18):
        x = torch.randn(B, n, H * D, dtype=F64)
        torch.testing.assert_close(relevancy_of(compiled, x), relevancy_of(model, x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_head_mean_is_relu_before_the_mean() -> None:
    """Eq. 5 clamps each head before heads are averaged: with opposite heads the other order would give zero."""
    prob, grad = torch.ones(1, 2, 1, 1, dtype=F64), t([[[1.0]], [[-1.0]]])
    assert head_mean(prob, grad.view(1, 2, 1, 1), False).item() == 0.5
    query, value = torch.zeros(1, 2, 1, 3, dtype=F64), torch.tensor([1.0, -1.0], dtype=F64).view(1, 2, 1, 1)
    got = va.relevancy_step(torch.ones(1, 1, 1, dtype=F64), query, query, value, torch.ones_like(value))
    assert got.item() == 0.5


def test_attend_gives_rows_that_sum_to_one_or_zero() -> None:
    prob, lse = attend(torch.randn(B, H, N, N, dtype=F64), visible())
    torch.testing.assert_close(prob.sum(-1), (~torch.isneginf(lse)).double())
    assert torch.equal(expand_heads(torch.arange(2.0).view(1, 2, 1, 1), 4).flatten(), torch.tensor([0.0, 0, 1, 1]))
