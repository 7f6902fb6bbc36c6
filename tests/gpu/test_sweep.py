"""The sweep compiles ahead, on all cores, what it then launches."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import programs
from tools.gpu import sweep

ROOT = Path(__file__).resolve().parents[2]
# what Triton compiles a launch for, ahead and then as it is timed and checked; ends with 1 where something was not compiled ahead
AHEAD = """
import torch
from triton.runtime.jit import JITFunction
from tools.gpu import production, sweep
from vlattn_fast.checking import verify

empty = torch.empty
torch.randn = torch.rand = lambda *shape, generator=None, **options: empty(*shape, **options)  # no kernel runs: any numbers do

def note(kernel, *args, grid, warmup, **kwargs):
    if kernel.fn.__name__ in hot.kernels:
        seen.add(str(kernel.device_caches[90][-1](*args, **kwargs)[1]))

JITFunction.run = note
for number in (0, 2):
    hot, seen = production.HOTTEST[number], set()
    (default,) = sweep.compile_some(number, [None], 90)
    assert default in sweep.every_candidate(default, hot.most, hot.stages)
    ahead, seen = seen, set()
    production.call_of(hot.benchmark, "triton", "cpu", batch=32)()
    for case in production.causal_too(production.case_named(hot.operator, *hot.check)):
        verify._run(case, case.in_dtype(torch.bfloat16), "triton")
    assert len(seen) == 3 and seen == ahead, (hot.key, ahead, seen)
"""


def test_the_sweep_compiles_ahead_what_is_timed_and_what_is_checked():
    done = programs.run(AHEAD)
    assert done.returncode == 0, done.stderr


def test_a_configuration_that_triton_does_not_compile_is_a_result():
    assert sweep.is_of_a_configuration(RuntimeError("PassManager::run failed\nThe backend 'triton' failed."))
    assert not sweep.is_of_a_configuration(RuntimeError("CUDA error: an illegal memory access was encountered"))


DIES = """
import os, pathlib, time
from tools.gpu import sweep

def outlive():
    time.sleep(600)
    pathlib.Path("outlived").touch()
    os._exit(1)

if __name__ == "__main__":
    pool = sweep.new_pool(3)
    for _ in range(3):
        pool.submit(outlive)
    print("begun", flush=True)
    time.sleep(600)
"""


def test_a_sweep_that_dies_takes_its_pool_along(tmp_path):
    """Whoever reads what it prints would wait for processes that hold its output open."""
    (tmp_path / "dies.py").write_text(DIES)
    words, environment = [sys.executable, tmp_path / "dies.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == "" and not (tmp_path / "outlived").exists()  # to the end of the output
