"""The fixtures that build a small random model of the family a test names, and one that opens pages in a browser."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.interpret.cases import CASES, Case, lively
from tests.helpers.interpret.decoder_cases import DECODERS, Decoder, mllama

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture(autouse=True)
def _published(request: pytest.FixtureRequest) -> None:
    """Adapters and relevancy are compared with the published formulas."""
    if request.path.parent.name in ("adapters", "relevancy"):
        request.getfixturevalue("published")


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The case named by the test's parameter, its model in eval mode."""
    torch.manual_seed(0)
    made = CASES[request.param]()
    lively(made.model).eval()
    return made


@pytest.fixture
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(6)
    made = {**DECODERS, "mllama": mllama}[request.param]()
    lively(made.model).eval()
    return made


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str, str], dict[str, Any]]:
    """Opens a page, runs a script behind its own, and returns what that one puts into `results`."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")

    def run(page: str, script: str) -> dict[str, Any]:
        tail = (
            f"<script>const results = {{}};\n{script}\ndocument.body.dataset.results = JSON.stringify(results);</script></body>"
        )
        path = tmp_path / "page.html"
        path.write_text(page.replace("</body>", tail), "utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", *OFFLINE.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()], capture_output=True, text=True
        )
        found = re.search(r'data-results="([^"]*)"', done.stdout)
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads(html.unescape(found[1]))

    return run
