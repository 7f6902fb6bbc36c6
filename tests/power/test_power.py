"""The rule sees what it is there for: flaws planted in a copy of the streaming code are caught, the copy itself is not.

Each flaw names the dtypes in which it is visible, and why not in the others: there the plain formula rounds as much by itself.
Where it is not visible the flaw must pass, so that this table stays true.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.streaming import _scores, _tiles, score_attention

LOW = (torch.float32, torch.bfloat16, torch.float16)
B, H, N, M, D = 2, 3, 24, 40, 16
SCALE = D**-0.5


@dataclass(frozen=True)
class Flaw:
    """`edits`: what stands once in the source of score_attention, _scores or _tiles, and what it becomes."""

    edits: Mapping[str, str]
    dtypes: tuple[torch.dtype, ...] = LOW
    why_only: str = ""
    causal: bool = False


OUT = "(weights.to(value.dtype) @ value) / total.to(value.dtype)"
LSE = "cast_finite(rows[1], lse.dtype)"
EXPONENTIALS = "weights = torch.exp(logits - torch.where(torch.isinf(largest), 0.0, largest))"
LOGITS = 'return mask_tile(self.attention, score, self.shape, *tile, x.get("row_bias"))'
QUERY, SUM = "x.query[tile].to(self.dtype)", "tile] += x"

FLAWS = {
    "lse rounded to bfloat16": Flaw(
        {LSE: f"{LSE}.bfloat16()"},
        (torch.float32, torch.float16),
        "the formula sums logits that are rounded to bfloat16 themselves",
    ),
    "P rounded to bfloat16": Flaw(
        {OUT: OUT.replace("weights", "weights.bfloat16()")},
        (torch.float32,),
        "the formula's P is a bfloat16; a float16 result has an ulp of 1e-3, and rounding P costs it as much",
    ),
    "gradients of a tile rounded to bfloat16": Flaw(
        {SUM: f"{SUM}.bfloat16().to(x.dtype)"}, (torch.float32,), "the formula rounds P, dP and dS as much"
    ),
    "outputs off by 1e-3": Flaw({OUT: f"{OUT} * 1.001"}, (torch.float32,), "a float16 has an ulp of 1e-3, a bfloat16 of 8e-3"),
    "an exponential off by up to 1e-3": Flaw(
        {EXPONENTIALS: f"{EXPONENTIALS} * (1 + 1e-3 * torch.sin(9 * logits)).nan_to_num()"},
        (torch.float32, torch.float16),
        "a bfloat16 has an ulp of 8e-3",
    ),
    "one key tile left out of one row": Flaw(
        {LOGITS: f"{LOGITS.replace('return', 'logits =')}\n        logits[:1, :1, :1, 16:32] = -torch.inf\n        return logits"}
    ),
    "one head unscaled": Flaw({QUERY: f"{QUERY} * (1.0 if h.start else 1 / x.scale)"}),
    "a mask off by one key": Flaw({"o_kv > o_q[:, None]": "o_kv > o_q[:, None] + 1"}, causal=True),
}


def copy_of(module: ModuleType, edits: Mapping[str, str], names: Mapping[str, Any]) -> tuple[ModuleType, int]:
    """A fresh module of the edited source, with other `names`; and how many of the edits found their place."""
    source, planted = inspect.getsource(module), 0
    for old, new in edits.items():
        if old in source:
            assert source.count(old) == 1, f"{source.count(old)} places in {module.__name__}: {old}"
            source, planted = source.replace(old, new), planted + 1
    fresh = ModuleType(f"{module.__name__}_flawed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, fresh.__name__, fresh)  # dataclasses look their module up
        exec(compile(source, fresh.__name__, "exec"), fresh.__dict__)
    fresh.__dict__.update(names)
    return fresh, planted


def planted(edits: Mapping[str, str]) -> ModuleType:
    """The streaming code of score_attention with these edits, tile by tile."""
    tiles, first = copy_of(_tiles, edits, {"TILE_ELEMENTS": 3 * N * M // 2})
    parts, second = copy_of(_scores, edits, {name: getattr(tiles, name) for name in ("mask_tile", "Tiling")})
    helpers = {name: getattr(tiles, name) for name in ("exponentials", "log_of_sum")}
    helpers |= {"Logits": parts.Logits, "Sums": parts.Sums, "_fused_cpu": SimpleNamespace(runs=lambda *_: False)}
    code, third = copy_of(score_attention, edits, helpers)
    assert first + second + third == len(edits), "an edit has no place in the source"
    return code


# the inputs beside the attention and its tensors
PLAIN: dict[str, Any] = {"seed": None, "dropout_p": 0.0, "backend": "streaming"}


class Attending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, code: ModuleType, causal: bool) -> tuple[Tensor, Tensor]:
        ctx.code, ctx.causal = code, causal
        attention = Attention(query, key, scale=SCALE, is_causal=causal)
        inputs = ScoreAttentionInputs(attention=attention, value=value, sink=None, **PLAIN)
        out, lse = code.forward(inputs)
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        inputs = ScoreAttentionBackwardInputs(
            grad_out=grad_out,
            grad_lse=grad_lse,
            attention=Attention(query, key, scale=SCALE, is_causal=ctx.causal),
            value=value,
            out=out,
            lse=lse,
            **PLAIN,
        )
        grad_q, grad_k, grad_v, *_ = ctx.code.backward(inputs)
        return grad_q, grad_k, grad_v, None, None


def compare(flaw: Flaw, dtype: torch.dtype, edits: Mapping[str, str]) -> None:
    code = planted(edits)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return Attending.apply(query, key, value, code, flaw.causal)

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return va.reference.score_attention(query, key, value, score="dot", scale=SCALE, is_causal=flaw.causal, return_lse=True)

    inputs = {name: torch.randn(B, H, size, D) for name, size in (("query", N), ("key", M), ("value", M))}
    assert_all_close_to(ours, formula, as_dtype(inputs, dtype), [torch.randn(B, H, N, D), None])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("flaw", {x.causal: x for x in FLAWS.values()}.values(), ids=("plain", "causal"))
def test_the_copy_itself_passes(flaw: Flaw, dtype: torch.dtype) -> None:
    compare(flaw, dtype, {})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", FLAWS)
def test_a_planted_flaw_is_caught(name: str, dtype: torch.dtype) -> None:
    flaw = FLAWS[name]
    if dtype in flaw.dtypes:
        with pytest.raises(AssertionError, match="numbers of|must hold in"):
            compare(flaw, dtype, flaw.edits)
    else:
        assert flaw.why_only
        compare(flaw, dtype, flaw.edits)
