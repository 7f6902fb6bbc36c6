"""The lowest versions that pyproject.toml claims, as constraints of pip: `make oldest` installs these.

Where a release still runs, but warns of newer packages below it, these are held to their time, too.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
OF_THEIR_TIME = ("pyparsing<3.3", "scipy<1.16")  # below matplotlib 3.8 and scikit-learn 1.4


def lowest() -> list[str]:
    """A line for each package with a lowest version that the operators or an extra in `all` need."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    chosen = re.search(r"\[(.*)\]", everything)
    assert chosen is not None, everything
    needed = [*project["dependencies"], *(one for name in chosen[1].split(",") for one in extras[name])]
    floors = [floor for one in needed if (floor := re.match(r"([\w-]+)>=([\d.]+)", one))]
    return sorted({f"{name}=={version}.*" for name, version in (floor.groups() for floor in floors)})


if __name__ == "__main__":
    print(*lowest(), *OF_THEIR_TIME, sep="\n")
