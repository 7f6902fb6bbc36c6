"""The suite where torch's own products round otherwise: `make bits`, and a tenth of it in `make test`.

    python -m tools.bits            all tests; further arguments are pytest's
    python -m tools.bits --tenth    one test in ten of those that compare numbers

tests/helpers/bits.py moves the products by an ulp. No test may rest on their bits, which are another processor's affair.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARE = "0/10"
# the folders of the tests that compare what torch multiplies with something: others compile, print, or start processes
FOLDERS = tuple(f"tests/{name}" for name in ("cpu", "interpret", "nn", "ops"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenth", action="store_true", help="one test in ten, drawn by a stored seed")
    parser.add_argument("--workers", type=int, default=2, help="processes that run side by side")
    options, asked = parser.parse_known_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.process", "-p", "tests.helpers.bits", "--tb=short"]
    command += ["--numprocesses", str(options.workers), "--dist", "worksteal"] if options.workers > 1 else []
    if options.tenth:
        environment["VLATTN_BITS_SHARE"] = SHARE
        command += ["--quiet", *FOLDERS]
    return subprocess.run([*command, *asked], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
