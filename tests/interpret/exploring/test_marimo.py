"""marimo shows the widget, a click there is computed and shown, and the notebook of the examples runs in marimo, too.

`python -m tools.environments marimo` runs this file.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interpret.conftest import CHROMIUM, OFFLINE

pytest.importorskip("marimo")
pytest.importorskip("anywidget")

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted(ROOT.glob("packages/*/examples/*.ipynb"))
APP = """
import marimo

app = marimo.App()


@app.cell
def _():
    import marimo as mo
    import vlattn_fast as va
    from tests.helpers.interpret.edited_maps import made

    widget = mo.ui.anywidget(va.widget(*made("llava"), ["image", "question", "last"]))
    widget
    return mo, widget


@app.cell
def _(mo, widget):
    mo.md(f"<b id='edits'>{len(widget.edits)} {widget.explanations['gradient'].scores[0]:.3f}</b>")
    return


if __name__ == "__main__":
    app.run()
"""
FIND = """const all = (what, root = document) => [...root.querySelectorAll("*")].flatMap(
    (each) => [...(each.matches(what) ? [each] : []), ...(each.shadowRoot ? all(what, each.shadowRoot) : [])]);
"""


@contextmanager
def started(command: list[str], line: str) -> Iterator[str]:
    """Runs a program; gives what `line` finds in its output."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    try:
        assert process.stdout is not None
        said = ""
        for each in process.stdout:
            said += each
            if found := re.search(line, each):
                break
        else:
            raise AssertionError(said)
        yield found[1]
    finally:
        process.kill()
        process.communicate()


@contextmanager
def opened(url: str, profile: Path) -> Iterator[Callable[[str], Any]]:
    """Opens a page in a browser; gives a function that evaluates an expression on it."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", *OFFLINE.split(), "--remote-debugging-port=0"]
    with started([*command, f"--user-data-dir={profile}", url], r"ws://([\d.]+:\d+)/") as address:
        with urllib.request.urlopen(f"http://{address}/json") as pages:
            (page,) = [each for each in json.load(pages) if each["type"] == "page"]
        numbers = itertools.count()

        def evaluate(expression: str) -> Any:
            number = next(numbers)
            options = {"expression": f"{{{FIND}{expression}}}", "returnByValue": True}
            with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                socket.send(json.dumps({"id": number, "method": "Runtime.evaluate", "params": options}))
                answer = next(each for each in map(json.loads, socket) if each.get("id") == number)
            return answer.get("result", {}).get("result", {}).get("value")

        yield evaluate


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_click_is_computed_and_shown(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    server = [sys.executable, "-m", "marimo", "--yes", "run", str(tmp_path / "app.py"), "--headless", "--no-token"]
    with started(server, r"URL: (http://\S+)") as url, opened(url, tmp_path / "profile") as evaluate:

        def until(expression: str, holds: Callable[[Any], bool]) -> Any:
            for _ in range(1000):
                if holds(value := evaluate(expression)):
                    return value
                time.sleep(0.3)
            raise AssertionError(f"{expression} stays {value}")

        (first,) = until("all('#edits').map((each) => each.textContent)", bool)
        assert first.startswith("0 ") and evaluate("all('.vlattn-explorer canvas').length") == 1
        assert "→" not in evaluate("all('.score')[0].textContent")
        evaluate("all('.vlattn-explorer td button')[1].click()")
        score = until("all('.score')[0].textContent", lambda text: "→" in text)
        (then,) = until("all('#edits').map((each) => each.textContent)", lambda texts: texts not in ([], [first]))
        assert (first, then) == (f"0 {score.split()[1]}", f"1 {score.split()[-1]}")
        evaluate("all('.edits button').find((each) => each.textContent.includes('remove all')).click()")
        until("all('#edits').map((each) => each.textContent)", lambda texts: texts == [first])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Converted, from the folder in which it lies, without an error in a cell."""
    app, page = tmp_path / "app.py", tmp_path / "page.html"
    for command in (["convert", path, "-o", app], ["export", "html", app, "-o", page]):
        program = [sys.executable, "-m", "marimo", "--yes", *command]
        done = subprocess.run(program, cwd=path.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert app.read_text(encoding="utf-8").count("@app.cell") >= len(code)
    assert "marimo-anywidget" in page.read_text(encoding="utf-8")
