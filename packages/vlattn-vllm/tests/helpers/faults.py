"""Scenario: whatever fails in the plug-in refuses those who ask, with the reason. All requests get their tokens, those that do
not ask with the same bits, and the engine goes on. Each wrapped method of it fails in turn, before and after vLLM's own, always
or once; then each part of a step; then layers have metadata of every kind that vLLM has.

The server's scenario plants the same faults in each of its processes, which read in the file VLATTN_FAULT what fails."""

from __future__ import annotations

from tests.helpers.tiny import Maps, engine, everything, prompts, sampling, saved

# isort: split
import dataclasses
import importlib
import json
import os
import pkgutil
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vlattn_vllm import wrapping

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles what counts the ranks of log-probabilities
FAILS: dict[str, Any] = {"name": "", "after": False, "calls": 0, "once": False}
# An error there is an answer to one request alone, or there is no engine yet; or all that can fail is guarded (`parts` below).
ALLOWED = {"__init__", "process_inputs", "add_request", "add_cli_args", "build_middleware_stack"}
GUARDED = {"forward", "forward_impl", "_new_completion_output"}
ALONE = ("_created", "_completion", "_completion_chunks", "_chat", "_chat_chunks", "_process_inputs", "_add_request")
CUT = [{"keys": [0, 4], "weight": 0}]
CORE = ("block_table", "seq_lens", "query_start_loc", "causal")  # fields of metadata that the plug-in reads
harmless, wrap = wrapping.harmless, wrapping.wrap


class Planted(Exception):
    pass


def failing(around: Any, refuse: Any = None) -> Any:
    MADE.append(around.__name__)
    return harmless(switch(around), refuse)


def wrapped(owner: Any, name: str, around: Any) -> None:
    """What serves one request alone fails for those that ask."""
    wrap(owner, name, switch(around, asking) if getattr(around, "__name__", "") in ALONE else around)


def asking(value: Any) -> bool:
    """Whether an argument is a request that asks, or its parameters."""
    of_server = hasattr(value, "vllm_xargs") and server._asks(value)
    return of_server or front.asks(value) or front.asks(getattr(value, "sampling_params", None))


def switch(around: Any, concerns: Callable[[Any], bool] | None = None) -> Any:
    name = around.__name__

    def switched(original: Any, *args: Any, **kwargs: Any) -> Any:
        if "VLATTN_FAULT" in os.environ:
            FAILS.update(json.loads(Path(os.environ["VLATTN_FAULT"]).read_text()))
        fails = FAILS["name"] == name and (not FAILS["once"] or FAILS["calls"] == 2)
        fails = fails and (concerns is None or any(map(concerns, (*args, *kwargs.values()))))
        FAILS["calls"] += FAILS["name"] == name
        if fails and not FAILS["after"]:
            raise Planted(name)
        result = around(original, *args, **kwargs)
        if fails:
            raise Planted(name)
        return result

    return switched


MADE: list[str] = []
wrapping.harmless, wrapping.wrap = failing, wrapped
from vlattn_vllm import engine as core  # noqa: E402
from vlattn_vllm import front, server, worker  # noqa: E402


def main() -> None:
    folder = saved()
    llm, maps = engine(folder, max_num_batched_tokens=64, enable_prefix_caching=False), Maps(folder)
    wrapped = {name for _, name in wrapping.WRAPPED}
    assert {f"_{name.removeprefix('_')}" for name in wrapped - ALLOWED - GUARDED} == {
        name.removesuffix("_v2") for name in MADE
    }, (wrapped, MADE)
    some = prompts(90, 33, 20)
    tokens = [output.outputs[0] for output in llm.generate(some, sampling(6, logprobs=3), use_tqdm=False)]
    edited = answers(llm, some)[1].token_ids
    for name in MADE:
        for after in (False, True):
            for once in (False, True):
                FAILS.update(name=name, after=after, once=once, calls=0)
                check(answers(llm, some), tokens, maps, some, f"{FAILS}")
    FAILS["name"] = ""
    parts = [(worker.Step, part) for part in ("_see", "_steer", "_read", "_stacks", "_attention")]
    parts += [(worker, part) for part in ("_gathered", "groups_of_tokens", "Edits")] + [(worker.Ask, "read")]
    parts += [
        (core, "_add"),
        (core, "_of_output"),
        (core.Attention, "to_bytes"),
        (core.Attention, "from_dict"),
        (front, "joined"),
    ]
    for owner, name in parts:
        with mock.patch.object(owner, name, side_effect=Planted(name)):
            got = answers(llm, some)
        check(got, tokens, maps, some, name)
        assert got[0].attention.refused or name in ("_steer", "Edits"), (name, got[0].attention)
        assert "Planted" in got[1].attention.refused or name in ("_read", "_add", "to_bytes"), (name, got[1].attention)
    of_every_kind(llm, some, tokens, maps)
    asked, steered, _ = answers(llm, some)
    maps.check(asked, some[0]["prompt_token_ids"])
    assert steered.token_ids == edited and not steered.attention.refused
    long(llm)


