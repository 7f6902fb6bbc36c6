"""Compiles the Triton kernels and stores registers, shared memory, spills, tensor cores and warps in build/compiled/triton.json.

    python -m tools.compiled.triton [OPERATOR ...]    # compile, store, and print what changed since the table that is there
    python -m tools.compiled.triton --parse           # only whether this Triton takes the kernels' Python; two minutes

Triton's own cache makes a second run quick. No GPU is needed. The kernels' launchers run as they are, on CPU tensors: triton is
told that an sm_80, sm_90 or sm_100 device is there, and each launch compiles its kernel with the specialisation for this device,
and ends. An opcode that the emulator `ptx` lacks is an error. tools/compiled/calls/ has the calls, a file per operator:
`calls()` yields (name, function). Triton's interpreter must be off. tools/compiled/thresholds.py says what tests ask of kernels.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ptx.reading.opcodes import matching
from tools.compiled.descriptors import stale_descriptors
from tools.compiled.device import pretend
from tools.compiled.machine_code import facts, waits
from tools.compiled.table import Row, differences, file_of, nvdisasm, read, usage, write

TABLE = Path(__file__).parents[2] / "build" / "compiled" / "triton.json"
ARCHITECTURES = (80, 90, 100)
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}


DIVISIONS = ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui")


def operators() -> list[str]:
    return sorted(file.stem for file in Path(__file__).with_name("calls").glob("[a-z]*.py"))


def calls_module(operator: str) -> Any:
    return importlib.import_module(f"tools.compiled.calls.{operator}")


def calls_of(operator: str) -> dict[str, Any]:
    return dict(calls_module(operator).calls())


def launches(operator: str, name: str, architecture: int, launch: Callable[[Any, dict[str, Any]], None]) -> None:
    """Runs one call as on a device of this architecture. Its launches go to `launch`, with the kernel and its arguments."""
    launches_of(calls_of(operator)[name], f"{operator} {name}", architecture, launch)


def launches_of(call: Callable[[], Any], title: str, architecture: int, launch: Callable[[Any, dict[str, Any]], None]) -> None:
    """The same for any call."""
    from triton.runtime.jit import JITFunction

    from vlattn_fast.kernels import _configurations

    def without_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not args, f"{title} {self.fn.__name__}: name the arguments of the launch"
        launch(self, kwargs)

    _configurations.TARGET = f"sm_{architecture}"
    pretend(architecture)
    run, JITFunction.run = JITFunction.run, without_launch
    try:
        call()
    finally:
        JITFunction.run = run


def compile_call(operator: str, name: str, architecture: int, kernels: list[str] | None = None) -> dict[str, Row]:
    """The rows of the kernels that one call launches, or of those named."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    launched: dict[str, list[Row]] = {}

    def compile_only(kernel: Any, kwargs: dict[str, Any]) -> None:
        if kernels is None or kernel.fn.__name__ in kernels:
            compiled = run(kernel, grid=(1,), warmup=True, **kwargs)
            check(f"{operator} {name} {kernel.fn.__name__}", compiled.asm)
            launched.setdefault(kernel.fn.__name__, []).append(_row(compiled) | facts(compiled, kwargs))

    launches(operator, name, architecture, compile_only)
    assert launched, f"{operator} {name}: no kernel was launched"
    return {
        f"{operator} {name} {kernel}{f' launch {n + 1}' if n else ''} sm_{architecture}": row
        for kernel, rows in launched.items()
        for n, row in enumerate(rows)
        if row not in rows[:n]
    }


class _Parsed(Exception):
    pass


def refused(operator: str) -> Iterator[str]:
    """The kernels whose Python this Triton refuses, each with the innermost reason."""
    from triton.compiler.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    run, make_ir, found = JITFunction.run, ASTSource.make_ir, dict[str, str]()

    def only_parsed(self: Any, *args: Any, **options: Any) -> None:
        make_ir(self, *args, **options)
        raise _Parsed

    def parse(kernel: Any, kwargs: dict[str, Any]) -> None:
        try:
            run(kernel, grid=(1,), warmup=True, **kwargs)
        except _Parsed:
            pass
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            found.setdefault(f"{operator} {kernel.fn.__name__}", str(error))

    ASTSource.make_ir = only_parsed
    try:
        for name in calls_of(operator):
            launches(operator, name, 90, parse)
    finally:
        ASTSource.make_ir = make_ir
    yield from (f"{kernel}: {reason}" for kernel, reason in found.items())


def check(what: str, asm: dict[str, Any]) -> None:
    overwritten = overwritten_operands(asm["ttgir"])
    assert not overwritten, f"{what}: copies overwrite what products in flight read: {overwritten}"
    narrow = narrow_offsets(asm["ttir"])
    assert not narrow, f"{what}: products of 32 bits reach an address: {narrow}"
    unknown = unknown_opcodes(asm["ptx"])
    assert not unknown, f"{what}: opcodes that ptx's opcodes.txt lacks: {unknown}"
    if TENSOR_CORES["wgmma"] in asm["ptx"]:
        stale = stale_descriptors(_sass(asm["cubin"]))
        assert not stale, f"{what}: descriptors of products come from what is no address: {stale}"


def _row(kernel: Any) -> Row:
    cores = [name for name, words in TENSOR_CORES.items() if words in kernel.asm["ptx"]]
    waiting = waits(_sass(kernel.asm["cubin"])) if "wgmma" in cores else {}
    row = usage(kernel) | {"tensor_cores": "+".join(cores)}
    return row | waiting


@functools.lru_cache(maxsize=1)  # of a kernel that is checked first, and then has its row
def _sass(cubin: bytes) -> str:
    with file_of(cubin) as file:
        return nvdisasm(file)


