"""Items of `make gpu`: each runs once, in a process of its own, and leaves a row, whatever becomes of it."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.releases import needs_ptx
from tools.gpu import session

ROOT = Path(__file__).parents[2]


def test_a_row_is_known_to_the_same_sources_alone(tree, monkeypatch):
    (session.ROOT / "kernels").mkdir()
    source = session.ROOT / "kernels" / "one.py"
    source.write_text("a")
    tree.sources = session.sources()
    tree.store("verify", {"item": "x", "passed": True})
    assert tree.known("verify").keys() == {"x"} and tree.known("tiles") == {}
    (session.ROOT / "kernels" / "configurations.json").write_text("{}")  # the table of the fastest tiles
    assert session.sources() == tree.sources
    source.write_text("b")
    tree.sources = session.sources()
    assert tree.known("verify") == {}


def test_rows_of_earlier_calls_count_wherever_this_one_writes(tree):
    tree.store("verify", {"item": "x", "passed": True})
    (tree.options.out).rename(session.STORED)
    assert tree.known("verify").keys() == {"x"}


def test_rows_of_a_device_are_stored_here_as_well(tree):
    """The folder that comes back from a lent machine is empty in the next call."""
    session.STORED.mkdir()
    tree.device = "cuda"
    tree.store("verify", {"item": "x", "passed": True, "rows": [{"benchmark": "b"}]})
    for name in (session.ROWS, "cpu.json"):
        assert (session.STORED / name).read_text() == (tree.options.out / name).read_text()
        (tree.options.out / name).unlink()
    tree.store("verify", {"item": "y", "passed": True})
    assert tree.known("verify").keys() == {"x", "y"} and len(json.loads((tree.options.out / session.ROWS).read_text())) == 2


def test_compiled_kernels_go_to_another_machine(tree, monkeypatch):
    """As many as an archive may hold, without Triton's other files; the new machine has them in another folder."""
    tree.device, kept = "cuda", {"triton-cache/k/a.cubin": b"code", "triton-cache/k/a.json": b"{}", "cuda/sources": b"x"}
    group = {"child_paths": {"a.cubin": "/there/k/a.cubin", "a.json": "/there/k/a.json", "a.ptx": "/there/k/a.ptx"}}
    files = {**kept, "triton-cache/k/a.ptx": b"text", "triton-cache/k/__grp__a.json": json.dumps(group).encode()}
    for name, content in files.items():
        (tree.compiled / name).parent.mkdir(parents=True, exist_ok=True)
        (tree.compiled / name).write_bytes(content)
    tree.options.out.mkdir()
    tree.pack_kernels()
    tree.compiled = tree.compiled / "new"
    tree.compiled.mkdir()
    (tree.options.out / session.KERNELS).rename(tree.compiled / session.KERNELS)
    tree.unpack_kernels()
    assert {name: (tree.compiled / name).read_bytes() for name in kept} == kept
    assert not (tree.compiled / "triton-cache/k/a.ptx").exists()
    group = json.loads((tree.compiled / "triton-cache/k/__grp__a.json").read_text())
    assert group == {"child_paths": {name: str(tree.compiled / "triton-cache" / "k" / name) for name in ("a.cubin", "a.json")}}
    noise = os.urandom(2**18)
    monkeypatch.setattr(session, "MOST_BYTES", 2**18)
    for number in range(9):
        (tree.compiled / f"triton-cache/k/{number}.cubin").write_bytes(noise)
    tree.pack_kernels()
    assert (tree.options.out / session.KERNELS).stat().st_size < 2**20


def test_items_run_once_and_what_failed_again_on_request(tree):
    items, ran = [{"item": name} for name in "abc"], []

    def execute(item: dict[str, Any], seconds: float) -> dict[str, Any]:
        ran.append(item["item"])
        return {"passed": item["item"] != "b" or ran.count("b") > 1}

    for again, expected in ((False, ["a", "b", "c"]), (False, []), (True, ["b"]), (True, [])):
        tree.options.again = again
        ran.clear() if expected != ["b"] else ran.__init__(["b"])
        assert tree.run("verify", items, lambda: execute)
        assert ran[-len(expected) or 3 :] == expected


def test_what_is_not_stored_runs_where_no_row_is_known(tree):
    tree.store("ncu", {"item": "a", "passed": True})
    asked = []
    items = [{"item": name, "part": "ncu compiled"} for name in "ab"]
    assert tree.run("ncu", items, lambda: lambda item, seconds: asked.append(item) or {"passed": False}, 2, stored=False)
    assert asked == [{"item": "b", "part": "ncu compiled"}] and tree.known("ncu").keys() == {"a"}


