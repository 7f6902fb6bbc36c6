"""Programs that one process forks end as those of `python -c` do."""

import os
import select
from types import SimpleNamespace

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


@pytest.mark.slow
def test_a_program_that_does_not_end_in_time_is_killed(tmp_path, monkeypatch):
    """The next one has a process of its own. The time is up once the program runs, however slow this machine is."""
    process = forking.Forking("tests.helpers.programs")
    monkeypatch.setattr(programs, "_PROCESS", process)
    assert programs.run("print(1)").stdout == "1\n"  # has imported torch
    begun, at_its_end, ends = tmp_path / "begun", tmp_path / "at its end", []

    def out_of_time(answers, *_):
        while not (begun.exists() and begun.read_text().endswith("\n")):
            if select.select(answers, [], [], 0.01)[0]:
                return answers, [], []  # it failed
        ends.append(os.pidfd_open(int(begun.read_text())))
        return [], [], []

    endless = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); "
    endless += "time.sleep(600); open(sys.argv[2], 'w')"
    with monkeypatch.context() as patch:
        patch.setattr(forking, "select", SimpleNamespace(select=out_of_time))
        with pytest.raises(AssertionError, match="no answer in 3600 seconds"):
            programs.run(endless, begun, at_its_end)
    assert select.select(ends, [], [])[0] and not at_its_end.exists()
    os.close(ends[0])
    assert programs.run("print(2)").stdout == "2\n"
