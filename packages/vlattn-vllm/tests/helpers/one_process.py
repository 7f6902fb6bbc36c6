"""Scenario: one process, batches of requests that ask and that do not, chunked prompts, a cached prefix, preemption, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.tiny import Maps, close, engine, everything, prompts, sampling, saved


def main() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original: Callable[..., Any] = Scheduler._preempt_request
    Scheduler._preempt_request = lambda *args, **kwargs: preempted.append(1) or original(*args, **kwargs)
    folder = saved()
    maps = Maps(folder)
    # 64 tokens a step: longer prompts come in chunks; 16 blocks of 32 tokens: not all requests fit
    llm = engine(folder, max_num_batched_tokens=64, block_size=32, num_gpu_blocks_override=17)
    batch(llm, maps)
    assert not preempted
    cached_prefix(llm, maps)
    samples(llm, maps)
    several(llm)
    grounding(llm, maps)
    refused(llm)
    some = prompts(60, 70, 80, 90, 100, 110, seed=7)
    for prompt, output in zip(some, llm.generate(some, sampling(50, everything()), use_tqdm=False), strict=True):
        first = output.outputs[0].attention.queries[0]
        assert first == 0, first
        maps.check(output.outputs[0], prompt["prompt_token_ids"])
    assert preempted
    print("preempted", len(preempted))


def batch(llm: Any, maps: Maps) -> None:
    """Requests of several lengths, some of which ask for all layers, one or nothing."""
    some = prompts(5, 90, 33, 130, 7)
    asks = [everything(), everything(layers=[1]), None, everything(), {"statistics": ["entropy"], "layers": [1, 0]}]
    outputs = llm.generate(some, [sampling(6, ask) for ask in asks], use_tqdm=False)
    plain = llm.generate(prompts(5, 90, 33, 130, 7), sampling(6), use_tqdm=False)
    assert [x.outputs[0].token_ids for x in outputs] == [x.outputs[0].token_ids for x in plain]
    assert all(x.outputs[0].attention is None for x in plain) and outputs[2].outputs[0].attention is None
    for number in (0, 1, 3):
        layers = (1,) if number == 1 else (0, 1)
        maps.check(outputs[number].outputs[0], some[number]["prompt_token_ids"], layers=layers)
    attention, tokens = outputs[4].outputs[0].attention, list(outputs[4].outputs[0].token_ids)
    rows = maps(some[4]["prompt_token_ids"], tokens)[[1, 0]][:, :, 6:].permute(2, 0, 1, 3)
    close(attention.entropy, -rows.xlogy(rows).sum(-1))
    assert attention.mass is attention.maximum is attention.received is attention.queries is None


def cached_prefix(llm: Any, maps: Maps) -> None:
    """A prompt whose beginning another one left in the cache: the queries behind it alone run."""
    (long,) = prompts(100, seed=3)
    llm.generate([long], sampling(2), use_tqdm=False)
    again = {"prompt_token_ids": long["prompt_token_ids"][:80] + [9, 8, 7]}
    (output,) = llm.generate([again], sampling(4, everything()), use_tqdm=False)
    assert output.num_cached_tokens == 64, output.num_cached_tokens
    maps.check(output.outputs[0], again["prompt_token_ids"], first=64)


def samples(llm: Any, maps: Maps) -> None:
    """Several completions of one prompt: each has its own rows."""
    (prompt,) = prompts(20, seed=4)
    (output,) = llm.generate([prompt], sampling(5, everything(), n=3, temperature=1.5, seed=1), use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    for one in output.outputs:
        maps.check(one, prompt["prompt_token_ids"], first=one.attention.queries[0])


def several(llm: Any) -> None:
    """Named groups: a text has no image, and the masses of question and answer are all there is."""
    (output,) = llm.generate(prompts(12, seed=5), sampling(3, {"groups": "image|question|answer"}), use_tqdm=False)
    mass = output.outputs[0].attention.mass
    assert output.outputs[0].attention.groups == ("image", "question", "answer")
    close(mass.sum(-1), mass.new_ones(mass.shape[:-1]))
    assert (mass[..., 0] == 0).all() and (mass[0, ..., 2] == 0).all() and (mass[1:, ..., 2] > 0).all()


def grounding(llm: Any, maps: Maps) -> None:
    """The numbers of each token as it comes are those of the core, for an answer without the last token, which is no query."""
    (prompt,) = prompts(14, seed=6)
    ask = {"statistics": ["mass", "diagonal", "received_answer"], "groups": "question|answer"}
    (output,) = llm.generate([prompt], sampling(7, ask), use_tqdm=False)
    got, tokens = output.outputs[0].attention, list(output.outputs[0].token_ids)[:-1]
    ids = {"input_ids": torch.tensor([prompt["prompt_token_ids"]])}
    table = va.token_grounding(maps.model, ids, answer=[tokens], maps=False)
    wanted = {name: values[0].float() for name, values in table.by_head.items()}  # (tokens, layers, heads)
    for number, name in enumerate(("share_question", "share_answer")):
        close(got.mass[:-1, ..., number], wanted[name])
    close(got.diagonal[1:], wanted["diagonal"])
    later = torch.arange(len(tokens), 0, -1)
    close(got.received_answer.permute(2, 0, 1) / later[:, None, None] - got.diagonal[1:], wanted["received_less_diagonal"])


def refused(llm: Any) -> None:
    """Wrong asks are refused by name before anything runs, and the engine goes on."""
    wrong = {
        "at most 1": {"layers": [2]},
        "statistics must": {"statistics": ["median"]},
        "must not share": {"groups": {"a": [[0, 4]], "b": [[3, 5]]}},
        "groups must": {"groups": "image|dog"},
        "groups must name each once": {"groups": "image|image"},
        "within the 7 tokens": {"groups": {"a": [[9000, 9005]]}},
        "some of layers, statistics, groups, top, compact, steer": {"heads": [1]},
        "'mass' if groups": {"statistics": ["entropy"], "groups": {"a": [[0, 1]]}},
    }
    for words, ask in wrong.items():
        with pytest.raises((ValueError, TypeError), match=words):
            llm.generate(prompts(5), sampling(2, ask), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    (output,) = llm.generate(prompts(5), sampling(2, {}), use_tqdm=False)
    assert output.outputs[0].attention.mass.shape == (2, 2, 4, 3)


if __name__ == "__main__":
    main()