def answers(llm: Any, some: Any) -> Any:
    """Of a request that asks, of one that edits, and of one that does neither."""
    asks = everything(), {"layers": [1], "steer": CUT}, None
    return [one.outputs[0] for one in llm.generate(some, [sampling(6, ask, logprobs=3) for ask in asks], use_tqdm=False)]


def check(got: Any, tokens: Any, maps: Maps, some: Any, what: str) -> None:
    asked, steered, plain = got
    assert asked.token_ids == tokens[0].token_ids and plain.attention is None, what
    assert (plain.token_ids, plain.logprobs) == (tokens[2].token_ids, tokens[2].logprobs), what  # to the bit
    assert len(steered.token_ids) == 6 and steered.attention is not None, what
    if not asked.attention.refused:
        maps.check(asked, some[0]["prompt_token_ids"])
    if not steered.attention.refused:
        assert steered.attention.mass.shape == (6, 1, 4, 3) and steered.attention.mass.sum(-1).sub(1).abs().max() < 1e-5, what
    reasons = [one.attention.refused for one in (asked, steered) if one.attention.refused]
    assert what.startswith("kind ") or all(
        "Planted" in reason or "a token came without its numbers" in reason for reason in reasons
    ), (what, reasons)


def of_every_kind(llm: Any, some: Any, tokens: Any, maps: Maps) -> None:
    """A layer of another kind refuses, or has what the numbers need: then they are right."""
    see, answered = worker.Step.see, 0
    for number, kind in enumerate(kinds := kinds_of_metadata()):
        for rich in (True, False):  # with all that the plug-in reads, or not
            draw = random.Random(2 * number + rich)

            def seen(step: Any, impl: Any, layer: Any, query: Any, cache: Any, metadata: Any, out: Any) -> None:
                see(step, impl, layer, query, cache, drawn(kind, metadata, draw, rich), out)  # noqa: B023

            with mock.patch.object(worker.Step, "see", seen):
                got = answers(llm, some)
            check(got, tokens, maps, some, f"kind {kind.__module__}.{kind.__name__}")
            answered += not got[0].attention.refused
    print(len(kinds), "kinds of metadata, answered", answered)
    assert len(kinds) > 10 and 0 < answered < 2 * len(kinds)


def kinds_of_metadata() -> list[Any]:
    """Of every backend that can be imported here."""
    from vllm.v1.attention import backends

    kinds: dict[str, Any] = {}
    for module in pkgutil.walk_packages(backends.__path__, f"{backends.__name__}."):
        try:
            found = vars(importlib.import_module(module.name))
        except Exception as error:
            print("not here:", module.name, type(error).__name__)
            continue
        kinds |= {f"{one.__module__}.{name}": one for name, one in found.items() if is_metadata(one)}
    return [kinds[name] for name in sorted(kinds)]


def is_metadata(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Metadata")


def drawn(kind: Any, real: Any, draw: random.Random, rich: bool) -> Any:
    """An instance of a kind. The fields that the plug-in reads are the real ones or, if not `rich`, anything or absent."""
    made = object.__new__(kind)
    names = {field.name for field in dataclasses.fields(kind)} | ({*CORE} if rich else set())
    for name in sorted(names):
        anything = draw.choice([None, True, False, 0, 3, torch.arange(3), torch.rand(2, 2), "x", [1]])
        unread = name not in (*CORE, *worker._NOT_CAUSAL)
        if unread or (not rich and draw.random() < 0.5):
            object.__setattr__(made, name, anything if unread or name != "block_table" else None)
        elif hasattr(real, name):
            object.__setattr__(made, name, getattr(real, name))
    return made


def long(llm: Any) -> None:
    """An answer that has no end but the model's."""
    (output,) = llm.generate(prompts(5)[:1], sampling(10**9, {"layers": [0]}), use_tqdm=False)
    assert output.outputs[0].attention.mass.shape == (251, 1, 4, 3)


if __name__ == "__main__":
    main()
