"""A process that imports once what tests need and forks the rest: a fork starts in no time.

A module of this folder is the process, `python -m <module>`, which answers each line of its input by a line of its output. It
serves all tests of one process.
"""

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Forking:
    """The process of a module, which starts where it is first asked. It ends, with all that it forked, where it does not answer
    in time, where the question is interrupted, and with this process."""

    def __init__(self, module: str, seconds: int = 3600) -> None:
        self._module, self._seconds = module, seconds
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self._end)

    def ask(self, line: str) -> str:
        """Its answer, or that there was none."""
        answer = ""
        try:
            process = self._process = self._process or self._started()
            assert process.stdin and process.stdout
            print(line, file=process.stdin, flush=True)
            if select.select([process.stdout], [], [], self._seconds)[0]:
                answer = process.stdout.readline().strip()
        finally:
            if not answer:
                self._end()
        return answer or f"no answer in {self._seconds} seconds, or the process ended"

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", self._module]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork of a process with threads of OpenMP hangs
        return subprocess.Popen(command, cwd=ROOT, env=one_thread, text=True, start_new_session=True, **pipes)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def answer(by: Callable[[str], int]) -> None:
    """The loop of such a process: the answer to each line."""
    for line in sys.stdin:
        print(by(line), flush=True)
    os._exit(0)  # at once: nothing is left to do
