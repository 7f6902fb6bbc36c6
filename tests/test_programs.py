"""Programs that one process forks end as those of `python -c` do."""

import pytest

from tests.helpers import programs


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
