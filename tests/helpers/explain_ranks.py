"""Forks the ranks of `explain_dataset` runs, since a fork starts in no time: `explain_ranks.py MODEL DATASET OUT`.

Each line of the standard input is a run, "WORLD DIE"; behind what it prints comes "status" with its exit status. DIE is "no", or
where the last rank ends by SIGKILL: "lines" between its second shard and that shard's lines, "shard" while the shard is
unfinished, "first" while its first shard is. When a rank dies the others are killed, as torchrun does.
"""

import os
import signal
import socket
import sys

from vlattn_fast.interpret.dataset import store
from vlattn_fast.interpret.dataset.explain_all import explain_dataset
from vlattn_fast.interpret.explaining.loading import load_model


def die_in(place: str) -> None:
    publish, calls = store._publish, []

    def dies(unfinished, path):
        calls.append(path)
        if path.suffix == (".jsonl" if place == "lines" else ".safetensors") and (place == "first" or len(calls) > 2):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(unfinished, path)

    store._publish = dies


def main(world: str, die: str, model: str, dataset: str, out: str) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(int(world)):
        if (process := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if die != "no" and rank == int(world) - 1:
                die_in(die)
            outcome = explain_dataset(model, dataset, out, batch_size=2, shard_size=3, workers=1)
            if outcome.first:
                print(outcome.done, outcome.failed, outcome.skipped, flush=True)
            os._exit(0)
        ranks.append(process)
    worst = 0
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status and not worst:
            worst = status
            for one in ranks:
                os.kill(one, signal.SIGKILL)
    return int(worst != 0)


if __name__ == "__main__":
    load_model(sys.argv[1])  # the forks have what this imports
    for run in sys.stdin:
        print("status", main(*run.split(), *sys.argv[1:]), flush=True)
    os._exit(0)  # at once: nothing is left to do
