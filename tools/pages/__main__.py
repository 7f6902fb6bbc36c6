"""Makes the folder of the site's pages: `python -m tools.pages [build/docs]`. `make docs` runs it before Zensical."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.pages.site import ROOT, build

if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs")
