"""Programs of Python, each in a new process that has imported torch and nothing else: one process imports it and forks them.

A line of its input is a program as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch  # noqa: F401  for the programs

from tests.helpers import forking

_PROCESS = forking.Forking("tests.helpers.programs")


def run(code: str, *arguments: str | Path, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """As `python -c code arguments` in the repository, with `text` as its input and these variables beside those of this process.
    What torch reads at its import is this process's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").write_text(text)
        variables = {**os.environ, **environment}
        asked = {"code": code, "arguments": [*map(str, arguments)], "environment": variables, "folder": folder}
        status = _PROCESS.ask(json.dumps(asked))
        assert status.lstrip("-").isdigit(), status
        said = [(Path(folder) / name).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(code, int(status), *said)


def _forked(code: str, arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """The exit status."""
    if (process := os.fork()) == 0:
        status = 1
        try:
            for number, (name, mode) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
                os.dup2(os.open(f"{folder}/{name}", mode | os.O_CREAT), number)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv, sys.stdin = ["-c", *arguments], open(0)
            scope: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(code, "<string>", "exec"), scope)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if status and not isinstance(ended.code, int):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    forking.answer(lambda line: _forked(**json.loads(line)))
