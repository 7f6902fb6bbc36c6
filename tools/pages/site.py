"""The folder of which `make docs` makes the site: docs/, with the tables that are made of stored rows, and the report.

A page has a line `<!-- table: NAME -->`, or `<!-- table: NAME: ARGUMENTS -->`, where a table of `TABLES` stands.
docs/extension.py fills in costs and counts, which need nothing but Python.

The python blocks of the pages in `DRAWN` are run, and what they save lies in a folder of the page's name: each figure of the page
is the output of the code above it.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.pages import report

ROOT = Path(__file__).parents[2]
DOCS, ROWS = ROOT / "docs", ROOT / "benchmarks" / "results"
TABLES = {  # by name the function that makes it, of this package or of vlattn_lab, which need not be installed for the others
    "measured kernels": "tools.pages.kernel_measured.measured_kernels",
    "operators": "tools.pages.report.operators",
    "GPU kernels": "tools.pages.card.card",
    "tiles": "tools.pages.kernel_measured.changes_of_tiles",
    "tile times": "tools.compiled.tile_times.table",
    "commands": "tools.pages.commands.commands",
    "requirements": "tools.versions.requirements",
    "versions": "tools.versions.runs",
    "measured models": "tools.pages.models_page.measured_models",
    "listed models": "tools.pages.models_page.listed_models",
    "experiment": "vlattn_lab.pages.experiment_page.tables",
    "evaluation": "vlattn_lab.pages.evaluation_page.evaluation",
    "residual shares": "vlattn_lab.pages.evaluation_page.residual_shares",
    "pointing": "vlattn_lab.real.page.pointing",
    "real": "vlattn_lab.real.page.page",
    "planted faults": "tools.planted.table.planted_faults",
    "reasons of planted faults": "tools.planted.table.planted_reasons",
    "evaluations of others": "vlattn_lab.pages.evaluations_of_others.evaluations_of_others",
}
MARK = re.compile(r"^<!-- table: (.+?) -->$", re.M)
REPORT = "report.md"  # made whole
README, HOME = "README.md", "index.md"  # the first page is README; its links count from docs/
DRAWN = ("tutorial.md", "gallery.md")  # they need vlattn_lab
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def table(line: str) -> str:
    """line: the name, and after a colon arguments, with blanks between them."""
    name, _, arguments = line.partition(": ")
    if name not in TABLES:
        raise ValueError(f"a line '<!-- table: NAME -->' must name one of {', '.join(TABLES)}; got {name!r}")
    module, _, function = TABLES[name].rpartition(".")
    return str(getattr(importlib.import_module(module), function)(*arguments.split())).strip("\n")


def filled(text: str) -> str:
    """A page with its tables.

    Raises:
        ValueError: a line names no table.
    """
    return MARK.sub(lambda mark: table(mark[1]), text)


def home(readme: str) -> str:
    """README as the first page of the site.

    Raises:
        ValueError: a link leads to a file outside of docs/, which the site has not.
    """
    if outside := re.findall(r"\]\((?!docs/|https?://)(.+?)\)", readme):
        raise ValueError(f"links of {README} must lead into docs/, of which the site is made; got {', '.join(outside)}")
    return readme.replace("](docs/", "](")


def draw(page: Path) -> None:
    """Runs the python blocks of a page in turn, in a process of their own, whose folder is named as the page and lies next to it.

    Raises:
        subprocess.CalledProcessError: the code raises an error.
    """
    figures = page.with_suffix("")
    figures.mkdir()
    code = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    subprocess.run([sys.executable, "-c", code], cwd=figures, check=True, stdout=subprocess.DEVNULL)


def build(folder: Path) -> None:
    """Writes the pages anew; what else lies in the folder is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    (folder / HOME).write_text(home((ROOT / README).read_text(encoding="utf-8")), encoding="utf-8")
    for page in folder.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if (made := filled(text)) != text:
            page.write_text(made, encoding="utf-8")
    for name in DRAWN:
        draw(folder / name)
    report.write(ROWS, folder / REPORT)
