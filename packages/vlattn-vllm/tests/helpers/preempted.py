"""Scenario: two requests with one prompt, in chunks. The younger one is preempted in its middle, while the older one caches more
of it. The younger one goes on with its own next query, and no query is missing in `received`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.tiny import Maps, engine, everything, prompts, sampling, saved

LENGTH, BLOCK = 200, 32


def main() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    progress = []  # of the preempted requests
    original: Callable[..., Any] = Scheduler._preempt_request

    def preempt(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        progress.append(request.num_computed_tokens)
        return original(scheduler, request, *args, **kwargs)

    Scheduler._preempt_request = preempt
    folder = saved()
    # each request gets 32 tokens a step; the 8 blocks (one more is the engine's) hold one prompt and a bit
    llm = engine(
        folder, max_num_batched_tokens=2 * BLOCK, long_prefill_token_threshold=BLOCK, block_size=BLOCK, num_gpu_blocks_override=9
    )
    (prompt,) = prompts(LENGTH)
    maps = Maps(folder)
    outputs = llm.generate([prompt] * 2, sampling(4, everything()), use_tqdm=False)
    assert progress and BLOCK < progress[0] < LENGTH - BLOCK, progress
    for number, output in enumerate(outputs):  # the second one finds the first block in the cache
        maps.check(output.outputs[0], prompt["prompt_token_ids"], first=number * BLOCK)
    print("preempted at", progress)


if __name__ == "__main__":
    main()
