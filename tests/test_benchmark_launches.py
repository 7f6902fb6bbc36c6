"""A row of a benchmark has the tiles of the Triton launches that its call made, whatever the table of the commit says."""

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.ops.backends import ready
from vlattn_fast.benchmarks import _choice, _launches, _measure, _rates
from vlattn_fast.kernels import _configurations
from vlattn_fast.kernels._tiles import launched
from vlattn_fast.kernels.attention_map import Constants, _map_kernel

SIZES = {"B": 1, "H": 2, "N": 40, "D": 16}
NAME = "attention_map/gradient/clip"


class Tiles(dict[str, Any]):
    """In place of the table's tiles, as the table of the fastest tiles has them; it notes which kernels of the operator asked."""

    def get(self, key: str, default: Any = None) -> Any:
        self[key] = {**default, "BLOCK_Q": 16, "BLOCK_KV": 32, "num_warps": 2}
        return self[key]


def rows(**options: Any) -> dict[str, dict[str, Any]]:
    (benchmark,) = _choice.choose([NAME])
    fixed = mock.patch.object(_measure, "rates", lambda device, dtype: _rates.Rates(1e11, 1e10, 1e9))
    with ready("triton"), fixed, mock.patch.object(_measure, "EMULATED", ()):
        made = _measure.Measurement(benchmark, torch.device("cpu"), overrides=SIZES, rounds=1, compiled=False, **options)
        return {row["variant"]: row for row in made.run()}


def test_a_row_has_the_tiles_of_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(unused={})
    monkeypatch.setattr(_configurations, "OVERRIDES", tiles)
    measured = rows(only=["triton", "streaming", "reference"])
    stored = {tile["kernel"]: tile for tile in measured["triton"]["tiles"]}
    asked = [key for key in tiles if key != "unused"]
    assert len(asked) == 2 and stored.keys() == {"_map_kernel", "_rows_kernel"}
    for key in asked:
        tile = stored[f"_{key.split()[1]}_kernel"]
        used = {name: tile[name] for name in tiles[key] if name in tile}
        assert {"BLOCK_Q": 16, "BLOCK_KV": 32, "num_warps": 2}.items() <= used.items() and used.items() <= tiles[key].items()
    assert "tiles" not in measured["streaming"] and "tiles" not in measured["reference"]


def test_a_launch_that_is_known_is_recorded_again() -> None:
    """`cached_launch` caches launches: a second row of the same call asks the table for nothing."""
    first, second = (rows(only=["triton"])["triton"]["tiles"] for _ in range(2))
    assert first and first == second


def test_a_tile_is_of_constants_and_options() -> None:
    """Sizes of tensors are arguments of a kernel."""
    constants = Constants(64, 64, 0, False, False, False, "ieee")
    named = launched({"C": constants, "x": 3}, {"BLOCK_Q": 64, "num_warps": 4, "maxnreg": 128})
    assert _launches.tile_of(_map_kernel, named) == {"kernel": "_map_kernel", "BLOCK_Q": 64, "num_warps": 4, "maxnreg": 128}
