"""Two processes of one group. A process that has imported what they need forks them: a fork starts in no time.

A line of its input names a module, a function and a folder. Each rank calls the function and saves the tensors or words that it
returns, by name, as <folder>/<rank>.pt.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import forking

_PROCESS = forking.Forking("tests.helpers.two_ranks")
SAID = "said"  # in the folder: what ranks print


def results_of(module: str, function: str, folder: Path) -> list[dict[str, Any]]:
    """What the function returns in each of the two processes."""
    status = _PROCESS.ask(f"{module} {function} {folder}")
    if status != "0":
        said = folder / SAID
        raise AssertionError(f"{status}\n{said.read_text(errors='replace') if said.exists() else ''}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def main(module: str, function: str, folder: str) -> int:
    """1 where a rank fails; the other one is then killed."""
    call = getattr(importlib.import_module(module), function)
    ranks = []
    for rank in range(2):
        if (process := os.fork()) == 0:
            try:
                said = os.open(f"{folder}/{SAID}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1)
                os.dup2(said, 2)
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
    forking.answer(lambda line: main(*line.split()))
