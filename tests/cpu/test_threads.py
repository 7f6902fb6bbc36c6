"""Kernels run on torch's threads: by its C interface or, as before torch 2.10, by the OpenMP runtime that torch has loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, json, os, pathlib, sys, threading, time
import torch, vlattn_fast as va
from vlattn_fast.backends import native

threads, report = lambda: len(os.listdir("/proc/self/task")), {}
torch.set_num_threads(3)

if sys.argv[1] == "openmp":
    class Old:  # as torch before 2.10
        def __init__(self, library): self.library = library
        def __getattr__(self, name):
            if name.startswith("torch_"): raise AttributeError(name)
            return getattr(self.library, name)
    set_threads = native._set_threads
    native._set_threads = lambda library: set_threads(Old(library))

x = torch.linspace(-1, 1, 2 * 3 * 70 * 8).view(2, 3, 70, 8)
score = va.scores.General(torch.eye(8), activation="tanh")

def call():
    return va.score_attention(x, x, x, score=score, backend="cpu")

torch.set_num_threads(1)
before = threads()
alone = call()
report["started by one"] = threads() - before
torch.set_num_threads(3)
together = call()
report["started by three"] = threads() - before
same = lambda y: torch.allclose(y, alone, rtol=0, atol=1e-6)
report["right"] = same(together)

# inside of a parallel region a call runs on the thread that made it
region, results = ctypes.CFUNCTYPE(None, ctypes.c_void_p), []
libtorch = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
inside = region(lambda _: results.append(call()))
libtorch.GOMP_parallel(inside, None, 2, 0)
report["nested"] = len(results) == 2 and all(map(same, results))
# the runtime ends a thread that a smaller team leaves over, some time after the region
deadline = time.monotonic() + 60
while threads() - before > 1 and time.monotonic() < deadline:
    time.sleep(0.01)
report["started by nested"] = threads() - before

# a thread of Python has the number that was set elsewhere, and a team of its own
counts = []
def beside():
    start = threads()
    results.append(call())
    counts.append(threads() - start)
other = threading.Thread(target=beside)
other.start()
other.join()
report["started by another thread"], report["right there"] = counts[0], same(results[-1])
report["runtimes"] = len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rsplit("/", 1)[-1]})
torch.set_num_threads(1)
if (child := os.fork()) == 0:
    os._exit(0 if same(call()) else 1)
report["forked"] = os.waitpid(child, 0)[1]
print(json.dumps(report))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("by", ["openmp", "torch"])
@pytest.mark.slow
def test_threads_are_those_of_torch(by: str) -> None:
    command, environment = (
        [sys.executable, "-c", PROGRAM, by],
        {**os.environ, "OMP_NUM_THREADS": "1", "OMP_MAX_ACTIVE_LEVELS": "2"},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "started by one": 0,
        "started by three": 2,
        "right": True,
        "nested": True,
        "started by nested": 1,  # a team of two
        "started by another thread": 2,
        "right there": True,
        "runtimes": 1,
        "forked": 0,
    }
