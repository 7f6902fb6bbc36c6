"""tests/helpers/bits.py sees a test that rests on the bits of torch's products, and no other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLANTED = """
import pytest
import torch
from torch.nn import functional

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rests_on_equal_rows(dtype):
    row, matrix = random(1, 40, dtype=dtype), random(40, 5, dtype=dtype)
    assert len(torch.unique(row.expand(40, -1) @ matrix, dim=0)) == 1


def test_rests_on_a_batch_and_its_samples():
    x, matrix = random(8, 3, 40), random(8, 40, 5)
    assert torch.equal((x @ matrix)[:2], x[:2] @ matrix[:2])


def test_rests_on_gradients():
    x = random(1, 40).expand(40, -1).clone().requires_grad_()
    (grad,) = torch.autograd.grad(functional.linear(x, random(9, 40)), x, random(1, 9).expand(40, -1))
    assert len(torch.unique(grad, dim=0)) == 1


def test_rests_on_a_convolution():
    x = random(1, 3, 6, 6).expand(40, -1, -1, -1)
    assert len(torch.unique(functional.conv2d(x, random(2, 3, 3, 3)), dim=0)) == 1


def test_rests_on_a_compiled_product():
    x, matrix = random(1, 40).expand(40, -1), random(40, 5)
    assert len(torch.unique(torch.compile(lambda x: x @ matrix, backend="eager")(x), dim=0)) == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_of_whole_numbers(dtype):
    one, other = ((random(7, 7, seed=seed) * 9).floor().to(dtype) for seed in (1, 2))
    want = [[sum(int(a) * int(b) for a, b in zip(row, column)) for column in other.T] for row in one]
    assert (one @ other).tolist() == torch.tensor(want).to(dtype).tolist()


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_of_chosen_rows(dtype):
    matrix, chosen = random(9, 5, dtype=dtype), torch.tensor([3, 3, 0, 8])
    assert torch.equal(functional.one_hot(chosen, 9).to(dtype) @ matrix, matrix[chosen])


@pytest.mark.parametrize("dtype", FLOATS)
def test_within_the_rounding(dtype):
    one, other = random(40, 40, dtype=dtype), random(40, 40, dtype=dtype, seed=3)
    want = one.double() @ other.double()
    assert ((one @ other).double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.max()


def test_of_nothing_and_of_no_number():
    assert (random(0, 3) @ random(3, 2)).shape == (0, 2) and (random(2, 0) @ random(0, 2) == 0).all()
    assert (torch.full((3, 3), torch.nan) @ random(3, 3)).isnan().all()
    assert (torch.full((3, 3), 3e38) @ random(3, 3)).isinf().any()
"""


PLUGIN = ("-p", "tests.helpers.bits")


def outcomes_of(code: str, folder: Path, *options: str) -> dict[str, str]:
    """PASSED or FAILED by the names of a file's tests, under pytest's `options`."""
    planted = folder / "test_planted.py"
    planted.write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", *options, "-rA", "--tb=no", "--rootdir", folder]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, planted], cwd=folder, env=environment, capture_output=True, text=True)
    outcomes = {name: state for state, name in re.findall(r"^(PASSED|FAILED) (\S+)", done.stdout, re.M)}
    assert outcomes, done.stdout + done.stderr
    return outcomes


@pytest.mark.slow
def test_what_rests_on_bits_is_seen(tmp_path: Path) -> None:
    outcomes = outcomes_of(PLANTED, tmp_path, *PLUGIN)
    assert len(outcomes) == 20
    assert {name for name, state in outcomes.items() if state == "FAILED"} == {name for name in outcomes if "rests_on" in name}


@pytest.mark.slow
def test_no_product_is_changed_elsewhere() -> None:
    """The doctests import each file of tests/."""
    code = (
        "import torch; a, b = torch.rand(40, 40), torch.rand(40, 40); before = a @ b\n"
        "import tests.helpers.bits as bits; assert torch.equal(a @ b, before)\n"
        "with bits.other_bits(): assert not torch.equal(a @ b, before)\n"
        "assert torch.equal(a @ b, before)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
