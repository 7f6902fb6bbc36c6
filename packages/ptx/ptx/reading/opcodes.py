"""The table of opcodes: each is declared once. The parser's widths, liveness and the names of the handlers follow from it.

A row of `ptx/reading/opcodes.txt` has a pattern, operands, a kind and traits, with two blanks in between:

    mad.wide.{u16,s16,u32,s32}    =2t t t 2t    integer

Pattern: modifiers between dots.
    {a,b}     one of these, which stays in the handler's name; `{a,}` may be absent; `{a>b}`: the text a, named b
    (a,b)     one of these, which cannot change a result here and is dropped from the name; `(a,)` may be absent
    <,a,b>    one of these, whose place in the list (0, 1, 2) goes to the handler as a plain number
    m64n#k#   a number in the place of each #, dropped from the name    $set   a set of modifiers, declared as `$set = a,b`
Operands, in the order of PTX; `=` is written, `+` is read and written, the others are read:
    s32, f16  a register or constant of this type      t, d    the opcode's last and first type
    2t, e     twice as wide as t; a part of t, which a vector divides evenly
    p, !p     a predicate; with a plain number behind it: 1 where it stands negated
    t*, t*4   a vector in braces, of any length or of 4    =t|p    a second result, which may be absent
    @, #      an address: base, bytes of the base, plain offset; a plain number        label    a place in the program
    t?0, p?   may be absent, then the constant 0; then nothing
Traits: a name of Control (machine.h); `converged`: the whole warp executes it together; `as=name`: the name in place of the
opcode's first modifier; `load`, `store`: operands as `program.py` lays them out; `order=n0,#0,1,:7`: the handler's operands,
where they are not the numbers of the pattern and then the operands of PTX: `n0` the first number of the pattern, `#0` how many
registers operand 0 has, `1` operand 1, `:7` the number 7. An absent second result is -1, and with `1?` in an order nothing.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

# bytes of a value; a predicate is a bit a lane
SIZES = {kind + bits: int(bits) // 8 for kind in "bus" for bits in ("8", "16", "32", "64")}
SIZES |= {"b128": 16, "f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8, "pred": 0}
SIZES |= {"u16x2": 4, "s16x2": 4, "e4m3x2": 2, "e5m2x2": 2}
KINDS = "integer float special convert move predicate ld.global st.global ld.shared st.shared ldmatrix cp.async mma".split()
KINDS += "shuffle barrier branch other".split()
CONTROLS = "PLAIN BRANCH INDIRECT EXIT TRAP BARRIER ARRIVE BARRIER_REDUCE WARP_BARRIER WAITS RETRIES".split()
# Triton's order of an atomic's modifiers; the PTX ISA, and the table, have them the other way round
_ORDER, _SCOPE = "relaxed|acquire|release|acq_rel", "cta|cluster|gpu|sys"
SPACE_FIRST = re.compile(rf"^(atom|red)\.(global|shared)\.(?:({_SCOPE})\.({_ORDER})|({_ORDER})\.({_SCOPE}))\b")
ANY_BLOCK = ("ld", "st", "atom", "red", "mbarrier", "isspacep")  # take addresses in other blocks of a cluster
TABLE = Path(__file__).with_name("opcodes.txt")


@dataclass(frozen=True)
class Operand:
    """What a row says of one operand."""

    type: str  # of SIZES, or t, d, 2t, e, p, @, #, label
    access: str = "read"  # written, both
    vector: bool = False
    count: int | None = None
    optional: bool = False
    default: int | None = None
    negatable: bool = False
    second: bool = False  # stands behind a bar


@dataclass(frozen=True)
class Row:
    pattern: str
    operands: tuple[Operand, ...]
    kind: str
    control: str
    converged: bool
    layout: str  # "", load or store
    head: str  # of the handlers' names, in place of the opcode's; or ""
    order: tuple[str, ...]
    line: int

    @cached_property
    def named(self) -> list[int]:
        """Numbers of the operands that stand between commas: not those behind a bar, nor the condition code."""
        return [n for n, one in enumerate(self.operands) if not one.second and one.type != "carry"]

    def names(self) -> list[str]:
        """The names of all handlers that the row needs."""
        parts = [[] if kind in "(<" else [name for _, name in choices] for kind, choices in _parts(self.pattern)]
        return sorted({self._named(list(words)) for words in itertools.product(*[part or [""] for part in parts])})

    def _named(self, words: list[str]) -> str:
        return ".".join(word for word in [self.head or words[0], *words[1:]] if word)


@dataclass(frozen=True)
class Opcode:
    """A row, and what its modifiers say in one instruction."""

    row: Row
    name: str  # of the handler
    types: tuple[str, ...]
    numbers: tuple[int, ...]

    def type_of(self, operand: Operand, parts: int = 1) -> str:
        """The type of an operand; of a vector of `parts` registers, the type of each."""
        simple = {"t": self.types[-1:], "d": self.types[:1], "p": ("pred",)}
        if operand.type in simple:
            return simple[operand.type][0]
        if operand.type == "2t":
            return f"{self.types[-1][0]}{16 * SIZES[self.types[-1]]}"
        return f"b{8 * SIZES[self.types[-1]] // parts}" if operand.type == "e" else operand.type


def _parts(pattern: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The pattern's modifiers: bracket, and the choices with their names in the handler's."""
    parts = []
    for text in re.findall(r"\{[^}]*\}|\([^)]*\)|<[^>]*>|[^.{(<]+", pattern):
        if text[0] in "{(<":
            choices = [one.partition(">") for one in text[1:-1].split(",")]
            parts.append((text[0], [(word, name if bar else word) for word, bar, name in choices]))
        else:
            parts.append(("(" if "#" in text else "{", [(text, text)]))
    return parts


