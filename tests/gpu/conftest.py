import argparse
import sys

import pytest

from tests.helpers.ops.backends import cuda_library  # noqa: F401  a fixture
from tools.gpu import run, session


class Clock:
    """Seconds that pass where a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tree(tmp_path, monkeypatch, clock):
    """A session over an empty tree, of a minute by `clock`."""
    for module in (run, session):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(session, "STORED", tmp_path / "stored")
    options = argparse.Namespace(device="cpu", out=tmp_path / "out", minutes=1.0, seconds=None, again=False, select="", workers=1)
    made = session.Session(options, clock)
    made.begin()
    return made
