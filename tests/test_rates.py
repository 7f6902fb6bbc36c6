"""The rates of a machine by which the report's column *of limit* is computed (benchmarks/_rates.py)."""

import pytest
import torch

from vlattn_fast.backends import native
from vlattn_fast.benchmarks import _rates

GIGA = 1e9
# What the library's loops over registers give: multiply-adds and products of tiles a second and core, and pairs over FMA
LOOPS = {"vlattn_multiply_adds_a_second": 50 * GIGA, "vlattn_rate_of_pairs": 0.5, "vlattn_amx_tile_products_a_second": GIGA / 8}


class Library:
    exists = True

    def function(self, name, result):
        return lambda: LOOPS[name]


@pytest.fixture
def processor(monkeypatch):
    """One with AMX and three cores, whose torch is slow."""
    monkeypatch.setattr(_rates.native, "library", Library())
    monkeypatch.setattr(_rates.native, "instruction_set", lambda: "amx")
    monkeypatch.setattr(_rates, "_memory", lambda: 1.0)
    monkeypatch.setattr(_rates, "_arithmetic", lambda dtype, threads: (1.0, 1.0))
    monkeypatch.setattr(_rates, "_peaks", _rates._peaks.__wrapped__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.usefixtures("processor")
def test_the_limit_names_the_peak_of_the_instruction_that_does_most(monkeypatch):
    cpu = torch.device("cpu")
    single, half = _rates.rates(cpu, torch.float32), _rates.rates(cpu, torch.bfloat16)
    assert single.peaks == {"FMA": 300 * GIGA} and half.peaks == {"FMA": 300 * GIGA, "pairs": 150 * GIGA, "AMX": 6144 * GIGA}
    assert single.limit([(600 * GIGA, 0, 0)]) == (2, "FMA") and half.limit([(6144 * GIGA, 0, 0)]) == (1, "AMX")
    assert half.limit([(0, 0, 1)]) == (1, "exponentials")
    monkeypatch.setattr(_rates.native, "instruction_set", lambda: "v4_bf16")
    assert _rates.rates(cpu, torch.bfloat16).limit([(300 * GIGA, 0, 0)]) == (1, "FMA")
    monkeypatch.setattr(_rates, "_arithmetic", lambda dtype, threads: (400 * GIGA, 1.0))
    assert _rates.rates(cpu, torch.float32).limit([(400 * GIGA, 0, 0)]) == (1, "products")


@pytest.mark.usefixtures("processor")
def test_without_the_library_torch_sets_the_rate(monkeypatch):
    monkeypatch.setattr(Library, "exists", False)
    assert _rates.rates(torch.device("cpu"), torch.float32) == (1.0, 1.0, 1.0, {})


def test_the_peak_of_fma_is_that_of_a_processor():
    """The library's own loop: between a multiply-add a nanosecond and two vectors of 16 at 8 GHz."""
    if not native.library.exists or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no library, or no FMA")
    assert 1 < _rates._peaks(torch.float32)["FMA"] / (2 * GIGA) < 2 * 16 * 8


@pytest.mark.parametrize("name, bytes_a_second", [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H200", 4.8e12)])
def test_rates_of_gpus_are_those_of_their_data_sheets(monkeypatch, name, bytes_a_second):
    """Beside what torch's product reaches, which is no limit."""
    monkeypatch.setattr(_rates, "device_name", lambda device: name)
    monkeypatch.setattr(_rates, "_product_on_gpu", lambda: 700e12)
    rates = _rates.rates(torch.device("cuda"), torch.bfloat16)
    assert rates.peaks == {"tensor cores": 989e12, "torch's product": 700e12}
    assert rates.limit([(989e12, 0, 0)]) == (1, "tensor cores") and rates.limit([(0, bytes_a_second, 0)]) == (1, "memory")
    monkeypatch.setattr(_rates, "device_name", lambda device: "NVIDIA H100 PCIe")
    assert _rates.rates(torch.device("cuda"), torch.bfloat16) is None
