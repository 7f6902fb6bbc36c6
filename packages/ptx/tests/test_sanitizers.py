"""FpSan's numbers against integers of Python's, infinities, and what ConSan reports. Calls run in a process whose kernels are
compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ptx.testing import needs_sanitizers, sanitizing

pytestmark = needs_sanitizers
MOST = 2**32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_and_integers_stand_for_one_another(dtype: torch.dtype) -> None:
    from ptx.sanitizers import BITS, number, payload

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    numbers = (every * 65521 if dtype == torch.float32 else every.short()).view(dtype)
    integers = payload(numbers)
    assert payload(torch.tensor([0.0, 1.0, -1.0], dtype=dtype)).tolist() == [0, 1, -1]
    assert len(integers.unique()) == len(every) and integers.abs().max() <= 2 ** (8 * dtype.itemsize - 1)
    for shifted in (integers, integers + 2**40):
        assert torch.equal(number(shifted, dtype).view(BITS[dtype]), numbers.view(BITS[dtype]))


@pytest.mark.parametrize("rounding", [True, False])
def test_arithmetic_is_that_of_integers(rounding: bool) -> None:
    vectors, results = sanitizing("tests.helpers.sanitized.arithmetic", rounding)
    from ptx.sanitizers import number, payload

    a, b, c = (x.tolist() for x in vectors)
    as_floats = payload(torch.maximum(*(number(x, torch.float32) for x in vectors[:2]))).tolist()
    sums, quotients, powers, product, largest, narrowed = (x.tolist() for x in results)
    for i in range(len(a)):
        assert (sums[i] - (a[i] * b[i] + c[i] - a[i])) % MOST == 0
        assert b[i] % 2 == 0 or (quotients[i] - a[i] * pow(b[i], -1, MOST)) % MOST == 0
        assert powers[i] == product[i] and powers[i] % 4 == 1
        assert largest[i] == as_floats[i]
        assert narrowed[i] == ((a[i] + 2**15) % 2**16 - 2**15) or rounding
    assert not rounding or any((one - x) % 2**16 for one, x in zip(narrowed, a, strict=True))


def test_torch_multiplies_and_adds_integers() -> None:
    (x, y, z), product, total = sanitizing("tests.helpers.sanitized.products")
    for i in range(2):
        for j in range(3):
            exact = sum(x[i][k] * y[k][j] for k in range(4))
            assert (product[i][j] - exact) % MOST == 0 == (total[i][j] - z[i][j] - exact) % MOST


def test_infinities_mask() -> None:
    """As where FpSan is not: 2^-inf is 0, a masked number is less than all, and a minimum passes over NaN."""
    x, out = sanitizing("tests.helpers.sanitized.infinities")
    even = torch.arange(len(x)) % 2 == 0
    power, exponential, nothing, largest, least, passed, left, right, total = out
    assert (power[even] == 1).all() and (power[~even] == 0).all()
    assert (exponential[even] != 0).all() and (exponential[~even] == 0).all()
    assert (nothing == 0).all() and torch.equal(largest, x) and torch.equal(least, x)
    assert torch.equal(passed[even], x[even]) and passed[~even].isneginf().all()
    for one in (left, right):
        assert (one[even] != 0).all() and (one[~even] == 0).all()
    assert total.isneginf().all()


@pytest.mark.parametrize(
    ("dtype", "nan", "like_nan"),
    [(torch.float32, 0x7FC00000, 0x7F812345), (torch.bfloat16, 0x7FC0, 0x7F81), (torch.float16, 0x7E00, 0x7D01)],
)
def test_a_number_that_looks_like_nan_equals_itself(dtype: torch.dtype, nan: int, like_nan: int) -> None:
    """And the NaN of a text does not."""
    assert sanitizing("tests.helpers.sanitized.equal_to_itself", [nan, like_nan, 1, 0], dtype) == [False, True, True, True]


def test_an_instruction_that_makes_zero_of_integers_makes_zero() -> None:
    """By itself FpSan makes a number of them, which depends on the grid."""
    assert (sanitizing("tests.helpers.sanitized.zero_of_an_instruction") == 0).all()


def test_consan_reports_a_copy_that_nothing_waits_for() -> None:
    assert sanitizing("tests.helpers.sanitized.copied", True) == (True, "")
    done, text = sanitizing("tests.helpers.sanitized.copied", False)
    assert not done and "assertion failed" in text and "pending access" in text


def test_consan_refuses_what_triton_cannot_compile() -> None:
    from ptx.sanitizers import consan

    with pytest.raises(ValueError, match="ConSan needs sm_90 or newer, .*; got sm_80"), consan(80):
        pass


def test_a_mode_leaves_nothing_behind() -> None:
    assert sanitizing("tests.helpers.sanitized.changed_by_a_mode") == (True, False)