def narrow_offsets(ttir: str) -> list[str]:
    """Products of two 32-bit variables that reach an address without being widened; with large tensors these overflow.

    A product with a constant, such as a block's number times its size, stays within the number of rows, unless the second factor
    is a stride. A quotient or a remainder is no larger than its dividend, and a condition only chooses. A loaded number
    does not depend on its address.
    """
    # a name's definitions with their lines: regions side by side reuse names, so the last definition above a line counts
    definitions: dict[str, list[tuple[int, str, list[str], str]]] = {}
    for number, line in enumerate(ttir.splitlines()):
        if match := re.match(r"\s*(%[\w#.]+) = (\S+) (.*?) : (.*?)(?: loc\(.*)?$", line):
            definition = (number, match[2], re.findall(r"%[\w#.]+", match[3]), match[4])
            definitions.setdefault(match[1], []).append(definition)
        if "scf." in line:  # what a loop counts and carries on, whatever had the name above
            for name in re.findall(r"(%[\w.]+) = %", line):
                definitions.setdefault(name, []).append((number, "scf", [], ""))

    def above(name: str, number: int) -> tuple[int, str, list[str], str] | None:
        return next((one for one in reversed(definitions.get(name, [])) if one[0] < number), None)

    narrow: list[str] = []
    for place, operation, operands, kind in (one for every in definitions.values() for one in every):
        if operation != "tt.addptr" or not re.search(r"(, |x)i32>?$", kind.strip()):
            continue
        ahead, seen = [(operands[1], place)], set()
        while ahead:
            name, number = ahead.pop()
            found_above = above(name, number)
            if found_above is None or found_above[0] in seen or found_above[1] == "tt.load":
                continue
            line_of, inner, of, _ = found_above
            seen.add(line_of)
            constants = [operand for operand in of if (one := above(operand, line_of)) and one[1] == "arith.constant"]
            strides = [operand for operand in of if "stride" in operand and operand not in constants]
            if inner == "arith.muli" and (strides or not constants):
                narrow.append(f"{name} = {' * '.join(of)}")
            ahead += [(x, line_of) for x in (of[:1] if inner in DIVISIONS else of[1:] if inner == "arith.select" else of)]
    return narrow


def overwritten_operands(ttgir: str) -> list[str]:
    """Operands of asynchronous products that lie in a buffer of one tile, where a wait lets products in flight.

    Triton allots one tile instead of two to a load that another instruction than wgmma reads as well (triton-lang/triton pull
    request 7110). In a loop of several stages the copy of the next tile may overtake the product.
    """
    tiles = dict(re.findall(r"(%\S+) = ttg\.local_alloc\s*: \(\) -> !ttg\.memdesc<(\d+)x", ttgir))
    parents = dict(re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%[\w#]+)", ttgir))

    def buffer(name: str) -> str:
        return buffer(parents[name]) if name in parents else name

    if not re.search(r"warp_group_dot_wait .*pendings = [1-9]", ttgir):
        return []
    products = re.findall(r"ttng\.warp_group_dot (%\S+), (%\S+),.*isAsync = true", ttgir)
    return [name for operands in products for name in operands if tiles.get(buffer(name)) == "1"]


def unknown_opcodes(ptx: str) -> list[str]:
    """Opcodes that the emulator of compiled kernels lacks."""
    opcodes = set(re.findall(r"(?m)^\s*\{?\s*(?:@!?%\w+\s+)?([a-z]\w*(?:(?:\.|::)\w+)*)(?=[\s;])", ptx))
    return sorted(opcode for opcode in opcodes if not matching(opcode))


Task = tuple[str, str, int]  # operator, call, architecture


def tasks_of(chosen: list[str]) -> list[Task]:
    return [(operator, name, arch) for operator in chosen for name in calls_of(operator) for arch in ARCHITECTURES]


def rows_of(tasks: list[Task], rows: dict[str, Row]) -> dict[str, Row]:
    """The stored rows that these tasks compile."""
    patterns = [rf"{re.escape(f'{operator} {name}')} \w+( launch \d+)? sm_{arch}" for operator, name, arch in tasks]
    pattern = re.compile("|".join(patterns))
    return {key: row for key, row in rows.items() if pattern.fullmatch(key)}


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(prog="python -m tools.compiled.triton", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(operators())}; default: all")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one for each processor")
    parser.add_argument("--parse", action="store_true", help="compile nothing; print the kernels that this Triton refuses")
    options = parser.parse_args()
    chosen = options.operators or operators()
    if unknown := sorted(set(chosen) - set(operators())):
        parser.error(f"OPERATOR must be one of {', '.join(operators())}; got {', '.join(unknown)}")
    if options.parse:
        lines = [line for operator in chosen for line in refused(operator)]
        print(*lines, sep="\n")
        sys.exit(1 if lines else 0)
    too_large = []
    tasks = tasks_of(chosen)
    with ProcessPoolExecutor(options.workers or os.cpu_count(), get_context("spawn"), gc.disable) as pool:
        # stored call by call, so that an end in between loses little
        for task, compiled in zip(tasks, pool.map(compile_call, *zip(*tasks, strict=True)), strict=True):
            table = read(TABLE)
            rows = table.get(triton.__version__, {})
            old = rows_of([task], rows)
            print(*differences(compiled, old), sep="\n", flush=True)
            too_large += differences(compiled, compiled)
            table[triton.__version__] = {key: row for key, row in rows.items() if key not in old} | compiled
            write(TABLE, table)
    sys.exit(1 if too_large else 0)


if __name__ == "__main__":
    main()
