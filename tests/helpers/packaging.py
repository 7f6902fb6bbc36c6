"""Packages of this tree, built as pip builds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAPPED = ("kernels", "benchmarks")  # folders at the top that are installed inside of the package
LIBRARY, CPU_LIBRARY = (f"vlattn_fast/backends/{name}/libvlattn_{name}.so" for name in ("cuda", "cpu"))


def copied(source: Path) -> Path:
    """The sources, so that neither leftovers in the tree get in nor the build's own files stay there; and libraries in them as
    an editable install leaves them."""
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, source)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "build.json")
    for name in ("vlattn_fast", "csrc", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for library in (LIBRARY, CPU_LIBRARY):
        (source / library).write_text("an old library")
    return source


def build(source: Path, target: Path, environment: dict[str, str], kind: str = "wheel") -> subprocess.CompletedProcess[str]:
    """Into target/kind."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target / kind)!r})"
    (target / kind).mkdir()
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)


def installed(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment in `folder`, which has this wheel and, by their path, torch's packages."""
    import torch

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, wheel], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python
