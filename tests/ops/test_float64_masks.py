"""A float64 mask is added in float64, whatever the dtype of the query: an offset of a whole row changes nothing but the
log-sum-exp, the larger of two huge values wins, and a row of one huge value throughout attends evenly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import on
from vlattn_fast._ground.tensors import cast_finite

F64 = torch.float64
SIZES = ((33, 47), (33, 800), (5, 1100))  # one block of keys, several, and few rows over several
Operator = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def inputs(n: int, m: int) -> dict[str, Tensor]:
    shapes = {"query": (n, 16), "key": (m, 16), "value": (m, 8), "grad_output": (n, 8)}
    return {name: torch.randn(2, 2, *shape) for name, shape in shapes.items()}


def leaves(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name].clone().requires_grad_() for name in ("query", "key", "value")]


def attend(x: dict[str, Tensor], options: dict[str, Any], score: Any = "scaled_dot") -> dict[str, Tensor]:
    """The log-sum-exp as `lse`; with its gradient in the others."""
    tensors = leaves(x)
    out, lse = va.score_attention(*tensors, score=score, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), tensors, (x["grad_output"], x["grad_output"][..., 0]))
    return {"lse": lse.detach(), "out": out.detach(), **dict(zip(("grad q", "grad k", "grad v"), grads, strict=True))}


def attend_additively(x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    return attend(x, options, va.scores.Additive(torch.linspace(-1.0, 1.0, 16, dtype=x["query"].dtype)))


def carry(x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """relevancy_attention, over as many keys as queries."""
    n = x["query"].shape[2]
    x = {name: t[:, :, :n] for name, t in x.items()}
    options = {**options, "attn_mask": options["attn_mask"][:, :n]}
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][:, :n]
    tensors = [*leaves(x), x["query"][:, :2, :, 0].clone().requires_grad_()]
    out = va.relevancy_attention(*tensors, **options)
    grads = torch.autograd.grad(out, tensors, (x["grad_output"], x["query"][:, :2, :, 1].abs()))
    return {"out": out[0].detach(), **{f"grad {i}": grad for i, grad in enumerate(grads)}}


def step(x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """relevancy_step by its own log-sum-exp, and by that of score_attention."""
    rows = x["query"][:, :2, :, 0].abs()
    lse = attend(x, options)["lse"] if options["backend"] != "reference" else None
    return {
        f"{rule}{name}": va.relevancy_step(rows, *tensors(x), rule=rule, lse=known, **options)
        for rule in ("gradient", "attention")
        for name, known in (("", None), (" by lse", lse))
    }


def tensors(x: dict[str, Tensor]) -> list[Tensor]:
    return [x[name] for name in ("query", "key", "value", "grad_output")]


def average(x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    return {
        "gradient": va.attention_map(*tensors(x), rule="gradient", **options),
        "attention": va.attention_map(x["query"], x["key"], **options),
    }


def describe(x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    query, key, _ = leaves(x)
    groups = {"key_groups": torch.arange(key.shape[2]) % 3, "num_groups": 3}
    found = va.attention_statistics(query, key, statistics=va.LogitStatistics._fields, **groups, **options)
    outputs = {name: getattr(found, name) for name in ("mass", "entropy", "maximum", "received")}
    grads = torch.autograd.grad([y.square().sum() for y in outputs.values()], (query, key))
    return {name: y.detach() for name, y in found._asdict().items()} | dict(zip(("grad q", "grad k"), grads, strict=True))


OPERATORS: dict[str, Operator] = {
    "score_attention": attend,
    "additive": attend_additively,
    "relevancy_attention": carry,
    "relevancy_step": step,
    "attention_map": average,
    "attention_statistics": describe,
}


def same(backend: str, operator: str, x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The operator's results, which must be those of the formula in float64."""
    run = OPERATORS[operator]
    got = run(x, {**options, "backend": backend})
    exact = run({name: t.double() for name, t in x.items()}, {**options, "backend": "reference"})
    for name, y in got.items():
        of_logits = name in ("lse", "max_logit")  # which an offset moves, and which float32 holds as far as it goes
        right = cast_finite(exact[name], y.dtype) if of_logits else exact[name]
        closely = {"rtol": 3e-7 if of_logits else 2e-4, "atol": 2e-5, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(y.to(right.dtype), right, **closely)
    return got


@pytest.mark.parametrize("hides", (False, True), ids=("", "hidden keys"))
@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("operator", OPERATORS)
@on("streaming", "cpu")
def test_an_offset_of_a_million_is_exact(backend: str, operator: str, n: int, m: int, hides: bool) -> None:
    """Also where keys that other masks hide have the largest value of their row."""
    x, bias = inputs(n, m), torch.randn(n, m, dtype=F64)
    options: dict[str, Any] = {}
    if hides:
        options = {"key_mask": (torch.arange(m) % 7 > 0).expand(2, m), "is_causal": True}
        bias[:, ::7] = 1e9
        bias += torch.ones(n, m).triu(1) * 1e9
    same(backend, operator, x, {**options, "attn_mask": bias + 1e6})


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("operator", OPERATORS)
@on("streaming", "cpu")
def test_huge_values_keep_their_order(backend: str, operator: str, n: int, m: int) -> None:
    """-1e300 beside -1e299: one key is attended to. -1e300 throughout: all are alike. Only -inf masks."""
    x, mask = inputs(n, m), torch.randn(n, m, dtype=F64)
    mask[1] = mask[2] = -1e300
    mask[2, 3] = -1e299
    mask[3] = -torch.inf
    found, lowest = same(backend, operator, x, {"attn_mask": mask}), torch.finfo(torch.float32).min
    for name in found.keys() & {"lse", "max_logit"}:
        assert found[name][:, :, 1:4].flatten(0, 1).unique(dim=0).tolist() == [[lowest, lowest, -torch.inf]]


@on("streaming", "cpu")
def test_masks_of_any_layout(backend: str) -> None:
    """One mask for all heads, rows or samples, and one whose keys do not lie side by side."""
    x = inputs(17, 30)
    for shape in ((30,), (17, 1), (2, 1, 1, 30), (1, 2, 17, 30), (2, 2, 17, 30)):
        mask = torch.randn(shape, dtype=F64) + 1e6
        for layout in (mask, mask.mT.contiguous().mT if mask.dim() > 1 else mask[None].mT.contiguous().mT[0]):
            for operator in ("score_attention", "attention_map", "attention_statistics"):
                same(backend, operator, x, {"attn_mask": layout})
