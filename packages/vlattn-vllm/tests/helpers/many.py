"""Scenario: cancelled requests, and a thousand requests in a row: nothing is lost, and nothing is left of them.

VLATTN_SERVE_REQUESTS=10000 makes more.
"""

from __future__ import annotations

import gc
import os
from typing import Any

from tests.helpers.tiny import close, engine, everything, prompts, sampling, saved

REQUESTS = int(os.environ.get("VLATTN_SERVE_REQUESTS", "1000"))
AT_ONCE = 50
# Bytes that an allocator may take for itself: 5,000 requests that do not ask take 3.6 MB. The groups of one that asks have 2 KB.
GROWTH = 12 << 20
ONE_LAYER = {"layers": [1], "statistics": ["mass", "received"]}
LONG = 200  # tokens of a request that is cancelled before it has them
# number of tokens and ask; every fifth request is of one kind
KINDS = (2, everything()), (1, ONE_LAYER), (2, None), (LONG, everything()), (LONG, None)


def main() -> None:
    folder = saved()
    cancelled(engine(folder, max_num_batched_tokens=64, enable_prefix_caching=False))
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    # few blocks of the cache: each is used before the memory is looked at
    in_a_row(engine(folder, max_num_batched_tokens=64, enable_prefix_caching=False, num_gpu_blocks_override=40))


def cancelled(llm: Any) -> None:
    """In the middle of a prompt, and of an answer."""
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
    assert not runner._vlattn_asking and not inner.engine_core.engine_core.scheduler.requests


def in_a_row(llm: Any) -> None:
    """The engine's core and its worker are processes of their own."""
    inner, some, first = llm.llm_engine, prompts(20, 40, 70), {}
    sizes, answers = [], 0
    for start in range(0, REQUESTS, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, REQUESTS))
        for number in numbers:
            tokens, ask = KINDS[number % len(KINDS)]
            inner.add_request(str(number), some[number % len(some)], sampling(tokens, ask))
        inner.abort_request([str(number) for number in numbers if KINDS[number % len(KINDS)] == (LONG, None)])  # before it runs
        while inner.has_unfinished_requests():
            for output in inner.step():
                number, completion = int(output.request_id), output.outputs[0]
                tokens, ask = KINDS[number % len(KINDS)]
                assert ask is not None or (tokens != LONG and completion.attention is None), "it was cancelled, or did not ask"
                if tokens == LONG:
                    inner.abort_request([output.request_id])
                elif output.finished:
                    answers += 1
                    same = first.setdefault((number % len(some), number % len(KINDS)), completion)
                    check(completion, same, tokens, ask)
        if start in (REQUESTS // 4 // AT_ONCE * AT_ONCE, (REQUESTS - 1) // AT_ONCE * AT_ONCE):
            gc.collect()
            sizes.append(resident())
    assert answers == sum(KINDS[number % len(KINDS)][0] != LONG for number in range(REQUESTS)), answers
    llm.generate(some, sampling(2), use_tqdm=False)  # tells the worker that the last ones ended
    assert llm.collective_rpc(asking) == [0] and not inner.output_processor.request_states
    grown = [after - before for before, after in zip(*sizes, strict=True)]
    print(f"client, core and worker grew by {grown} bytes in the last three quarters of {REQUESTS} requests; {answers} answers")
    assert max(grown) < GROWTH, sizes


def check(completion: Any, same: Any, tokens: int, ask: Any) -> None:
    """As the first completion of this prompt and kind was."""
    assert len(completion.token_ids) == tokens and completion.token_ids == same.token_ids
    if ask is not None:
        assert completion.attention.mass.shape[0] == tokens
        close(completion.attention.mass, same.attention.mass)
        close(completion.attention.received, same.attention.received)


def asking(worker: Any) -> int:
    """In the worker's process: how many requests it knows."""
    return len(worker.model_runner._vlattn_asking)


def resident() -> list[int]:
    """Bytes of this process, the engine's core and its worker."""
    import psutil

    here = psutil.Process()
    return [each.memory_info().rss for each in (here, *here.children(recursive=True))]


if __name__ == "__main__":
    main()
