"""The library itself: what it says of calls that it cannot run or that do not fit it, and the way to it: VLATTN_CUDA_LIBRARY."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops import backends
from tests.helpers.ops.backends import arguments_of
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.backends.inputs import ScoreAttentionInputs

ROOT = Path(__file__).parents[2]


def score(x: Tensor, value: Tensor) -> Tensor:
    given = {"query": x, "key": x, "value": value, "vector": torch.zeros(1, x.shape[3]), "score": "additive"}
    return torch.ops.vlattn.score_attention(*arguments_of(ScoreAttentionInputs, **given, dropout_p=0.0, backend="cuda"))[0]


def congruence(x: Tensor) -> Tensor:
    return torch.ops.vlattn.congruence_loss(*[x] * 8, None, None, "cacr", "softmax", "both", 1.0, False, "cuda")[0]


def test_a_failed_call_names_kernel_sizes_and_device() -> None:
    """Past what the public call refuses."""
    x = torch.zeros(2, 1, 4, 200)
    words = r"score_attention\(dtype=0, B=2, H=1, key_heads=1, value_heads=1, N=4, M=4, A=200, DV=200, .*\) on " + f"{x.device}: "
    with pytest.raises(RuntimeError, match=words):
        score(x, x)
    assert (score(x[..., :5], x[..., :5]) == 0).all()  # what comes after it runs


def test_what_is_too_large_is_refused_not_computed_in_part() -> None:
    """Also past the public call: no kernel takes more than 128 features."""
    small, large = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 200)
    for run in (lambda: score(small, large), lambda: score(large, small), lambda: congruence(large)):
        with pytest.raises(RuntimeError, match=r"invalid (argument|configuration)"):
            run()
    leaves = [torch.zeros(1, 1, 4, size, requires_grad=True) for size in (8, 8, 200)]
    with pytest.raises(ValueError, match="the CUDA C\\+\\+ kernel takes value sizes of at most 128"):
        va.score_attention(*leaves, score=va.scores.Additive(torch.zeros(8)), backend="cuda")


def test_a_member_that_the_library_lacks_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"does not fit this vlattn_fast: install it again \(congruence_loss: .*length"):
        _shared_library.kernel("congruence_loss")(torch.zeros(1), length=2)


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="has no vlattn_cuda_transmogrify: it does not fit this vlattn_fast; install it again"):
        _shared_library.kernel("transmogrify")(torch.zeros(1))


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    file.write_text("not a library")
    with (
        backends.ready("cuda", file),
        pytest.raises(RuntimeError, match=r"the CUDA C\+\+ kernels cannot be loaded \(install vlattn_fast again\): "),
    ):
        score(*[torch.zeros(1, 1, 4, 8)] * 2)


@pytest.mark.parametrize("built, driver", [(0, 0), (13000, 13000), (13010, 13000), (12080, 13000)])
def test_a_driver_runs_its_own_major_version_and_older_ones(built: int, driver: int) -> None:
    _shared_library.check_versions(built, driver)


@pytest.mark.parametrize("driver, runs", [(12080, 12), (0, 0)])
def test_a_driver_that_is_too_old_is_named(driver: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shared_library, "_versions", lambda of: (13000, driver))
    _shared_library._function.cache_clear()
    with pytest.raises(RuntimeError, match=f"are built with CUDA 13, and the driver runs CUDA {runs}: update the driver"):
        score(*[torch.zeros(1, 1, 4, 8)] * 2)
    monkeypatch.undo()


def test_a_scale_beyond_float32_is_infinite_to_the_kernels() -> None:
    x = torch.ones(1, 1, 3, 4)
    out = va.score_attention(x, x, x, score=va.scores.Additive(torch.ones(4)), scale=1e39, backend="cuda")
    assert torch.isnan(out).all()


@pytest.mark.skipif(backends.DEVICE != "cpu", reason="of the emulated library")
@pytest.mark.slow
def test_the_command_runs_the_emulated_kernels() -> None:
    code = "import tools.emulated.package; tools.emulated.package.install('90')\nfrom vlattn_fast.cli import app\n"
    code += "for words in {!r}: app(words, standalone_mode=False)"
    words = ["verify", "congruence_loss", "--backend", "cuda", "--dtype", "float32"]
    done = subprocess.run([sys.executable, "-c", code.format((words, ["info"]))], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert re.search(r"^congruence_loss +cuda +float32 +[1-9]", said, re.M), said
    assert "the worst again: VLATTN_PTX=90 python -m tools.emulated verify congruence_loss --backend cuda" in said
