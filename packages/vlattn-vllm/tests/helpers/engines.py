"""Scenario: `windows`: Gemma 2, whose layers have a scale of their own, a softcap, and by turns a window; two groups of caches.
`ranks`: two ranks of tensor parallelism, whose heads are gathered."""

from __future__ import annotations

import sys
from typing import Any

from tests.helpers.tiny import GEMMA, Maps, engine, everything, prompts, sampling, saved

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"windows": (GEMMA, {}), "ranks": ({}, {"tensor_parallel_size": 2})}


def main(kind: str) -> None:
    model, options = KINDS[kind]
    folder, some = saved(**model), prompts(5, 90, 33)
    asks = [everything(layers=[1]), everything(), None]
    llm = engine(folder, max_num_batched_tokens=64, **options)
    outputs = [output.outputs[0] for output in llm.generate(some, [sampling(20, ask) for ask in asks], use_tqdm=False)]
    maps = Maps(folder)
    for number, layers in enumerate(((1,), (0, 1))):
        maps.check(outputs[number], some[number]["prompt_token_ids"], layers=layers)
    assert outputs[2].attention is None


if __name__ == "__main__":
    main(sys.argv[1])
