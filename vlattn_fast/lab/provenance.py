"""What a stored row says about where it comes from."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from torch import nn


def commit() -> str:
    """The commit of the checkout that holds this file, "+dirty" where it differs from it in more than results and docs."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if top / "vlattn_fast" / "lab" / Path(__file__).name != Path(__file__).resolve():
            return "unknown"
        changes = git("-C", str(top), "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python and of packages; None where one is not installed."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def fingerprint(model: nn.Module) -> str:
    """Of the weights: rows tell which ones they were measured with."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
