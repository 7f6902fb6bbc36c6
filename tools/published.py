"""Records what the authors' code computes, for tests that compare with it on machines without that code.

    VLATTN_PUBLISHED=/folder/of/clones python -m tools.published --record

It runs the tests of tests/published with the clones, at the commits of tests/helpers/published/authors.py, and writes
tests/helpers/published/recorded.json. Without --record, they run and nothing is written.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "tests" / "helpers" / "published" / "recorded.json"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    if "VLATTN_PUBLISHED" not in os.environ:
        parser.error("set VLATTN_PUBLISHED to the folder of the clones")
    if record:
        FILE.unlink(missing_ok=True)
    environment = {**os.environ, **({"VLATTN_RECORD": "1"} if record else {})}
    sys.exit(
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/published"], env=environment).returncode
    )
