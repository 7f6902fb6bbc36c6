"""Places in the core's source at which one small change is a fault: in Python, kernels in Triton among it, by the syntax tree;
in C++ by its tokens."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SIGNS: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OF_AXES = {*"sum mean amax amin any all flatten unflatten unsqueeze squeeze transpose softmax flip cumsum logsumexp".split()}
_TYPES = "dict", "ndarray", "tuple", "type"  # whose subscripts are types, as those of names with a capital
# of a line of C++ without its comment: what stands there, and what stands there instead
IN_CPP = {
    "comparison": (r"(?<=\s)(<=|>=|==|!=|<|>)(?=\s)", {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}),
    "sign": (r"(?<=\s)([+-])(?=\s)", {"+": "-", "-": "+"}),
    "condition": (r"(&&|\|\|)", {"&&": "||", "||": "&&"}),
    "off by one": (r"(?<=[\s(,\[])([0-4])(?=[,;)\]\s])", {str(n): str(n + 1) for n in range(5)}),
}


class Mutant(NamedTuple):
    """`after` stands for the characters from `start` to `end` of a file."""

    file: str
    line: int
    function: str  # the innermost one; empty outside of all, and in C++
    kind: str
    start: int
    end: int
    before: str
    after: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {' '.join(self.before.split())} -> {' '.join(self.after.split())}"

    def planted(self, text: str) -> str:
        return text[: self.start] + self.after + text[self.end :]


def mutants(root: Path, file: str) -> list[Mutant]:
    text = (root / file).read_text()
    return [*(_in_python(file, text) if file.endswith(".py") else _in_cpp(file, text))]


def _in_cpp(file: str, text: str) -> Iterator[Mutant]:
    start = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.partition("//")[0].rstrip()
        begin = len(code) - len(code.lstrip())
        if not re.match(r"\s*(#|template|static_assert|FIELDS|EXPORT)", code):
            for kind, (pattern, instead) in IN_CPP.items():
                for match in re.finditer(pattern, code):
                    after = code[begin : match.start(1)] + instead[match[1]] + code[match.end(1) :]
                    yield Mutant(file, number, "", kind, start + begin, start + len(code), code[begin:], after)
        start += len(line)


def _in_python(file: str, text: str) -> Iterator[Mutant]:
    data, lines = text.encode(), [0]
    for line in data.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return len(data[: lines[line - 1] + column].decode())

    for function, node in _nodes(ast.parse(text), ""):
        for kind, changed in _changes(node):
            start, end = (offset(*at) for at in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))
            before, after = text[start:end], _written(changed, node.col_offset)
            if ast.unparse(node) != after and "\n" not in before.strip():
                yield Mutant(file, node.lineno, function, kind, start, end, before, after)
        if isinstance(node, ast.Try) and node.finalbody and not node.handlers:  # it ends so only if nothing is raised
            first = node.body[0]
            start, end = offset(node.lineno, node.col_offset), offset(node.end_lineno or 0, node.end_col_offset or 0)
            statements = [*node.body, *node.finalbody]
            after = f"\n{' ' * node.col_offset}".join(_written(each, node.col_offset) for each in statements)
            yield Mutant(file, first.lineno, function, "finally", start, end, text[start:end], after)


def _written(node: ast.AST, column: int) -> str:
    text = ast.unparse(node).replace("\n", f"\n{' ' * column}")
    return f"({text})" if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp, ast.UnaryOp)) else text


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[str, Any]]:
    """Each node that is code, after the innermost function around it: no annotation, no text, no error's words."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_comment", "decorator_list") or isinstance(node, (ast.JoinedStr, ast.Raise)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
                yield inner, child
                yield from _nodes(child, inner)


def _changes(node: Any) -> Iterator[tuple[str, ast.AST]]:
    def changed(edit: Callable[[Any], object]) -> Any:
        new = copy.deepcopy(node)
        edit(new)
        return new

    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", changed(lambda x: x.ops.__setitem__(0, COMPARISONS[type(x.ops[0])]()))
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS and not isinstance(node.left, (ast.List, ast.JoinedStr)):
        yield "sign", changed(lambda x: setattr(x, "op", SIGNS[type(x.op)]()))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)) and not isinstance(node.operand, ast.Constant):
        yield ("sign" if isinstance(node.op, ast.USub) else "condition"), copy.deepcopy(node.operand)
    if isinstance(node, ast.BoolOp):
        yield "condition", changed(lambda x: setattr(x, "op", ast.And() if isinstance(x.op, ast.Or) else ast.Or()))
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Tuple):
        keyed = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if all(isinstance(each, ast.Name) for each in node.slice.elts) and not (keyed[:1].isupper() or keyed in _TYPES):
            yield "key", changed(lambda x: x.slice.elts.pop())
    if isinstance(node, ast.Call):
        yield from _calls(node, changed)


def _calls(node: ast.Call, changed: Callable[..., Any]) -> Iterator[tuple[str, ast.AST]]:
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    for i, each in enumerate(node.args):
        value = each.operand if isinstance(each, ast.UnaryOp) and isinstance(each.op, ast.USub) else each
        if isinstance(value, ast.Constant) and type(value.value) is int:
            number = -value.value if value is not each else value.value
            kind = "axis" if method in OF_AXES else "off by one"
            other = number - 1 if number < 0 else number + 1
            yield kind, changed(lambda x, i=i, other=other: x.args.__setitem__(i, ast.Constant(other)))
        if isinstance(each, ast.Name) and "mask" in each.id:
            yield "mask", changed(lambda x, i=i: x.args.__setitem__(i, ast.Constant(None)))
        if i and isinstance(each, ast.Name) and isinstance(node.args[i - 1], ast.Name):
            yield "swapped", changed(lambda x, i=i: x.args.__setitem__(slice(i - 1, i + 1), x.args[i - 1 : i + 1][::-1]))
    for i, keyword in enumerate(node.keywords):
        # zip's strict asks for what holds; leave is of a progress bar
        if (
            isinstance(keyword.value, ast.Constant)
            and type(keyword.value.value) is bool
            and keyword.arg not in ("strict", "leave")
        ):
            other = not keyword.value.value
            yield "flag", changed(lambda x, i=i, other=other: setattr(x.keywords[i], "value", ast.Constant(other)))
        if isinstance(keyword.value, ast.Name) and "mask" in keyword.value.id:
            yield "mask", changed(lambda x, i=i: setattr(x.keywords[i], "value", ast.Constant(None)))
