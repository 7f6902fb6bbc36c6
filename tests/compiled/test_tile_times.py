"""The estimate of tiles beside the times that an H100 measured, without a device."""

import pytest

from tools.compiled import tile_times
from tools.compiled.tile_times import Tile, cycles, estimates, rank_correlation, timed

TIMED = timed()


@pytest.mark.parametrize("launch", TIMED)
def test_it_orders_the_tiles_that_were_timed(launch: str) -> None:
    times, guesses = [us for _, us in TIMED[launch]], estimates(launch, [tile for tile, _ in TIMED[launch]])
    assert rank_correlation(guesses, times) > 0.88
    assert times[guesses.index(min(guesses))] < 1.1 * min(times)


def test_each_fact_has_a_cost() -> None:
    config = {"BLOCK_Q": 64, "BLOCK_KV": 64, "num_warps": 4, "num_stages": 3}
    best = cycles("forward", 64, Tile(config, 4, 0))
    worse = [
        Tile(config, 1, 0),
        Tile(config, 4, 50),
        Tile({**config, "num_stages": 1}, 4, 0),
        Tile({**config, "num_warps": 8}, 4, 0),
        Tile({**config, "AHEAD": 1}, 4, 0),
    ]
    assert all(cycles("forward", 64, tile) > best for tile in worse)
    assert cycles("backward_kv", 64, Tile(config, 4, 0)) > best


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 1
    assert rank_correlation([1.0, 2.0, 3.0], [30.0, 20.0, 10.0]) == -1


def test_the_table_has_a_line_for_each_launch() -> None:
    assert len(tile_times.table().splitlines()) == 2 + len(TIMED)
