"""Requests to the server that ask, without vLLM and its server: endpoints without a place for the numbers refuse them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from http import HTTPStatus
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vlattn_vllm import guard, plugin, server
from vlattn_vllm.guard import ANSWERED, Guard, asks

ASK = {"statistics": ["median"]}  # which no place that answers would take
FORM = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n{}\r\n--x--\r\n'


def posted(path: str, body: bytes, refused: str = "", root: str = "", **state: Any) -> tuple[int, bytes]:
    """(status, body) of the answer. The application behind the guard answers 200 with the body that it reads."""
    parts = [body[:5], body[5:]]
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        message, read = await receive(), b""
        while message["type"] == "http.request":
            read, message = read + message["body"], await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": read})

    app = SimpleNamespace(state=SimpleNamespace(**(state or {"vllm_config": 1})))
    scope = {"type": "http", "method": "POST", "path": root + path, "root_path": root, "app": app}
    asyncio.run(Guard(echo, refused)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize(
    "body",
    [
        {"vlattn": ASK},
        {"vlattn": None},
        {"sampling_params": {"extra_args": {"vlattn": ASK}}},
        {"extra_args": {"vlattn": ASK}},
        {"vllm_xargs": {"vlattn": "mass"}},
    ],
)
def test_an_endpoint_without_a_place_for_the_numbers_refuses(body: Any) -> None:
    status, answer = posted("/v1/responses", json.dumps({"input": "w9", **body}).encode())
    error = json.loads(answer)["error"]
    assert status == error["code"] == 400
    assert "/v1/responses has no place for 'vlattn'; ask at /v1/completions or /v1/chat/completions" in error["message"]


ASKED = json.dumps({"input": "w9", "vlattn": ASK})


@pytest.mark.parametrize(
    "body",
    [
        ASKED.replace("vlattn", "vl\\u0061ttn").encode(),
        *[ASKED.encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig")],
        b'{"extra_args": {"\\u0076lattn": null}}',
        b"file=x&vlattn={}",
        FORM % b"vlattn",
        (FORM % b"vlattn").replace(b'"', b""),
    ],
)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/tokenize"])
def test_a_key_is_found_however_it_is_written(path: str, body: bytes) -> None:
    assert posted(path, body)[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 100_000,
        b"no JSON, but it says vlattn",
        json.dumps({"input": 'a text about "vlattn"', "metadata": {"vlattn": 1}}).encode(),
        json.dumps([{"vlattn": {}}]).encode(),
        json.dumps({"extra_args": None, "sampling_params": ["vlattn"]}).encode(),
        FORM % b"prompt",
    ],
)
def test_what_does_not_ask_goes_through_whole(body: bytes) -> None:
    assert not asks(body) and posted("/v1/responses", body) == (200, body)


@pytest.mark.parametrize("root", ["", "/behind/a/proxy"])
def test_places_that_answer_are_left_alone(root: str) -> None:
    body = json.dumps({"vlattn": ASK}).encode()
    assert [posted(path, body, root=root) for path in ANSWERED] == [(200, body)] * 2


def test_versions_of_any_build() -> None:
    assert [plugin.refused_version(name) for name in ("0.31.0", "0.32.0", "0.33.0+cpu")] == [""] * 3
    for name in ("0.32.1", "0.34.0", "0.30.0", "0.32.0rc1"):
        assert f"needs vLLM 0.31.0, 0.32.0 or 0.33.0 and found {name}" in plugin.refused_version(name)


def test_another_version_refuses_at_every_endpoint() -> None:
    reason = plugin.refused_version("0.30.0")
    for path in (*ANSWERED, "/v1/messages"):
        status, answer = posted(path, json.dumps({"vlattn": {}}).encode(), refused=reason)
        assert status == 400 and json.loads(answer)["error"]["message"] == reason
        assert posted(path, b'{"prompt": "w9"}', refused=reason) == (200, b'{"prompt": "w9"}')


def module(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    """A module of this name, and packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        made: Any = ModuleType(".".join(parts[:end]))
        made.__path__ = []
        monkeypatch.setitem(sys.modules, made.__name__, made)
    vars(sys.modules[name]).update(values)


def test_only_the_servers_of_vllm_are_guarded() -> None:
    body = json.dumps({"vlattn": ASK}).encode()
    assert posted("/ask", body, database=1) == (200, body)


