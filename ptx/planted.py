"""Plants faults in the package's Triton kernels, in their PTX and in their source, and tells what notices each.

    python -m ptx.planted                     # all calls on sm_80, sm_90 and sm_100; writes tests/ptx/planted.json
    python -m ptx.planted --limit 0           # every place of every fault, not a few drawn ones: hours

A fault is noticed by an error that ends a launch, by a finding, or by a result outside the tolerance rule. It is harmless where
several seeds give no finding and the very bits of the results without it. No finding means that every two accesses which the
removed barrier, wait or fence might order are ordered by others, whatever the order of warps. A fault in what float32 adds to a
bfloat16 (the third part of a split number) may differ by a rounding; it counts by itself where that is at most four ulps.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

import ptx.triton
from ptx.program import Program
from ptx.reader import PtxError
from ptx.reports import EmulationError, Options
from vlattn_fast.checking import verify
from vlattn_fast.checking.tolerance import Errors

TABLE = Path(__file__).parents[1] / "tests" / "ptx" / "planted.json"
ARCHITECTURES = (80, 90, 100)
ULPS = 4  # another order of sums differs by as much
SEEDS = (1, 2, 3)  # further ones where the first shows nothing
SOURCES_FOR_A_FEW = 2  # each compiles the call's kernels
SIZES = verify.Sizes(90, 140, 64, 64, 50, 40, 128)
CALLS = (  # operator and name of a case of `vlattn verify`, dtype
    ("score_attention", "scaled_dot causal", torch.bfloat16),
    ("relevancy_attention", "row-normalised", torch.bfloat16),
    ("attention_map", "gradient", torch.float32),
    ("stacked_cross_attention", "SCAN t2i", torch.bfloat16),
)

# ---- faults in PTX: a kind, and a function from a line to the line with the fault, or to None where it does not apply

Edit = Callable[[str], str | None]
GUARD = r"^(\s*)((?:@!?%p\d+\s+)?)"


def _replaced(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Edit:
    expression = re.compile(pattern)

    def edit(line: str) -> str | None:
        return expression.sub(by, line, count=1) if expression.search(line) else None

    return edit


def _without(word: str) -> Edit:
    return _replaced(GUARD + re.escape(word) + r"[^;]*;", r"\1")


def _one_element_further(match: re.Match[str]) -> str:
    size = int(re.findall(r"\.[a-z]+(\d+)", match[1])[-1]) // 8
    return f"{match[1]}{match[2]}[{match[3]}+{int(match[4] or 0) + size}]"


REMOVED = (
    "bar.sync", "cp.async.wait_group", "cp.async.commit_group", "fence.proxy.async", "wgmma.fence", "wgmma.commit_group",
    "wgmma.wait_group", "tcgen05.commit", "tcgen05.wait::st", "tcgen05.dealloc",
)  # fmt: skip
IN_PTX: dict[str, Edit] = {f"{word} removed": _without(word) for word in REMOVED} | {
    "mbarrier.try_wait removed": _replaced(r"mbarrier\.try_wait\S*\s+(\w+),[^;]*;", r"setp.eq.u32 \1, 0, 0;"),
    "predicate inverted": _replaced(r"^(\s*)@(!?)(%p\d+)", lambda m: f"{m[1]}@{'' if m[2] else '!'}{m[3]}"),
    "predicate dropped": _replaced(r"^(\s*)@!?%p\d+(?=\s+(?!bra)\S)", r"\1"),
    "xor of a swizzle removed": _replaced(r"\bxor\.b32\s+(%r\d+), (%r\d+), [^;]*;", r"mov.b32 \1, \2;"),
    "offset off by one element": _replaced(
        r"((?:ld|st)\.(?:global|shared)[\w.:]*\.[a-z]+\d+)(.*)\[\s*(%r\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", _one_element_further
    ),
    "scale forgotten": _replaced(r"\bmul\.(?:rn\.)?(?:ftz\.)?f32\s+(%r\d+), (%r\d+), [^;]*;", r"mov.b32 \1, \2;"),
}

# ---- faults in sources: a kind, and a function from a node to the node with the fault, or to None


def _is_access(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store")


def _mask_dropped(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and _is_access(node) and any(one.arg == "mask" for one in node.keywords):
        return ast.Call(node.func, node.args, [one for one in node.keywords if one.arg not in ("mask", "other")])
    return None


def _offset_off_by_one(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and _is_access(node):
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


IN_SOURCE: dict[str, Callable[[ast.AST], ast.AST | None]] = {
    "source: mask dropped": _mask_dropped,
    "source: offset off by one": _offset_off_by_one,
    "source: scale forgotten": _scale_forgotten,
    "source: condition dropped": _condition_dropped,
}


class Replacement(ast.NodeTransformer):
    """Replaces the n-th node to which a fault applies; `lines` of each node, first and last."""

    def __init__(self, fault: Callable[[ast.AST], ast.AST | None], number: int) -> None:
        self.fault, self.number, self.lines = fault, number, list[range]()

    def visit(self, node: ast.AST) -> Any:
        changed = self.fault(node)
        if changed is not None:
            self.lines.append(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
            if len(self.lines) - 1 == self.number:
                return ast.copy_location(changed, node)
        return self.generic_visit(node)


def _edited(source: str, fault: Callable[[ast.AST], ast.AST | None], number: int) -> tuple[str, list[range]]:
    """The source with the fault at its n-th place, and the lines of all places."""
    replacement = Replacement(fault, number)
    tree = replacement.visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)), replacement.lines


# ---- calls


class Fault(NamedTuple):
    kind: str
    kernel: str  # or, in a source, the function
    place: int  # line of the PTX, or number of the place in the function


class Outcome(NamedTuple):
    state: str  # noticed, harmless, rounding, not noticed, not executed
    by: tuple[str, ...] = ()


class Call:
    """A call of an operator, forward and backward, whose kernels take faults."""

    def __init__(self, architecture: int, operator: str, name: str, dtype: torch.dtype) -> None:
        self.architecture, self.title = architecture, f"{operator} {name} {str(dtype)[6:]}"
        self.case = next(case for case in verify.cases(0, SIZES) if (case.operator, case.name) == (operator, name))
        self.tensors = self.case.in_dtype(dtype)
        self.kernels: dict[str, str] = {}  # texts by names
        self._names: dict[str, str] = {}

    @cached_property
    def truth(self) -> tuple[verify.Tensors, verify.Tensors]:
        return verify._run(self.case, self.tensors, "reference", torch.float64), verify._run(self.case, self.tensors, "reference")

    @cached_property
    def unchanged(self) -> verify.Tensors:
        """The results without a fault; `kernels` and `executed` follow from this run."""
        self.executed: dict[str, set[int]] = {}
        programs: dict[str, Program] = {}

        def keep(text: str, program: Program) -> Program:
            programs.setdefault(self._named(text, program), program)
            return program

        results, launches = self._run(keep, 1)
        assert not (findings := [str(one) for launch in launches for one in launch.findings]), findings
        for name, program in programs.items():
            counted = zip(program.hits(), program.kernel.instructions, strict=True)
            self.executed[name] = {one.line for count, one in counted if count}
        return results

    def _named(self, text: str, program: Program) -> str:
        """The kernel's name; with a number where a call compiles it several times."""
        if text not in self._names:
            same = sum(one.partition(" ")[0] == program.name for one in self.kernels)
            name = f"{program.name} {same + 1}" if same else program.name
            self._names[text], self.kernels[name] = name, text
        return self._names[text]

    def _run(self, program_of: Callable[[str, Program], Program], seed: int) -> tuple[verify.Tensors, list[Any]]:
        with ptx.triton.emulated(self.architecture, Options(seed=seed), strict=False) as launches, _programs(program_of):
            return verify._run(self.case, self.tensors, "triton"), launches

    def faults(self) -> list[Fault]:
        """All that apply to what the call runs."""
        assert self.unchanged
        lines = [(name, n, line) for name, text in self.kernels.items() for n, line in enumerate(text.splitlines(), 1)]
        in_ptx = [Fault(kind, name, n) for kind, edit in IN_PTX.items() for name, n, line in lines if edit(line) is not None]
        compiled = {place for text in self.kernels.values() for place in re.findall(r"// (\w+\.py:\d+):", text)}
        in_source = [
            Fault(kind, name, n)
            for kind, fault in IN_SOURCE.items()
            for name, function in _functions().items()
            for n, lines in enumerate(_edited(function.src, fault, -1)[1])
            if any(f"{name.partition('.')[0]}.py:{function.def_file_line_number + n - 1}" in compiled for n in lines)
        ]
        return in_ptx + in_source

    def may_run(self, fault: Fault) -> bool:
        return fault.kind in IN_SOURCE or fault.place in self.executed[fault.kernel]

    def try_fault(self, fault: Fault) -> Outcome | None:
        """None where the fault makes no PTX, or no kernel, that compiles."""
        assert self.unchanged
        if fault.kind in IN_SOURCE:
            with _changed_source(fault):
                return self._judge(lambda text, program: program, in_source=True)
        lines = self.kernels[fault.kernel].splitlines()
        if not self.may_run(fault):
            return Outcome("not executed")
        lines[fault.place - 1] = IN_PTX[fault.kind](lines[fault.place - 1]) or ""
        try:
            changed = Program("\n".join(lines), self._program_name(fault.kernel))
        except PtxError:
            return None
        original = self.kernels[fault.kernel]
        return self._judge(lambda text, program: changed if text == original else program)

    @staticmethod
    def _program_name(kernel: str) -> str:
        return kernel.partition(" ")[0]

    def _judge(self, program_of: Callable[[str, Program], Program], in_source: bool = False) -> Outcome | None:
        texts: set[str] = set()

        def note(text: str, program: Program) -> Program:
            texts.add(text)
            return program_of(text, program)

        ulps = 0.0
        for seed in SEEDS:
            try:
                results, launches = self._run(note, seed)
            except EmulationError:
                return Outcome("noticed", ("error",))
            except triton.CompilationError:
                return None
            if in_source and texts <= set(self.kernels.values()):
                return Outcome("not executed")
            by = {finding.kind for launch in launches for finding in launch.findings}
            by |= {"wrong result"} if self._wrong(results) else set()
            if by:
                return Outcome("noticed", tuple(sorted(by)))
            ulps = max(ulps, *(_ulps(results[name], x) for name, x in self.unchanged.items()))
        return Outcome("not noticed" if ulps > ULPS else "rounding" if ulps else "harmless")

    def _wrong(self, results: verify.Tensors) -> bool:
        exact, formula = self.truth
        for name, x in results.items():
            errors = Errors()
            errors.add(x, exact[name], formula[name])
            if not errors.ratio() <= 1:
                return True
        return False