def _operand(text: str, second: bool = False) -> Operand:
    text, question, default = text.partition("?")
    match = re.fullmatch(r"([=+]?)(!?)([\w@#]+?)(\*(\d*))?", text)
    assert match, f"operand {text}"
    access = {"": "read", "=": "written", "+": "both"}[match[1]]
    optional = bool(question) or second
    number = int(default) if default else None
    return Operand(
        match[3], access, bool(match[4]), int(match[5]) if match[5] else None, optional, number, bool(match[2]), second
    )


def _row(text: str, line: int) -> Row:
    pattern, operands, kind, *traits = re.split(r"\s{2,}", text)
    words = " ".join(traits).split()
    known = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    control = next((word for word in words if word in CONTROLS), "PLAIN")
    assert kind in KINDS, f"{TABLE.name}, line {line}: kind {kind}"
    assert set(known) <= {*CONTROLS, "converged", "as", "order", "load", "store"}, f"{TABLE.name}, line {line}: {words}"
    parsed = []
    for operand in [] if operands == "-" else operands.split():
        first, _, second = operand.partition("|")
        parsed.append(_operand(first))
        if second:
            parsed.append(_operand("=" + second, second=True))
    layout = next((word for word in ("load", "store") if word in known), "")
    order = tuple(known["order"].split(",")) if "order" in known else ()
    return Row(pattern, tuple(parsed), kind, control, "converged" in known, layout, known.get("as", ""), order, line)


@cache
def rows() -> tuple[Row, ...]:
    sets: dict[str, str] = {}
    parsed = []
    for number, line in enumerate(TABLE.read_text().splitlines(), 1):
        if line.startswith("$"):
            name, _, words = line.partition(" = ")
            sets[name] = words
        elif line and not line.startswith("#"):
            parsed.append(_row(re.sub(r"\$\w+", lambda match: sets[match[0]], line), number))
    return tuple(parsed)


def spelled(row: Row, whole: bool = False) -> list[str]:
    """Opcodes of PTX that fit a row, for all handlers, with all modifiers that become plain numbers.

    Modifiers that are dropped are absent where they may be, unless the `whole` opcode is asked for.
    """
    parts = [(kind, [word for word, _ in choices]) for kind, choices in _parts(row.pattern)]
    choices = [words if kind != "(" else [""] if "" in words and not whole else words[:1] for kind, words in parts]
    return [".".join(word for word in words if word) for words in itertools.product(*choices)]


@cache
def _expressions() -> dict[str, list[tuple[re.Pattern[str], Row]]]:
    """Rows with the expression that matches their opcodes, by the opcode's first word."""
    by_head: dict[str, list[tuple[re.Pattern[str], Row]]] = {}
    for row in rows():
        parts, expression = _parts(row.pattern), ""
        for place, (_, choices) in enumerate(parts):
            words = [re.escape(word).replace(r"\#", r"(\d+)") for word, _ in choices if word]
            dot = r"\." if place else ""
            absent = "?" if len(words) < len(choices) else ""
            expression += f"(?:{dot}(?P<p{place}>{'|'.join(sorted(words, key=len, reverse=True))})){absent}"
        for head, _ in parts[0][1]:
            by_head.setdefault(head.split(".")[0], []).append((re.compile(expression), row))
    return by_head


def _space_last(found: re.Match[str]) -> str:
    """An atomic whose space Triton names first: behind order and scope, as the table has it."""
    name, space, scope, order, order_first, scope_last = found.groups()
    return f"{name}.{order or order_first}.{scope or scope_last}.{space}"


@cache
def matching(opcode: str) -> tuple[Opcode, ...]:
    """The rows that an opcode of PTX fits, with names and numbers. Rows that differ by their operands alone all come."""
    opcode = opcode.replace("shared::cta", "shared")
    if opcode.partition(".")[0] in ANY_BLOCK:
        opcode = opcode.replace("shared::cluster", "shared")
    plain = SPACE_FIRST.sub(_space_last, opcode)
    fitting = []
    for expression, row in _expressions().get(plain.split(".")[0], []):
        match = expression.fullmatch(plain)
        if not match:
            continue
        words, numbers = [], []
        for place, (bracket, choices) in enumerate(_parts(row.pattern)):
            word = match[f"p{place}"] or ""
            if bracket == "<":
                numbers.append([text for text, _ in choices].index(word))
            elif bracket == "{":
                words.append(dict(choices)[word])
            elif "#" in choices[0][0]:
                numbers += map(int, re.fullmatch(re.escape(choices[0][0]).replace(r"\#", r"(\d+)"), word).groups())  # type: ignore[union-attr]
        types = tuple(word for word in plain.split(".") if word in SIZES)
        fitting.append(Opcode(row, row._named(words), types, tuple(numbers)))
    return tuple(fitting)
