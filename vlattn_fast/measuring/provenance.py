"""The origin that a stored result names."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from torch import nn

from vlattn_fast._ground.origin import version, versions

__all__ = ["commit", "fingerprint", "version", "versions"]


def commit() -> str:
    """Returns the commit of the checkout that holds this file; "+dirty" if the checkout differs in more than results and docs."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

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
    """Returns a hash of the weights, by which a stored result names the weights it was measured with."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
