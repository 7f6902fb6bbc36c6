"""A kernel of the kernel hub from kernels/, csrc/ and the few modules that they need, into build/hub/.

usage: python -m vlattn_native.hub.build [--out build/hub]

`build/` has a folder for each variant, which `kernels.get_local_kernel` loads: Triton's kernels for GPUs, and for the CPU the C++
kernels of this machine's architecture, compiled here. `build.toml` with `torch-ext/` is the first one in the form that
kernel-builder takes. The modules are those that front.py imports, directly or not; their imports become relative.
Nothing but torch, triton and Python's own library is imported: another import is an error here. On the hub this is the branch
v1, which transformers takes where a model's `attn_implementation` is the repository's name (attention.py).
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import importlib.util
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from vlattn_native import building

ROOT = building.ROOT.parents[1]  # the clone
NAME, VERSION = "vlattn-fast", 1  # of the functions' arguments; transformers asks for 1
FRONT = "vlattn_native.hub.front"  # becomes the folder's __init__.py
KERNELS = {"cuda": "vlattn_native.hub.triton_kernels", "cpu": "vlattn_native.hub.cpu_kernels"}  # behind the operators, by backend
LIBRARIES = "libvlattn_torch.so", "libvlattn_cpu.so"  # the first one opens the second one beside it
# torch's stable ABI of 2.10 and later (CMakeLists.txt), this processor, this system
MACHINE = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
CPU_VARIANT = f"torch-stable-abi210-cpu-{MACHINE}-{platform.system().lower()}"
NAMESPACE = "vlattn_fast.ops._ops"  # is written anew
PLACES = {  # of a package's files
    "vlattn_fast.kernels": ROOT / "kernels",
    "vlattn_fast": ROOT / "vlattn_fast",
    "vlattn_native": building.ROOT / "vlattn_native",
}
GLIBC = "2.28"  # the oldest with which a library runs; the hub asks for it
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
OPS = '''"""The namespace of this version's operators in torch.library."""

from pathlib import Path

import torch

NAMESPACE = "{namespace}"
for library in Path(__file__).parent.glob("{library}"):
    torch.ops.load_library(library)
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''


def source(module: str) -> Path | None:
    """The file of a module of this repository; None for a package and for what is no module."""
    package = next(package for package in PLACES if f"{module}.".startswith(f"{package}."))
    path = PLACES[package].joinpath(*module.removeprefix(package).strip(".").split(".")).with_suffix(".py")
    return path if path.is_file() else None


def place(module: str) -> str:
    """The module's name within the folder."""
    inner = f"{module}.".removeprefix("vlattn_fast.").removeprefix("vlattn_native.hub.").rstrip(".")
    return {FRONT: "", NAMESPACE: "_ops"}.get(module, inner)


