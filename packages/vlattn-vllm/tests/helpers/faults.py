"""Scenario: whatever fails in the plug-in refuses those who ask, with the reason. All requests get their tokens, and the engine
goes on. Each wrapped method of it fails in turn, before and after vLLM's own, always or once; then each part of a step."""

from __future__ import annotations

from tests.helpers.tiny import Maps, engine, everything, prompts, sampling, saved

# isort: split
from typing import Any
from unittest import mock

from vlattn_vllm import wrapping

FAILS: dict[str, Any] = {"name": "", "after": False, "calls": 0, "once": False}
# An error there is an answer to one request alone, or there is no engine yet; or all that can fail is guarded (`parts` below).
ALLOWED = {"__init__", "process_inputs", "add_request", "add_cli_args", "build_middleware_stack"}
GUARDED = {"forward", "_new_completion_output"}
CUT = [{"keys": [0, 4], "weight": 0}]
harmless = wrapping.harmless


class Planted(Exception):
    pass


def failing(around: Any, refuse: Any = None) -> Any:
    name = around.__name__
    MADE.append(name)

    def switched(original: Any, *args: Any, **kwargs: Any) -> Any:
        fails = FAILS["name"] == name and (not FAILS["once"] or FAILS["calls"] == 2)
        FAILS["calls"] += FAILS["name"] == name
        if fails and not FAILS["after"]:
            raise Planted(name)
        result = around(original, *args, **kwargs)
        if fails:
            raise Planted(name)
        return result

    return harmless(switched, refuse)


MADE: list[str] = []
wrapping.harmless = failing
from vlattn_vllm import engine as core  # noqa: E402
from vlattn_vllm import front, worker  # noqa: E402


def main() -> None:
    folder = saved()
    llm, maps = engine(folder, max_num_batched_tokens=64, enable_prefix_caching=False), Maps(folder)
    wrapped = {name for _, name in wrapping.WRAPPED}
    assert {f"_{name.removeprefix('_')}" for name in wrapped - ALLOWED - GUARDED} == {
        name.removesuffix("_v2") for name in MADE
    }, (wrapped, MADE)
    some = prompts(90, 33, 20)
    tokens = [list(output.outputs[0].token_ids) for output in llm.generate(some, sampling(6), use_tqdm=False)]
    edited = answers(llm, some)[1].token_ids
    for name in MADE:
        for after in (False, True):
            for once in (False, True):
                FAILS.update(name=name, after=after, once=once, calls=0)
                check(answers(llm, some), tokens, maps, some, f"{FAILS}")
    FAILS["name"] = ""
    parts = [(worker.Step, part) for part in ("_see", "_steer", "_read", "_stacks", "_attention")]
    parts += [(worker, part) for part in ("_gathered", "groups_of_tokens", "Edits")] + [(worker.Ask, "read")]
    parts += [(core, part) for part in ("_add", "_of_output", "to_bytes")] + [(front, part) for part in ("from_bytes", "joined")]
    for owner, name in parts:
        with mock.patch.object(owner, name, side_effect=Planted(name)):
            got = answers(llm, some)
        check(got, tokens, maps, some, name)
        assert got[0].attention.refused or name in ("_steer", "Edits"), (name, got[0].attention)
        assert "Planted" in got[1].attention.refused or name in ("_read", "_add", "to_bytes"), (name, got[1].attention)
    asked, steered, _ = answers(llm, some)
    maps.check(asked, some[0]["prompt_token_ids"])
    assert steered.token_ids == edited and not steered.attention.refused
    long(llm)


def answers(llm: Any, some: Any) -> Any:
    """Of a request that asks, of one that edits, and of one that does neither."""
    asks = everything(), {"layers": [1], "steer": CUT}, None
    return [one.outputs[0] for one in llm.generate(some, [sampling(6, ask) for ask in asks], use_tqdm=False)]


def check(got: Any, tokens: Any, maps: Maps, some: Any, what: str) -> None:
    asked, steered, plain = got
    assert [list(asked.token_ids), list(plain.token_ids)] == [tokens[0], tokens[2]] and plain.attention is None, what
    assert len(steered.token_ids) == 6 and steered.attention is not None, what
    if not asked.attention.refused:
        maps.check(asked, some[0]["prompt_token_ids"])
    if not steered.attention.refused:
        assert steered.attention.mass.shape == (6, 1, 4, 3) and steered.attention.mass.sum(-1).sub(1).abs().max() < 1e-5, what
    reasons = [one.attention.refused for one in (asked, steered) if one.attention.refused]
    assert all("Planted" in reason or "a token came without its numbers" in reason for reason in reasons), (what, reasons)


def long(llm: Any) -> None:
    """An answer that has no end but the model's."""
    (output,) = llm.generate(prompts(5)[:1], sampling(10**9, {"layers": [0]}), use_tqdm=False)
    assert output.outputs[0].attention.mass.shape == (251, 1, 4, 3)


if __name__ == "__main__":
    main()
