"""The tests of the CPU kernels under sanitizers of addresses and undefined behaviour, and of threads.

    python -m tools.sanitize                       everything, with address under each instruction set of this processor and `amx`
    python -m tools.sanitize --only thread -k causal  one sanitizer, with further arguments of pytest

Under `address` the kernels' workspace is filled with NaN. Under `thread` the kernels run on three separate threads (threads.cpp).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tools.building import build, instruction_sets

ROOT = Path(__file__).parents[1]
KINDS = ("address", "thread")
PATHS = ("tests/cpu", "tests/ops")
# left out: what compiles, starts processes, or runs on torch's threads, which the sanitizer of threads cannot follow
NOT = ("compile", "opcheck", "test_library", "threads_are_those", "same_bits")
CHOSEN = " and not ".join(("cpu", *NOT))
MOST = 2**31  # filled bytes of a workspace


def sanitized(kind: str, *sets: str) -> Path:
    """The folder of the library with these instruction sets, `amx` last, or with all; built where something changed."""
    return build(f"cpu-{kind}", "-DVLATTN_CPU=ON", f"-DVLATTN_SANITIZE={kind}", f"-DVLATTN_ISA={';'.join(sets) or 'all'}")


def sanitizing(kind: str) -> dict[str, str]:
    """The environment in which Python loads a sanitized library."""
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[kind]
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    # torch takes two of its own locks of forward mode in either order; the kernels have none
    return {**os.environ, "TSAN_OPTIONS": "exitcode=66:detect_deadlocks=0", "LD_PRELOAD": " ".join(libraries)}


def run(kind: str, folder: Path, instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with the library of `folder`; its exit status is not 0 where a test fails or the sanitizer reports."""
    environment = {
        **sanitizing(kind),
        "ASAN_OPTIONS": f"detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size={MOST}",
        "VLATTN_CPU_LIBRARY": str(folder / "libvlattn_cpu.so"),
        "VLATTN_CPU_ISA": instruction_set,
        "VLATTN_OWN_THREADS": str(folder / "libthreads.so"),
        "VLATTN_TEST_SANITIZED": "1",  # one draw of the numbers (tests/helpers/compare.py)
        "OMP_NUM_THREADS": "1",
    }
    plugins = ("-p", "tests.helpers.cpu.own_threads") if kind == "thread" else ()
    # pytest must not capture the sanitizer's output
    options = ("-q", "-p", "no:cacheprovider", "--capture=sys", *plugins, *arguments)
    command = [sys.executable, "-m", "tests.helpers.process", *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("-k", dest="chosen", metavar="EXPRESSION", help="of pytest")
    options = parser.parse_args()
    sets = instruction_sets()  # any runs a sanitized library's `amx`, by a stand-in
    chosen = f"{CHOSEN} and ({options.chosen})" if options.chosen else CHOSEN
    codes = []
    for kind, instruction_set in [*(("address", name) for name in [*sets, "amx"]), ("thread", sets[0])]:
        if options.only in (None, kind):
            done = run(kind, sanitized(kind), instruction_set, *PATHS, "-k", chosen)
            lines = done.stdout.strip().splitlines()
            print(f"{kind}, {instruction_set}:", *(lines if done.returncode else lines[-1:]), sep="\n", flush=True)
            codes.append(done.returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