def rewritten(module: str, backend: str = "cuda") -> tuple[str, set[str]]:
    """The text of a module with relative imports, and the modules that it imports."""
    path = source(module)
    assert path is not None, module
    text = path.read_text(encoding="utf-8").replace(KERNELS["cuda"], KERNELS[backend])
    lines, needs = text.splitlines(keepends=True), set[str]()
    depth = place(module).count(".") + 1
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for name in [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            if isinstance(node, ast.ImportFrom) and name.split(".")[0] in ("vlattn_fast", "vlattn_native"):
                needs |= {name} if source(name) else {f"{name}.{alias.name}" for alias in node.names}
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = line.replace(f"from {name} import", f"from {'.' * depth}{place(name)} import", 1)
                assert lines[node.lineno - 1] != line, f"{module}:{node.lineno}: {line}"
            elif name.split(".")[0] not in ALLOWED:
                raise ValueError(f"{path}:{node.lineno} imports {name}; a kernel of the hub imports torch and triton alone")
    return "".join(lines), needs


def modules(backend: str) -> dict[str, str]:
    """Text of each file of a variant by its path."""
    texts, ahead, done = {}, {FRONT}, {NAMESPACE}
    while ahead:
        module = ahead.pop()
        text, needs = rewritten(module, backend)
        done.add(module)
        ahead |= needs - done
        texts[place(module).replace(".", "/") + ".py" if place(module) else "__init__.py"] = text
    for folder in {path.rpartition("/")[0] for path in texts if "/" in path}:
        for parent in (folder, *map(str, Path(folder).parents)):
            texts.setdefault(f"{parent}/__init__.py".removeprefix("./"), "")
    for path in sorted((ROOT / "kernels").glob("*.json")) if "kernels/__init__.py" in texts else ():
        texts[f"kernels/{path.name}"] = path.read_text(encoding="utf-8")
    return dict(sorted(texts.items()))


def write(out: Path) -> Path:
    """Makes the folder `out` anew, with Triton's kernels alone, and returns the folder of this variant."""
    for path in (out / "build", out / "torch-ext"):
        if path.exists():
            shutil.rmtree(path)
    texts = modules("cuda")
    module, kernel = NAME.replace("-", "_"), out / "build" / "torch-cuda"
    facts = _facts("cuda", json.dumps(texts).encode())
    for folder in (out / "torch-ext" / module, kernel):
        _write(folder, texts)
    _finish(kernel, facts)
    general = f'name = "{NAME}"\nversion = {VERSION}\nlicense = "Apache-2.0"\nbackends = ["cuda"]'
    (out / "build.toml").write_text(
        f'[general]\nedition = 5\n{general}\n\n[torch-noarch]\npyext = ["py", "json"]\n', encoding="utf-8"
    )
    return kernel


def write_portable(out: Path) -> Path:
    """`write_cpu` with kernels for every instruction set, not only for that of this processor, and operators that run on systems
    with older C and C++ libraries than this machine's, as manylinux_2_28 asks."""
    zig = _zig()  # an error before minutes of compiling
    return write_cpu(out, building.build("hub-cpu", "-DVLATTN_CPU=ON", source=ROOT), zig)


def write_cpu(out: Path, kernels: Path = ROOT / "vlattn_fast" / "backends" / "cpu", options: tuple[str, ...] = ()) -> Path:
    """Adds the CPU's variant to the folder `out`, for this machine's architecture, with the library of the CPU's kernels in the
    folder `kernels`, and returns its folder. `options`: of CMake, for the operators' library.

    Raises:
        building.Missing: a compiler, torch or the library of the CPU's kernels is not there.
    """
    kernels /= LIBRARIES[1]
    if not kernels.is_file():
        raise building.Missing(f"{kernels} is not built; `make` builds it")
    folders = ROOT / "csrc", ROOT / "csrc" / "cpu", building.ROOT / "csrc" / "torch"
    sources = [path for folder in folders for path in folder.glob("*.*")]
    texts = modules("cpu")
    facts = _facts("cpu", b"".join([json.dumps(texts).encode(), *[path.read_bytes() for path in sorted(sources)]]))
    operators = building.operators("hub-torch-zig" if options else "hub-torch", f"-DVLATTN_NAMESPACE={facts['id']}", *options)
    kernel = out / "build" / CPU_VARIANT
    if kernel.exists():
        shutil.rmtree(kernel)
    _write(kernel, texts)
    for library in (operators, kernels):
        shutil.copy(library, kernel)
    _finish(kernel, facts)
    return kernel


def _zig() -> tuple[str, ...]:
    """Options of CMake that compile for GLIBC, with the C++ library inside, which the kernels' library does without."""
    if importlib.util.find_spec("ziglang") is None:
        raise building.Missing("ziglang is not installed; `make hub` installs it")
    target = f"{MACHINE}-linux-gnu.{GLIBC}"
    return f"-DCMAKE_CXX_COMPILER={sys.executable}", f"-DCMAKE_CXX_COMPILER_ARG1=-m ziglang c++ -target {target}"


def _facts(backend: str, content: bytes) -> dict[str, Any]:
    """The content of a variant's metadata.json. `id` names the module, and the namespace of its operators."""
    identity = f"_{NAME.replace('-', '_')}_{backend}_{hashlib.sha256(content).hexdigest()[:7]}"
    facts = {"name": NAME, "id": identity, "version": VERSION, "license": "Apache-2.0", "python-depends": []}
    return {**facts, "backend": {"type": backend}}


def _finish(kernel: Path, facts: dict[str, Any]) -> None:
    """Adds what names the variant: its operators' namespace, and metadata.json with a digest of all other files."""
    _write(kernel, {"_ops.py": OPS.format(namespace=facts["id"], library=LIBRARIES[0])})
    files = {path.relative_to(kernel).as_posix(): path for path in sorted(kernel.rglob("*")) if path.is_file()}
    sums = {name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()}
    facts = {**facts, "digest": {"algorithm": "sha256", "files": sums}}
    _write(kernel, {"metadata.json": json.dumps(facts, indent=2) + "\n"})


def _write(folder: Path, texts: dict[str, str]) -> None:
    for file, text in texts.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    out = parser.parse_args().out
    for kernel in (write(out), write_portable(out)):  # `make hub` has what that needs
        files = [path for path in kernel.rglob("*") if path.is_file()]
        print(f"{kernel}: {len(files)} files, {sum(path.stat().st_size for path in files) // 1024} KiB, version {VERSION}")
