"""The host's time of calls whose kernels were compiled ahead, above that of torch's attention.

    python -m tests.helpers.host_time [CALL ...] [--rounds 1500]

CALL: an operator. The kernels of a short call are compiled into an archive, and launched over a stand-in for CUDA's driver that
does nothing: no GPU is needed. A time is the least of all rounds, which take the calls in turns, so that other work on the
machine hardly counts. Torch's operators around the kernels compute a few hundred numbers.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.helpers import launching
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_native.compiling import launches_in, write

ARCHITECTURE, REPEATS = 90, 10
SIZES = Sizes(16, 16, 16, 16, 16, 16, 16, batch=1, heads=1, rows=1, images=2, captions=2)
SDPA = "SDPA"


def examples(calls: list[str]) -> dict[str, Example]:
    """Of each operator the first call, in bfloat16, and of SDPA."""
    made = {SDPA: replace(next(cases_of("score_attention").host(SIZES)), call=F.scaled_dot_product_attention)}
    for name in calls:
        example = next(cases_of(name).host(SIZES))
        made[name] = replace(example, options={**example.options, "backend": "triton"})
    return {name: replace(example, tensors=example.in_dtype(torch.bfloat16)) for name, example in made.items()}


def passes(example: Example) -> dict[str, Callable[[], Any]]:
    options = example.placed_options(example.tensors)
    leaves = {name: x.detach().requires_grad_(example.differentiable) for name, x in example.tensors.items()}

    def outputs(of: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        out = example.call(**example.arrange(of), **options)
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]

    def forward() -> None:
        with torch.no_grad():
            outputs(example.tensors)

    def both() -> None:
        made = [x for x in outputs(leaves) if x.requires_grad]
        torch.autograd.grad(made, list(leaves.values()), [torch.ones_like(x) for x in made])

    return {"forward": forward, "forward+backward": both} if example.differentiable else {"forward": forward}


def times(calls: list[str], rounds: int) -> dict[tuple[str, str], float]:
    """Microseconds of each pass of these calls, and of SDPA."""
    of = examples(calls)
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str) -> None:
            for once in passes(of[name]).values():
                once()

        made = [one for name in calls for one in launches_in(lambda name=name: run(name), ARCHITECTURE, as_ptx=True)]
        write(Path(folder) / f"sm_{ARCHITECTURE}.zip", made, "ptx")
        with launching.planned(Path(folder), ARCHITECTURE):
            timed = {(name, what): once for name in of for what, once in passes(of[name]).items()}
            least = dict.fromkeys(timed, float("inf"))
            gc.disable()  # it is not the call's
            for _ in range(rounds):
                for key, once in timed.items():
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
        print(f"{name}, {what}: {us:.1f} us, {us - least[SDPA, what]:.1f} above {SDPA}")


if __name__ == "__main__":
    main()
