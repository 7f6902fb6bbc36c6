"""The origin that a stored record names."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from torch import nn

from vlattn_fast._ground.origin import version, versions

__all__ = ["commit", "fingerprint", "version", "versions"]


def commit() -> str:
    """The commit of the checkout that holds this file; "+dirty" where the checkout differs in more than results and docs."""

    def git(*words: str) -> str:
        place = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=place, check=True, capture_output=True, text=True).stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if top / "vlattn_fast" / "measuring" / Path(__file__).name != Path(__file__).resolve():
            return "unknown"  # the package is installed inside another repository
        left_out = (":!benchmarks/results", ":!docs")
        changes = git("-C", str(top), "status", "--porcelain", "--", ".", *left_out)
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def fingerprint(model: nn.Module) -> str:
    """A hash of the weights, by which a record names the weights it was measured with."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
