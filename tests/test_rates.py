"""The rates of a machine by which the report's column *of limit* is computed (benchmarks/_rates.py)."""

from __future__ import annotations

import torch

from vlattn_fast.benchmarks import _rates


def test_the_limit_of_bfloat16_is_the_peak_of_amx_tiles_where_kernels_take_them(monkeypatch):
    """With a stand-in for the library's loop over registers: a hundred million products a second and core."""
    asked = []

    class Library:
        exists = True

        def function(self, name, result):
            asked.append(name)
            return lambda: 1e8

    monkeypatch.setattr(_rates.native, "library", Library())
    monkeypatch.setattr(_rates.native, "instruction_set", lambda: "amx")
    monkeypatch.setattr(_rates, "_fastest", lambda call: 1.0)
    products, _ = _rates._arithmetic.__wrapped__(torch.bfloat16, 3)
    assert products == 3 * 1e8 * 16384 and asked == ["vlattn_amx_tile_products_a_second"]
    assert _rates._tiles(torch.float32) == 0
    monkeypatch.setattr(_rates.native, "instruction_set", lambda: "v4_bf16")
    assert _rates._tiles(torch.bfloat16) == 0
