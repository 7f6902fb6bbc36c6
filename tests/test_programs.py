"""Programs that one process forks end as those of `python -c` do."""

import time
from pathlib import Path

import pytest

from tests.helpers import forking, programs


@pytest.mark.parametrize(
    ("code", "status", "said", "error"),
    [
        ("print(1)", 0, "1\n", ""),
        ("import sys; print(sys.argv, input())", 0, "['-c', 'a'] line\n", ""),
        ("import os; print(os.environ['OF_TEST']); os.environ['LEFT'] = 'x'", 0, "yes\n", ""),
        ("import os; print('LEFT' in os.environ)", 0, "False\n", ""),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
        ("import sys; sys.exit(3)", 3, "", ""),
        ("import sys; sys.exit('no kernel')", 1, "", "no kernel\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, "", ""),
        ("import sys; print(1); sys.stdout.close()", 1, "1\n", "ValueError: I/O operation on closed file.\n"),
    ],
)
def test_a_program_ends_with_its_status_and_its_words(code, status, said, error):
    done = programs.run(code, "a", text="line\n", OF_TEST="yes")
    assert (done.returncode, done.stdout) == (status, said) and done.stderr.endswith(error)
    assert error or not done.stderr


def test_a_program_that_does_not_end_in_time_is_killed(tmp_path, monkeypatch):
    """The next one has a process of its own."""
    process = forking.Forking("tests.helpers.programs")
    monkeypatch.setattr(programs, "_PROCESS", process)
    assert programs.run("print(1)").stdout == "1\n"  # has imported torch
    monkeypatch.setattr(process, "_seconds", 3)
    endless = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(AssertionError, match="no answer in 3 seconds"):
        programs.run(endless, tmp_path / "number")
    number = (tmp_path / "number").read_text()
    for _ in range(100):
        if not Path(f"/proc/{number}/cmdline").exists() or not Path(f"/proc/{number}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"process {number} runs on")
    monkeypatch.setattr(process, "_seconds", 300)
    assert programs.run("print(2)").stdout == "2\n"
