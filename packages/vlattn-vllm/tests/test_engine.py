"""vLLM answers with the statistics of transformers' maps. Each scenario is a process, with an engine of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = (
    "one_process",
    "preempted",
    "windows",
    "pictures",
    "with_torchvision llava",
    "with_torchvision qwen2_vl",
    "steered",
    "compiled",
    "steered ranks",
    "many",
    "folder",
    "odd_layers",
    "faults",
    "guide",
    "refused guesses",
    "refused others",
    "ranks",
    "server",
    "server pooling",
    "server another_version",
    "server limits",
    "server alibi",
    "server chunks",
    "server faults",
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: str) -> None:
    command = [sys.executable, "-m", *f"tests.helpers.{scenario}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
