"""`python -m tools` lists the tools: each is run by `python -m tools.NAME`, and says more with --help or at its top."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent


def commands() -> dict[str, str]:
    """Each tool that can be run, with the first sentence of its docstring."""
    files = [file for file in sorted(HERE.rglob("*.py")) if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    named = {".".join(file.relative_to(HERE.parent).with_suffix("").parts).removesuffix(".__main__"): file for file in files}
    named.pop("tools")
    return {name: _first_sentence(file) for name, file in named.items()}


def _first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    for name, text in commands().items():
        print(f"python -m {name}\n    {text}")
