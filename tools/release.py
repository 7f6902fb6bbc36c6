"""Rehearses a release: does every part of it but the upload, and says of each part what was made, or what failed and what to do.

    python -m tools.release --rehearse [PART ...]    default: all parts, about an hour on two cores

Nothing is uploaded from here. After a rehearsal in which all parts are ok, and `make test-all`, a release is made by hand:

    git tag vVERSION; git push origin vVERSION    the workflow `wheels` builds the wheels of all systems
    dist/*.tar.gz and these wheels                to the package index
    site/                                         into the site's folder VERSION
    dist/vlattn-fast-hub-VERSION.zip              unpacked, onto the hub repository's branch v1
    conda/recipe.yaml                             to the channel, with the digest of the source distribution
    packages/                                     each by its own version, if it has changed
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from tools import wheel
from tools.lists import ROOT, VERSIONED, Lists

LOGS = ROOT / "build" / "release"
HERE = sys.executable


class Failed(Exception):
    """What failed, and what to do."""


def run(log: str, *command: str) -> list[str]:
    """The lines that a command prints; all of them are stored in a log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{log}.log"
    with path.open("w", encoding="utf-8") as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("make: ")]
    if status != 0:
        words = " ".join(command).replace(HERE, "python")
        raise Failed(f"`{words}` ended with {status}: {lines[-1] if lines else ''}; mend what {path.relative_to(ROOT)} shows")
    return lines


def version(lists: Lists) -> str:
    if stale := {*lists.stale()} & {*VERSIONED}:
        raise Failed(f"{', '.join(sorted(stale))} must have the version of pyproject.toml, {lists.version()}; run `make lists`")
    if tags := run("version", "git", "tag", "--list", f"v{lists.version()}"):
        raise Failed(f"{tags[0]} is released already; write the next version into pyproject.toml and run `make lists`")
    return f"{lists.version()} of pyproject.toml, also in {', '.join(VERSIONED)}"


def tree(lists: Lists) -> str:
    if changed := run("tree", "git", "status", "--porcelain"):
        raise Failed(f"{len(changed)} files are not committed, such as {changed[0].split()[-1]}; commit or remove them")
    return f"commit {run('tree', 'git', 'rev-parse', '--short', 'HEAD')[0]}, nothing uncommitted"


def changelog(lists: Lists) -> str:
    heading, entries = re.split(r"^## ", lists.text("CHANGELOG.md"), flags=re.M)[1].split("\n", 1)
    name, _, when = heading.partition(" ")
    if name != lists.version():
        raise Failed(f"CHANGELOG.md begins with {name}; write '## {lists.version()} (unreleased)' above it")
    if not (count := len(re.findall(r"^- ", entries, re.M))):
        raise Failed(f"CHANGELOG.md says nothing of {name}; write what a user can do now")
    if when == "(unreleased)":
        return f"{count} entries of {name}; before the tag, write its date in place of (unreleased)"
    if not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", when):
        raise Failed(f"the date of {name} in CHANGELOG.md must be (unreleased) or like (2026-11-29); got {when!r}")
    return f"{count} entries of {name}, {when}"


def wheels(lists: Lists) -> str:
    return "\n".join(line for line in run("wheels", HERE, "-m", "tools.wheel") if line.startswith(("dist/", "  ")))


def docs(lists: Lists) -> str:
    run("docs", "make", "docs")
    if f"vlattn_fast {lists.version()}" not in lists.text("site/index.html"):
        raise Failed(f"site/index.html does not show the version {lists.version()}; run `make lists`")
    return f"site/, {len([*(ROOT / 'site').rglob('index.html')])} pages of version {lists.version()}"


def hub(lists: Lists) -> str:
    """Of the GPU's variant and of the CPU's, and as one file."""
    variants = run("hub", "make", "hub")[-2:]
    path = Path(
        shutil.make_archive(str(lists.root / "dist" / f"vlattn-fast-hub-{lists.version()}"), "zip", lists.root / "build/hub")
    )
    return "\n".join([*variants, f"dist/{path.name}: {path.stat().st_size / 1e6:.1f} MB"])


def conda(lists: Lists) -> str:
    return run("conda", HERE, "-m", "tools.environments", "conda")[-1]


def packages(lists: Lists) -> str:
    """A wheel of each, from its source distribution."""
    built = []
    for folder in sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml")):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        with tempfile.TemporaryDirectory() as out:
            sources = wheel.source(folder, Path(out))
            command = "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, str(sources)
            run(folder.name, HERE, "-m", *command)
            built += [path.name for path in Path(out).glob("*.whl")]
        if not built[-1].startswith(f"{project['name'].replace('-', '_')}-{project['version']}-"):
            raise Failed(f"the wheel of {folder.name} is {built[-1]}; it must have the name and version of its pyproject.toml")
    return "\n".join(built)


PARTS: dict[str, Callable[[Lists], str]] = {
    part.__name__: part for part in (tree, version, changelog, wheels, docs, hub, conda, packages)
}


def rehearse(names: list[str]) -> list[str]:
    """Which parts failed; a part that fails does not keep the others from being tried."""
    failed = []
    for name in names:
        start = time.monotonic()
        try:
            state, said = "ok", PARTS[name](Lists())
        except (Failed, subprocess.CalledProcessError) as failure:
            state, said = "FAILED", str(failure)
            failed.append(name)
        lines = said.splitlines() or [""]
        print(f"{name:<10}{state:<8}{lines[0]}  ({time.monotonic() - start:.0f} s)", *lines[1:], sep="\n" + " " * 18, flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="do all parts but the upload")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    options = parser.parse_args()
    if unknown := {*options.parts} - {*PARTS}:
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if not options.rehearse:
        parser.error("a release is made by hand, as --help says; --rehearse does all parts but the upload")
    if failed := rehearse(options.parts or [*PARTS]):
        raise SystemExit(f"again, once that is done: python -m tools.release --rehearse {' '.join(failed)}")


if __name__ == "__main__":
    main()
