"""What the CUDA C++ kernels compile to: registers, shared memory and stack of every kernel and target, held to a stored table.

    python tests/cuda/compile_table.py            # compare build/cuda, made anew where a source changed, with the table
    python tests/cuda/compile_table.py --write    # store what is found in tests/cuda_compile_table.json

"shared" is what is allocated statically, with the KiB that CUDA keeps for itself in every block since sm_90; what a launch asks
for besides is not in the library. "stack" is bytes of a thread: spilled registers, and arrays that are indexed at run time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "cuda_compile_table.json"
SHARED_LIMIT = 99 * 1024  # bytes a block may have on every GPU since Ampere: sm_86 and sm_89 have the least

Row = dict[str, int]


def cuobjdump(*arguments: str | Path) -> str:
    """What it prints. It comes with Triton, as not every CUDA toolkit has it."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None, "cuobjdump comes with Triton, which is not installed"
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV([\d.]+)", said)[1]


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
    return rows


def readable(mangled: list[str]) -> list[str]:
    """Names with template arguments, without parameters and our namespaces."""
    names = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"vlattn::|\(anonymous namespace\)::", "", name) for name in names.splitlines()]


def complaints(found: dict[str, Row], stored: dict[str, Row]) -> list[str]:
    """What is not as stored, a line each."""
    lines = [
        f"{key}: {row['shared']} bytes of shared memory, more than {SHARED_LIMIT}"
        for key, row in found.items()
        if row["shared"] > SHARED_LIMIT
    ]
    for key in sorted(found.keys() | stored.keys()):
        if key not in stored or key not in found:
            lines.append(f"{key}: {'not in the table' if key in found else 'in the table, but not in the library'}")
        elif found[key] != stored[key]:
            changed = [f"{name} {was} -> {found[key][name]}" for name, was in stored[key].items() if found[key][name] != was]
            lines.append(f"{key}: {', '.join(changed)}")
    return lines


def read() -> dict[str, dict[str, Row]]:
    """The stored rows of each version of nvcc: another one allocates registers in another way."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write(table: dict[str, dict[str, Row]]) -> None:
    versions = ",\n".join(
        f"{json.dumps(version)}: {{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)) + "\n}"
        for version, rows in sorted(table.items())
    )
    TABLE.write_text(f"{{\n{versions}\n}}\n")


def built() -> Path:
    from tests.cuda.building import CUDA, build

    return build("cuda", *CUDA) / "libvlattn_cuda.so"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store what is found")
    parser.add_argument("--library", type=Path, help="another one than that of build/cuda")
    options = parser.parse_args()
    found, table, version = rows_of(options.library or built()), read(), nvcc_version()
    if options.write:
        table[version] = found
        write(table)
    lines = complaints(found, table.get(version, {}))
    for key, row in found.items():
        if row["stack"]:
            print(f"stack of {row['stack']} bytes: {key}")
    print("\n".join(lines))
    print(f"nvcc {version}: {len(found)} kernels, {len(lines)} not as stored")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
