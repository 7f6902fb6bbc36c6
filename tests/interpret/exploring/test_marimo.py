"""The notebook of the examples, with its widget, runs in marimo.

`python -m tools.environments marimo` runs this file.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("marimo")
pytest.importorskip("anywidget")

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted(ROOT.glob("packages/*/examples/*.ipynb"))


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
