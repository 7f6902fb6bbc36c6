"""Scenario: the first example in Python of the guide, and of the package's README, run as scripts, as their readers run them."""

from __future__ import annotations

from tests.helpers.tiny import saved, with_tokenizer

# isort: split
import os
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
GUIDE = PACKAGE.parents[1] / "docs" / "guides" / "serve.md"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def main() -> None:
    folder = with_tokenizer(saved("Llama", num_hidden_layers=24))
    variables = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    for page, layers in ((GUIDE, 2), (PACKAGE / "README.md", 1)):
        found = re.search(r"```python\n(from vllm import .*?)```", page.read_text(), re.DOTALL)
        assert found is not None and MODEL in found[1], page
        script = Path(folder, "script.py")
        script.write_text(found[1].replace(MODEL, folder) + "    print(tuple(mass.shape))\n")
        done = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-4000:])
        assert done.returncode == 0 and f", {layers}, 4, 2)" in done.stdout, page


if __name__ == "__main__":
    main()
