"""Scenario: `collect` writes answers into a folder, takes up a run that was killed, and refuses another one's folder; a thousand
prompts in one call."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.tiny import Maps, engine, everything, prompts, sampling, saved
from vlattn_vllm import collect, load


def main() -> None:
    folder, out = saved(), Path(tempfile.mkdtemp()) / "answers"
    llm, maps = engine(folder, max_num_batched_tokens=64, enable_prefix_caching=False), Maps(folder)
    some = [*prompts(5, 40, 33, 12, 7), {"prompt_token_ids": [5] * 300}]  # the last one is longer than the model's context
    calls: list[int] = []
    generate = llm.generate

    def counted(asked: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(asked))
        if sum(calls) > 4:
            raise KeyboardInterrupt
        return generate(asked, *args, **kwargs)

    llm.generate = counted
    with pytest.raises(KeyboardInterrupt):
        collect(llm, some, out, everything(), params=sampling(4), shard_size=2)
    assert load(out).ids == ["0", "1", "2", "3"]
    llm.generate = generate
    answers = collect(llm, some, out, everything(), params=sampling(4), shard_size=2)
    assert answers.ids == ["0", "1", "2", "3", "4"] and [one["item"] for one in answers.failures] == [5]
    assert "256" in answers.failures[0]["error"], answers.failures
    for prompt, answer in zip(some, answers, strict=False):
        maps.check(SimpleNamespace(token_ids=answer.tokens, attention=answer.attention), prompt["prompt_token_ids"])
    assert len(answers[1:3]) == 2 and answers[1:3][0].id == "1"
    for changed in ({"attention": everything(layers=[1])}, {"prompts": some[:5]}):
        with pytest.raises(ValueError, match="earlier runs"):
            collect(llm, changed.get("prompts", some), out, changed.get("attention", everything()), params=sampling(4))
    several(llm, maps, out.with_name("several"))
    a_thousand(llm, maps, out.with_name("thousand"))


def several(llm: Any, maps: Maps, out: Path) -> None:
    """Three samples of a prompt are three answers; a run that was killed goes on with the next prompt."""
    some = prompts(20, 9)
    params = sampling(4, n=3, temperature=1.5)  # with a seed, a prompt in chunks ends the CPU engine
    assert len(collect(llm, [*some[:1], {"prompt_token_ids": [5] * 300}], out, everything(), params=params)) == 3
    answers = collect(llm, some, out.with_name("more"), everything(), params=params, ids=["a", "b"])
    assert answers.ids == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"] and load(out).failures[0]["item"] == 3
    assert len({tuple(answer.tokens) for answer in answers[:3]}) > 1
    for number, answer in enumerate(answers):
        prompt = some[number // 3]["prompt_token_ids"]
        maps.check(SimpleNamespace(token_ids=answer.tokens, attention=answer.attention), prompt, answer.attention.queries[0])
    again = collect(llm, some, out.with_name("more"), everything(), params=params, ids=["a", "b"])
    assert again.ids == answers.ids


def a_thousand(llm: Any, maps: Maps, out: Path) -> None:
    some = prompts(*[5 + number % 20 for number in range(1000)])
    answers = collect(llm, some, out, everything(), params=sampling(2))
    assert len(answers) == 1000 and not answers.failures and answers.ids == [str(number) for number in range(1000)]
    for number in (0, 499, 999):
        maps.check(
            SimpleNamespace(token_ids=answers[number].tokens, attention=answers[number].attention),
            some[number]["prompt_token_ids"],
        )
    assert len(load(out)) == 1000


if __name__ == "__main__":
    main()
