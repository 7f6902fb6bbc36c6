"""The code of the pages that import this package runs and prints what they say, and the commands that they name exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from vlattn_lab.checkout import ROOT
from vlattn_lab.experiments.run import NAMES

DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
DOCUMENTS["README of the package"] = (ROOT / "packages" / "vlattn-lab" / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


PAGES = [name for name, text in DOCUMENTS.items() if re.search(r"^import vlattn_lab", "".join(blocks(text)), re.M)]


@pytest.mark.parametrize("name", PAGES)
def test_the_code_runs(name, tmp_path, monkeypatch, capsys):
    """The blocks of a page run in turn, and each `print(...)  # text` prints that text."""
    monkeypatch.chdir(tmp_path)
    figures = set(re.findall(rf"\]\({Path(name).stem}/([\w.-]+)\)", DOCUMENTS[name]))  # which the site has from this code
    variables = {"__name__": "document"}
    for number, code in enumerate(blocks(DOCUMENTS[name])):
        exec(compile(code, f"{name}, block {number}", "exec"), variables)
        said = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.M)
        assert len(said) == len(re.findall(r"^ *print\(", code, re.M)), "a print without its result beside it"
        assert capsys.readouterr().out.splitlines() == said
    assert figures <= {path.name for path in tmp_path.iterdir()}


def test_commands_exist():
    named = {found for text in DOCUMENTS.values() for found in re.findall(r"\bpython -m (vlattn_lab[\w.]*)(?: (\w+))?", text)}
    assert {"vlattn_lab.experiments", "vlattn_lab.demo", "vlattn_lab.real"} <= {module for module, _ in named}
    for module, word in named:
        assert importlib.util.find_spec(module), module
        assert module != "vlattn_lab.experiments" or word in (*NAMES, "NAME"), word


def test_what_the_reference_names_is_documented():
    named = re.findall(r"^::: (vlattn_lab\.\S+)$", DOCUMENTS["docs/api.md"], re.M)
    assert len(named) > 10
    for name in named:
        module, _, attribute = name.rpartition(".")
        prose = re.sub(
            r"`[^`]*`|^>>>.*", "", inspect.getdoc(getattr(importlib.import_module(module), attribute)) or "", flags=re.M
        )
        assert prose and not re.search(r"[\w)]\*[\w(]", prose), f"{name}: no docstring, or one with a product without blanks"
