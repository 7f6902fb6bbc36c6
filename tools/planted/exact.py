"""Faults that stay within the tolerance, planted again under FpSan: `python -m tools.planted.exact` stores which are seen.

FpSan knows no tolerance. A call runs without the fault and with it, in the same tiles, and a fault is seen where a bit differs.
The PTX under FpSan has none of the instructions of the kernel's own. So what a fault does in PTX is done here to the expression
of the source that it comes from, or to one like it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ptx.sanitizers
from tools.emulated.triton import emulated
from tools.planted.calls import changed_source, tile_by_tile
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Sizes, Tensors
from vlattn_fast.kernels import _configurations

TABLE = Path(__file__).parents[2] / "tests" / "compiled" / "planted_exact.json"
SIZES = Sizes(queries=40, keys=72, regions=40)
TILE = {"BLOCK_Q": 32, "BLOCK_KV": 32, "num_warps": 4, "num_stages": 1}


class Planted(NamedTuple):
    reason: str  # by which tools/planted/reasons.py explains that a fault keeps the tolerance
    operator: str
    case: str
    dtype: torch.dtype
    function: str
    expression: str  # as `ast.unparse` writes it
    instead: str
    differentiable: bool = False


FAULTS = (
    Planted(
        "a softmax subtracts it, and may subtract another number",
        *("score_attention", "softcap and sink", torch.bfloat16, "score_attention._softmax_of_all"),
        "tl.max(b_s, axis=1)) * b_scale",
        "tl.max(b_s, axis=1))",
    ),
    Planted(
        "its value is so small that 0 keeps the tolerance as well",
        *("attention_map", "gradient", torch.float32, "attention_map._rows_kernel"),
        "(b_max - b_safe) * scale_log2",
        "(b_max - b_safe)",
    ),
    Planted(
        "a term of a series changes, below the tolerance",
        *("score_attention", "softcap and sink", torch.bfloat16, "_scores._tanh"),
        "-0.00570498872745 * xx",
        "-0.00570498872745",
    ),
    Planted(
        "the next part of a split number makes up for it",
        *("stacked_cross_attention", "SCAN t2i", torch.bfloat16, "_stacked_products.store_parts"),
        "b_part = b.to(",
        "b_part = (b if part > 0 else b * 0.5).to(",
    ),
    Planted(
        "a row's sum corrects it: 0 and -2 times it keep the tolerance as well",
        *("score_attention", "scaled_dot causal", torch.float32, "_products_backward._backward_q_kernel"),
        "b_delta = delta_of(",
        "b_delta = -2.0 * delta_of(",
        True,
    ),
    Planted(
        "where the condition fails, 2 more keeps the tolerance as well",
        *("stacked_cross_attention", "SCAN t2i", torch.bfloat16, "_stacked_weights._weights_kernel"),
        "tl.where((o_kv < num)[None, :], b_x, float('-inf'))",
        "b_x",
    ),
)


def seen(planted: Planted, architecture: int = 90) -> bool:
    torch.set_num_threads(1)
    case = next(one for one in verify.cases(sizes=SIZES, operators=[planted.operator]) if one.name == planted.case)
    case = replace(case, differentiable=planted.differentiable)
    tensors = case.in_dtype(planted.dtype)

    def results() -> Tensors:
        return verify._run(case, tensors, "triton")

    before, _configurations.OVERRIDES = _configurations.OVERRIDES, _Tile()
    try:
        with ptx.sanitizers.fpsan(architecture, emulated=emulated), tile_by_tile():
            right = results()
            with changed_source(planted.function, _edited(planted)):
                wrong = results()
    finally:
        _configurations.OVERRIDES = before
    return any(not torch.equal(ptx.sanitizers.payload(x), ptx.sanitizers.payload(wrong[name])) for name, x in right.items())


class _Tile(dict[str, dict[str, int]]):
    """Replaces `OVERRIDES`: one small tile, which compiles soon."""

    def __bool__(self) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> Any:
        return {name: TILE.get(name, 32) for name in default if name != "AHEAD"}


def _edited(planted: Planted) -> Callable[[str], str]:
    def edit(source: str) -> str:
        text = ast.unparse(ast.parse(source))
        assert text.count(planted.expression) == 1, (
            f"{planted.function} has {text.count(planted.expression)} {planted.expression}"
        )
        return text.replace(planted.expression, planted.instead)

    return edit


def row(planted: Planted) -> dict[str, Any]:
    call = f"{planted.operator} {planted.case} {str(planted.dtype)[6:]}"
    function, expression = planted.function, planted.expression
    return {"reason": planted.reason, "call": call, "function": function, "expression": expression, "instead": planted.instead}


def main() -> None:
    rows = []
    for planted in FAULTS:
        rows.append({**row(planted), "seen": seen(planted)})
        print(rows[-1], flush=True)
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