def test_an_item_that_cannot_be_executed_is_a_row(tree):
    """Otherwise its thread ends, nothing waits, and the part would have passed without it."""

    def execute(item: dict[str, Any], seconds: float) -> dict[str, Any]:
        if item["item"] == "a":
            raise OSError("no more processes")
        return {"passed": True}

    assert tree.run("tests", [{"item": name} for name in "ab"], lambda: execute)
    assert {name: row["passed"] for name, row in tree.known("tests").items()} == {"a": False, "b": True}
    assert tree.known("tests")["a"]["problem"] == "OSError: no more processes"


def test_out_of_time_is_not_a_row(tree, clock):
    """Nor is an item that was ended because the part was; one that had its whole time hangs."""
    tree.begin(session.LEAST_LEFT + 1.0)
    asked = []
    execute = lambda item, seconds: asked.append((item["item"], seconds)) or session.hung(seconds, "")  # noqa: E731
    assert not tree.run("tests", [{"item": name} for name in "ab"], lambda: execute)
    assert tree.known("tests") == {} and asked == [("a", 16.0), ("b", 16.0)]
    clock.now += 2.0
    assert not tree.run("tests", [{"item": "a"}], lambda: lambda item, seconds: {"passed": True})
    assert tree.known("tests") == {}
    tree.begin()
    assert tree.run("tests", [{"item": "a", "limit": 5.0}], lambda: lambda item, seconds: session.hung(seconds, "so far"))
    assert tree.known("tests")["a"]["problem"] == "hung: ended after 5 s: so far"


def test_without_a_limit_no_item_is_left_out(tree, monkeypatch):
    """However long an item takes: a rehearsal on a busy machine has all of its rows."""
    passing = iter(range(0, 10**6, 3600))  # an hour from look to look
    tree.options.minutes = tree.options.seconds = math.inf
    made, asked = session.Session(tree.options, lambda: next(passing)), []
    execute = lambda item, seconds: asked.append(seconds) or {"passed": True}  # noqa: E731
    for share in (110.0, math.inf):
        made.begin(share * made.options.minutes)
        assert made.run("verify", [{"item": f"{share} {n}", "limit": 1.0} for n in range(3)], lambda: execute)
    assert asked == 6 * [math.inf] and len(made.known("verify")) == 6
    monkeypatch.setattr(session, "TREE", session.ROOT)
    assert made.command(["sh", "-c", "echo x"], math.inf) == (0, "x\n")


def test_what_takes_long_in_the_first_steps_comes_again(tree, monkeypatch, clock):
    """With the seconds of the last steps, in which it has its row."""
    monkeypatch.setattr(tree, "_call_ends", clock.now + 1000)
    given = []

    def execute(item: dict[str, Any], seconds: float) -> dict[str, Any]:
        given.append(seconds)
        return session.hung(seconds, "")

    tree.begin(100)
    assert not tree.run("verify", [{"item": "a"}, {"item": "b", "limit": 50.0}], lambda: execute)
    assert tree.known("verify") == {} and given == [session.FIRST, 50.0]
    tree.begin()
    assert tree.run("verify", [{"item": "a"}], lambda: execute)
    assert given[-1] == session.LAST and tree.known("verify")["a"]["hung"]
    assert tree.left() == 1000
    tree.begin(2000)
    assert tree.left() == 1000  # a step takes no more than the call has
    tree.options.seconds = 7.0  # of every item, as a rehearsal says
    assert not tree.run("verify", [{"item": "c", "limit": 50.0}], lambda: execute) and given[-1] == 7.0


def test_who_takes_too_long_is_ended_with_what_it_started(tree, monkeypatch):
    """The time is up once the command has begun, however slow this machine is."""
    monkeypatch.setattr(session, "TREE", session.ROOT)
    begun, outlived = session.ROOT / "begun", session.ROOT / "outlived"
    communicate, given = subprocess.Popen.communicate, []

    def out_of_time(process: subprocess.Popen[str], *args: Any, timeout: float | None = None) -> tuple[str, str]:
        given.append(timeout)
        if timeout == 0.5:
            wait_for(begun)
            raise subprocess.TimeoutExpired(process.args, timeout)
        return communicate(process, *args)

    monkeypatch.setattr(subprocess.Popen, "communicate", out_of_time)
    endless = f"echo so far; (touch {begun}; sleep 600; touch {outlived}) & wait"
    assert tree.command(["sh", "-c", endless], 0.5) == (None, "so far\n")
    assert not outlived.exists()  # the pipe ends with the last process that holds it
    assert tree.command(["sh", "-c", "echo x; exit 3"], 5.0) == (3, "x\n") and given == [0.5, None, 5.0]


def wait_for(begun: Path) -> None:
    while not begun.exists():
        time.sleep(0.01)


