"""A benchmark with each variant in a separate process."""

import multiprocessing
import os
import select
import time

from vlattn_fast.benchmarks import _measure
from vlattn_lab.timed import isolated

TINY = {"B": 3, "H": 2, "N": 12, "D": 8, "L": 5, "V": 7}


def test_variants_in_processes_of_their_own():
    """Each process measures its variant alone; the rows come back in the order asked for, with ratios to the bound's."""
    variants = ("SDPA", "streaming")
    rows = isolated.measure("congruence_loss/cacr, forward+backward/uniter", variants, rounds=2, overrides=TINY)
    assert [row["variant"] for row in rows] == list(variants) and [row["is_bound"] for row in rows] == [True, False]
    for row in rows:
        assert row["rounds"] == 2 and row["ratio_to_bound"] == row["p50_us"] / rows[0]["p50_us"]
        assert row["error"] is None if row["is_bound"] else row["error"] <= 1e-4
        assert row["sizes"]["L"] == TINY["L"] and row["peak_bytes"] is not None


def test_a_worker_ends_with_a_killed_process(tmp_path):
    forked, (reader, writer) = multiprocessing.get_context("fork"), os.pipe()
    at_its_end = tmp_path / "at its end"

    def work():
        isolated._begin()
        time.sleep(600)
        at_its_end.touch()

    def wait():
        worker = forked.Process(target=work)
        worker.start()
        os.write(writer, str(worker.pid).encode())
        time.sleep(600)

    process = forked.Process(target=wait)
    process.start()
    worker = os.pidfd_open(int(os.read(reader, 20)))
    process.kill()
    assert select.select([worker], [], [])[0] and not at_its_end.exists()
    process.join()
    for opened in (reader, writer, worker):
        os.close(opened)


def test_a_slow_variant_in_its_own_process_misses_no_round(monkeypatch):
    monkeypatch.setitem(_measure.SECONDS_A_VARIANT, "cpu", 0.0)
    monkeypatch.setattr(isolated, "_measurements", [])
    isolated._start("attention_map/attention/clip", "streaming", 3, TINY, {})
    for number in range(3):
        isolated._round(number)
    assert isolated._records()[0]["rounds"] == 3