def _ulps(one: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference in ulps of the largest number; 0 only for the same bits."""
    one, reference = one.detach().contiguous(), reference.detach().contiguous()
    if torch.equal(one.view(torch.uint8), reference.view(torch.uint8)):
        return 0.0
    largest = float((one.double() - reference.double()).abs().max()) / max(float(reference.abs().max()), 1e-30)
    return max(largest / torch.finfo(one.dtype).eps, 1e-9) if largest == largest else float("inf")


@contextmanager
def _programs(program_of: Callable[[str, Program], Program]) -> Iterator[None]:
    """Each launch takes the program that the function gives for its text."""
    launch = ptx.triton.Driver.launch

    def changed(self: ptx.triton.Driver, name: str, program: Program, *rest: Any) -> None:
        launch(self, name, program_of("\n".join(program.lines), program), *rest)

    ptx.triton.Driver.launch = changed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ptx.triton.Driver.launch = launch  # type: ignore[method-assign]


def _functions() -> dict[str, JITFunction[Any]]:
    """The package's Triton functions, by module and name."""
    import sys

    modules = {name: module for name, module in sys.modules.items() if name.startswith("vlattn_fast.kernels.")}
    return {
        f"{one.__module__.rpartition('.')[2]}.{one.__name__}": one
        for module in modules.values()
        for one in vars(module).values()
        if isinstance(one, JITFunction) and one.__module__ in modules
    }


@contextmanager
def _changed_source(fault: Fault) -> Iterator[None]:
    functions = _functions()
    function = functions[fault.kernel]
    source = function.src
    function._unsafe_update_src(_edited(source, IN_SOURCE[fault.kind], fault.place)[0])
    _forget(functions)
    try:
        yield
    finally:
        function._unsafe_update_src(source)
        _forget(functions)


def _forget(functions: dict[str, JITFunction[Any]]) -> None:
    """Keys of what is compiled depend on the sources of all functions that a kernel calls."""
    for one in functions.values():
        one.hash = None
        one.device_caches.clear()


# ---- the table


def key_of(text: str) -> str:
    """Of a PTX text without its lines about the source's places."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\.loc|\.file|//)", line)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def plant(architecture: int, number: int, limit: int) -> dict[str, Any]:
    """The outcomes of one call's faults: of each kind so many that are executed, at most."""
    call = Call(architecture, *CALLS[number])
    faults = call.faults()
    random.Random(call.title).shuffle(faults)
    executed, idle = Counter[str](), Counter[str]()
    rows = []
    for fault in faults:
        most = SOURCES_FOR_A_FEW if fault.kind in IN_SOURCE else limit
        if limit and executed[fault.kind] + (idle[fault.kind] if fault.kind in IN_SOURCE else 0) >= most and call.may_run(fault):
            continue
        outcome = call.try_fault(fault)
        if outcome and outcome.state == "not executed":
            idle[fault.kind] += 1
        elif outcome:
            executed[fault.kind] += 1
            rows.append([*fault, outcome.state, " + ".join(outcome.by)])
    keys = {name: key_of(text) for name, text in call.kernels.items()}
    return {"architecture": architecture, "call": call.title, "kernels": keys, "not executed": idle, "faults": sorted(rows)}


STATES = ("noticed", "harmless", "rounding", "not noticed")


def summary(calls: list[dict[str, Any]]) -> list[str]:
    """By kind and architecture: planted where a call runs, noticed, harmless, a rounding, and not noticed. In Markdown."""
    counts: dict[tuple[str, int], Counter[str]] = {}
    for call in calls:
        for kind, _, _, state, _ in call["faults"]:
            counts.setdefault((kind, call["architecture"]), Counter())[state] += 1

    def cell(states: Counter[str]) -> str:
        numbers = [sum(states.values()), *(states[state] for state in STATES)]
        return " / ".join(map(str, numbers)) if states else "–"

    head = ["fault", *(f"sm_{architecture}" for architecture in ARCHITECTURES)]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * len(ARCHITECTURES))]
    for kind in [*IN_PTX, *IN_SOURCE]:
        cells = [cell(counts.get((kind, architecture), Counter())) for architecture in ARCHITECTURES]
        lines.append(" | ".join([kind, *cells]))
    return [f"| {line} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx.planted", description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=6, metavar="N", help="faults of a kind in a call; 0: all (default: 6)")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--call", type=int, choices=range(len(CALLS)), action="append", help="number of a call; default: all")
    parser.add_argument("--write", type=Path, default=TABLE, metavar="FILE", help="where the outcomes go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = []
    for architecture in options.architecture or ARCHITECTURES:
        for number in options.call or range(len(CALLS)):
            calls.append(plant(architecture, number, options.limit))
            rows = calls[-1]["faults"]
            print(f"sm_{architecture} {calls[-1]['call']}: {Counter(row[3] for row in rows)}", flush=True)
            for row in rows:
                if row[3] == "not noticed":
                    print("    not noticed:", *row[:3], flush=True)
            with options.write.open("w") as file:
                json.dump({"triton": triton.__version__, "calls": calls}, file, indent=None, separators=(",", ":"))
                file.write("\n")
    print("\n".join(summary(calls)))


if __name__ == "__main__":
    main()
