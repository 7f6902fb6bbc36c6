"""The accuracy tests in each instruction set of this processor, under the arithmetic of further CPUs: `make cpus`.

torch's kernels, MKL and oneDNN choose their code by the CPU. The settings are variables that make them choose code for older or
other CPUs, with sums in other orders and blocks of other sizes; the package's CPU kernels then run in another instruction set, of
a library that has all (build/cpu-all). The rule of vlattn_fast/checking/tolerance.py must hold in each setting. `library` is the
tests of such a library: that of an editable install has one instruction set.

    python -m tools.cpus                      everything
    python -m tools.cpus avx2 library         some settings; VLATTN_SHARD=2/20 for a twentieth of the tests
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tools import building

ROOT = Path(__file__).parent.parent
ISA = "VLATTN_CPU_ISA"
SETTINGS = {
    "as it is": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", ISA: "v3"},
    "sse4": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        ISA: "baseline",
    },
    "compatible": {"MKL_CBWR": "COMPATIBLE", ISA: "v4"},
}
# the folders of the accuracy tests: collecting all tests takes longer than running a share of these
FOLDERS = tuple(f"tests/{name}" for name in ("cpu", "cuda", "kernels", "ops", "power"))
LIBRARY = ("tests/cpu/test_library.py", "tests/cpu/test_tiles.py", "tests/test_cpus.py")  # what needs several instruction sets


def run(name: str, *words: str, **variables: str) -> int:
    environment = {**os.environ, "VLATTN_CPU_LIBRARY": str(building.all_sets()), "OMP_NUM_THREADS": "1", **variables}
    if environment.get(ISA) not in building.instruction_sets():
        environment.pop(ISA, None)
    command = [sys.executable, "-m", "tests.helpers.process", "--quiet", "--tb=short", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.strip().splitlines()
    print(f"{name}: ", *(lines if done.returncode else lines[-1:]), sep="\n" if done.returncode else "", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SETTINGS, "library"]
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes that run side by side")
    options = parser.parse_args()
    workers = ("--numprocesses", str(options.workers))
    accuracy = (*workers, "--dist", "worksteal", "-m", "accuracy", *FOLDERS)
    if unknown := sorted({*options.settings} - {*names}):
        parser.error(f"SETTING must be one of {', '.join(names)}; got {', '.join(unknown)}")
    codes = []
    for name in options.settings or names:
        words, variables = (accuracy, {"VLATTN_DRAWS": "enough", **SETTINGS[name]}) if name in SETTINGS else (LIBRARY, {})
        codes.append(run(name, *words, **variables))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
