"""Stores registers, shared memory, stack and instructions of every compiled CUDA C++ kernel in build/compiled/cuda.json.

    python -m tools.compiled.cuda    # of build/cuda, brought up to date; prints what changed since the table that is there

"shared" counts static bytes, with the KiB that CUDA keeps in every block since sm_90; dynamic bytes of a launch are not in the
library. "stack" counts bytes of a thread: spilled registers, and arrays indexed at run time. "mma" counts the kernel's matrix
instructions, "loop" all instructions of the main loop (machine_code.py), or of the longest loop where none has any.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.building import build
from tools.compiled.machine_code import MMA, innermost_loops, main_loop
from tools.compiled.table import Row, cuobjdump, differences, nvdisasm, read, tool, write

TABLE = Path(__file__).parents[2] / "build" / "compiled" / "cuda.json"


@functools.cache
def nvcc_version() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV([\d.]+)", printed)[1]


def rows_of(library: Path) -> dict[str, Row]:
    """A row for each kernel and target: "score_attention_kernel<__half, 64> sm_90a"."""
    rows: dict[str, Row] = {}
    for part in cuobjdump("--dump-resource-usage", library).split("\nFatbin ")[1:]:
        target = re.search(r"^arch = (\w+)$", part, re.M)[1]
        usage = re.findall(r"^ Function (\S+):\n(.*)$", part, re.M)
        for name, (_, words) in zip(readable([mangled for mangled, _ in usage]), usage, strict=True):
            key = f"{name} {target}"
            assert key not in rows, f"two kernels are called {name}: give one of them another name"
            numbers = {word: int(number) for word, number in re.findall(r"(\w+):(\d+)", words)}
            rows[key] = {"registers": numbers["REG"], "shared": numbers["SHARED"], "stack": numbers["STACK"]}
    for key, sass in machine_code(library).items():
        loops = innermost_loops(sass)
        loop = main_loop(loops) or max(loops, key=lambda one: one.instructions, default=None)
        rows[key] |= {"mma": len(re.findall(rf"\s{MMA}", sass)), "loop": loop and loop.instructions}
    return rows


def machine_code(library: Path) -> dict[str, str]:
    """nvdisasm's text of each kernel and target."""
    codes = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "--extract-elf", "all", library.absolute()], cwd=folder, check=True, capture_output=True
        )
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = cubin.suffixes[-2].removeprefix(".")
            _, *parts = re.split(r"^\t\.section\t\.text\.", nvdisasm(cubin), flags=re.M)
            names = readable([part.split(",", 1)[0] for part in parts])
            codes |= {f"{name} {target}": part for name, part in zip(names, parts, strict=True)}
    return codes


def readable(mangled: list[str]) -> list[str]:
    """Names with template arguments, without parameters and this package's namespaces."""
    names = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"vlattn::|\(anonymous namespace\)::", "", name) for name in names.splitlines()]


def assembled(library: Path, chosen: Callable[[str], object], folder: Path) -> list[Path]:
    """Files in `folder` with the machine code of some kernels of a library of PTX (ptx.cuda), chosen by their names: the code
    that the library for GPUs has. Files of the same PTX that lie there already are taken, others are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run(
            [tool("cuobjdump"), "--extract-ptx", "all", library.absolute()], cwd=scratch, check=True, capture_output=True
        )
        for file in sorted(Path(scratch).glob("*.ptx")):
            text = file.read_text()
            mangled = re.findall(r"\.entry (\w+)", text)
            names = [one for one, name in zip(mangled, readable(mangled), strict=True) if chosen(name)]
            if names:
                target, entries = file.suffixes[-2].removeprefix(".sm_"), ",".join(f"--entry={name}" for name in names)
                command = ["nvcc", "-fatbin", f"-gencode=arch=compute_{target},code=sm_{target}", f"-Xptxas={entries}"]
                key = hashlib.sha256("\n".join((nvcc_version(), *command, text)).encode()).hexdigest()
                files.append(folder / f"{key[:32]}.fatbin")
                if not files[-1].exists():
                    subprocess.run([*command, file, "-o", file.with_suffix(".fatbin")], check=True, capture_output=True)
                    file.with_suffix(".fatbin").replace(files[-1])  # it appears whole or not at all
    for old in {*folder.glob("*.fatbin")} - {*files}:
        old.unlink()
    return files


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.compiled.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="a library to read instead of build/cuda's")
    options = parser.parse_args()
    compiled, table, version = rows_of(options.library or build("cuda") / "libvlattn_cuda.so"), read(TABLE), nvcc_version()
    lines = differences(compiled, table.get(version, {}))
    table[version] = compiled
    write(TABLE, table)
    for key, row in compiled.items():
        if row["stack"]:
            print(f"stack of {row['stack']} bytes: {key}")
    print("\n".join(lines))
    print(f"nvcc {version}: {len(compiled)} kernels, {len(lines)} changed")


if __name__ == "__main__":
    main()
