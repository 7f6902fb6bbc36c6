"""vLLM answers with the statistics of transformers' maps. Each scenario is a process, with an engine of its own. Some also run
with model runner V2, which GPUs have by default, and whose Triton kernels run in Triton's interpreter here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = (
    "one_process",
    "preempted",
    "engines windows",
    "latent",
    "pictures",
    "with_torchvision llava",
    "with_torchvision qwen2_vl",
    "steered",
    "steered compiled",
    "steered ranks",
    "many",
    "folder",
    "odd_layers",
    "faults",
    "guide",
    "refused guesses",
    "refused others",
    "engines ranks",
    "server",
    "server pooling",
    "server another_version",
    "server limits",
    "server alibi",
    "server chunks",
    "server faults",
)
V2 = ("one_process", "preempted", "engines windows", "steered", "many", "odd_layers", "faults", "engines ranks")


@pytest.mark.parametrize(("scenario", "runner"), [*((each, "0") for each in SCENARIOS), *((each, "1") for each in V2)])
def test_scenario(scenario: str, runner: str) -> None:
    command = [sys.executable, "-m", *f"tests.helpers.{scenario}".split()]
    variables = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": runner}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
