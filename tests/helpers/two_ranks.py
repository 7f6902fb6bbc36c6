"""Two processes of one group: `python -m tests.helpers.two_ranks MODULE FUNCTION FOLDER` forks them: a fork starts in no time.

Each calls FUNCTION() and saves the tensors or words that it returns, by name, as FOLDER/<rank>.pt.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def results_of(module: str, function: str, folder: Path) -> list[dict[str, Any]]:
    """What the function returns in each of the two processes."""
    command = [sys.executable, "-m", "tests.helpers.two_ranks", module, function, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def main(module: str, function: str, folder: str) -> int:
    call = getattr(importlib.import_module(module), function)
    ranks = []
    for rank in range(2):
        if (process := os.fork()) == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
                torch.save(call(), f"{folder}/{rank}.pt")
                dist.destroy_process_group()
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        ranks.append(process)
    worst = 0
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status and not worst:
            worst = 1
            for one in ranks:
                os.kill(one, 9)
    return worst


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # at once: nothing is left to do
