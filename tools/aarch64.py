"""The tests of the CPU kernels with a library for aarch64, which qemu emulates.

    python -m tools.aarch64             all of them
    python -m tools.aarch64 -k causal   with arguments of pytest

It needs Debian's g++-aarch64-linux-gnu and qemu-user. A call runs on one thread (tests/helpers/cpu/emulated.py), and its time
says nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools import building, sanitize

COMPILER = "aarch64-linux-gnu-g++"
SETS = ("bf16", "baseline")
TARGET = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")
CHOSEN = f"{sanitize.CHOSEN} and not test_memory"  # which measures this process, in which nothing is computed


def build() -> Path:
    """The folder of runner and library, built where something changed, by -O1 in half the time of -O3."""
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if shutil.which(tool) is None:
            raise building.Missing(f"{tool} is not installed (Debian's {package})")
    return building.build("cpu-aarch64", "-DVLATTN_CPU=ON", *TARGET, "-DCMAKE_CXX_FLAGS_RELEASE=-O1")


def run(folder: Path, instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with the library of `folder`."""
    options = {
        "VLATTN_CPU_LIBRARY": str(folder / "libvlattn_cpu.so"),
        "VLATTN_CPU_ISA": instruction_set,
        "VLATTN_TEST_SANITIZED": "1",  # one draw of the numbers (tests/helpers/compare.py); more are drawn where it is fast
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.helpers.cpu.emulated", *arguments]
    return subprocess.run(
        command, cwd=building.ROOT, env={**os.environ, **options}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="chosen", metavar="EXPRESSION", help="of pytest")
    options, rest = parser.parse_known_args()
    chosen = f"{CHOSEN} and ({options.chosen})" if options.chosen else CHOSEN
    folder, codes = build(), []
    for instruction_set in SETS:
        done = run(folder, instruction_set, *(rest or sanitize.PATHS), "-k", chosen)
        print(f"{instruction_set}:", done.stdout, sep="\n", flush=True)
        codes.append(done.returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
