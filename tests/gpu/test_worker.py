"""What a worker says: a row a line, and kernels by the names that profilers show."""

import json

import pytest

from tests.helpers import programs
from tools.gpu import production, session, worker


@pytest.mark.parametrize(
    "shown, name",
    [
        ("_map_kernel", "_map_kernel"),
        ("void vlattn::(anonymous namespace)::forward_kernel<__half, 64>(vlattn::ScoreAttention)", "forward_kernel"),
        ("attention_map._map_kernel", "_map_kernel"),
        ("forward_kernel<__half, (int)64>", "forward_kernel"),
        ("Memcpy DtoH (Device -> Pageable)", "DtoH"),
        ("void at::native::(lambda at file.cu:7)", "void at::native::(lambda at file.cu:7)"),
        ("", ""),
    ],
)
def test_names_of_kernels_as_profilers_show_them(shown, name):
    assert production.function_name(shown) == name


def test_a_profile_without_kernels_is_no_profile(monkeypatch):
    monkeypatch.setattr(production, "call_of", lambda *_: lambda: None)
    monkeypatch.setattr(worker, "_profiled", lambda *_: {})
    assert not worker.kernels({"call": "", "backend": "triton"}, "cuda")["passed"]


BAR = """
import sys
from tools.gpu import worker
worker.tiles.tried = lambda item, device: sys.stdout.write("50%") and {"passed": True}
worker.main("cpu")
"""


def test_a_row_stands_on_a_line_of_its_own():
    """Whatever was printed before it, as a progress bar without an end of line."""
    said = programs.run(BAR, text='{"item": "x", "part": "tiles"}\n').stdout
    (line,) = [line for line in said.splitlines() if line.startswith(session.ROW)]
    assert json.loads(line.removeprefix(session.ROW))["passed"]


FORKS = """
import torch

def touched(*args, **kwargs):
    raise AssertionError("a GPU is asked for")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, touched)
from tests.helpers import programs
from tools.gpu import production, worker
assert len(production.checks()) > 100 and all(map(production.cases, production.SIZES))
"""


def test_the_process_that_is_forked_asks_for_no_gpu():
    """Its processes could not use it any more."""
    done = programs.run(FORKS)
    assert done.returncode == 0, done.stderr
