"""The kernels of tools/trials/, emulated as they are compiled for sm_90: docs/gluon.md says what came of them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.testing import compiling, needs_fences

GLUON = ["Gluon, products ahead", "Gluon, groups in turn"]


def error_of(name: str) -> tuple[float, int]:
    """The largest error of r Abar beside float64, over the largest number, and the number of launches. Findings raise."""
    import ptx
    from tools.trials.__main__ import STEPS, random_inputs

    r, query, key, value, grad_output, lse, scale = inputs = random_inputs(2, 256)
    with ptx.emulated(90) as launches:
        r_abar = STEPS[name][0](*inputs)
    p = (scale * query.double() @ key.double().mT - lse.double()[..., None]).exp()
    e = (p * (grad_output.double() @ value.double().mT)).relu()
    expected = torch.einsum("bi,bhij->bj", r.double(), e) / query.shape[1]
    return ((r_abar - expected).abs().max() / expected.abs().max()).item(), len(launches)


def products_and_waits(name: str) -> tuple[int, int]:
    from tools.trials.__main__ import STEPS, machine_code

    row = machine_code(STEPS[name][0], 256)
    return row["products"], row["waits"]


@pytest.mark.parametrize("name", [*GLUON, pytest.param("Triton, as it is", marks=needs_fences)])
def test_trials_are_right_and_nothing_is_reported(name: str) -> None:
    error, launches = compiling(f"{__name__}.error_of", name)
    assert error < 1e-5 and launches == 1


@pytest.mark.parametrize("name", GLUON)
def test_no_product_of_a_warp_group_waits_alone(name: str) -> None:
    """Eight instructions make the two products of a tile, and one wait ends both."""
    products, waits = compiling(f"{__name__}.products_and_waits", name)
    assert products == 8 * waits > 0
