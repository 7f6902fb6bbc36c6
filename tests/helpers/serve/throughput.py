"""Tokens per second of vLLM without the plug-in, with it, and where requests ask.

    .venv-serve/bin/python -m tests.helpers.serve.throughput

One engine serves all rounds, in turn, so that they share what else the machine does. The model is a small random Llama of 8
layers and 8 heads. Prompts have 256 tokens, answers 32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.serve.tiny import engine, prompts, sampling, saved

ASKS: dict[str, dict[str, Any] | None] = {
    "without the plug-in": None,
    "nobody asks": None,
    "all ask: mass, one layer": {"layers": [6]},
    "all ask: mass, 8 layers": {},
    "all ask: received, one layer": {"layers": [6], "statistics": ["received"]},
    "all ask: received, 8 layers": {"statistics": ["received"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args()
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    llm = engine(saved("Llama", **sizes), enable_prefix_caching=False, max_model_len=512, max_num_seqs=64)
    print(f"{'requests':>8}  {'':30} {'tokens / s':>10} {'of the first':>12}")
    for requests in options.requests:
        some, tokens = prompts(*[256] * requests), 32 * requests
        seconds: dict[str, list[float]] = {name: [] for name in ASKS}
        for number in range(options.rounds + 1):
            for name, ask in ASKS.items():
                with bare(name == "without the plug-in"):
                    start = time.perf_counter()
                    llm.generate(some, sampling(32, ask), use_tqdm=False)
                    if number:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
        first = statistics.median(seconds["without the plug-in"])
        for name, each in seconds.items():
            median = statistics.median(each)
            print(f"{requests:>8}  {name:30} {tokens / median:>10.0f} {first / median:>12.1%}", flush=True)


@contextmanager
def bare(out: bool) -> Iterator[None]:
    """vLLM's own methods, for a while, in the place of those that the plug-in wraps."""
    from vllm.outputs import RequestOutput
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    classes = (RequestOutput, CPUAttentionBackendImpl, Scheduler, InputProcessor, OutputProcessor, RequestState, GPUModelRunner)
    wrapped = [
        (owner, name, method) for owner in classes for name, method in vars(owner).items() if hasattr(method, "__vlattn__")
    ]
    assert len(wrapped) == 8, wrapped
    for owner, name, method in wrapped if out else ():
        setattr(owner, name, method.__wrapped__)
    try:
        yield
    finally:
        for owner, name, method in wrapped:
            setattr(owner, name, method)


if __name__ == "__main__":
    main()
