"""Two `explain_dataset` runs into one new directory that begin at once: `explain_twice.py MODEL DATASET OUT`.

Each waits in front of writing the settings until the other one is there, too, or was refused.
"""

import contextlib
import multiprocessing
import os
import sys
import threading

from vlattn_fast.interpret.dataset import explain_all as run
from vlattn_fast.interpret.explaining.loading import load_model


def main(model: str, dataset: str, out: str) -> int:
    barrier = multiprocessing.get_context("fork").Barrier(2)
    write_text = run.write_text

    def wait_and_write(path, text):
        if path.name == run.SETTINGS:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait()
        write_text(path, text)

    run.write_text = wait_and_write
    load_model(model)  # the forks have what this imports
    for _ in range(2):
        if os.fork() == 0:
            try:
                outcome = run.explain_dataset(model, dataset, out, workers=1)
                print("explained", outcome.done, flush=True)
            except ValueError as error:
                print(error, flush=True)
            finally:
                barrier.abort()  # nobody waits for a process that has ended, however it did
            os._exit(0)
    return max(os.wait()[1] for _ in range(2))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