class Timer:
    """In place of a timer: the time of the item that hangs is up once it hangs, and that of others never."""

    begun: Path

    def __init__(self, seconds: float, end: Callable[[], Any]) -> None:
        self.seconds, self.end, self.over = seconds, end, threading.Event()

    def start(self) -> None:
        if self.seconds < 10.0:
            threading.Thread(target=self.wait, daemon=True).start()

    def wait(self) -> None:
        while not self.over.is_set():
            if self.begun.exists():
                self.begun.unlink()
                return self.end()
            time.sleep(0.01)

    def cancel(self) -> None:
        self.over.set()


# A worker whose items hang, crash and take too much memory, as torch says it and as the system does it.
PLANTED = """
import os, pathlib, sys, time, torch
from tests.gpu.test_session import Timer
from tools.gpu import worker

Timer.begun = pathlib.Path(sys.argv[1])
worker.threading.Timer = Timer

def planted(item, device):
    print("it was", item["item"], flush=True)
    if item["item"] == "hang":
        Timer.begun.touch()
        time.sleep(600)
    if item["item"] == "crash":
        os.abort()
    if item["item"] == "no memory":
        torch.empty(1 << 50)
    if item["item"] == "killed":
        os.kill(os.getpid(), 9)
    return {"passed": True, "process": os.getpid(), "worker": os.getppid()}

worker.verified = worker.tiles.tried = planted
worker.main("cpu")
"""


@needs_ptx
@pytest.mark.slow
def test_an_item_that_hangs_crashes_or_takes_all_memory_costs_its_row(tree, monkeypatch):
    """All of it in one worker, which lives on; a later call does not run them again."""

    def started(worker: session.Worker) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PLANTED, str(Timer.begun)]
        return subprocess.Popen(words, cwd=ROOT, env=tree.environment(), stdin=subprocess.PIPE, **session.PIPES)

    monkeypatch.setattr(session.Worker, "_started", started)
    monkeypatch.setattr(Timer, "begun", session.ROOT / "begun", raising=False)
    monkeypatch.setattr(session.threading, "Timer", Timer)
    names = ["first", "hang", "crash", "no memory", "killed", "last"]
    items = [{"item": name, **({"limit": 2.0} if name == "hang" else {})} for name in names]
    assert tree.run("verify", items, tree.worker)
    rows = tree.known("verify")
    assert [name for name in names if rows[name]["passed"]] == ["first", "last"]
    assert rows["first"]["worker"] == rows["last"]["worker"] and rows["first"]["process"] != rows["last"]["process"]
    assert rows["hang"]["hung"] and rows["hang"]["problem"].startswith("hung: ended after 2 s: it was hang")
    assert rows["crash"]["problem"].startswith("the process ended with -6: it was crash")
    assert "RuntimeError" in rows["no memory"]["problem"] and "process ended with -9" in rows["killed"]["problem"]
    assert tree.run("verify", items, lambda: lambda *_: pytest.fail("it ran again"))
    # launches share a process, which starts anew after one of them
    monkeypatch.setattr(session, "GRACE", 0.0)
    items = [{"item": name, **({"limit": 3.0} if name == "hang" else {})} for name in names[:3]]
    assert tree.run("tiles", [*items, {"item": "last"}], tree.worker)
    rows = tree.known("tiles")
    assert (
        rows["first"]["process"] != rows["last"]["process"] and rows["first"]["worker"] == rows["last"]["worker"] == os.getpid()
    )
    assert rows["hang"]["hung"] and "the process ended with -6" in rows["crash"]["problem"]
    tree.close()


def test_a_worker_that_dies_is_a_row_and_starts_anew(tree, monkeypatch):
    program = (
        "import sys, os\nfor line in sys.stdin:\n  print('hm')\n  print('ROW {\"passed\": true}', flush=True)\n  os._exit(7)\n"
    )
    monkeypatch.setattr(session, "TREE", session.ROOT)
    folder = session.ROOT / "tools" / "gpu"
    folder.mkdir(parents=True)
    (folder / "worker.py").write_text(program)
    worker = session.Worker(tree)
    assert worker({"item": "a"}, 60.0) == {"passed": True}
    worker._process.wait()
    assert worker({"item": "b"}, 60.0) == {"passed": True}
    (folder / "worker.py").write_text("print('no memory')\nraise SystemExit(5)\n")
    worker._process.wait()
    row = worker({"item": "c"}, 60.0)
    assert not row["passed"] and "the process ended with 5: no memory" in row["problem"]
    worker.close()


def test_packages_that_were_brought_along_are_behind_the_tree(tree, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    for tree.device in ("cpu", "cuda"):
        assert tree.environment()["PYTHONPATH"] == f"{session.TREE}:/tmp/site"
    monkeypatch.delenv("PYTHONPATH")
    assert tree.environment()["PYTHONPATH"] == f"{session.TREE}"
