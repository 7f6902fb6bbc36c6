"""Bars of progress: of calls that take longer than two seconds, by a clock that the tests set."""

import io
import sys

import pytest
import torch

pytest.importorskip("transformers")

import vlattn_fast as va
from tests.helpers.interpret.evaluation_cases import made
from vlattn_fast._ground import extras
from vlattn_fast.interpret.explaining.loading import generate


class Screen(io.StringIO):
    """Stands for stderr: a terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    """Stands for `time.time`: it goes on by so many seconds whenever it is read."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 1e9, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def watched(monkeypatch: pytest.MonkeyPatch, terminal: bool = True) -> tuple[Screen, Clock]:
    """A new screen, and a clock that stands still. Called within a test: pytest sets stderr anew when a test begins."""
    screen, clock = Screen(terminal), Clock(0.0)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return screen, clock


def test_a_bar_appears_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = watched(monkeypatch)
    drawn = []
    for _ in extras.with_progress(range(8), "counting"):
        drawn.append("counting:" in screen.getvalue())
        clock.now += 0.6  # of four items are 2.4 seconds
    assert drawn == [False] * 4 + [True] * 4 and "8/8" in screen.getvalue()


def test_a_short_call_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = watched(monkeypatch)
    for _ in extras.with_progress(range(3), "counting"):
        clock.now += 0.6
    with extras.progress("counting", total=3) as seen:
        for count in range(3):
            clock.now += 0.6
            seen(count + 1)
    assert screen.getvalue() == ""


def test_a_bar_without_items_is_told_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = watched(monkeypatch)
    with extras.progress("counting", total=7, initial=2) as seen:
        clock.now += 2.5
        seen(5)
        assert "5/7" in screen.getvalue()


def test_a_log_file_has_a_line_each_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = watched(monkeypatch, terminal=False)
    for _ in extras.with_progress(range(8), "counting"):
        for _ in extras.with_progress(range(3), "inside", leave=False):
            clock.now += 10.0
    lines = screen.getvalue().splitlines()
    assert [line.split("|")[0] for line in lines[:-1]] == [f"counting:  {n * 100 // 8}%" for n in (2, 4, 6)]
    assert lines[-1].startswith("counting: 100%") and "\r" not in screen.getvalue() and "\x1b" not in screen.getvalue()


@pytest.mark.parametrize("switch", ["file", "context", "environment", "no tqdm"])
def test_what_switches_bars_off(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = watched(monkeypatch, terminal=switch != "file")
    clock.seconds = 3.0
    if switch == "environment":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    elif switch == "no tqdm":
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)

    def count() -> list[int]:
        with extras.progress("counting", total=2) as seen:
            seen(1)
            return list(extras.with_progress(range(3), "counting"))

    if switch == "context":
        with pytest.raises(KeyError), extras.without_progress():
            assert count() == [0, 1, 2] and screen.getvalue() == ""
            raise KeyError
        count()
        assert "counting:" in screen.getvalue()  # an error leaves none of it
    else:
        assert count() == [0, 1, 2] and screen.getvalue() == ""


def data(inputs: dict[str, torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], None]]:
    return [(inputs, None)] * 3


CALLS = {
    "explain's steps": (
        "explaining:",
        "vit",
        lambda model, inputs: va.explain(model, inputs, method=va.methods.IntegratedGradients(n_steps=3)),
    ),
    "explain's tokens": ("explaining:", "llava", lambda model, inputs: va.explain(model, inputs, answer=[[5, 6, 7], [7, 8, 9]])),
    "generate": ("generating:", "llava", lambda model, inputs: generate(model, inputs, 3)),
    "information_flow": ("samples:", "llava", lambda model, inputs: va.information_flow(model, data(inputs), window=1)),
    "intervene_each": (
        "cutting edges:",
        "llava",
        lambda model, inputs: va.intervene_each(
            model, inputs, va.attribute_edges(model, inputs, ["image", "last"]).top(4), batch_size=1
        ),
    ),
    "record_heads": ("recording:", "vit", lambda model, inputs: va.record_heads(model, [inputs] * 3)),
    "probe": (
        "fitting probes of length:",
        "bert",
        lambda model, inputs: va.probe(model, [(inputs, None)] * 3, tests=["linguistic"]),
    ),
}


@pytest.mark.slow("probe")  # fits hundreds of probes
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_take_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shows its bar where its parts take longer, and nothing where they do not."""
    screen, clock = watched(monkeypatch)
    what, model, call = CALLS[name]
    given = made(model)
    call(*given)
    assert screen.getvalue() == ""
    clock.seconds = 3.0
    call(*given)
    assert what in screen.getvalue()
