"""The accuracy tests under the arithmetic of further CPUs: `make cpus`, and a tenth of the tests in `make test`.

    python -m tools.cpus            all tests, as this machine is and under each of three settings
    python -m tools.cpus --tenth    one test in thirty under each of the settings, another thirtieth for each

torch's kernels, MKL and oneDNN choose their code by the CPU. The settings are variables that make them choose code for older or
other CPUs, with sums in other orders and blocks of other sizes; the package's CPU kernels then run in another instruction set.
The rule of vlattn_fast/checking/tolerance.py must hold under each setting.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
ISA = "VLATTN_CPU_ISA"
SETTINGS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", ISA: "v3"},
    "sse4": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        ISA: "baseline",
    },
    "compatible": {"MKL_CBWR": "COMPATIBLE", ISA: "v4"},
}
SHARES = 10 * len(SETTINGS)
# the folders of the accuracy tests: collecting all tests takes longer than running a share of these
FOLDERS = tuple(f"tests/{name}" for name in ("cpu", "cuda", "kernels", "ops", "power"))


def shares() -> dict[str, str]:
    """The share that tests/helpers/accuracy.py draws for each setting; a tenth in all."""
    return {name: f"{n}/{SHARES}" for n, name in enumerate(SETTINGS)}


@functools.cache
def instruction_sets() -> list[str]:
    """The instruction sets of the package's CPU kernels that this processor runs."""
    code = "from vlattn_fast.backends import native; print(*(native._available() if native.library.exists else ()))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def run(name: str, *options: str, share: str = "") -> int:
    environment = {**os.environ, **SETTINGS.get(name, {}), "OMP_NUM_THREADS": "1", "VLATTN_ACCURACY_SHARE": share}
    if environment.get(ISA) not in instruction_sets():
        environment.pop(ISA, None)
    command = [sys.executable, "-m", "tests.helpers.process", "--quiet", "--tb=short", "-m", "accuracy", *options, *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.strip().splitlines()
    said = lines if done.returncode else lines[-1:]
    print(f"{name}{share and f', share {share}'}: ", *said, sep="\n" if done.returncode else "", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenth", action="store_true", help="one accuracy test in ten, drawn by a stored seed")
    parser.add_argument("--workers", type=int, default=2, help="processes that run side by side")
    options = parser.parse_args()
    if options.tenth:  # a process for each setting, all at once: collecting takes longer than a share's tests
        instruction_sets()  # once for the three
        with ThreadPoolExecutor(len(SETTINGS)) as pool:
            codes = list(pool.map(lambda named: run(named[0], share=named[1]), shares().items()))
    else:
        codes = [run(name, "--numprocesses", str(options.workers)) for name in ("as it is", *SETTINGS)]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
