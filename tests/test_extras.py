"""A package that is not installed is reported with the extra that brings it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn_fast as va
from vlattn_fast import cli

EXPLANATION = va.Explanation({"vision": torch.rand(1, 5)}, torch.rand(1, 2, 2), [0])
CALLS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "scans": ("sklearn", "lab", lambda path: va.lab.digit_scans.__wrapped__("train")),
    "weights": ("safetensors", "lab", lambda path: va.lab.load_uniter()),
    "save": ("safetensors", "explain", lambda path: EXPLANATION.save(path)),
    "load": ("safetensors", "explain", lambda path: va.Explanation.load(path)),
    "plot": ("matplotlib", "viz", lambda path: EXPLANATION.plot()),
    "page": ("jinja2", "viz", lambda path: EXPLANATION.save_html(path)),
    "model": ("transformers", "explain", lambda path: cli._load("x")),
    "picture": ("PIL", "viz", lambda path: cli._open(path)),
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
