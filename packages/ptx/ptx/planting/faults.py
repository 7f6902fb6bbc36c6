"""Faults: kinds, and what each changes in a line of PTX or in a node of a source."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Fault(NamedTuple):
    kind: str
    kernel: str  # or, in a source, the function
    place: int  # line of the PTX, or number of the place in the function


# ---- in PTX: a function from a line to the line with the fault, or to None where it does not apply

Edit = Callable[[str], str | None]
GUARD = r"^(\s*)((?:@!?%p\d+\s+)?)"
PRODUCT = re.compile(r"\bmul\.(?:rn\.)?(?:ftz\.)?f32\s+(%[rf]\d+), (%[rf]\d+), [^;]*;")


def _replaced(pattern: str | re.Pattern[str], by: str | Callable[[re.Match[str]], str]) -> Edit:
    expression = re.compile(pattern)

    def edit(line: str) -> str | None:
        return expression.sub(by, line, count=1) if expression.search(line) else None

    return edit


def _without(word: str) -> Edit:
    return _replaced(GUARD + re.escape(word) + r"\b[^;]*;", r"\1")


def _one_element_further(match: re.Match[str]) -> str:
    size = int(re.findall(r"\.[a-z]+(\d+)", match[1])[-1]) // 8
    return f"{match[1]}{match[2]}[{match[3]}+{int(match[4] or 0) + size}]"


REMOVED = (
    "bar.sync", "bar.warp.sync", "cp.async.wait_group", "cp.async.commit_group", "fence.proxy.async",
    "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "tcgen05.commit", "tcgen05.wait::st", "tcgen05.dealloc",
)  # fmt: skip
IN_PTX: dict[str, Edit] = {f"{word} removed": _without(word) for word in REMOVED} | {
    "mbarrier.try_wait removed": _replaced(r"mbarrier\.try_wait\S*\s+(\w+),[^;]*;", r"setp.eq.u32 \1, 0, 0;"),
    "predicate inverted": _replaced(r"^(\s*)@(!?)(%p\d+)", lambda m: f"{m[1]}@{'' if m[2] else '!'}{m[3]}"),
    "predicate dropped": _replaced(r"^(\s*)@!?%p\d+(?=\s+(?!bra)\S)", r"\1"),
    "xor of a swizzle removed": _replaced(r"\bxor\.b32\s+(%r\d+), (%r\d+), [^;]*;", r"mov.b32 \1, \2;"),
    "offset off by one element": _replaced(
        r"((?:ld|st)\.(?:global|shared)[\w.:]*\.[a-z]+\d+)(.*)\[\s*(%r\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", _one_element_further
    ),
    "scale forgotten": _replaced(PRODUCT, r"mov.b32 \1, \2;"),
}

# ---- in sources: a function from a node to the node with the fault, or to None

Change = Callable[[ast.AST], ast.AST | None]


def is_access(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store")


def _mask_dropped(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and is_access(node) and any(one.arg == "mask" for one in node.keywords):
        return ast.Call(node.func, node.args, [one for one in node.keywords if one.arg not in ("mask", "other")])
    return None


def _offset_off_by_one(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and is_access(node):
        return ast.Call(node.func, [ast.BinOp(node.args[0], ast.Add(), ast.Constant(1)), *node.args[1:]], node.keywords)
    return None


def _scale_forgotten(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and "scale" in ast.unparse(node.right):
        return node.left
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult) and "scale" in ast.unparse(node.value):
        return ast.Pass()
    return None


def _condition_dropped(node: ast.AST) -> ast.AST | None:
    return node.args[1] if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.where" else None


def _rescale_left_out(node: ast.AST) -> ast.AST | None:
    """That of earlier sums, when a tile of an online softmax has a larger maximum."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and "alpha" in ast.unparse(node.right):
        return node.left
    return None


def _group_forgotten(node: ast.AST) -> ast.AST | None:
    """A query head's number in the place of its key head's."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and "GROUP" in ast.unparse(node.right):
        return node.left
    return None


def _range_short(node: ast.AST) -> ast.AST | None:
    """A loop without its last step."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("range", "tl.range") and len(node.args) == 3:
        begin, end, step = node.args
        return ast.Call(node.func, [begin, ast.BinOp(end, ast.Sub(), step), step], node.keywords)
    return None


IN_SOURCE: dict[str, Change] = {
    "source: mask dropped": _mask_dropped,
    "source: offset off by one": _offset_off_by_one,
    "source: scale forgotten": _scale_forgotten,
    "source: condition dropped": _condition_dropped,
    "source: rescale left out": _rescale_left_out,
    "source: group of heads forgotten": _group_forgotten,
    "source: range one step short": _range_short,
}


class Replacement(ast.NodeTransformer):
    """Replaces the n-th node to which a fault applies by what `change` makes of it; `lines` of each node, first and last."""

    def __init__(self, fault: Change, number: int, change: Change) -> None:
        self.fault, self.number, self.change, self.lines = fault, number, change, list[range]()

    def visit(self, node: ast.AST) -> Any:
        if self.fault(node) is not None:
            self.lines.append(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
            if len(self.lines) - 1 == self.number:
                changed = self.change(node)
                assert changed is not None
                return ast.copy_location(changed, node)
        return self.generic_visit(node)


def edited(source: str, fault: Change, number: int, change: Change | None = None) -> tuple[str, list[range]]:
    """The source with the fault, or with `change`, at the fault's n-th place, and the lines of all places."""
    replacement = Replacement(fault, number, change or fault)
    tree = replacement.visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)), replacement.lines
