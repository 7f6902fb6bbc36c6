"""Which tests run under other arithmetic of the CPU, and that the settings reach torch."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.accuracy import compares
from tests.ops import test_congruence_loss, test_score_attention
from tests.power import test_power
from tools import cpus
from vlattn_fast.backends import native


def test_tests_that_compare_are_marked() -> None:
    assert compares(test_score_attention.test_every_score)
    assert compares(test_power.test_a_planted_flaw_is_caught)  # through a helper of its own file
    assert any(compares(test) for name, test in vars(test_congruence_loss).items() if name.startswith("test_"))
    assert not compares(test_tests_that_compare_are_marked)


def test_they_are_in_the_folders_that_are_collected(request: pytest.FixtureRequest) -> None:
    marked = [item.nodeid for item in request.session.items if item.get_closest_marker("accuracy")]
    assert [name for name in marked if not name.startswith(tuple(f"{folder}/" for folder in cpus.FOLDERS))] == []


@pytest.mark.parametrize("setting, name, words", [("avx2", "v3", "AVX2"), ("sse4", "baseline", "DEFAULT")])
def test_the_settings_reach_torch_and_the_kernels(setting: str, name: str, words: str) -> None:
    if name not in native._available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip(f"this processor does not run the CPU kernels of {name}, or has no vector instructions to leave out")
    code = (
        "import torch; from vlattn_fast.backends import native as n; print(n.instruction_set(), torch._C._get_cpu_capability())"
    )
    environment = {**os.environ, **cpus.SETTINGS[setting]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name, words]
