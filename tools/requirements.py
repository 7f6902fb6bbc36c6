"""What pip installs for this package, out of pyproject.toml; needs nothing but Python.

python -m tools.requirements [EXTRA ...]    the requirements of the package and of these extras, a line each
python -m tools.requirements --lowest       constraints: the lowest version of all that the extra `all` needs
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where a release still runs, but warns of newer packages below it, these are held to their time, too.
OF_THEIR_TIME = ("pyparsing<3.3", "scipy<1.16")  # below matplotlib 3.8 and scikit-learn 1.4


def requirements(*extras: str, folder: Path = ROOT) -> list[str]:
    """Those of the package in `folder`; an extra that names others of its own package has theirs."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = re.compile(rf"{re.escape(project['name'])}\[(.*)\]")
    found = dict.fromkeys(project["dependencies"])
    waiting = list(extras)
    while waiting:
        for one in project["optional-dependencies"][waiting.pop(0)]:
            if named := own.fullmatch(one):
                waiting += named[1].split(",")
            else:
                found[one] = None
    return list(found)


def lowest() -> list[str]:
    """A line for each package with a lowest version that the operators or an extra in `all` need."""
    floors = [floor for one in requirements("all") if (floor := re.match(r"([\w-]+)>=([\d.]+)", one))]
    return sorted({f"{name}=={version}.*" for name, version in (floor.groups() for floor in floors)})


if __name__ == "__main__":
    print(*([*lowest(), *OF_THEIR_TIME] if sys.argv[1:] == ["--lowest"] else requirements(*sys.argv[1:])), sep="\n")
