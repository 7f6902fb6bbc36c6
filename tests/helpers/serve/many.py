"""Scenario: cancelled requests, and a thousand requests in a row: nothing is left of them."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from tests.helpers.serve.tiny import engine, everything, prompts, sampling, saved

REQUESTS = int(os.environ.get("VLATTN_SERVE_REQUESTS", "1000"))
GROWTH = 8 << 20  # bytes of memory that the allocator may take for itself


def main() -> None:
    llm = engine(saved(), max_num_batched_tokens=64, enable_prefix_caching=False)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    cancelled(llm)
    some = prompts(20, 40)
    sizes = []
    for number in range(REQUESTS // 10):
        llm.generate(some * 5, sampling(4, everything()), use_tqdm=False)
        if number * 10 in (REQUESTS // 4 // 10 * 10, (REQUESTS - 10) // 10 * 10):
            gc.collect()
            sizes.append(resident())
    assert sizes[1] - sizes[0] < GROWTH, sizes
    llm.generate(some, sampling(2), use_tqdm=False)  # tells the worker that the last ones ended
    assert not runner._vlattn_asking and not core.scheduler.requests and not llm.llm_engine.output_processor.request_states
    print("grew by", sizes[1] - sizes[0], "bytes in", REQUESTS, "requests")


def cancelled(llm: Any) -> None:
    inner = llm.llm_engine
    runner = inner.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for number, prompt in enumerate(prompts(30, 90, 40)):  # the second one is cancelled in the middle of its prompt
        inner.add_request(str(number), prompt, sampling(20, everything()))
    inner.step()
    assert len(runner._vlattn_asking) > 1
    inner.abort_request(["0", "1"])
    ended = [output for _ in range(40) if inner.has_unfinished_requests() for output in inner.step() if output.finished]
    assert [output.request_id for output in ended] == ["2"] and ended[0].outputs[0].attention.mass.shape[0] == 20
    inner.add_request("3", prompts(5)[0], sampling(1))
    inner.step()
    assert not runner._vlattn_asking


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
