"""`make hub`: a kernel of the kernel hub from kernels/ and the few modules that they import, into build/hub/.

usage: python -m tools.hub.build [--out build/hub]

The folder has both forms: `build.toml` with `torch-ext/`, which kernel-builder takes, and `build/torch-cuda/`, which
`kernels.get_local_kernel` loads. The modules are those that tools/hub/functions.py imports, directly or not; their imports
become relative. Nothing but torch, triton and Python's own library is imported: another import is an error here.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME, VERSION = "vlattn-fast", 0  # 0 until a device has run it
FRONT = "tools.hub.functions"  # becomes the folder's __init__.py
NAMESPACE = "vlattn_fast.ops._ops"  # is written anew
PLACES = {"vlattn_fast.kernels": "kernels", "vlattn_fast": "vlattn_fast", "tools": "tools"}  # of a package's files
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
OPS = '''"""The namespace of this version's operators in torch.library."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''


def source(module: str) -> Path | None:
    """The file of a module of this repository; None for a package and for what is no module."""
    package = next(package for package in PLACES if f"{module}.".startswith(f"{package}."))
    path = ROOT.joinpath(PLACES[package], *module.removeprefix(package).strip(".").split(".")).with_suffix(".py")
    return path if path.is_file() else None


def place(module: str) -> str:
    """The module's name within the folder."""
    return {FRONT: "", NAMESPACE: "_ops"}.get(module, module.removeprefix("vlattn_fast.").removeprefix("tools.hub."))


def rewritten(module: str) -> tuple[str, set[str]]:
    """The text of a module with relative imports, and the modules that it imports."""
    path = source(module)
    assert path is not None, module
    text = path.read_text(encoding="utf-8")
    lines, needs = text.splitlines(keepends=True), set[str]()
    depth = place(module).count(".") + 1
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for name in [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            if isinstance(node, ast.ImportFrom) and name.split(".")[0] in ("vlattn_fast", "tools"):
                needs |= {name} if source(name) else {f"{name}.{alias.name}" for alias in node.names}
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = line.replace(f"from {name} import", f"from {'.' * depth}{place(name)} import", 1)
                assert lines[node.lineno - 1] != line, f"{module}:{node.lineno}: {line}"
            elif name.split(".")[0] not in ALLOWED:
                raise ValueError(f"{path}:{node.lineno} imports {name}; a kernel of the hub imports torch and triton alone")
    return "".join(lines), needs


def modules() -> dict[str, str]:
    """Text of each file of the folder by its path."""
    texts, ahead, done = {}, {FRONT}, {NAMESPACE}
    while ahead:
        module = ahead.pop()
        text, needs = rewritten(module)
        done.add(module)
        ahead |= needs - done
        texts[place(module).replace(".", "/") + ".py" if place(module) else "__init__.py"] = text
    for folder in {path.rpartition("/")[0] for path in texts if "/" in path}:
        for parent in (folder, *map(str, Path(folder).parents)):
            texts.setdefault(f"{parent}/__init__.py".removeprefix("./"), "")
    for path in sorted((ROOT / "kernels").glob("*.json")):
        texts[f"kernels/{path.name}"] = path.read_text(encoding="utf-8")
    return dict(sorted(texts.items()))


def write(out: Path) -> Path:
    """Makes the folder `out` anew and returns that of the kernel itself."""
    texts = modules()
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:7]
    module, kernel = NAME.replace("-", "_"), out / "build" / "torch-cuda"
    backend = {"type": "cuda"}
    facts = {"name": NAME, "id": f"_{module}_cuda_{digest}", "version": VERSION, "license": "Apache-2.0", "python-depends": []}
    for path in (out / "build", out / "torch-ext"):
        if path.exists():
            shutil.rmtree(path)
    for folder in (out / "torch-ext" / module, kernel):
        for file, text in texts.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    (kernel / "_ops.py").write_text(OPS.format(namespace=facts["id"]), encoding="utf-8")
    (kernel / "metadata.json").write_text(json.dumps({**facts, "backend": backend}, indent=2) + "\n", encoding="utf-8")
    general = f'name = "{NAME}"\nversion = {VERSION}\nlicense = "Apache-2.0"\nbackends = ["cuda"]'
    (out / "build.toml").write_text(
        f'[general]\nedition = 5\n{general}\n\n[torch-noarch]\npyext = ["py", "json"]\n', encoding="utf-8"
    )
    return kernel


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    kernel = write(parser.parse_args().out)
    files = [path for path in kernel.rglob("*") if path.is_file()]
    print(f"{kernel}: {len(files)} files, {sum(path.stat().st_size for path in files) // 1024} KiB, version {VERSION}")
