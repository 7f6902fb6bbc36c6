"""The host's time of calls whose kernels were compiled ahead, above that of torch's attention.

    python -m tests.helpers.host_time [CALL ...] [--rounds 1500]

CALL: of `python -m tools.host`. Its kernels are compiled into an archive, and launched over a stand-in for
CUDA's driver that does nothing: no GPU is needed. A time is the least of all rounds, which take the calls in turns, so that other
work on the machine hardly counts. As there, torch's operators compute a few hundred numbers, of projections for example.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch

from tests.helpers import launching
from tools import host
from vlattn_native.compiling import launches_in, write

ARCHITECTURE, REPEATS = 90, 10


def times(calls: list[str], rounds: int) -> dict[tuple[str, str], float]:
    """Microseconds of each pass of these calls, and of SDPA."""
    examples = host.examples(torch.device("cpu"), "triton")
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str) -> None:
            for once in host.passes(examples[name]).values():
                once()

        made = [one for name in calls for one in launches_in(lambda name=name: run(name), ARCHITECTURE, as_ptx=True)]
        write(Path(folder) / f"sm_{ARCHITECTURE}.zip", made, "ptx")
        with launching.planned(Path(folder), ARCHITECTURE):
            passes = {(name, what): once for name in (host.SDPA, *calls) for what, once in host.passes(examples[name]).items()}
            least = dict.fromkeys(passes, float("inf"))
            gc.disable()  # it is not the call's
            for _ in range(rounds):
                for key, once in passes.items():
                    once()
                    start = time.perf_counter()
                    for _ in range(REPEATS):
                        once()
                    least[key] = min(least[key], (time.perf_counter() - start) / REPEATS * 1e6)
            gc.enable()
    return least


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("calls", nargs="*", metavar="CALL", default=["score_attention"])
    parser.add_argument("--rounds", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    least = times(options.calls, options.rounds)
    for (name, what), us in least.items():
        print(f"{name}, {what}: {us:.1f} us, {us - least[host.SDPA, what]:.1f} above {host.SDPA}")


if __name__ == "__main__":
    main()
