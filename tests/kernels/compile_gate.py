"""Compiles every Triton kernel for GPUs that are not here and holds registers, shared memory and spills to a stored table.

    python tests/kernels/compile_gate.py [OPERATOR ...]            # compare with tests/compile_gate.json
    python tests/kernels/compile_gate.py [OPERATOR ...] --write    # store what is found

The launchers of the kernels run as they are, on CPU tensors: triton is told that an sm_80, sm_90 or sm_100 device is there, and
each launch compiles its kernel with the very specialisation that device would get, and ends there. tests/kernels/compiled/ has
the calls, a file per operator: `calls()` yields (name, function). It must run in a process of its own, without the interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE.parent / "compile_gate.json"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = 99 * 1024  # bytes a block may have on every GPU since Ampere: sm_86 and sm_89 have the least
TENSOR_CORES = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}

Row = dict[str, Any]


def operators() -> list[str]:
    return sorted(file.stem for file in (HERE / "compiled").glob("[a-z]*.py"))


def calls_of(operator: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"compiled_{operator}", HERE / "compiled" / f"{operator}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.calls())


def compile_call(operator: str, name: str, architecture: int) -> dict[str, Row]:
    """The rows of the kernels that one call launches."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Device:
        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

    launched: dict[str, list[Row]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.setdefault(self.fn.__name__, []).append(_row(kernel))

    driver.set_active(Device())
    JITFunction.run = compile_only
    try:
        calls_of(operator)[name]()
    finally:
        JITFunction.run = run
    assert launched, f"{operator} {name}: no kernel was launched"
    return {
        f"{operator} {name} {kernel}{f' launch {n + 1}' if n else ''} sm_{architecture}": row
        for kernel, rows in launched.items()
        for n, row in enumerate(rows)
        if row not in rows[:n]
    }


def _row(kernel: Any) -> Row:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    cores = [name for name, words in TENSOR_CORES.items() if words in kernel.asm["ptx"]]
    return {"registers": registers, "spills": stack, "shared": kernel.metadata.shared, "tensor_cores": "+".join(cores)}


def compile_all(chosen: list[str]) -> dict[str, Row]:
    tasks = [(operator, name, arch) for operator in chosen for name in calls_of(operator) for arch in ARCHITECTURES]
    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for found in pool.map(compile_call, *zip(*tasks, strict=True)):
            rows |= found
    return rows


def complaints(found: dict[str, Row], stored: dict[str, Row]) -> list[str]:
    """What is not as stored, a line each."""
    lines = [
        f"{key}: {row['shared']} bytes of shared memory, more than {SHARED_LIMIT}"
        for key, row in found.items()
        if row["shared"] > SHARED_LIMIT
    ]
    for key in sorted(found.keys() | stored.keys()):
        if key not in stored or key not in found:
            lines.append(f"{key}: {'not in the table' if key in found else 'in the table, but no call compiles it'}")
        elif found[key] != stored[key]:
            changed = [f"{name} {was} -> {found[key][name]}" for name, was in stored[key].items() if found[key][name] != was]
            lines.append(f"{key}: {', '.join(changed)}")
    return lines


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(operators())}; default: all")
    parser.add_argument("--write", action="store_true", help="store what is found")
    options = parser.parse_args()
    chosen = options.operators or operators()
    if unknown := sorted(set(chosen) - set(operators())):
        parser.error(f"unknown operators {unknown}; known: {operators()}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows = table.get(triton.__version__, {})
    mine = {key: row for key, row in rows.items() if key.split()[0] in chosen}
    found = compile_all(chosen)
    if options.write:
        table[triton.__version__] = dict(sorted(({key: row for key, row in rows.items() if key not in mine} | found).items()))
        versions = ",\n".join(
            f"{json.dumps(version)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(row)}" for k, row in kept.items()) + "\n}"
            for version, kept in sorted(table.items())
        )
        TABLE.write_text(f"{{\n{versions}\n}}\n")
        mine = found
    lines = complaints(found, mine)
    for key, row in found.items():
        if row["spills"]:
            print(f"spills {row['spills']} bytes: {key}")
    print("\n".join(lines))
    print(f"triton {triton.__version__}: {len(found)} kernels compiled, {len(lines)} not as stored")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
