"""Why a fault is harmless: each reason is decided, by the paths of the kernel or by running the call with a check in its place.

The checks are PTX or source in the place of the fault: a trap, which ends the launch unless the claim holds for each lane, or
another value, which moves no bit of the results unless something depends on it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import partial

from ptx.planting.faults import IN_PTX, IN_SOURCE, PRODUCT, Change, Fault, is_access
from ptx.planting.paths import COPIES, PRODUCTS, Paths
from ptx.reading.reader import Constant, Instruction
from tools.planted.calls import Call

OTHERS = (0x7FC0, 0x7B00)  # twice in 32 bits: NaN, and a large number, of which one may be lost in a maximum
ONES = (0x3F80, 0xBF80)  # about 1 and -1 in float32: 0 times NaN, or times what overflows, is no 0
ONE = 0x3F800000
MASK, SCALE, CONDITION = "source: mask dropped", "source: scale forgotten", "source: condition dropped"
GROUP = "source: group of heads forgotten"
SMALL = "its value is so small that 0 keeps the tolerance as well"
SUBTRACTED = "a softmax subtracts it, and may subtract another number"
REGISTER = {0: "pred", 2: "b16", 4: "b32", 8: "b64"}


def judged(call: Call, fault: Fault) -> tuple[str, str] | None:
    """The state of a fault, and what notices it or why it is harmless; None where it makes no kernel that compiles."""
    outcome = call.try_fault(fault)
    if outcome is None or outcome.state in ("noticed", "not executed"):
        return outcome and (outcome.state, " + ".join(outcome.by))
    text = reason(call, fault) if outcome.state == "harmless" else small(call, fault)
    return outcome.state if text else "unexplained", text


def reason(call: Call, fault: Fault) -> str:
    """Why the fault is harmless, or "" where nothing decides it."""
    if fault.kind in IN_SOURCE:
        checks = ((text, change) for text, kind, change in IN_SOURCES if fault.kind == kind)
        return next((text for text, change in checks if call.same(fault, change)), "")
    if fault.kind in ORDERS:
        order, in_this_run = ORDERS[fault.kind]
        paths = Paths(call.programs[fault.kernel])
        texts = {order(paths, n) for n in paths.at(fault.place)}
        return in_this_run if "" in texts else " + ".join(sorted(texts))
    return next((text for text, kinds, check in IN_LINES if re.fullmatch(kinds, fault.kind) and check(call, fault)), "")


# Where the paths do not decide, the run without the instruction has: the emulator knows of each byte who touched it and which
# barriers, waits and fences came since, and lands copies and products no sooner than they are waited for.
TOUCHED = "in this run nothing touches what it waits for before a later wait"
JOINED = "in this run nothing touches its group before a later wait"
ORDERS: dict[str, tuple[Callable[[Paths, int], str], str]] = {
    "bar.sync removed": (Paths.barrier, "in this run no warp touches what another writes between the barriers beside it"),
    "cp.async.wait_group removed": (partial(Paths.wait, kind=COPIES), TOUCHED),
    "cp.async.commit_group removed": (partial(Paths.commit, kind=COPIES), JOINED),
    "fence.proxy.async removed": (Paths.proxy_fence, "in this run another fence follows each write that a product reads"),
    "wgmma.fence removed": (Paths.product_fence, ""),
    "wgmma.commit_group removed": (partial(Paths.commit, kind=PRODUCTS), JOINED),
    "wgmma.wait_group removed": (partial(Paths.wait, kind=PRODUCTS), TOUCHED),
    "tcgen05.wait::st removed": (Paths.store_wait, "in this run nothing uses what it stores before a later wait"),
    "mbarrier.try_wait removed": (lambda paths, number: "", TOUCHED),
}

# ---- lines of PTX

GUARDED = re.compile(r"^(\s*)@(!?)(%p\d+)\s+(.*)$")


def _always(call: Call, fault: Fault) -> bool:
    """The predicate holds for each lane whenever the line runs."""
    line = call.line(fault)
    guard = GUARDED.match(line)
    return bool(guard) and call.same(fault, f"@{'' if guard[2] else '!'}{guard[3]} trap;\n{line}")


def _unused(call: Call, fault: Fault, lanes: str = "", values: tuple[int, ...] = OTHERS) -> bool:
    """Other values in its results, of all lanes or of those of a guard, move no bit."""
    written = _written(call, fault)

    def others(bits: int) -> str:
        return "\n".join(
            f"{lanes}mov.{REGISTER[size]} {name}, {bits & 1 if size == 0 else _repeated(bits, size)};"
            for name, size in written.items()
        )

    return bool(written) and all(call.same(fault, f"{call.line(fault)}\n{others(bits)}") for bits in values)


def _repeated(bits: int, size: int) -> int:
    return int(f"{bits:04x}" * (size // 2), 16)


def _written(call: Call, fault: Fault) -> dict[str, int]:
    """The registers that a line writes, with their bytes."""
    paths = Paths(call.programs[fault.kernel])
    sizes = {name: paths.kernel.registers[name] for n in paths.at(fault.place) for name in paths.instructions[n].written}
    return sizes if set(sizes.values()) <= REGISTER.keys() else {}


def _loads_unused(call: Call, fault: Fault) -> bool:
    """It makes addresses of loads alone, whose results are not used."""
    instructions = Paths(call.programs[fault.kernel]).instructions
    addresses, loads = {*_written(call, fault)}, set[int]()
    for one in instructions:  # a value is written before it is read
        if one.read & addresses and one.line != fault.place:
            if one.opcode.name.startswith(("ld.", "ldmatrix")):
                loads.add(one.line)
            elif one.opcode.name.startswith(("add.", "or.", "xor.", "mov.", "shl.")):
                addresses |= one.written
            else:
                return False
    return bool(loads) and all(_unused(call, fault._replace(place=line)) for line in loads)


def _same_there(call: Call, fault: Fault) -> bool:
    """A load one element further gives the very values."""
    if not (written := _written(call, fault)) or 0 in written.values():
        return False
    line = IN_PTX[fault.kind](call.line(fault)) or ""
    lines = [call.line(fault), "{", ".reg .pred %differs;"]
    for n, (name, size) in enumerate(written.items()):
        lines += [f".reg .{REGISTER[size]} %planted{n};", f"mov.{REGISTER[size]} %planted{n}, {name};"]
        line = re.sub(re.escape(name) + r"\b(?!.*\{)(?=.*\[)", f"%planted{n}", line, count=1)
    lines.append(line)
    for n, (name, size) in enumerate(written.items()):
        lines += [f"setp.ne.{REGISTER[size]} %differs, %planted{n}, {name};", "@%differs trap;"]
    return call.same(fault, "\n".join([*lines, "}"]))


def _unused_without(call: Call, fault: Fault, values: tuple[int, ...] = OTHERS) -> bool:
    """The same of the lanes that the predicate keeps out."""
    guard = GUARDED.match(call.line(fault))
    return bool(guard) and _unused(call, fault, f"@{'' if guard[2] else '!'}{guard[3]} ", values)


def _branches(call: Call, fault: Fault) -> bool:
    return "bra" in call.line(fault)


def _made_up_for(paths: Paths, product: Instruction) -> bool:
    """A fused product of the same factors gives what the rounded product leaves."""
    return any(one.opcode.name.startswith("fma") and one.values[-3:-1] == product.values[-2:] for one in paths.instructions)


def _in_series(paths: Paths, product: Instruction) -> bool:
    """All that it is used for is 1 + c x or x c + itself: steps of a series."""
    users = [one for one in paths.instructions if product.written & one.read]

    def step(one: Instruction) -> bool:
        constant, last = one.values[-2:] if one.opcode.name.startswith("fma") else (None, None)
        return last in product.written or isinstance(constant, Constant) and isinstance(last, Constant) and last.bits == ONE

    return bool(users) and all(step(one) for one in users)


def _needless(call: Call, fault: Fault) -> bool:
    """The call is the same without the line."""
    return call.same(fault, "")


def _subtracted(call: Call, fault: Fault) -> bool:
    """8 more keeps the tolerance rule as well: the largest logit, which a softmax subtracts, may be another number."""
    product = PRODUCT.search(call.line(fault))
    return bool(product) and call.keeps_tolerance(fault, f"{call.line(fault)}\nadd.f32 {product[1]}, {product[1]}, 0f41000000;")


def _corrected(call: Call, fault: Fault) -> bool:
    """0 and -2 times what it computes keep the tolerance rule as well.

    So it is with the terms of delta = sum(dO * O): in float32 the sum of dS, which would be 0, corrects it.
    """
    written = _written(call, fault)

    def times(factor: str) -> str:
        return "\n".join([call.line(fault), *(f"mul.f32 {name}, {name}, {factor};" for name in written)])

    return bool(written) and all(call.keeps_tolerance(fault, times(factor)) for factor in ("0f00000000", "0fC0000000"))


SHARED = re.compile(r"\b(st\.shared\.b32\s+\[[^]]*\]), %\w+;")


def _small_itself(call: Call, fault: Fault) -> bool:
    """So it is with old minus new maximum of a running sum of exponentials whose maximum hardly moves, and with the last part
    of a split number."""
    line = call.line(fault)
    if fault.kind.startswith("offset") and SHARED.search(line):
        return call.keeps_tolerance(fault, SHARED.sub(r"\1, 0;", line))
    zeros = "\n".join(f"mov.{REGISTER[size]} {name}, 0;" for name, size in _written(call, fault).items() if size > 0)
    return bool(zeros) and call.keeps_tolerance(fault, f"{line}\n{zeros}")


def small(call: Call, fault: Fault) -> str:
    """Why the results with the fault differ, and keep the tolerance rule; or "" where nothing decides it."""
    if fault.kind == SCALE:
        return SUBTRACTED if call.keeps_tolerance(fault, _eight_more) else ""
    if fault.kind == CONDITION:
        more = partial(_other_in_place, "c", "2.0")
        return "where the condition fails, 2 more keeps the tolerance as well" if call.keeps_tolerance(fault, more) else ""
    if fault.kind in IN_SOURCE or fault.kind in ORDERS:
        return ""
    if fault.kind == "scale forgotten":
        paths = Paths(call.programs[fault.kernel])
        product = paths.instructions[paths.at(fault.place)[0]]
        if _made_up_for(paths, product):
            return "the next part of a split number makes up for it"
        if _in_series(paths, product):
            return "a term of a series changes, below the tolerance"
        if _subtracted(call, fault):
            return SUBTRACTED
    if _small_itself(call, fault):
        return SMALL
    return "a row's sum corrects it: 0 and -2 times it keep the tolerance as well" if _corrected(call, fault) else ""


STORE = re.compile(r"\b(?:st\.global\S*\s+\[[^]]*\],\s*(?:\{([^}]*)\}|(%\w+))|cp\.async\.c\S+ .*, (%\w+) *;)")


def _writes_the_same(call: Call, fault: Fault) -> bool:
    """Other values are noticed that the lanes write which the predicate keeps out; so their own are those of other lanes.

    A copy of fewer bytes fills up with zeros.
    """
    guard, store = GUARDED.match(call.line(fault)), STORE.search(call.line(fault))
    if not guard or not store:
        return False
    values = [one.strip() for one in (store[1] or store[2] or store[3]).split(",")]
    sizes = Paths(call.programs[fault.kernel]).kernel.registers
    if not all(sizes.get(one) in (2, 4, 8) for one in values):
        return False
    lines, changed = [], IN_PTX[fault.kind](call.line(fault)) or ""
    for n, one in enumerate(values):
        kind = REGISTER[sizes[one]]
        bits = 0 if store[3] else _repeated(OTHERS[1], sizes[one])
        lines += [f".reg .{kind} %planted{n};", f"mov.{kind} %planted{n}, {one};"]
        lines.append(f"@{'' if guard[2] else '!'}{guard[3]} mov.{kind} %planted{n}, {bits};")
        changed = re.sub(re.escape(one) + r"(?=\W*[,};])(?!.*\])", f"%planted{n}", changed, count=1)
    return not call.same(fault, "\n".join(["{", *lines, changed, "}"]))


def _factor_is_one(call: Call, fault: Fault) -> bool:
    product = PRODUCT.search(call.line(fault))
    if not product:
        return False
    again = product[0].replace(product[1], "%planted", 1)
    check = (
        f"{{ .reg .f32 %planted; .reg .pred %differs; {again} setp.ne.b32 %differs, %planted, {product[2]}; @%differs trap; }}"
    )
    return call.same(fault, f"{check}\n{call.line(fault)}")


def _factor_cancels(call: Call, fault: Fault) -> bool:
    product = PRODUCT.search(call.line(fault))
    if not product:
        return False
    return call.same(fault, f"{call.line(fault)}\nmul.f32 {product[1]}, {product[1]}, 0f40800000;")


IN_LINES: tuple[tuple[str, str, Callable[[Call, Fault], bool]], ...] = (  # reason, kinds, check
    ("the predicate holds for all lanes", "predicate dropped", _always),
    ("what the lanes without it get reaches no result", "predicate dropped", _unused_without),
    ("what the lanes without it get is multiplied by 0", "predicate dropped", partial(_unused_without, values=ONES)),
    ("the lanes without it write what others write there", "predicate.*", _writes_the_same),
    ("both ways of the branch lead to the same", "predicate inverted", _branches),
    ("what it computes reaches no result", "predicate inverted|xor of a swizzle removed|offset.*|scale.*", _unused),
    ("what is read from its addresses reaches no result", "xor of a swizzle removed", _loads_unused),
    ("the next element is the same", "offset off by one element", _same_there),
    ("what it writes reaches no result", "predicate.*|offset.*", _needless),
    ("the factor is 1", "scale forgotten", _factor_is_one),
    (SUBTRACTED, "scale forgotten", _subtracted),
    ("a factor of 4 more moves no bit either: it is divided out", "scale forgotten", _factor_cancels),
    (SMALL, "predicate inverted|offset.*", _small_itself),
)

# ---- sources


def _parsed(text: str, **nodes: ast.AST) -> ast.AST:
    """An expression or a statement whose names are nodes."""

    class Filled(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.AST:
            return nodes.get(name.id, name)

    statement = ast.parse(text).body[0]
    return Filled().visit(statement.value if isinstance(statement, ast.Expr) else statement)


def _outside_without_mask(node: ast.AST) -> ast.AST | None:
    """Where the mask is false, an address outside of all memory."""
    assert isinstance(node, ast.Call) and is_access(node)
    mask = next(one.value for one in node.keywords if one.arg == "mask")
    kept = [one for one in node.keywords if one.arg not in ("mask", "other")]
    return ast.Call(node.func, [_parsed("p + tl.where(m, 0, 1 << 40)", p=node.args[0], m=mask), *node.args[1:]], kept)


def _other_without_mask(node: ast.AST) -> ast.AST | None:
    """Where the mask is false, another value: loaded, or stored."""
    assert isinstance(node, ast.Call)
    mask = next(one.value for one in node.keywords if one.arg == "mask")
    if ast.unparse(node.func) == "tl.load":
        return _parsed("tl.where(m, x, x + 77)", m=mask, x=node)
    place, value = node.args
    return ast.Call(node.func, [place, _parsed("tl.where(m, x, x + 77)", m=mask, x=value)], [])


def _other_in_place(condition: str, more: str, node: ast.AST) -> ast.AST | None:
    assert isinstance(node, ast.Call)
    c, a, b = node.args
    return _parsed(f"tl.where({condition}, a, a + {more})", c=c, a=a, b=b)


def _factor(text: str, node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp):
        return ast.BinOp(node.left, ast.Mult(), _parsed(text, f=node.right))
    assert isinstance(node, ast.AugAssign)
    return ast.AugAssign(node.target, node.op, _parsed(text, f=node.value))


def _eight_more(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp):
        return _parsed("x + 8.0", x=node)
    assert isinstance(node, ast.AugAssign)
    return ast.AugAssign(node.target, ast.Add(), _parsed("x * (f - 1.0) + 8.0", x=_read(node.target), f=node.value))


def _other_where_groups_are(node: ast.AST) -> ast.AST | None:
    """Another number where a group has several heads."""
    assert isinstance(node, ast.BinOp)
    return _parsed("x // g + (g - 1) * 777", x=node.left, g=node.right)


def _read(target: ast.expr) -> ast.AST:
    return ast.parse(ast.unparse(target)).body[0].value  # type: ignore[attr-defined]


IN_SOURCES: tuple[tuple[str, str, Change], ...] = (
    ("the mask is true for all elements", MASK, _outside_without_mask),
    ("what the mask keeps out reaches no result", MASK, _other_without_mask),
    ("where the condition fails, the value reaches no result", CONDITION, partial(_other_in_place, "c", "77")),
    (
        "where the condition fails, the values are the same or reach no result",
        CONDITION,
        partial(_other_in_place, "c | (a == b)", "77"),
    ),
    ("a factor of 4 more moves no bit either: it is divided out", SCALE, partial(_factor, "f * 4.0")),
    ("the factor is 1", SCALE, partial(_factor, "tl.where(f == 1.0, 1.0, 777.0)")),
    ("a group has one head", GROUP, _other_where_groups_are),
)
