"""Relevancy steps and maps behind any score of score_attention, by their backends and by the score's formula with whole maps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.backends import F64
from tests.helpers.ops.masks import real_keys
from tests.helpers.ops.score_cases import SCORES, attention_inputs
from vlattn_fast import scores as S
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, mask_padding
from vlattn_fast.backends.reference._softmax import attend, pair_bias_of
from vlattn_fast.backends.reference.relevancy_attention import head_mean
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.ops.core_scores import core_map, core_step

FEW = ("general-tanh-key", "cosine-eps=5", "additive")  # one of each sort
SCALE = 0.8


def made(
    case: str, n: int, m: int, *, b: int = 2, h: int = 2, kv: int = 2, rows: int = 2, dtype: torch.dtype = F64
) -> tuple[dict[str, Tensor], Callable[..., S.Score]]:
    """relevancy, which is no narrower than float32, query, key, value, grad_output and the score's parameters; and the score."""
    inputs, make = attention_inputs(SCORES[case], b=b, h=h, kv=kv, n=n, m=m, dv=5)
    inputs = as_dtype({**inputs, "grad_output": torch.randn(b, h, n, 5)}, dtype)
    return {"relevancy": torch.rand(b, rows, n, dtype=torch.promote_types(dtype, torch.float32)), **inputs}, make


def core_of(inputs: dict[str, Tensor], make: Callable[..., S.Score]) -> S.Core:
    params = {name: x for name, x in inputs.items() if name not in ("relevancy", "query", "key", "value", "grad_output")}
    return S.resolve(make(params)).core(inputs["query"], inputs["key"])


def functions(
    backend: str, make: Callable[..., S.Score], *, maps: bool = True, **options: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """r Abar, and with `maps` Abar, unless rows are normalised: by the backend, and by the formula."""
    sink: Tensor | None = options.pop("sink", None)
    rule, row_normalize = options.pop("rule", "gradient"), options.pop("row_normalize", False)
    maps = maps and not row_normalize and backend != "cuda"  # which has no maps

    def run(relevancy: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, **params: Tensor) -> Any:
        score = S.resolve(make(params))
        core = score.core(query, key)
        masks = {"attn_mask": None, "key_mask": None, "is_causal": False, "scale": SCALE, **options}
        logit = None if sink is None else sink[:, None] - SCALE * core.offset
        of_map = (value, grad_output) if rule == "gradient" else (None, None)
        more: dict[str, Any] = {"rule": rule, "sink": logit, "backend": backend, **masks}
        stepped = core_step(relevancy, core, *of_map, row_normalize=row_normalize, **more)
        return (stepped, core_map(core, *of_map, **more)) if maps else stepped

    def formula(relevancy: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, **params: Tensor) -> Any:
        score, heads = S.resolve(make(params)), query.shape[1]
        key, value = (expand_heads(x, heads) for x in mask_padding(options.get("key_mask"), key, value))
        bias = pair_bias_of(*(options.get(name) for name in ("group_bias", "query_groups", "key_groups")))
        masks = options.get("attn_mask"), options.get("key_mask"), options.get("is_causal", False)
        prob, _ = attend(SCALE * score.formula(query, key), *masks, sink=sink, pair_bias=bias)
        abar = head_mean(prob, grad_output @ value.mT if rule == "gradient" else None, row_normalize)
        stepped = (relevancy.to(abar.dtype) @ abar).to(relevancy.dtype)
        return (stepped, abar.to(compute_dtype(query))) if maps else stepped

    return run, formula


def check(backend: str, inputs: dict[str, Tensor], make: Callable[..., S.Score], **options: Any) -> None:
    scales = {"out0": 1e-3, "out1": 1e-3}  # A dA may cancel to nothing
    assert_all_close_to(*functions(backend, make, **options), inputs, what=backend, scales=scales, grads=False)


def ratios(case: str, dtype: torch.dtype) -> dict[str, float]:
    """The worst error of Triton's kernels, as a multiple of the allowed one, in one draw."""
    inputs, make = made(case, 40, 70, kv=1, rows=1, dtype=dtype)
    run, formula = functions("triton", make, key_mask=real_keys(2, 70))
    given = [(run, inputs), (formula, as_dtype(inputs, torch.float64)), (formula, inputs)]
    step, exact, rounded = (dict(zip(("step", "map"), of(**named), strict=True)) for of, named in given)
    return {f"{case} {name}": error.ratio() for name, error in settle([(step, exact, rounded)], 1e-3, lambda: 1).items()}