def test_a_stack_that_is_built_twice_is_guarded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Innermost, so that a server's check of keys comes first."""
    module(monkeypatch, "starlette.middleware", Middleware=lambda cls, *args: SimpleNamespace(cls=cls, args=args))
    keys = SimpleNamespace(cls=object)
    app = SimpleNamespace(user_middleware=[keys])
    for _ in range(2):
        assert guard._guarded("why", lambda app: len(app.user_middleware), app) == 2
    assert app.user_middleware[0] is keys and app.user_middleware[1].args == ("why",)


class Processor:
    def process_inputs(self, request_id: str, prompt: Any, params: Any) -> str:
        return request_id


@pytest.fixture
def no_entrance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in plugin.ENTRANCES:
        monkeypatch.setitem(sys.modules, name, None)  # an import raises


@pytest.mark.usefixtures("no_entrance")
@pytest.mark.parametrize("entrance", plugin.ENTRANCES.items())
def test_another_version_refuses_in_python(monkeypatch: pytest.MonkeyPatch, entrance: tuple[str, str]) -> None:
    where, name = entrance
    kind = type(name, (), {"process_inputs": Processor.process_inputs})
    module(monkeypatch, where, **{name: kind})
    plugin._refuse("needs vLLM 0.32.0")
    silent = SimpleNamespace(extra_args=None)
    assert kind().process_inputs("7", "a prompt", silent) == "7"
    for params in (SimpleNamespace(extra_args={"vlattn": {}}), SimpleNamespace(extra_kwargs={"vlattn": {}})):
        with pytest.raises(ValueError, match=r"needs vLLM 0\.32\.0"):
            kind().process_inputs("7", "a prompt", params=params)


@pytest.mark.usefixtures("no_entrance")
def test_a_version_in_which_nothing_can_be_refused_does_not_start() -> None:
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32\.0.*No place to refuse"):
        plugin._refuse("needs vLLM 0.32.0")


def server_request(parameters: Any = None, beams: bool = False, **extra: Any) -> Any:
    return SimpleNamespace(model_extra=extra, vllm_xargs=parameters, use_beam_search=beams)


def test_beams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "vllm.exceptions", VLLMValidationError=type("VLLMValidationError", (Exception,), {}))
    for request in (server_request(beams=True, vlattn=ASK), server_request({"vlattn": "mass"}, beams=True)):
        with pytest.raises(ValueError, match="vlattn is not answered for beams.*ask without use_beam_search"):
            created(request, "answer")
    assert created(server_request(beams=True), "answer") == "answer"


def test_a_server_allows_no_edits_unless_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "vllm.exceptions", VLLMValidationError=type("VLLMValidationError", (Exception,), {}))
    edits = server_request({"other": 1}, vlattn={"steer": [{"keys": [0, 4], "weight": 0}]})
    with pytest.raises(
        ValueError, match=r"steer must be left out: this server allows no edits \(it runs without --vlattn-edits\)"
    ):
        created(edits, "answer")
    asks = server_request(vlattn=ASK)
    assert created(asks, "answer") == "answer" and asks.vllm_xargs == {"vlattn": ASK}, "the engine's extra_args"
    monkeypatch.setenv("VLATTN_EDITS", "1")
    assert created(edits, "answer") == "answer" and "steer" in edits.vllm_xargs["vlattn"] and edits.vllm_xargs["other"] == 1


async def lines(*texts: str) -> AsyncIterator[str]:
    for text in texts:
        yield text


ERROR = {"error": {"message": "statistics must be ...", "type": "BadRequestError", "param": None, "code": 400}}


def created(request: Any, answer: Any) -> Any:
    """What the server makes of an answer, a stream as a list."""

    async def original(serving: Any, request: Any) -> Any:
        return answer

    async def whole() -> Any:
        got = await server._created(original, SimpleNamespace(create_error_response=lambda *parts: parts), request)
        return [line async for line in got] if hasattr(got, "__aiter__") else got

    return asyncio.run(whole())


def test_a_stream_that_begins_with_an_error_is_answered_with_its_status() -> None:
    asking = server_request(vlattn=ASK)
    stream = f"data: {json.dumps(ERROR)}\n\n", "data: [DONE]\n\n"
    assert created(asking, lines(*stream)) == ("statistics must be ...", "BadRequestError", HTTPStatus.BAD_REQUEST, None)
    assert created(server_request(), lines(*stream)) == [*stream]
    for whole in (("data: {}\n\n", stream[1]), (stream[1],), (": a comment\n\n",), ("data: {}\n\n", *stream)):
        assert created(asking, lines(*whole)) == [*whole]
    assert created(asking, "no stream") == "no stream"
