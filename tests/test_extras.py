"""A package that is not installed is reported with the extra that brings it."""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn_fast as va
from vlattn_fast._ground import extras
from vlattn_fast.interpret.explaining import loading
from vlattn_fast.interpret.result.figures import photos

EXPLANATION = va.Explanation({"vision": torch.rand(1, 5)}, torch.rand(1, 2, 2), [0])
CALLS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "save": ("safetensors", "explain", lambda path: EXPLANATION.save(path)),
    "load": ("safetensors", "explain", lambda path: va.Explanation.load(path)),
    "plot": ("matplotlib", "viz", lambda path: EXPLANATION.plot()),
    "table": ("pandas", "tables", lambda path: EXPLANATION.to_pandas()),
    "curves": ("matplotlib", "viz", lambda path: va.Evaluation([]).plot()),
    "probe": ("sklearn", "probe", lambda path: va.probe(torch.nn.Identity(), [])),
    "report": ("matplotlib", "viz", lambda path: va.ProbeReport([]).plot()),
    "report page": ("jinja2", "viz", lambda path: va.ProbeReport([]).save_html(path)),
    "report table": ("pandas", "tables", lambda path: va.ProbeReport([]).to_pandas()),
    "page": ("jinja2", "viz", lambda path: EXPLANATION.save_html(path)),
    "model": ("transformers", "explain", lambda path: loading.load_model("x")),
    "picture": ("PIL", "viz", lambda path: photos.open_image(path)),
    "flow": ("matplotlib", "viz", lambda path: va.EdgeTable((), torch.zeros(0, 1), torch.zeros(1), {}, {}).plot_flow()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_package_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra, call = CALLS[name]
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.* not installed: pip install 'vlattn_fast\[{extra}\]'"):
        call(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_package_that_fails_in_transformers_is_not_missing() -> None:
    """Such as a torchvision of another build: transformers raises a ModuleNotFoundError of its own class, without a name."""
    with pytest.raises(ImportError, match="^Could not import module 'CLIPModel': operator x does not exist. `vlattn info` shows"):
        with extras.extra("explain"):
            said = "Could not import module 'CLIPModel'. Are this object's requirements defined correctly?"
            raise ModuleNotFoundError(said) from RuntimeError("operator x does not exist")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("3.5.1", "triton 3.5.1 is installed, and 3.6 or newer is needed"),
        ("3.6.0+git1234", ""),
        ("3.10.0", ""),
        ("4", ""),
        (None, ""),  # a nightly build has another name
    ],
)
def test_a_package_that_is_too_old(version: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    assert extras.missing("triton", 3, 6) == words


def test_a_package_that_is_not_there() -> None:
    assert extras.missing("vlattn_slow", 1) == "vlattn_slow is not installed"


ROOT = Path(__file__).parent.parent
OF_OTHER_DOORS = {"triton", "cli", "docs", "all", "test"}  # no call imports them through `extra`


def test_every_extra_has_code():
    """What pyproject.toml offers is what the code asks for."""
    table = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert table is not None
    offered = set(re.findall(r"^(\w+) = \[", table[1], re.M)) - OF_OTHER_DOORS
    asked = {
        name for path in (ROOT / "vlattn_fast").rglob("*.py") for name in re.findall(r'\bextra\("(\w+)"\)', path.read_text())
    }
    assert offered == asked


def test_nothing_points_to_pages_that_are_not_shipped():
    shipped = {path.stem for path in ROOT.glob("*.md")} | {path.stem for path in (ROOT / "docs").rglob("*.md")}
    folders = ("vlattn_fast", "kernels", "csrc", "benchmarks", "tests", "tools", "docs", "examples")
    pages = re.compile(r"\b(DESIGN|PERFORMANCE|SPEC|RELIABILITY)\b")
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".cu", ".h", ".cpp", ".toml") and path != Path(__file__):
                missing = set(pages.findall(path.read_text())) - shipped
                assert not missing, (path, missing)


def test_the_environment_of_make_real_has_what_an_explanation_asks_for() -> None:
    """Files, figures, pages and tables: pandas was missing."""
    environments = (Path(__file__).parent.parent / "tools" / "environments.py").read_text(encoding="utf-8")
    (installed,) = re.findall(r"\"\.\[([\w,]+)\]\", \"--editable\", \"packages/vlattn-lab\"", environments)
    assert {CALLS[name][1] for name in ("save", "plot", "page", "table")} <= {*installed.split(",")}
