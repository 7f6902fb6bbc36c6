"""The ways of the numbers through the engine, the front end and the server, on objects with the fields of vLLM's."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vlattn_vllm import client, collect, counts, engine, front, limit, plugin, server
from vlattn_vllm.ask import Ask
from vlattn_vllm.attention import Attention, joined
from vlattn_vllm.server import Waiting
from vlattn_vllm.worker import NUMBERS
from vlattn_vllm.wrapping import harmless, wrap


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
    return [packed and Attention.from_dict(packed) for packed in packed]


def request(stop: Any = (), **extra: Any) -> Any:
    return SimpleNamespace(sampling_params=SimpleNamespace(stop=list(stop), extra_args=extra))


def test_received_adds_up_and_comes_with_the_end() -> None:
    one = request()
    assert stepped({"one": one}, {"one": part(1.0, (4, 6))}, []) == []  # the first part of a prompt
    (first,) = stepped({"one": one}, {"one": part(2.0, (6, 9))}, [core_output("one", [5])])
    assert first is not None and first.received is None and first.mass is not None and first.queries is None
    (last,) = stepped({"one": one}, {"one": part(3.0, (9, 10))}, [core_output("one", [6], "stop")])
    assert last is not None and last.queries == (4, 10) and torch.equal(last.received, torch.full((1, 2, 3), 6.0))


def test_what_an_answer_receives_grows_with_it() -> None:
    one, width = request(), iter((0, 1, 2))
    for tokens, finish in (([5], None), ([6], None), ([7], "stop")):
        some = next(width)
        added = torch.ones(1, 2, some) if some else None
        given = dataclasses.replace(part(1.0, (8 + some, 9 + some)), received_answer=added)
        (got,) = stepped({"one": one}, {"one": given}, [core_output("one", tokens, finish)])
        assert got is not None and (got.received_answer is None) == (finish is None)
    assert got.received_answer.tolist() == [[[2.0, 1.0]] * 2] and got.queries == (8, 11)


def test_a_gap_in_received_is_named() -> None:
    """Queries 6 to 8 did not run, as those of a request that goes on behind blocks of another one. What follows adds nothing."""
    one = request()
    stepped({"one": one}, {"one": part(1.0, (4, 6))}, [])
    (first,) = stepped({"one": one}, {"one": part(2.0, (9, 12))}, [core_output("one", [5])])
    assert first is not None and first.mass is not None and not first.refused
    (last,) = stepped({"one": one}, {"one": part(3.0, (12, 13))}, [core_output("one", [6], "stop")])
    assert last is not None and last.received is last.queries is None and last.mass is not None
    assert "received lacks the queries of positions 6 to 8" in last.refused and "enable_prefix_caching=False" in last.refused


def test_a_gap_of_one_query_is_a_gap() -> None:
    one = request()
    stepped({"one": one}, {"one": part(1.0, (4, 6))}, [])
    (last,) = stepped({"one": one}, {"one": part(2.0, (7, 8))}, [core_output("one", [5], "stop")])
    assert last is not None and last.received is None and "positions 6 to 6" in last.refused


def test_top_keeps_the_largest() -> None:
    given = dataclasses.replace(part(1.0, (0, 3)), received=torch.tensor([[[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]]))
    (got,) = stepped({"one": request(vlattn={"top": 2})}, {"one": given}, [core_output("one", [5], "stop")])
    assert got is not None and got.tokens.tolist() == [[[1, 2], [0, 2]]]
    torch.testing.assert_close(got.received, torch.tensor([[[0.7, 0.2], [0.5, 0.4]]]))


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


def test_numbers_go_to_the_choice_of_their_prompt_and_sample() -> None:
    """Two samples of each of two prompts."""

    async def lines(serving: Any, request: Any, inputs: Any, outputs: AsyncIterator[Any]) -> AsyncIterator[str]:
        async for prompt, output in outputs:
            choice = {"index": 2 * prompt + output.outputs[0].index, "text": "word"}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"

    places = [(1, 1), (0, 1), (0, 0), (1, 0)]
    outputs = [
        (prompt, SimpleNamespace(outputs=[SimpleNamespace(index=sample, attention=part(10.0 * prompt + sample))]))
        for prompt, sample in places
    ]
    asked = SimpleNamespace(model_extra={"vlattn": {}}, vllm_xargs=None, n=2)
    got = asyncio.run(listed(server._completion_chunks(lines, None, asked, None, each(outputs))))
    masses = {choice["index"]: choice["vlattn"]["mass"][0][0][0] for line in got for choice in json.loads(line[6:])["choices"]}
    assert masses == {3: [11.0], 1: [1.0], 0: [0.0], 2: [10.0]}


def test_a_client_takes_choices_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [{"index": n, "text": str(n), "token_ids": [n], "vlattn": {"layers": [0], "groups": []}} for n in (2, 0, 1)]
    answers = iter([{"data": [{"id": "tiny"}]}, {"choices": choices}])
    monkeypatch.setattr(client.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(json.dumps(next(answers)).encode()))
    (got,) = client.Server("http://nowhere", {}, {"n": 3}).answers(["w9"])
    assert [one.text for one in got] == ["0", "1", "2"]


def test_a_client_has_a_key_headers_and_a_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of which is written down. A server that wants another key refuses no prompt: the run ends."""
    seen: list[Any] = []

    def urlopen(request: Any, timeout: Any) -> Any:
        seen.append((request.headers, timeout))
        if request.data is None:
            return io.BytesIO(b'{"data": [{"id": "tiny"}]}')
        raise client.urllib.error.HTTPError(request.full_url, 401, "Unauthorized", {}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(client.urllib.request, "urlopen", urlopen)
    secrets = {"api_key": "k3y", "headers": {"X-Team": "t3am"}, "timeout": 7.5}
    with pytest.raises(OSError, match="Unauthorized"):
        collect("http://nowhere", ["a"], tmp_path / "out", **secrets)
    asked = {"Content-type": "application/json", "X-team": "t3am", "Authorization": "Bearer k3y"}
    assert seen == [(asked, 7.5)] * 2
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert written and not any(secret in written for secret in (b"k3y", b"t3am"))
    for name, value in secrets.items():
        with pytest.raises(ValueError, match="api_key, headers and timeout are for the address of a server; got them with obj"):
            collect(object(), ["a"], tmp_path / "other", **{name: value})
    with pytest.raises(ValueError, match="timeout must be"):
        collect("http://nowhere", ["a"], tmp_path / "other", timeout=0)


def test_metrics(monkeypatch: pytest.MonkeyPatch, configured: Any) -> None:
    """Refusals by reason, and the seconds of each answer when it ends."""
    seen: list[Any] = []

    class Metric:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self.name, self.reason = name.removeprefix("vlattn:"), ""

        def labels(self, reason: str) -> Metric:
            self.reason = reason
            return self

        def inc(self, by: float = 1) -> None:
            seen.append((self.name, self.reason, by))

        def observe(self, value: float) -> None:
            seen.append((self.name, "", value))

    module = ModuleType("prometheus_client")
    module.Counter = module.Histogram = Metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(counts, "_metrics", {})
    counts.count("asks")
    for _ in range(2):
        counts.install()
    for field, ask in (("speculative_config", {}), (None, {"top": 0}), (None, {})):
        monkeypatch.setenv("VLATTN_MAX_BYTES", "" if field or ask else "1")
        with pytest.raises(ValueError, match="must|guessed ahead"):
            processed(configured(field), ask)
    assert seen == [("refused", reason, 1) for reason in ("engine", "ask", "bytes")]
    one = SimpleNamespace(request_id="one", queue=None, **{front._ASKS: 0.0})
    processor, out = SimpleNamespace(request_states={"one": one}), SimpleNamespace(reqs_to_abort=[])
    del seen[:]
    for tokens in ([5], [6]):
        output = core_output("one", tokens)
        output.kv_transfer_params = {"vlattn": dataclasses.replace(part(1.0), seconds=0.25).to_bytes()}

        def process(processor: Any, outputs: Any) -> Any:
            if outputs[0].new_token_ids == [6]:
                processor.request_states.clear()
            return out

        front._process_outputs(process, processor, [output])
        assert seen == ([("seconds", "", 0.5)] if tokens == [6] else [])
    counts.count("bytes", 30)
    counts.count("asks")
    assert seen[1:] == [("bytes", "", 30), ("asks", "", 1)]


def test_a_resumed_run_asks_for_the_prompts_that_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of each prompt there are two answers."""
    asked: list[str] = []

    def urlopen(request: Any, timeout: Any) -> Any:
        if request.data is None:
            return io.BytesIO(b'{"data": [{"id": "tiny"}]}')
        asked.append(json.loads(request.data)["prompt"])
        if asked == ["a", "b", "c"]:
            raise OSError("the server went away")
        choices = [
            {"index": n, "text": f"{asked[-1]}{n}", "token_ids": [n], "vlattn": {"layers": [0], "groups": []}} for n in (0, 1)
        ]
        return io.BytesIO(json.dumps({"choices": choices}).encode())

    monkeypatch.setattr(client.urllib.request, "urlopen", urlopen)
    run = functools.partial(collect, "http://nowhere", [*"abc"], tmp_path / "out", params={"n": 2}, shard_size=1)
    with pytest.raises(OSError, match="went away"):
        run()
    assert [answer.text for answer in run()] == ["a0", "a1", "b0", "b1", "c0", "c1"] and asked == [*"abcc"]


def test_a_refused_sample_ends_its_whole_request(configured: Any) -> None:
    whole, ended, put = SimpleNamespace(request_id="whole"), [], []
    reason = Attention((), (), refused="why")
    states = [
        SimpleNamespace(request_id=name, parent_req=whole, queue=SimpleNamespace(put=put.append), **{front._PARTS: [reason]})
        for name in ("0_whole", "1_whole")
    ]
    processor = SimpleNamespace(request_states={one.request_id: one for one in states})

    def abort(names: list[str], internal: bool) -> list[str]:
        ended.append(names)
        processor.request_states.clear()
        return ["0_whole", "1_whole"]

    processor.abort_requests = abort
    assert front._stopped(processor, states) == ["0_whole", "1_whole"] and ended == [["whole"]]
    assert [str(error) for error in put] == ["vlattn cannot be answered: why"]


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
    assert not refused or "Install one of these" in refused


def test_vllm_finds_the_plug_in() -> None:
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="vlattn_vllm")
    assert found.load() is plugin.register


def test_nothing_imports_vllm() -> None:
    code = (
        "import sys, vlattn_vllm; vlattn_vllm.collect; import vlattn_vllm.plugin;"
        "assert not any(name.split('.')[0] in ('vllm', 'transformers') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fault_of_the_plug_in_never_reaches_vllm() -> None:
    """The original runs once, with its own result and errors; who asked is told."""
    told: list[Any] = []
    calls: list[int] = []

    def original(x: int) -> int:
        calls.append(x)
        return 10 // x

    def before(original: Any, x: int) -> int:
        raise KeyError("before")

    def after(original: Any, x: int) -> int:
        original(x)
        raise KeyError("after")

    for around in (before, after, lambda original, x: original(x)):
        guarded = harmless(around, lambda *parts: told.append(parts))
        assert guarded(original, 5) == 2
        with pytest.raises(ZeroDivisionError):
            guarded(original, 0)
    assert calls == [5, 0] * 3
    assert [(reason.partition(";")[0], *rest) for reason, *rest in told] == [
        ("vlattn_vllm failed (KeyError: 'before')", None, 5),
        ("vlattn_vllm failed (KeyError: 'before')", 2, 5),
        ("vlattn_vllm failed (KeyError: 'before')", None, 0),
        ("vlattn_vllm failed (KeyError: 'after')", 2, 5),
    ]
    assert harmless(before, lambda *_: 1 / 0)(original, 5) == 2, "nor does one of who is told"


def test_a_token_without_its_numbers_is_a_reason() -> None:
    """Where the core or a worker failed; a prompt in chunks has outputs without tokens."""
    states = {
        name: SimpleNamespace(request_id=name, queue=None, **({front._ASKS: 0.0} if name == "asks" else {}))
        for name in ("asks", "silent")
    }
    processor = SimpleNamespace(request_states=states)
    out = SimpleNamespace(reqs_to_abort=[])
    for tokens in ([], [5]):
        outputs = [core_output(name, tokens) for name in states]
        assert front._process_outputs(lambda *_: out, processor, outputs) is out
    (part,) = states["asks"].__dict__[front._PARTS]
    assert "a token came without its numbers" in part.refused and front._PARTS not in states["silent"].__dict__
    broken = core_output("asks", [6])
    broken.kv_transfer_params = {"vlattn": {"mass": 1}, "remote": 2}
    front._process_outputs(lambda *_: out, processor, [broken])
    assert "vlattn_vllm failed (" in states["asks"].__dict__[front._PARTS][1].refused
    assert broken.kv_transfer_params == {"remote": 2}


def test_numbers_that_do_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm.sampling_params")
    module.RequestOutputKind = SimpleNamespace(DELTA=1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module)
    wide = Attention((0,), ("a",), mass=torch.ones(1, 1, 3, 1))
    state = SimpleNamespace(**{front._PARTS: [part(1.0), wide]}, output_kind=0)
    completion = front._new_completion_output(lambda *_: SimpleNamespace(attention=None), state)
    assert "RuntimeError" in completion.attention.refused and completion.attention.is_empty()
    for kind, left in ((0, [2]), (1, [])):  # chunks of a stream have their own tokens alone
        state = SimpleNamespace(**{front._PARTS: [part(1.0), part(2.0)]}, output_kind=kind)
        completion = front._new_completion_output(lambda *_: SimpleNamespace(attention=None), state)
        assert completion.attention.mass.shape[0] == 2
        assert [len(each.mass) for each in state.__dict__[front._PARTS]] == left
    assert joined([part(1.0), part(2.0).refusing("why"), part(3.0)]).refused == "why"


class Cache:
    """The manager of the core's blocks."""

    def __init__(self) -> None:
        self.evicted: set[int] = set()

    def get_block_ids(self, name: str) -> Any:
        return [1, 2], [7]

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted = blocks


def test_a_refused_edit_leaves_no_keys_to_others_with_the_same_edit() -> None:
    """Its keys are those of the model without the edit, under the salt of the edit."""
    for steer, evicted in (([], set()), ([{"weight": 0}], {1, 2, 7})):
        one, cache = request(vlattn={"statistics": [], "steer": steer}), Cache()
        one.request_id = "one"
        scheduler = SimpleNamespace(requests={"one": one}, kv_cache_manager=cache)
        refused = Attention((0,), (), refused="why")
        output = core_output("one", [5])
        step = {0: SimpleNamespace(outputs=[output])}
        engine._update_from_output(lambda *_, step=step: step, scheduler, None, SimpleNamespace(**{NUMBERS: {"one": refused}}))
        assert cache.evicted == evicted and Attention.from_dict(output.kv_transfer_params["vlattn"]).refused == "why"


def test_a_fault_in_the_core_refuses_one_request() -> None:
    """Here `received` of the second part has another shape."""
    one, two = request(), request()
    stepped({"one": one, "two": two}, {"one": part(1.0, (0, 3)), "two": part(1.0, (0, 3))}, [])
    wrong = dataclasses.replace(part(1.0, (3, 5)), received=torch.ones(1, 4, 3))
    outputs = [core_output(name, [5]) for name in ("one", "two")]
    first, second = stepped({"one": one, "two": two}, {"one": wrong, "two": part(2.0, (3, 5))}, outputs)
    assert "vlattn_vllm failed (RuntimeError" in first.refused and first.is_empty() and not second.refused
    (last,) = stepped({"one": one}, {"one": part(1.0, (5, 6))}, [core_output("one", [6], "stop")])
    assert "RuntimeError" in last.refused and last.received is None


# fields of an engine's configuration: a value that runs, one that is refused, and a word of the reason
FIELDS: dict[str, tuple[Any, Any, str]] = {
    "speculative_config": (None, object(), "guessed ahead"),
    "parallel_config.pipeline_parallel_size": (1, 2, "pipeline stages"),
    "parallel_config.use_ubatching": (False, True, "dual-batch overlap"),
    "parallel_config.decode_context_parallel_size": (1, 2, "contexts run in parallel"),
    "parallel_config.prefill_context_parallel_size": (1, 2, "contexts run in parallel"),
    "cache_config.cache_dtype": ("auto", "fp8", "kv_cache_dtype=fp8"),
    "model_config.is_encoder_decoder": (False, True, "an encoder and a decoder"),
    "model_config.is_hybrid": (False, True, "layers without attention"),
    "model_config.is_attention_free": (False, True, "layers without attention"),
    "model_config.is_mm_prefix_lm": (False, True, "both directions"),
}


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of a field, which returns the configuration of an engine that is refused for it."""
    modules = {"vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")}}
    modules["vllm.exceptions"] = {"VLLMValidationError": type("VLLMValidationError", (Exception,), {})}
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    def configuration(field: str | None = None) -> Any:
        model: dict[str, Any] = {"use_mla": False, "get_total_num_hidden_layers": lambda: 2, "max_model_len": 30}
        model["model_arch_config"] = SimpleNamespace(total_num_attention_heads=4)
        parts: dict[str, Any] = {"compilation_config": {"pass_config": SimpleNamespace()}, "model_config": model}
        for each, (usual, refused, _) in FIELDS.items():
            part, _, name = each.rpartition(".")
            parts.setdefault(part, {})[name] = refused if each == field else usual
        return SimpleNamespace(**parts.pop(""), **{name: SimpleNamespace(**values) for name, values in parts.items()})

    return configuration


@pytest.mark.parametrize("field", [None, *FIELDS])
def test_an_engine_refuses_by_its_configuration(monkeypatch: pytest.MonkeyPatch, configured: Any, field: str | None) -> None:
    """Each request that asks, with what to do; and a line of the log says so when the engine starts."""
    reasons = front.refusals(configured(field))
    assert len(reasons) == (field is not None) and (field is None or FIELDS[field][2] in reasons[0])
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("vllm.vlattn"), "handlers", [handler])
    front.warn(configured(field))
    assert lines == [f"requests with 'vlattn' will be refused: {reason}" for reason in reasons]
    if field:
        with pytest.raises(ValueError, match=FIELDS[field][2].replace("(", ".")):
            processed(configured(field), {})


def processed(config: Any, ask: Any, salt: str | None = None) -> Any:
    """The request that the front end makes of a prompt of six tokens."""
    params = SimpleNamespace(extra_args={"vlattn": ask}, max_tokens=10**11)
    config.compilation_config.pass_config.fuse_attn_quant = False
    made = SimpleNamespace(prompt_token_ids=[5] * 6, sampling_params=params, mm_features=None, cache_salt=salt)
    return front._process_inputs(lambda *_: made, SimpleNamespace(vllm_config=config), "7", "a prompt", params)


def test_edits_salt_the_prefix_cache(configured: Any) -> None:
    """Blocks are shared by requests with the same edits, under the client's own salt."""
    cut, more = ({"steer": [{"keys": [0, 4], "weight": weight}]} for weight in (0, 2))
    asks = [({}, None), ({}, "mine"), (cut, None), (cut, "mine"), (more, None), (more, "mine")]
    salts = [processed(configured(), ask, salt).cache_salt for ask, salt in asks]
    assert salts[:2] == [None, "mine"] and len({*salts}) == 6
    assert processed(configured(), {**cut, "layers": [0]}).cache_salt == salts[2], "numbers do not change keys"


def test_latent_attention_is_not_edited(configured: Any) -> None:
    config = configured()
    config.model_config.use_mla = True
    assert processed(config, {}).sampling_params.extra_args["vlattn"]["layers"] == [0, 1]
    with pytest.raises(ValueError, match=r"latent attention \(MLA\), which is not edited; leave out steer"):
        processed(config, {"steer": [{"keys": [0, 4], "weight": 0}]})


def test_spans_end_where_the_model_does(configured: Any) -> None:
    """Whatever max_tokens says."""
    assert processed(configured(), {"groups": {"a": [[29, 30]]}}).sampling_params.extra_args["vlattn"]["layers"] == [0, 1]
    with pytest.raises(ValueError, match="within the 30 tokens"):
        processed(configured(), {"groups": {"a": [[29, 31]]}})


def state(parent: Any = None, asks: bool = True) -> Any:
    return SimpleNamespace(parent_req=parent, queue=[], **({front._ASKS: 0.0} if asks else {}))


def test_samples_of_a_request_are_one_ask(monkeypatch: pytest.MonkeyPatch, configured: Any) -> None:
    """Where two may run at a time."""
    exceptions = sys.modules["vllm.exceptions"]
    vars(exceptions)["GracefulHTTPError"] = type("GracefulHTTPError", (Exception,), {})
    monkeypatch.setenv("VLATTN_MAX_ASKS", "2")
    parent = object()
    processor = SimpleNamespace(request_states={name: state(parent) for name in "ab"} | {"c": state(asks=False)})

    def added(name: str, index: int, **extra: Any) -> None:
        one = SimpleNamespace(request_id=name, sampling_params=SimpleNamespace(extra_args=extra))
        add = lambda *_: processor.request_states.update({name: state(parent, False)})  # noqa: E731
        front._add_request(add, processor, one, "", parent, index)

    asked: list[str] = []
    monkeypatch.setattr(counts, "count", lambda name, **_: asked.append(name))
    added("d", 2, vlattn={})
    assert not asked and front._ASKS in processor.request_states["d"].__dict__
    processor.request_states["e"] = state()
    added("f", 0)
    added("d2", 3, vlattn={})
    with pytest.raises(ValueError, match="2 requests with 'vlattn' run already"):
        added("g", 0, vlattn={})


@pytest.mark.usefixtures("configured")
def test_limits_are_a_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = limit._with_options(lambda parser: parser, argparse.ArgumentParser())
    monkeypatch.setattr(limit, "_serving", False)
    limits = limit.ASKS, limit.BYTES, limit.EDITS
    assert [*map(limit.most, limits)] == [None] * 3
    limit.serve()
    assert [*map(limit.most, limits)] == [32, 262144, 0]
    for name in ("VLATTN_MAX_ASKS", "VLATTN_MAX_BYTES", "VLATTN_EDITS"):
        monkeypatch.setenv(name, "")  # which the options below replace
    parser.parse_args(["--vlattn-max-asks", "0", "--vlattn-max-bytes", "8", "--vlattn-edits"])
    assert [*map(limit.most, limits)] == [0, 8, 1]
    asked = Ask((0, 1), ("mass", "received"), (("a", ()), ("b", ())))  # 3 numbers, 2 layers, 4 heads
    with pytest.raises(
        ValueError, match="at most 8 bytes of numbers for each token .--vlattn-max-bytes.; got 96, for 2 layers and 4"
    ):
        front._check_bytes(asked, 4)
    os.environ["VLATTN_MAX_BYTES"] = "96"
    front._check_bytes(asked, 4)
